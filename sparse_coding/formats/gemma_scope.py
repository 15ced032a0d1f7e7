"""Google DeepMind's Gemma Scope: a folder of params.npz, or (Gemma Scope 2) params.safetensors.

    f = pre * (pre > threshold),   pre = x W_enc + b_enc,   x_hat = f W_dec + b_dec

which is `JumpReLUSAE`, with one threshold per feature and orientations equal to ours; b_dec is not
subtracted from the input. Gemma Scope 2 writes w_enc and w_dec. Transcoders hold the same tensors
and are read as such; an affine skip connection (what it adds is no feature's) and crosscoders have
no class here.

The first release's SAEs of the folder `embedding` were trained on rows of Gemma's embedding
matrix, which the model multiplies by sqrt(d_in) before its first block. Here, as in
TransformerLens (`hook_embed`) and SAELens, x is the product: W_enc is divided by sqrt(d_in) and
W_dec multiplied. Nothing in the file says so, and nothing says that it is a transcoder of the
first release: the names of the folders, as published, do. So no transcoder is written.
"""

import re
import zipfile
from collections.abc import Iterable, Mapping
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.formats.formulas import refuse_what_cannot_be_said
from sparse_coding.formats.hooks import hook_of
from sparse_coding.formats.tensors import check_tensors, read_tensors
from sparse_coding.sae import SAE, JumpReLUSAE
from sparse_coding.storage import atomic_path, read_json

ARCHIVE, TENSORS, CONFIG = "params.npz", "params.safetensors", "config.json"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")  # theirs and ours
SPELLINGS = {"w_enc": "W_enc", "w_dec": "W_dec"}  # Gemma Scope 2's: ours
MAX_RATIO = 8  # of the arrays to the archive: float32 weights deflate by 1.1, bfloat16 ones by 2.3
TRANSCODERS = re.compile(r"gemma-scope[^/]*-transcoders/|/transcoder(_all)?/[^/]+/[^/]+$")
CROSSCODERS = re.compile(r"/(crosscoder|clt)(_all)?/[^/]+/[^/]+$")
EMBEDDINGS = re.compile(r"/embedding/width_[^/]+/average_l0_[^/]+/params\.npz$")


def recognises(path: Path) -> bool:
    """Whether it is a parameter file of Gemma Scope, or a folder with one."""
    return path.name in (ARCHIVE, TENSORS) or any(
        (path / name).is_file() for name in (ARCHIVE, TENSORS)
    )


def load_gemma_scope(path: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE or transcoder in a Gemma Scope folder or parameter file, of raw activations.

    In float32 from an archive, in the file's own dtype otherwise. Thresholds below 0 become 0, as
    a JumpReLU with a ReLU in it acts. `UserError` for a skip connection or a crosscoder, a missing
    or damaged file, a pickled array, NaN or infinity, names or shapes that disagree.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (ARCHIVE if (path / ARCHIVE).is_file() else TENSORS)
    tensors = _read_archive(path) if path.suffix == ".npz" else read_tensors(path)
    is_transcoder = _is_transcoder(path, tensors)
    tensors = _in_our_names(path, tensors)
    d_in, d_sae = tensors["W_enc"].shape if "W_enc" in tensors else (0, 0)
    W_dec = tensors.get("W_dec") if is_transcoder else None
    d_out = d_in if W_dec is None or W_dec.ndim != 2 else W_dec.shape[1]
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,)}
    shapes |= {"b_dec": (d_out,), "threshold": (d_sae,)}
    check_tensors(path, tensors, shapes, "an SAE of Gemma Scope")
    scale = _embedding_scale(path, d_in)
    tensors["W_enc"] = tensors["W_enc"] / scale
    tensors["W_dec"] = tensors["W_dec"] * scale
    tensors["threshold"] = tensors["threshold"].clamp(min=0)
    # A generator of its own: loading must not advance the global random stream.
    sae = JumpReLUSAE(d_in, d_sae, torch.Generator())
    if is_transcoder:
        sae.retarget(d_out, torch.Generator())
    sae.to(reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values())))
    sae.load_state_dict(tensors)
    return sae.to(device)


def training_facts(path: Path) -> dict[str, Any]:
    """What Gemma Scope 2's config.json says; the first release says nothing."""
    facts = _read_facts(path if path.is_dir() else path.parent)
    module = facts.get("hf_hook_point_in")
    return {"lm": facts.get("model_name"), "hook_name": hook_of(module), "module": module}


def save_gemma_scope(sae: SAE, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write params.npz of a `JumpReLUSAE` of raw activations, in float32; it is whole or absent.

    The layout has no place for metadata. `UserError` for any other class, or if the file exists
    and `overwrite` is not set.
    """
    refuse_what_cannot_be_said(sae, (JumpReLUSAE,), "Gemma Scope")
    path = Path(folder) / ARCHIVE
    kind = _kind_by_place(path)
    if kind != "sae":
        raise UserError(f"{folder} says to Gemma Scope that it is a {kind}; choose another folder")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another folder or allow overwriting")
    tensors = {name: getattr(sae, name).detach().float() for name in NAMES}
    scale = _embedding_scale(path, sae.d_in)
    tensors["W_enc"] = tensors["W_enc"] * scale
    tensors["W_dec"] = tensors["W_dec"] / scale
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **{name: tensor.cpu().numpy() for name, tensor in tensors.items()})
    return path.parent


def _embedding_scale(path: Path, d_in: int) -> float:
    """sqrt(d_in) for embedding/width_4k/average_l0_6/params.npz and its like, else 1."""
    return d_in**0.5 if EMBEDDINGS.search(path.absolute().as_posix()) else 1.0


def _in_our_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {SPELLINGS.get(name, name): tensor for name, tensor in tensors.items()}
    if len(named) < len(tensors):
        raise UserError(f"{path} holds {', '.join(sorted(tensors))}: the same matrix twice")
    W_enc = named.get("W_enc")
    if W_enc is not None and (W_enc.ndim != 2 or W_enc.numel() == 0):
        raise UserError(f"{path}: W_enc is {tuple(W_enc.shape)}; it must be (d_in, d_sae)")
    return named


def _is_transcoder(path: Path, names: Iterable[str]) -> bool:
    """Whether it decodes another place's activations; `UserError` for what has no class here."""
    facts = _read_facts(path.parent)
    kind = facts.get("type", _kind_by_place(path))
    if kind not in ("sae", "transcoder"):
        raise UserError(f"{path} is a crosscoder; only SAEs and transcoders are supported")
    if "affine_skip_connection" in names or facts.get("affine_connection"):
        raise UserError(f"{path} is a transcoder with a skip connection, which is not supported")
    if facts.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(
            f"{path.parent / CONFIG}: architecture is {facts['architecture']!r}; supported is "
            "'jump_relu'"
        )
    hook = facts.get("hf_hook_point_in")
    is_elsewhere = facts.get("hf_hook_point_out", hook) != hook
    return kind == "transcoder" or is_elsewhere


def _kind_by_place(path: Path) -> str:
    """What the names of the published folders say; a config.json that says it goes before."""
    place = path.absolute().as_posix()
    if CROSSCODERS.search(place):
        return "crosscoder"
    return "transcoder" if TRANSCODERS.search(place) else "sae"


def _read_facts(folder: Path) -> dict[str, Any]:
    config = folder / CONFIG
    facts = read_json(config) if config.is_file() else {}
    if not isinstance(facts, dict):
        raise UserError(f"{config} is not a configuration of Gemma Scope: no JSON object")
    return facts


def _read_archive(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
            if size > MAX_RATIO * path.stat().st_size:
                raise UserError(
                    f"{path} unpacks to {size:,} bytes, over {MAX_RATIO} times its own"
                )
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    _check_header(f"{path}: {entry.filename}", file, entry.file_size)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name].astype("f4")) for name in arrays.files}
    except UserError:
        raise
    except Exception as error:  # zipfile, zlib and numpy read a hostile file: they raise anything
        raise UserError(f"{path} is damaged or no archive ({type(error).__name__})") from None


def _check_header(what: str, file: zipfile.ZipExtFile, size: int) -> None:
    """`UserError` unless an array's header claims floats that its file has: they get allocated."""
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
        version, np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file)
    if dtype.kind != "f":
        raise UserError(f"{what} holds {dtype}; it must hold floating-point numbers")
    if min(shape, default=0) < 0 or prod(shape) * dtype.itemsize > size:
        raise UserError(f"{what} claims to be {shape} of {dtype}; its file has {size} bytes")

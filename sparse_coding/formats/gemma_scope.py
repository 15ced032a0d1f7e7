"""Google DeepMind's Gemma Scope: a folder of params.npz, or (Gemma Scope 2) params.safetensors.

    f = pre * (pre > threshold),   pre = x W_enc + b_enc,   x_hat = f W_dec + b_dec

which is `JumpReLUSAE`, with one threshold per feature and orientations equal to ours; b_dec is not
subtracted from the input. Gemma Scope 2 writes w_enc and w_dec. The SAEs on embeddings (folder
`embedding`) were trained on embeddings times sqrt(d_in), which Gemma applies after the hook: their
W_enc is divided by it and W_dec multiplied, as in SAELens. Transcoders have no class here.
"""

import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.formats.formulas import refuse_what_cannot_be_said
from sparse_coding.formats.tensors import check_tensors, read_tensors
from sparse_coding.sae import SAE, JumpReLUSAE
from sparse_coding.storage import atomic_path, read_json

ARCHIVE, TENSORS, CONFIG = "params.npz", "params.safetensors", "config.json"
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
MAX_BYTES = 2**36
"""Of one archive's arrays: four times the largest dictionary of the release."""


def recognises(path: Path) -> bool:
    """Whether it is a parameter file of Gemma Scope, or a folder with one."""
    return path.name in (ARCHIVE, TENSORS) or any(
        (path / name).is_file() for name in (ARCHIVE, TENSORS)
    )


def load_gemma_scope(path: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a Gemma Scope folder or parameter file, in float32 or the file's own dtype.

    Thresholds below 0 become 0, as a JumpReLU with a ReLU in it acts. `UserError` for a
    transcoder, a missing or damaged file, a pickled array, NaN or infinity, names or shapes that
    disagree.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (ARCHIVE if (path / ARCHIVE).is_file() else TENSORS)
    tensors = _read_archive(path) if path.suffix == ".npz" else read_tensors(path)
    _refuse_a_transcoder(path, tensors)
    tensors = {name[:1].upper() + name[1:] if name[:2] == "w_" else name: tensors[name]
               for name in tensors}  # fmt: skip
    d_in, d_sae = (
        tensors["W_enc"].shape if tensors.get("W_enc", torch.empty(0)).ndim == 2 else (0, 0)
    )
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,)}
    shapes |= {"b_dec": (d_in,), "threshold": (d_sae,)}
    check_tensors(path, tensors, shapes, "an SAE of Gemma Scope")
    if "embedding" in path.parts:
        tensors["W_enc"] = tensors["W_enc"] / d_in**0.5
        tensors["W_dec"] = tensors["W_dec"] * d_in**0.5
    tensors["threshold"] = tensors["threshold"].clamp(min=0)
    # A generator of its own: loading must not advance the global random stream.
    sae = JumpReLUSAE(d_in, d_sae, torch.Generator()).to(tensors["W_dec"].dtype)
    sae.load_state_dict(tensors)
    return sae.to(device)


def save_gemma_scope(sae: SAE, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write params.npz of a `JumpReLUSAE` of raw activations; the file is whole or absent.

    The layout has no place for metadata. `UserError` for any other class, or if the file exists
    and `overwrite` is not set.
    """
    refuse_what_cannot_be_said(sae, (JumpReLUSAE,), "Gemma Scope")
    path = Path(folder) / ARCHIVE
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another folder or allow overwriting")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(sae, name).detach().float().cpu().numpy() for name in NAMES}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    return path.parent


def _read_archive(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            if sum(sizes.values()) > MAX_BYTES or len(sizes) > 16:
                raise UserError(
                    f"{path} claims {sum(sizes.values()):,} bytes in {len(sizes)} arrays"
                )
            for name, size in sizes.items():
                _refuse_a_lying_header(path, archive, name, size)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged: {str(error).splitlines()[0]}") from None


def _refuse_a_lying_header(path: Path, archive: zipfile.ZipFile, name: str, size: int) -> None:
    """`UserError` if an array's header claims more than its file has: it would be allocated."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    if dtype.hasobject or prod(shape) * dtype.itemsize > size:
        raise UserError(
            f"{path}: {name} claims to be {shape} of {dtype}; its file has {size} bytes"
        )


def _refuse_a_transcoder(path: Path, tensors: Mapping[str, Tensor]) -> None:
    config = path.parent / CONFIG
    facts = read_json(config) if config.is_file() else {}
    hooks = [facts.get(f"hf_hook_point_{end}") for end in ("in", "out")] if facts else [None] * 2
    if "affine_skip_connection" in tensors or hooks[0] != hooks[1]:
        raise UserError(
            f"{path} is a transcoder, from one hook to another; only SAEs are supported"
        )

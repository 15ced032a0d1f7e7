"""EleutherAI's sparsify: a folder of cfg.json and sae.safetensors.

Written so that its `SparseCoder.load_from_disk` reads it as it is. It knows one architecture,

    f = top_k(relu((x - b_dec) encoder.weight^T + encoder.bias)),   x_hat = f W_dec + b_dec

which is `TopKSAE`; an nn.Linear's weight is the transpose of our W_enc, W_dec is as ours. Its
groupmax (the largest of each of k groups), transcoders and skip connections have no class here.
Old configurations say neither `activation` nor `transcode`: they mean topk and an SAE. (A few old
transcoders without a skip connection say it in their run's config.json only; sparsify itself
takes them for SAEs.)
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.formats.folders import holds_files
from sparse_coding.formats.formulas import refuse_what_cannot_be_said
from sparse_coding.formats.hooks import hook_of
from sparse_coding.formats.tensors import check_tensors, read_tensors, write_tensors
from sparse_coding.sae import SAE, BatchTopKSAE, TopKSAE
from sparse_coding.storage import read_json, read_object, whole_folder, write_json

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
RUN_CONFIG = "config.json"  # of the run, which its dictionaries lie in
recognises = partial(holds_files, names=(CONFIG, WEIGHTS))
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
# What the configuration may say, beside the sizes; absent in older or newer files.
ALLOWED = {"activation": "topk", "transcode": False, "skip_connection": False, "signed": False}
MAX_SIZE = 2**31 - 1


def load_sparsify(folder: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a sparsify folder, in the dtype of its file.

    `UserError` for groupmax, a transcoder or a skip connection, a missing or damaged file, NaN or
    infinity, names or shapes that disagree.
    """
    folder = Path(folder)
    d_in, d_sae, k = _read_config(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,)}
    shapes |= {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    check_tensors(folder / WEIGHTS, tensors, shapes, "an SAE of sparsify")
    # A generator of its own: loading must not advance the global random stream.
    sae = TopKSAE(d_in, d_sae, torch.Generator(), k=k).to(tensors["W_dec"].dtype)
    sae.load_state_dict({ours: _turned(theirs, tensors[theirs]) for theirs, ours in NAMES.items()})
    return sae.to(device)


def training_facts(folder: Path) -> dict[str, Any]:
    """What the run's config.json says, one folder up, and the folder's own name: a module's.

    The two are believed where the configuration names that module.
    """
    config = folder.absolute().parent / RUN_CONFIG
    run = read_object(config) if config.is_file() else {}
    points, name = run.get("hookpoints"), folder.absolute().name
    facts = read_object(folder / CONFIG)
    facts = {"hook_name": hook_of(facts.get("hook_name")), "lm": facts.get("model_name")}
    if not isinstance(points, list) or name not in points:
        return facts
    return facts | {
        "lm": run.get("model"),
        "hook_name": hook_of(name),
        "module": name,
        "text": run.get("dataset"),
        "text_field": run.get("text_column"),
        "context_length": run.get("ctx_len"),
    }


def save_sparsify(
    sae: SAE, folder: str | Path, *, metadata: dict[str, Any], overwrite: bool = False
) -> Path:
    """Write a `TopKSAE` of raw activations; the folder appears whole or not at all.

    `metadata` joins cfg.json, where sparsify passes over it. `UserError` for any other class (a
    BatchTopK's threshold cannot be said), or if the folder exists and `overwrite` is not set.
    """
    if isinstance(sae, BatchTopKSAE):
        raise UserError(f"sparsify has no {type(sae).__name__}; it can hold: TopKSAE")
    refuse_what_cannot_be_said(sae, (TopKSAE,), "sparsify")
    config = metadata | ALLOWED
    config |= {
        "expansion_factor": -(-sae.d_sae // sae.d_in),
        "normalize_decoder": sae.has_unit_norm_rows,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "d_in": sae.d_in,
    }
    with whole_folder(folder, WEIGHTS, overwrite=overwrite) as temporary:
        tensors = {
            theirs: _turned(theirs, getattr(sae, ours).detach()) for theirs, ours in NAMES.items()
        }
        write_tensors(temporary / WEIGHTS, tensors)
        write_json(temporary / CONFIG, config)
    return Path(folder)


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name == "encoder.weight" else tensor


def _read_config(path: Path) -> tuple[int, int, int]:
    """d_in, d_sae and k."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a configuration of sparsify: it must be a JSON object")
    for key, allowed in ALLOWED.items():
        if config.get(key, allowed) != allowed:
            raise UserError(f"{path}: {key} is {config[key]!r}; supported is {allowed!r}")
    # Its defaults; 0 latents stand for a multiple of d_in.
    d_in, k = _size(path, config, "d_in"), _size(path, config, "k", 32)
    if config.get("num_latents"):
        d_sae = _size(path, config, "num_latents")
    else:
        d_sae = d_in * _size(path, config, "expansion_factor", 32)
    if k > d_sae:
        raise UserError(f"{path}: k is {k}; it must be at most the {d_sae} latents")
    return d_in, d_sae, k


def _size(path: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    size = config.get(key, default)
    if type(size) is not int or not 0 < size <= MAX_SIZE:
        raise UserError(f"{path}: {key} is {size!r}; it must be an integer from 1 to {MAX_SIZE}")
    return size

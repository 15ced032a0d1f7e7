"""Crosscoders, in a layout of our own: a folder of cfg.json and crosscoder.safetensors.

None of SAELens 6.54.12, dictionary_learning 0.1.0 and eai-sparsify 1.3.3 has a class for them.
cfg.json is SAELens's in its words, with `widths` of the hooks, whose names are joined by + in
`metadata.hook_name`; the tensors are ours by name (`saes.crosscoder`):

    W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in)
        d_in = sum of the widths: columns of the hooks side by side, in raw units
    scales (hooks)  by what each hook's activations were multiplied in training
    threshold ()    of batch_topk_crosscoder alone

so that with the formulas there they are all that is needed.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_coding.config import hooks_of
from sparse_coding.errors import UserError
from sparse_coding.formats import saelens
from sparse_coding.formats.folders import holds_files
from sparse_coding.formats.tensors import check_tensors, read_tensors, write_tensors
from sparse_coding.sae import CROSSCODERS, SAE
from sparse_coding.storage import read_object, whole_folder, write_json

CONFIG, WEIGHTS = "cfg.json", "crosscoder.safetensors"
recognises = partial(holds_files, names=(CONFIG, WEIGHTS))
training_facts = saelens.training_facts  # cfg.json says them in the same words
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


def save_crosscoder(
    sae: SAE, folder: str | Path, *, metadata: dict[str, Any], overwrite: bool = False
) -> Path:
    """Write a crosscoder of raw activations; the folder appears whole or not at all.

    `metadata` as of `save_saelens`, with the hooks' names joined in `hook_name`. `UserError` for
    any other class or number of hooks, or if the folder exists and `overwrite` is not set.
    """
    if CROSSCODERS.get(sae.name) is not type(sae):
        raise UserError(f"{type(sae).__name__} is no crosscoder; save it with formats.saelens")
    config = {
        "architecture": sae.name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **sae.settings,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "metadata": metadata,
    }
    _check(Path(folder) / CONFIG, config)
    with whole_folder(folder, CONFIG, overwrite=overwrite) as temporary:
        write_tensors(temporary / WEIGHTS, sae.state_dict())
        write_json(temporary / CONFIG, config)
    return Path(folder)


def load_crosscoder(folder: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The crosscoder in a folder, bit by bit as it was saved.

    `UserError` for another architecture, a missing or damaged file, NaN or infinity, or names,
    shapes, widths and hooks that disagree.
    """
    folder = Path(folder)
    config = read_object(folder / CONFIG, "metadata")
    _check(folder / CONFIG, config)
    cls, d_in, d_sae = CROSSCODERS[config["architecture"]], config["d_in"], config["d_sae"]
    weights = _read_weights(folder / WEIGHTS, config)
    own = {"k": config["k"]} if cls.sparsity_is_chosen else {}
    # A generator of its own: loading must not advance the global random stream.
    sae = cls(d_in, d_sae, torch.Generator(), widths=config["widths"], **own)
    sae = sae.to(DTYPES[config["dtype"]])
    sae.load_state_dict(weights)
    return sae.to(device)


def _check(path: Path, config: dict[str, Any]) -> None:
    """`UserError` unless a configuration says what can be."""
    for key, allowed in (("architecture", CROSSCODERS), ("dtype", DTYPES)):
        if not isinstance(config.get(key), str) or config[key] not in allowed:
            choice = " or ".join(allowed)
            raise UserError(f"{path}: {key} is {config.get(key)!r}; it must be {choice}")
    has_k = CROSSCODERS[config["architecture"]].sparsity_is_chosen
    for key in ("d_in", "d_sae", "k")[: 3 if has_k else 2]:
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(f"{path}: {key} is {config.get(key)!r}; it must be a positive integer")
    if has_k and config["k"] > config["d_sae"]:
        raise UserError(f"{path}: k is {config['k']}; it must be at most d_sae {config['d_sae']}")
    widths, names = config.get("widths"), config["metadata"].get("hook_name")
    are_widths = isinstance(widths, list | tuple) and all(type(w) is int and w > 0 for w in widths)
    if not are_widths or sum(widths) != config["d_in"]:
        raise UserError(
            f"{path}: widths are {widths!r}; they must be positive integers that add up to d_in "
            f"{config['d_in']}"
        )
    if not isinstance(names, str) or len(hooks_of(names)) != len(widths):
        raise UserError(
            f"{path}: hook_name is {names!r}; it must name {len(widths)} hooks, as A+B"
        )


def _read_weights(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    d_in, d_sae = config["d_in"], config["d_sae"]
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "scales": (len(config["widths"]),),
    }
    if CROSSCODERS[config["architecture"]].sparsity_is_chosen:
        shapes["threshold"] = ()
    weights = read_tensors(path)
    check_tensors(path, weights, shapes, f"a {config['architecture']}")
    if (weights["scales"] <= 0).any():
        raise UserError(f"{path}: scales must be positive")
    return weights

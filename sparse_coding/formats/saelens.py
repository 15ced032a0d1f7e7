"""SAELens 6: a folder of cfg.json, sae_weights.safetensors and (optional) sparsity.safetensors.

Written so that `sae_lens.SAE.load_from_disk` reads it as it is. Their `standard` architecture is

    f = relu((x - b_dec * apply_b_dec_to_input) @ W_enc + b_enc),   x_hat = f @ W_dec + b_dec

with the tensors' names and orientations equal to ours; a tied encoder is written out as W_dec^T.
What a loss or a constraint was in training is not expressed, only named in the metadata.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.sae import ARCHITECTURES, L1SAE, SAE, NormWeightedL1SAE, TiedL1SAE
from sparse_coding.storage import atomic_path, read_json, write_json

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
OURS = "sparse_coding"  # metadata key under which our own facts travel
VERSION = "6.54.12"  # the SAELens whose layout is written; without it theirs assumes one before 6
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}
ALLOWED = {
    "architecture": ("standard",),
    "normalize_activations": ("none",),
    "reshape_activations": ("none",),
    "apply_b_dec_to_input": (True, False),
    "dtype": (*DTYPES, *(f"torch.{name}" for name in DTYPES)),
}


def save_saelens(
    sae: SAE,
    folder: str | Path,
    *,
    metadata: dict[str, Any],
    density: Float[Tensor, " d_sae"] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an SAE of raw activations; the folder appears whole or not at all.

    `metadata` holds SAELens's own keys (model_name, hook_name, context_size, prepend_bos,
    dataset_path ...) and any others, which it keeps. `density`: share of tokens each feature fires
    on. `UserError` if the SAE encodes or decodes by a formula of its own, or if the folder exists
    and `overwrite` is not set; only an empty folder or an SAE's is ever replaced.
    """
    folder = Path(folder)
    _refuse_what_standard_cannot_say(sae, density)
    _refuse_to_destroy(folder, overwrite)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_tensors(temporary / WEIGHTS, {name: getattr(sae, name) for name in TENSORS})
        write_json(temporary / CONFIG, _config(sae, metadata))
        if density is not None:
            log_density = (density.double() + 1e-10).log10().float()
            _write_tensors(temporary / SPARSITY, {"sparsity": log_density})
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_saelens(folder: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a SAELens 6 folder, in the dtype its cfg.json states (`.float()` converts).

    Ours comes back as the class it was, bit by bit. Any other `standard` SAE becomes the class
    that encodes alike: `L1SAE` if b_dec is subtracted from the input, else `NormWeightedL1SAE`;
    its decoder rows have the norms they had, whatever the class would keep in training. The same
    holds for one of ours that SAELens has changed, so that W_enc is no longer W_dec^T.

    `UserError` for another architecture, an activation scale that is not folded into the weights,
    a layout before 6, a missing or damaged file, NaN or infinity, names or shapes that disagree.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    d_in, d_sae = config["d_in"], config["d_sae"]
    weights = _read_weights(folder / WEIGHTS, d_in, d_sae)
    # A generator of its own: loading must not advance the global random stream.
    sae = _class_that_encodes_alike(config, weights)(d_in, d_sae, torch.Generator())
    sae = sae.to(DTYPES[config["dtype"].removeprefix("torch.")])
    sae.load_state_dict({name: weights[name] for name in sae.state_dict()})
    return sae.to(device)


def _config(sae: SAE, metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "standard",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtracts_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata
        | {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,  # or SAELens names itself as the trainer
            "training_architecture": "standard",
            OURS: {"class": sae.name},
        },
    }


def _refuse_what_standard_cannot_say(sae: SAE, density: Tensor | None) -> None:
    cls = type(sae)
    for method in ("pre_activations", "encode", "decode"):
        if getattr(cls, method) is not getattr(SAE, method):
            raise UserError(
                f"{cls.__name__} has its own {method}, which SAELens's standard architecture "
                "cannot express; it must keep that of SAE"
            )
    if density is not None and density.shape != (sae.d_sae,):
        raise UserError(f"density is {tuple(density.shape)}; it must be ({sae.d_sae},)")


def _refuse_to_destroy(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder} exists; choose another folder or allow overwriting")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file()):
        raise UserError(f"{folder} is not an SAE's folder ({CONFIG} is missing); it is kept")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary)


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Two renames: at every instant each of the two SAEs is whole under some name."""
    retired = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        os.replace(folder, retired)
    os.replace(temporary, folder)
    shutil.rmtree(retired, ignore_errors=True)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    metadata = config.setdefault("metadata", {}) if isinstance(config, dict) else None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is not a SAELens configuration: it must be a JSON object")
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "none")
    major = version.partition(".")[0]
    if not major.isdigit() or int(major) < 6:
        raise UserError(
            f"{path} was written by SAELens {version}; 6 or newer is supported: load it in "
            "SAELens 6 and save it again with save_model"
        )
    missing = [key for key in (*ALLOWED, "d_in", "d_sae") if key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    for key, allowed in ALLOWED.items():
        if config[key] not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise UserError(f"{path}: {key} is {config[key]!r}; supported is {choice}")
    for key in ("d_in", "d_sae"):
        if type(config[key]) is not int or config[key] < 1:
            raise UserError(f"{path}: {key} is {config[key]!r}; it must be a positive integer")
    return config


def _read_weights(path: Path, d_in: int, d_sae: int) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if set(weights) != set(TENSORS):
        raise UserError(
            f"{path} holds {', '.join(sorted(weights)) or 'nothing'}; "
            f"a standard SAE holds {', '.join(TENSORS)}"
        )
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        tensor = weights[name]
        if tuple(tensor.shape) != shape:
            raise UserError(f"{path}: {name} is {tuple(tensor.shape)}; {CONFIG} says {shape}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise UserError(f"{path}: {name} must hold finite floating-point numbers only")
    return weights


def _class_that_encodes_alike(config: dict[str, Any], weights: dict[str, Tensor]) -> type[SAE]:
    subtracts = config["apply_b_dec_to_input"]
    ours = config["metadata"].get(OURS)
    recorded = ARCHITECTURES.get(str(ours.get("class"))) if isinstance(ours, dict) else None
    # SAELens hands our metadata on when it saves weights that it has changed.
    is_untied = not torch.equal(weights["W_enc"], weights["W_dec"].T)
    if (
        recorded is None
        or recorded.subtracts_b_dec != subtracts
        or (recorded is TiedL1SAE and is_untied)
    ):
        return L1SAE if subtracts else NormWeightedL1SAE
    return recorded

"""SAELens 6: a folder of cfg.json, sae_weights.safetensors and (optional) sparsity.safetensors.

Written so that `sae_lens.SAE.load_from_disk` reads it as it is. Their `standard` architecture is

    f = relu((x - b_dec * apply_b_dec_to_input) @ W_enc + b_enc),   x_hat = f @ W_dec + b_dec

with the tensors' names and orientations equal to ours. Their training loss is not expressed.
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
from sparse_coding.sae import ARCHITECTURES, L1SAE, SAE, NormWeightedL1SAE
from sparse_coding.storage import read_json, write_json

TENSORS = ("W_enc", "W_dec", "b_enc", "b_dec")
OURS = "sparse_coding"  # metadata key under which our own facts travel
VERSION = "6.54.12"  # the SAELens whose layout is written; without it theirs assumes one before 6


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
    on. `UserError` if the folder exists and `overwrite` is not set.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists; choose another folder or allow overwriting")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    weights = {name: getattr(sae, name).detach().cpu().contiguous().clone() for name in TENSORS}
    save_file(weights, temporary / "sae_weights.safetensors")
    write_json(temporary / "cfg.json", _config(sae, metadata))
    if density is not None:
        sparsity = (density.double() + 1e-10).log10().float().cpu()
        save_file({"sparsity": sparsity}, temporary / "sparsity.safetensors")
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    return folder


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
            "training_architecture": "standard",
            OURS: {"class": sae.name},
        },
    }


def load_saelens(folder: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a SAELens folder: ours as the class it was, any other `standard` SAE as the class
    that encodes alike (`L1SAE` if b_dec is subtracted from the input, else `NormWeightedL1SAE`).

    `UserError` for another architecture, a missing or damaged file, or shapes that disagree.
    """
    folder = Path(folder)
    config = read_json(folder / "cfg.json")
    architecture = config.get("architecture", "standard")
    if architecture != "standard" or config.get("normalize_activations", "none") != "none":
        raise UserError(
            f"{folder} holds a {architecture} SAE with normalize_activations "
            f"{config.get('normalize_activations', 'none')}; only standard with none is supported"
        )
    weights = _weights(folder / "sae_weights.safetensors")
    subtracts = config.get("apply_b_dec_to_input", True)
    default = L1SAE.name if subtracts else NormWeightedL1SAE.name
    name = config.get("metadata", {}).get(OURS, {}).get("class", default)
    d_in, d_sae = weights["W_enc"].shape
    sae = ARCHITECTURES[name](d_in, d_sae).to(weights["W_dec"].dtype)
    sae.load_state_dict({key: weights[key] for key in sae.state_dict()})
    return sae.to(device)


def _weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    missing = [name for name in TENSORS if name not in weights]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(weights)}")
    d_in, d_sae = weights["W_enc"].shape
    expected = {"W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise UserError(f"{path}: {name} is {tuple(weights[name].shape)}, not {shape}")
    return weights

"""Writes the golden Gemma Scope files of this folder, and what SAELens makes of them.

    python tests/golden/make_gemma_scope.py

The authors publish no library. The parameter files hold random numbers under the release's names
(d_in 5, d_sae 7); SAELens 6.54.12 loads them with its loaders for Gemma Scope, downloads
replaced by these files, and `recorded.safetensors` holds inputs x and what its encode and decode
returned.
"""

import json
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sae_lens import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
)
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import save_file

HERE = Path(__file__).parent / "gemma_scope"
SHAPES = {"W_enc": (5, 7), "W_dec": (7, 5), "b_enc": (7,), "b_dec": (5,), "threshold": (7,)}
CONFIG = {
    "architecture": "jumprelu", "d_in": 5, "d_sae": 7, "dtype": "float32", "device": "cpu",
    "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
    "finetuning_scaling_factor": False,
}  # fmt: skip


def record(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    known = {key: CONFIG[key] for key in CONFIG if key not in ("architecture", "device")}
    del known["finetuning_scaling_factor"]
    if "transcoder" in str(folder):
        d_out = weights["W_dec"].shape[1]
        sae = JumpReLUTranscoder(JumpReLUTranscoderConfig(**known, d_out=d_out))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**known))
    sae.load_state_dict(weights)
    x = 2 * torch.randn(11, 5)
    with torch.no_grad():
        f = sae.encode(x)
        recorded = {"x": x, "f": f, "x_hat": sae.decode(f)}
    save_file(recorded, folder / "recorded.safetensors")


def write_safetensors(
    name: str, random: np.random.Generator, theirs: str, d_out: int = 5, **changes: str
) -> None:
    """Gemma Scope 2, with the keys and the kinds of values that its config.json has."""
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    sizes = SHAPES | {"W_dec": (7, d_out), "b_dec": (d_out,)}
    arrays = {
        names.get(key, key): random.standard_normal(size, np.float32)
        for key, size in sizes.items()
    }
    arrays["threshold"] = np.abs(arrays["threshold"])
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    save_file(tensors, folder / "params.safetensors")
    hook = "model.layers.12.output"
    config = {
        "hf_hook_point_in": hook, "hf_hook_point_out": hook, "width": 7,
        "model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu", "l0": 3,
        "affine_connection": False, "type": "sae",
    } | changes  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config) + "\n")

    def download(*args: str, **kwargs: str) -> str:  # repository and file come first
        return str(folder / Path((*args, *kwargs.values())[1]).name)

    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    with (
        mock.patch.object(loaders, "hf_hub_download", download),
        mock.patch.object(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes),
    ):
        _, weights, _ = loaders.gemma_3_sae_huggingface_loader(
            "google/gemma-scope-2-270m-pt", theirs
        )
    record(folder, weights)


def write_npz(name: str, random: np.random.Generator, kind: str = "") -> None:
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {key: random.standard_normal(shape, np.float32) for key, shape in SHAPES.items()}
    arrays["threshold"] = np.abs(arrays["threshold"])
    np.savez(folder / "params.npz", **arrays)
    with (
        mock.patch.object(loaders, f"get_gemma_2_{kind}config_from_hf", lambda *_: dict(CONFIG)),
        mock.patch.object(loaders, "hf_hub_download", lambda **_: str(folder / "params.npz")),
    ):
        load = getattr(loaders, f"gemma_2_{kind or 'sae_'}huggingface_loader")
        _, weights, _ = load("owner/name", name)
    record(folder, weights)


if __name__ == "__main__":
    torch.manual_seed(0)
    numbers = np.random.default_rng(0)
    write_npz("layer_12", numbers)
    write_npz("embedding/width_4k/average_l0_6", numbers)
    write_safetensors("gemma_scope_2", numbers, "resid_post/layer_12_width_16k_l0_small")
    write_npz("gemma-scope-2b-pt-transcoders/layer_3", numbers, "transcoder_")
    write_safetensors(
        "transcoder", numbers, "transcoder/layer_12_width_16k_l0_small", d_out=6,
        hf_hook_point_in="model.layers.12.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.12.post_feedforward_layernorm.output",
        type="transcoder",
    )  # fmt: skip

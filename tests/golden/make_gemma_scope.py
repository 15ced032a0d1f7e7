"""Writes the golden Gemma Scope files of this folder, and what SAELens makes of them.

    python tests/golden/make_gemma_scope.py

The authors publish no library. The parameter files hold random numbers under the release's names
(d_in 5, d_sae 7); SAELens 6.54.12 loads them with its loader for Gemma Scope, downloads
replaced by these files, and `recorded.safetensors` holds inputs x and what its encode and decode
returned.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
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
    sae = JumpReLUSAE(JumpReLUSAEConfig(**known))
    sae.load_state_dict(weights)
    x = 2 * torch.randn(11, 5)
    with torch.no_grad():
        f = sae.encode(x)
        recorded = {"x": x, "f": f, "x_hat": sae.decode(f)}
    save_file(recorded, folder / "recorded.safetensors")


def write_npz(name: str, random: np.random.Generator) -> None:
    folder = HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {key: random.standard_normal(shape, np.float32) for key, shape in SHAPES.items()}
    arrays["threshold"] = np.abs(arrays["threshold"])
    np.savez(folder / "params.npz", **arrays)
    with (
        mock.patch.object(loaders, "get_gemma_2_config_from_hf", lambda *_: dict(CONFIG)),
        mock.patch.object(loaders, "hf_hub_download", lambda **_: str(folder / "params.npz")),
    ):
        _, weights, _ = loaders.gemma_2_sae_huggingface_loader("owner/name", name)
    record(folder, weights)


if __name__ == "__main__":
    torch.manual_seed(0)
    numbers = np.random.default_rng(0)
    write_npz("layer_12", numbers)
    write_npz("embedding", numbers)

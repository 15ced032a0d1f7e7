"""Writes the golden SAELens files of this folder, with SAELens's own code and forward pass.

    python tests/golden/make_saelens.py

Each `saelens_*` folder is what `StandardSAE.save_model` writes (d_in 5, d_sae 7, random weights);
`saelens_*_recorded.safetensors` holds inputs x and what that SAE's encode and decode returned.
They were made with sae-lens 6.54.12 and change only when SAELens's format does.
"""

from pathlib import Path

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from safetensors.torch import save_file

HERE = Path(__file__).parent


def write(name: str, apply_b_dec_to_input: bool, dtype: str) -> None:
    config = StandardSAEConfig(
        d_in=5, d_sae=7, dtype=dtype, apply_b_dec_to_input=apply_b_dec_to_input
    )
    config.metadata.model_name = "pythia-70m-deduped"
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    sae = StandardSAE(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    sae.save_model(HERE / name)
    x = 2 * torch.randn(11, 5)
    with torch.no_grad():
        f = sae.encode(x)
        recorded = {"x": x, "f": f, "x_hat": sae.decode(f)}
    save_file(recorded, HERE / f"{name}_recorded.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    write("saelens_b_dec_subtracted", apply_b_dec_to_input=True, dtype="float32")
    write("saelens_b_dec_not_subtracted", apply_b_dec_to_input=False, dtype="float32")
    write("saelens_bfloat16", apply_b_dec_to_input=True, dtype="bfloat16")

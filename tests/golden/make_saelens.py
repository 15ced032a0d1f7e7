"""Writes the golden SAELens files of this folder, with SAELens's own code and forward pass.

    python tests/golden/make_saelens.py

Each `saelens_*` folder is what SAELens saves for inference of an SAE with random weights (d_in 5,
d_sae 7); `saelens_*_recorded.safetensors` holds inputs x and what that SAE's encode and decode
returned. They were made with sae-lens 6.54.12 and change only when SAELens's format does.
"""

from pathlib import Path

import sae_lens
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent


def write(name: str, architecture: str = "Standard", **options: bool | int | str) -> None:
    config = getattr(sae_lens, f"{architecture}SAEConfig")(d_in=5, d_sae=7, **options)
    config.metadata.model_name = "pythia-70m-deduped"
    config.metadata.hook_name = "blocks.3.hook_resid_post"
    sae = getattr(sae_lens, f"{architecture}SAE")(config)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        for threshold in sae.buffers():  # BatchTopK's, one number
            threshold.fill_(5.0)
    getattr(sae, "save_inference_model", sae.save_model)(HERE / name)
    x = 2 * torch.randn(11, 5)
    sae = sae_lens.SAE.load_from_disk(HERE / name)
    with torch.no_grad():
        f = sae.encode(x)
        recorded = {"x": x, "f": f, "x_hat": sae.decode(f)}
    save_file(recorded, HERE / f"{name}_recorded.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    write("saelens_b_dec_subtracted", apply_b_dec_to_input=True, dtype="float32")
    write("saelens_b_dec_not_subtracted", apply_b_dec_to_input=False, dtype="float32")
    write("saelens_bfloat16", apply_b_dec_to_input=True, dtype="bfloat16")
    for is_subtracted in (True, False):
        suffix = "b_dec_subtracted" if is_subtracted else "b_dec_not_subtracted"
        write(f"saelens_topk_{suffix}", "TopK", apply_b_dec_to_input=is_subtracted, k=3)
        write(f"saelens_jumprelu_{suffix}", "JumpReLU", apply_b_dec_to_input=is_subtracted)
    write("saelens_topk_rescaled", "TopK", k=3, rescale_acts_by_decoder_norm=True)
    write("saelens_batchtopk", "BatchTopKTraining", k=3)
    for is_subtracted in (True, False):
        suffix = "b_dec_subtracted" if is_subtracted else "b_dec_not_subtracted"
        write(f"saelens_gated_{suffix}", "Gated", apply_b_dec_to_input=is_subtracted)

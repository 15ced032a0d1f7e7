"""Writes the golden sparsify files of this folder, with sparsify's own code and forward pass.

    python tests/golden/make_sparsify.py

`sparsify/*` is what `SparseCoder.save_to_disk` writes of random weights (d_in 5, 7 latents);
`recorded.safetensors` beside it holds inputs x and what its encode and decode returned. They were
made with eai-sparsify 1.3.3.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

HERE = Path(__file__).parent / "sparsify"


def write(name: str, dtype: torch.dtype, **options: int) -> None:
    sae = SparseCoder(5, SparseCoderConfig(k=3, **options), dtype=dtype)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        sae.save_to_disk(HERE / name)
        x = (2 * torch.randn(11, 5)).to(dtype)
        top = SparseCoder.load_from_disk(HERE / name).encode(x)
        f = torch.zeros(11, sae.num_latents, dtype=dtype).scatter(1, top.top_indices, top.top_acts)
        x_hat = sae.decode(top.top_acts, top.top_indices)
    save_file({"x": x, "f": f, "x_hat": x_hat}, HERE / name / "recorded.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    write("topk", torch.float32, num_latents=7)
    write("topk_bfloat16", torch.bfloat16, num_latents=7)
    write("topk_by_factor", torch.float32, expansion_factor=2)

"""Writes the golden OpenAI files of this folder, with the module of openai/sparse_autoencoder.

    PYTHONPATH=CHECKOUT python tests/golden/make_openai.py

It is on no package index: CHECKOUT is a clone of github.com/openai/sparse_autoencoder (theirs were
made from its model.py of commit 764586a). `openai/*.pt` is what torch.save writes of the module's
state dict with random weights (8 inputs, 12 latents); `*_recorded.safetensors` holds inputs x and
what its encode and decode returned.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from sparse_autoencoder.model import Autoencoder, TopK
from torch import nn

HERE = Path(__file__).parent / "openai"


def write(name: str, activation: nn.Module, *, normalize: bool) -> None:
    dictionary = Autoencoder(12, 8, activation, normalize=normalize)
    x = 3 + 2 * torch.randn(11, 8)
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        f, statistics = dictionary.encode(x)
        recorded = {"x": x, "f": f, "x_hat": dictionary.decode(f, statistics)}
    torch.save(dictionary.state_dict(), HERE / f"{name}.pt")
    save_file(recorded, HERE / f"{name}_recorded.safetensors")


if __name__ == "__main__":
    torch.manual_seed(0)
    HERE.mkdir(exist_ok=True)
    write("relu", nn.ReLU(), normalize=False)
    write("topk", TopK(3), normalize=True)

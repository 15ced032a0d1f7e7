"""How well an SAE has learnt, whichever library trained it."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionary import Dictionary
from sparse_coding.metrics import ActivationSums, ReconstructionSums


@torch.no_grad()
def measure_fit(sae: Dictionary, x: Float[Tensor, "n d_in"], l1_coeff: float) -> dict[str, float]:
    """l0, fvu, the loss (squared error and L1 weighted by row norms) and silent features on x."""
    inputs, sums = ActivationSums(sae.d_in, 1), ReconstructionSums(sae, 1)
    for part in x.split(512):
        document = torch.zeros(len(part), dtype=torch.int64)
        inputs.add(part, document)
        sums.add(part, document)
    squared_error = sums.squared_error.sum().item()
    return {
        "l0": sums.rows["n_active"].sum().item() / len(x),
        "fvu": squared_error / inputs.total_variance(torch.ones(1, 1, dtype=torch.float64)).item(),
        "loss": (squared_error + l1_coeff * sums.rows["l1"].sum().item()) / len(x),
        "dead_fraction": (sums.n_firings == 0).float().mean().item(),
        "n_tokens_eval": len(x),
    }

"""AuxK's gradients (2406.04093, appendix A.2): dead features learn to decode what is left over.

Dense in the dead features, of which a healthy run has few; chunked over tokens.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.sae import TopKSAE, keep_largest


class Auxiliary(NamedTuple):
    """Gradients of `aux_coeff * ||e - e_hat||^2` by the dead features' parameters, in rows.

    `square` is that squared error's sum over the batch, in float64.
    """

    W_enc: Float[Tensor, "n_dead d_in"]
    W_dec: Float[Tensor, "n_dead d_in"]
    b_enc: Float[Tensor, " n_dead"]
    square: Float[Tensor, ""]


def auxiliary_gradients(
    sae: TopKSAE,
    centred: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "batch d_in"],
    dead: Int[Tensor, " n_dead"],
    times_transposed: Callable[[Tensor, Tensor], Tensor],
    chunk_bytes: int,
) -> Auxiliary:
    """`centred` is x - b_dec, `residual` x_hat - x (that is, -e).

    `times_transposed(a, b)` computes a b^T as it is fastest on the device; `chunk_bytes` bounds
    one chunk's pre-activations.
    """
    W_enc, W_dec, b_enc = sae.W_enc.T[dead], sae.W_dec[dead], sae.b_enc[dead]
    sums = Auxiliary(
        torch.zeros_like(W_enc),
        torch.zeros_like(W_dec),
        torch.zeros_like(b_enc),
        torch.zeros((), dtype=torch.float64, device=b_enc.device),
    )
    n_tokens, n_aux = len(centred), min(sae.n_aux, len(dead))
    scale = sae.aux_coeff * 2 / n_tokens
    size = max(64, chunk_bytes // (len(dead) * W_dec.element_size()))
    for x, minus_e in zip(centred.split(size), residual.split(size), strict=True):
        f = keep_largest(times_transposed(x, W_enc) + b_enc, n_aux)
        aux_residual = times_transposed(f, W_dec.T) + minus_e
        f_gradient = scale * times_transposed(aux_residual, W_dec) * (f > 0)
        sums.W_enc.add_(times_transposed(f_gradient.T, x.T))
        sums.W_dec.add_(times_transposed(f.T, aux_residual.T), alpha=scale)
        sums.b_enc.add_(f_gradient.sum(dim=0))
        sums.square.add_(aux_residual.square().sum(dtype=torch.float64))
    return sums

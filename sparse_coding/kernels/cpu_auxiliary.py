"""AuxK's gradients (2406.04093, appendix A.2): dead features learn to decode what is left over.

Dense in the dead features, of which a healthy run has few; chunked over tokens.
"""

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sparse_coding.kernels import cpu_loops as loops
from sparse_coding.kernels.cpu_features import Extra
from sparse_coding.kernels.cpu_screen import CHUNK_BYTES, chunks, times_transposed
from sparse_coding.sae import TopKSAE, keep_largest


def auxiliary_gradients(
    sae: TopKSAE, batch: loops.Batch, residual: np.ndarray, dead: Bool[Tensor, " d_sae"]
) -> tuple[Extra, float]:
    """Gradients of `aux_coeff * ||e - e_hat||^2`, and that squared error's sum over the batch.

    residual (batch, d_in) is x_hat - x, that is -e.
    """
    features = dead.nonzero().flatten()
    W_enc, W_dec, b_enc = sae.W_enc.T[features], sae.W_dec[features], sae.b_enc[features]
    gradients = torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.zeros_like(b_enc)
    centred, minus_e = torch.from_numpy(batch.centred), torch.from_numpy(residual)
    scale, square_sum = sae.aux_coeff * float(batch.error_scale), 0.0
    n_aux = min(sae.n_aux, len(features))
    for chunk in chunks(len(centred), CHUNK_BYTES // (len(features) * W_dec.element_size())):
        f = keep_largest(times_transposed(centred[chunk], W_enc) + b_enc, n_aux)
        aux_residual = times_transposed(f, W_dec.T) + minus_e[chunk]
        f_gradient = scale * times_transposed(aux_residual, W_dec) * (f > 0)
        gradients[0].add_(times_transposed(f_gradient.T, centred[chunk].T))
        gradients[1].add_(times_transposed(f.T, aux_residual.T), alpha=scale)
        gradients[2].add_(f_gradient.sum(dim=0))
        square_sum += aux_residual.square().sum(dtype=torch.float64).item()
    row = torch.full((sae.d_sae,), -1, dtype=torch.int64)
    row[features] = torch.arange(len(features))
    return Extra(row.numpy(), *(gradient.numpy() for gradient in gradients)), square_sum

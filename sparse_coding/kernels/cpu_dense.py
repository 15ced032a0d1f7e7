"""Gradients of the L1 family by whole-matrix products, chunk by chunk, without an autograd graph.

For batches on which so many features are active that looking for them costs more than it saves.
"""

from typing import NamedTuple

import numpy as np
import torch

from sparse_coding.kernels import cpu_loops as loops
from sparse_coding.kernels.cpu_features import gate_gradient
from sparse_coding.kernels.cpu_screen import CHUNK_BYTES, chunks, times_transposed
from sparse_coding.sae import SAE


class DenseGradients(NamedTuple):
    """Of the squared error and, through the activations, of the penalty."""

    W_dec: np.ndarray
    W_enc: np.ndarray
    """Feature-major, (d_sae, d_in)."""
    b_enc: np.ndarray
    f_sum: np.ndarray
    n_active: np.ndarray
    residual_sum: np.ndarray
    square_sum: float


def dense_gradients(sae: SAE, batch: loops.Batch) -> DenseGradients:
    """The decoder's gradient lacks the part of a penalty on its norms; f_sum (d_sae) gives it."""
    x, centred = torch.from_numpy(batch.x), torch.from_numpy(batch.centred)
    decoder, encoder = torch.zeros_like(sae.W_dec), torch.zeros_like(sae.W_dec)
    f_sum, b_enc = torch.zeros(2, sae.d_sae, dtype=x.dtype).numpy()
    residual_sum, square_sum = torch.zeros_like(sae.b_dec), 0.0
    n_active = np.zeros(sae.d_sae, np.int64)
    # Four times the sparse chunk: the gradients' products need the long inner dimension.
    for chunk in chunks(len(x), 4 * CHUNK_BYTES // (sae.d_sae * x.element_size())):
        f = times_transposed(centred[chunk], sae.W_enc.T).add_(sae.b_enc).relu_()
        residual = times_transposed(f, sae.W_dec.T) + (sae.b_dec - x[chunk])
        gradient = times_transposed(residual, sae.W_dec)
        gate_gradient(f.numpy(), gradient.numpy(), batch, f_sum, b_enc, n_active)
        decoder.add_(times_transposed(f.T, residual.T), alpha=float(batch.error_scale))
        encoder.add_(times_transposed(gradient.T, centred[chunk].T))
        residual_sum += residual.sum(dim=0)
        square_sum += residual.square().sum(dtype=torch.float64).item()
    matrices = decoder.numpy(), encoder.numpy()
    return DenseGradients(*matrices, b_enc, f_sum, n_active, residual_sum.numpy(), square_sum)

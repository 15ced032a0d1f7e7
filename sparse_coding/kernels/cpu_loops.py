"""What the CPU step's compiled loops share: how they are compiled, their data, arithmetic on rows.

Each token and each feature is one thread's work from beginning to end, and sums over several of
them run over fixed blocks, so no result depends on the number of threads. Plain NumPy arrays in
and out; every matrix is feature-major (row i belongs to feature i). No torch here.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

# Reassociation lets sums vectorise and contraction allows fused multiply-adds; NaN and infinity
# keep their meaning, so a bad batch still shows in the loss. Numba's cache notices a change of the
# function's own file only: who edits the arithmetic below touches cpu_tokens.py and
# cpu_features.py too.
_OPTIONS = {
    "cache": True,
    "error_model": "numpy",
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
}

FEATURE_BLOCK = 32
"""Features per partial sum of the centre's gradient; fixed, so that threads do not matter."""


def compiled(function: Callable) -> Callable:
    """Machine code of a function; unwrapped, because tests wrap functions in type checks."""
    return njit(**_OPTIONS)(inspect.unwrap(function))


def compiled_parallel(function: Callable) -> Callable:
    """The same with `prange` spread over threads.

    The body of a `prange` must be one call: Numba may take a variable assigned in such a body
    for a sum over its iterations, and drop writes.
    """
    return njit(**_OPTIONS, parallel=True)(inspect.unwrap(function))


class Model(NamedTuple):
    """An SAE's parameters; W_enc is W_dec itself if they are tied."""

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray
    threshold: np.ndarray
    """Above which a feature is active (d_sae): JumpReLU's, else 0."""
    bandwidth: np.floating
    """How near to its threshold an entry teaches it: JumpReLU's, else 0."""
    is_tied: bool
    has_unit_norm_rows: bool


class Moments(NamedTuple):
    """Adam's two running means of each matrix's gradient."""

    W_enc: np.ndarray
    W_enc_sq: np.ndarray
    W_dec: np.ndarray
    W_dec_sq: np.ndarray


class AdamScalars(NamedTuple):
    """Adam's constants of one step, in the parameters' dtype."""

    step_size: np.floating
    """lr / (1 - beta1^t)"""
    root_correction: np.floating
    """sqrt(1 - beta2^t)"""
    beta1_complement: np.floating
    beta2_complement: np.floating
    eps: np.floating


class Batch(NamedTuple):
    """What a step reads besides the parameters."""

    x: np.ndarray
    """What is to be decoded: of a transcoder, its target."""
    centred: np.ndarray
    """What the encoder multiplies: the SAE's input, or that - b_dec."""
    penalty: np.ndarray
    """What one unit of each feature costs, ||W_dec[i]||; before the coefficient."""
    error_scale: np.floating
    """2 / batch: times the residual, the squared error's gradient by the reconstruction."""
    penalty_scale: np.floating
    """l1_coeff / batch where the penalty is an L1 norm, else 0."""
    step_scale: np.floating
    """l1_coeff / batch where the penalty is an L0, else 0."""


class Entries(NamedTuple):
    """Entries: which feature (or token), its activation, the loss's gradient by it.

    All are active but for JumpReLU's below and near their threshold, whose f is 0.
    """

    index: np.ndarray
    f: np.ndarray
    gradient: np.ndarray


@compiled
def dot(a, b):
    total = a.dtype.type(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@compiled
def add_rows(total, coefficients, rows, indices):
    """total += sum_k coefficients[k] * rows[indices[k]], four rows per pass over total."""
    n, width = indices.size, total.size
    whole = n - n % 4
    for k in range(0, whole, 4):
        c0, c1 = coefficients[k], coefficients[k + 1]
        c2, c3 = coefficients[k + 2], coefficients[k + 3]
        r0, r1 = rows[indices[k]], rows[indices[k + 1]]
        r2, r3 = rows[indices[k + 2]], rows[indices[k + 3]]
        for j in range(width):
            total[j] += (c0 * r0[j] + c1 * r1[j]) + (c2 * r2[j] + c3 * r3[j])
    for k in range(whole, n):
        c, row = coefficients[k], rows[indices[k]]
        for j in range(width):
            total[j] += c * row[j]


@compiled
def adam(weights, exp_avg, exp_avg_sq, gradient, scalars):
    """Adam (Kingma and Ba 2015, algorithm 1) on one vector, in place, as torch writes it."""
    for j in range(weights.size):
        g = gradient[j]
        exp_avg[j] += scalars.beta1_complement * (g - exp_avg[j])
        exp_avg_sq[j] += scalars.beta2_complement * (g * g - exp_avg_sq[j])
        denominator = np.sqrt(exp_avg_sq[j]) / scalars.root_correction + scalars.eps
        weights[j] -= scalars.step_size * exp_avg[j] / denominator

"""The CPU step feature by feature: gradient from its own tokens, projection, Adam, unit norm.

`update_features` does all of it in one pass over entries that `group_by_feature` has ordered;
`update_features_densely` the same for gradients that dense products have made. No torch here.
"""

from typing import NamedTuple

import numpy as np
from numba import prange

from sparse_coding.kernels.cpu_loops import (
    FEATURE_BLOCK,
    adam,
    add_rows,
    compiled,
    compiled_parallel,
    dot,
)


class FeatureEntries(NamedTuple):
    """A batch's entries in the order of features."""

    parts: np.ndarray
    """Boundaries between stretches of features, multiples of FEATURE_BLOCK."""
    starts: np.ndarray
    """A feature's first entry (d_sae + 1)."""
    index: np.ndarray
    f: np.ndarray
    gradient: np.ndarray


class Extra(NamedTuple):
    """Gradients of some features that come from elsewhere (AuxK)."""

    row: np.ndarray
    """Where below a feature's gradients are (d_sae), or -1; empty if no feature has any."""
    W_enc: np.ndarray
    W_dec: np.ndarray
    b_enc: np.ndarray


def no_extra(dtype: np.dtype) -> Extra:
    """An `Extra` that adds nothing."""
    matrix = np.empty((0, 0), dtype)
    return Extra(np.empty(0, np.int64), matrix, matrix, np.empty(0, dtype))


class FeatureResults(NamedTuple):
    """One number per feature, and sums over features."""

    n_active: np.ndarray
    b_enc_gradient: np.ndarray
    threshold_gradient: np.ndarray
    centre: np.ndarray
    """Per block of features, sum_i (d loss / d b_enc[i]) * W_enc[i] at the old weights."""


def no_results(d_sae: int, d_in: int, dtype: np.dtype) -> FeatureResults:
    """Sums at zero."""
    n_blocks = -(-d_sae // FEATURE_BLOCK)
    zeros = np.zeros((2, d_sae), dtype)
    return FeatureResults(np.zeros(d_sae, np.int64), *zeros, np.zeros((n_blocks, d_in), dtype))


@compiled
def _collect(part, parts, by_token, n_entries, starts, by_feature):
    first, last = parts[part], parts[part + 1]
    slots = starts[first:last].copy()
    entry = 0
    for token in range(len(n_entries)):
        for _ in range(n_entries[token]):
            i = by_token.index[entry]
            if first <= i < last:
                slot = slots[i - first]
                slots[i - first] += 1
                by_feature.index[slot] = token
                by_feature.f[slot] = by_token.f[entry]
                by_feature.gradient[slot] = by_token.gradient[entry]
            entry += 1


@compiled_parallel
def group_by_feature(parts, by_token, n_entries, starts, by_feature):
    """Reorder entries from token-major to feature-major, tokens ascending within a feature.

    parts are boundaries between stretches of features, starts (d_sae + 1) their first entries.
    """
    for part in prange(len(parts) - 1):
        _collect(part, parts, by_token, n_entries, starts, by_feature)


@compiled
def _update_feature(i, decoder_gradient, encoder_gradient, model, moments, scalars):
    """Project the decoder's gradient, Adam on both rows, renormalise; overwrites gradients."""
    row = model.W_dec[i]
    if model.is_tied:
        for j in range(row.size):
            decoder_gradient[j] += encoder_gradient[j]
    else:
        adam(model.W_enc[i], moments.W_enc[i], moments.W_enc_sq[i], encoder_gradient, scalars)
    if model.has_unit_norm_rows:
        parallel = dot(decoder_gradient, row)
        for j in range(row.size):
            decoder_gradient[j] -= parallel * row[j]
    adam(row, moments.W_dec[i], moments.W_dec_sq[i], decoder_gradient, scalars)
    if model.has_unit_norm_rows:
        norm = np.sqrt(dot(row, row))
        for j in range(row.size):
            row[j] /= norm


@compiled
def _add_penalty_gradient(gradient, f_sum, i, batch, model):
    """Add that of penalty_scale * f_sum * ||W_dec[i]||; at a zero row zero, autograd's choice."""
    if not model.has_unit_norm_rows and batch.penalty[i] > 0:
        coefficient = batch.penalty_scale * f_sum / batch.penalty[i]
        for j in range(gradient.size):
            gradient[j] += coefficient * model.W_dec[i, j]


@compiled
def _learn_threshold(i, f, gradient, batch, model):
    """d loss / d threshold[i] (2407.14435, equations 11 and 12); no gradient where f is 0."""
    total = f.dtype.type(0)
    for k in range(f.size):
        if f[k] - model.threshold[i] < model.bandwidth / 2:  # those below come with f = 0
            total -= model.threshold[i] * gradient[k] + batch.step_scale
        if f[k] == 0:
            gradient[k] = 0
    return total / model.bandwidth


@compiled
def _add_extra(i, extra, decoder_gradient, encoder_gradient, b_enc_gradient):
    row = extra.row[i]
    if row >= 0:
        b_enc_gradient[i] += extra.b_enc[row]
        for j in range(decoder_gradient.size):
            decoder_gradient[j] += extra.W_dec[row, j]
            encoder_gradient[j] += extra.W_enc[row, j]


@compiled
def _update_part(part, entries, batch, residual, model, moments, scalars, extra, results):
    d_in = residual.shape[1]
    decoder_gradient = np.empty(d_in, residual.dtype)
    encoder_gradient = np.empty(d_in, residual.dtype)
    b_enc_gradient, centre = results.b_enc_gradient, results.centre
    for i in range(entries.parts[part], entries.parts[part + 1]):
        span = slice(entries.starts[i], entries.starts[i + 1])
        tokens, f, gradient = entries.index[span], entries.f[span], entries.gradient[span]
        results.n_active[i] = f.size
        if model.bandwidth > 0:
            results.n_active[i] = np.count_nonzero(f)
            results.threshold_gradient[i] = _learn_threshold(i, f, gradient, batch, model)
        decoder_gradient[:] = 0
        encoder_gradient[:] = 0
        add_rows(decoder_gradient, f, residual, tokens)
        add_rows(encoder_gradient, gradient, batch.centred, tokens)
        b_enc_gradient[i] = gradient.sum()
        for j in range(d_in):
            decoder_gradient[j] *= batch.error_scale
        if extra.row.size > 0:
            _add_extra(i, extra, decoder_gradient, encoder_gradient, b_enc_gradient)
        for j in range(d_in):
            centre[i // FEATURE_BLOCK, j] += b_enc_gradient[i] * model.W_enc[i, j]
        _add_penalty_gradient(decoder_gradient, f.sum(), i, batch, model)
        _update_feature(i, decoder_gradient, encoder_gradient, model, moments, scalars)


@compiled_parallel
def update_features(entries, batch, residual, model, moments, scalars, extra, results):
    """Gradient, projection, Adam and renormalisation of every feature, in one pass."""
    for part in prange(len(entries.parts) - 1):
        _update_part(part, entries, batch, residual, model, moments, scalars, extra, results)


# ---- dense ---------------------------------------------------------------------------------


@compiled
def _gate_block(block, f, gradient, batch, f_sum, gradient_sum, n_active):
    first, last = block * FEATURE_BLOCK, min((block + 1) * FEATURE_BLOCK, f.shape[1])
    for row in range(len(f)):
        for i in range(first, last):
            is_active = f[row, i] > 0
            slope = batch.error_scale * gradient[row, i] + batch.penalty_scale * batch.penalty[i]
            gradient[row, i] = slope if is_active else f.dtype.type(0)
            f_sum[i] += f[row, i]
            gradient_sum[i] += gradient[row, i]
            n_active[i] += is_active


@compiled_parallel
def gate_gradient(f, gradient, batch, f_sum, gradient_sum, n_active):
    """Turn residual @ W_dec.T (chunk, d_sae), in place, into d loss / d pre-activations.

    Adds f, that gradient and the number of active entries to their sums (d_sae).
    """
    for block in prange(-(-f.shape[1] // FEATURE_BLOCK)):
        _gate_block(block, f, gradient, batch, f_sum, gradient_sum, n_active)


@compiled
def _update_feature_densely(
    i, decoder_gradient, encoder_gradient, f_sum, batch, model, moments, scalars
):
    _add_penalty_gradient(decoder_gradient[i], f_sum[i], i, batch, model)
    _update_feature(i, decoder_gradient[i], encoder_gradient[i], model, moments, scalars)


@compiled_parallel
def update_features_densely(
    decoder_gradient, encoder_gradient, f_sum, batch, model, moments, scalars
):
    """`update_features` for gradients (d_sae, d_in) that already exist; overwrites them.

    The squared error's alone for the decoder: the penalty's is added from f_sum (d_sae).
    """
    for i in prange(len(decoder_gradient)):
        _update_feature_densely(
            i, decoder_gradient, encoder_gradient, f_sum, batch, model, moments, scalars
        )

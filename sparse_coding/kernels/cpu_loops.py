"""Compiled loops of the CPU step: what follows the encoder's product touches active entries only.

Each token and each feature is one thread's work from beginning to end, and sums over several of
them run over fixed blocks, so no result depends on the number of threads. Plain NumPy arrays in
and out; every matrix is feature-major (row i belongs to feature i). No torch here.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

# Reassociation lets sums vectorise and contraction allows fused multiply-adds; NaN and infinity
# keep their meaning, so a bad batch still shows in the loss.
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
    """An SAE of the L1 family; W_enc is W_dec itself if they are tied."""

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray
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
    centred: np.ndarray
    """What the encoder multiplies: x, or x - b_dec."""
    penalty: np.ndarray
    """What one unit of each feature costs, ||W_dec[i]||; before the coefficient."""
    error_scale: np.floating
    """2 / batch: times the residual, the squared error's gradient by the reconstruction."""
    penalty_scale: np.floating
    """l1_coeff / batch"""


class Screen(NamedTuple):
    """Bounds that pass on whatever may be active (`cpu_screen` says why)."""

    lowest: np.ndarray
    norm: np.ndarray
    margin: np.ndarray


class Entries(NamedTuple):
    """Active entries: which feature (or token), its activation, the loss's gradient by it."""

    index: np.ndarray
    f: np.ndarray
    gradient: np.ndarray


class TokenResults(NamedTuple):
    """One row per token of the batch."""

    n_active: np.ndarray
    residual: np.ndarray
    """x_hat - x, shape (batch, d_in)"""
    square: np.ndarray
    penalty: np.ndarray


# ---- arithmetic on rows --------------------------------------------------------------------


@compiled
def _dot(a, b):
    total = a.dtype.type(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@compiled
def _add_rows(total, coefficients, rows, indices):
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


# ---- screen --------------------------------------------------------------------------------


def _as_float(value):
    raise NotImplementedError("in compiled code only")


@overload(_as_float, inline="always")
def _compile_as_float(value):
    if isinstance(value, types.Integer):  # the bits of a bfloat16
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@compiled
def _flag(product, screen, token, flags):
    margin = screen.margin[token]
    for i in range(product.size):
        flags[i] = _as_float(product[i]) >= screen.lowest[i] - margin * screen.norm[i]


@compiled
def _candidates(product, screen, token, features):
    """Write the features that may be active on one token; returns their number.

    Flagging is a vectorised pass; the search for the few set flags takes eight at a time.
    """
    flags = np.empty(product.size, np.uint8)
    _flag(product, screen, token, flags)
    words = flags[: flags.size - flags.size % 8].view(np.uint64)
    n = 0
    for word in range(words.size):
        if words[word] != 0:
            for i in range(8 * word, 8 * word + 8):
                features[n] = i  # overwritten by the next one unless flagged
                n += flags[i]
    for i in range(8 * words.size, flags.size):
        features[n] = i
        n += flags[i]
    return n


@compiled
def _count_row(row, product, screen, n_candidates):
    flags = np.empty(product.shape[1], np.uint8)
    _flag(product[row], screen, row, flags)
    n_candidates[row] = flags.sum()


@compiled_parallel
def count_candidates(product, screen, n_candidates):
    """Write how many entries of each of the first tokens (chunk, d_sae) the screen passes on."""
    for row in prange(len(product)):
        _count_row(row, product, screen, n_candidates)


# ---- token by token ------------------------------------------------------------------------


@compiled
def _activate(centred, model, n_candidates, features, f):
    """Keep the candidates whose pre-activation is positive at full precision."""
    n = 0
    for k in range(n_candidates):
        i = features[k]
        pre = _dot(centred, model.W_enc[i]) + model.b_enc[i]
        if pre > 0:
            features[n] = i
            f[n] = pre
            n += 1
    return n


@compiled
def _decode(token, batch, model, features, f, gradient, results):
    W_dec, b_dec = model.W_dec, model.b_dec
    residual = results.residual[token]
    for j in range(residual.size):
        residual[j] = b_dec[j] - batch.x[token, j]
    _add_rows(residual, f, W_dec, features)
    results.square[token] = _dot(residual, residual)
    penalty = f.dtype.type(0)
    for k in range(f.size):
        i = features[k]
        penalty += f[k] * batch.penalty[i]
        slope = batch.error_scale * _dot(residual, W_dec[i])
        gradient[k] = slope + batch.penalty_scale * batch.penalty[i]
    results.penalty[token] = penalty


@compiled
def _activate_and_decode_row(row, first, product, screen, batch, model, chunk, results):
    token = first + row
    features, f, gradient = chunk.index[row], chunk.f[row], chunk.gradient[row]
    n = _candidates(product[row], screen, token, features)
    n = _activate(batch.centred[token], model, n, features, f)
    _decode(token, batch, model, features[:n], f[:n], gradient, results)
    results.n_active[token] = n


@compiled_parallel
def activate_and_decode(first, product, screen, batch, model, chunk, results):
    """For the tokens from `first` on: active entries, residual, loss, gradient by f.

    product (chunk, d_sae) is the screen's. The entries of a token are the first n_active[token]
    columns of its row of `chunk` (chunk, d_sae); the rest goes to `results`.
    """
    for row in prange(len(product)):
        _activate_and_decode_row(row, first, product, screen, batch, model, chunk, results)


@compiled
def append_entries(chunk, n_active, start, by_token, n_per_feature):
    """Copy a chunk's entries behind by_token[start], count them by feature; returns the end."""
    end = start
    for row in range(len(n_active)):
        for k in range(n_active[row]):
            i = chunk.index[row, k]
            by_token.index[end] = i
            by_token.f[end] = chunk.f[row, k]
            by_token.gradient[end] = chunk.gradient[row, k]
            n_per_feature[i] += 1
            end += 1
    return end


# ---- feature by feature --------------------------------------------------------------------


@compiled
def _collect(part, parts, by_token, n_active, starts, by_feature):
    first, last = parts[part], parts[part + 1]
    slots = starts[first:last].copy()
    entry = 0
    for token in range(len(n_active)):
        for _ in range(n_active[token]):
            i = by_token.index[entry]
            if first <= i < last:
                slot = slots[i - first]
                slots[i - first] += 1
                by_feature.index[slot] = token
                by_feature.f[slot] = by_token.f[entry]
                by_feature.gradient[slot] = by_token.gradient[entry]
            entry += 1


@compiled_parallel
def group_by_feature(parts, by_token, n_active, starts, by_feature):
    """Reorder entries from token-major to feature-major, tokens ascending within a feature.

    parts are boundaries between stretches of features, starts (d_sae + 1) their first entries.
    """
    for part in prange(len(parts) - 1):
        _collect(part, parts, by_token, n_active, starts, by_feature)


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
        parallel = _dot(decoder_gradient, row)
        for j in range(row.size):
            decoder_gradient[j] -= parallel * row[j]
    adam(row, moments.W_dec[i], moments.W_dec_sq[i], decoder_gradient, scalars)
    if model.has_unit_norm_rows:
        norm = np.sqrt(_dot(row, row))
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
def _update_part(
    part, parts, starts, entries, batch, residual, model, moments, scalars, b_enc_gradient, centre
):
    d_sae, d_in = model.W_dec.shape
    decoder_gradient = np.empty(d_in, residual.dtype)
    encoder_gradient = np.empty(d_in, residual.dtype)
    for i in range(parts[part], parts[part + 1]):
        tokens = entries.index[starts[i] : starts[i + 1]]
        f = entries.f[starts[i] : starts[i + 1]]
        gradient = entries.gradient[starts[i] : starts[i + 1]]
        decoder_gradient[:] = 0
        encoder_gradient[:] = 0
        _add_rows(decoder_gradient, f, residual, tokens)
        _add_rows(encoder_gradient, gradient, batch.centred, tokens)
        b_enc_gradient[i] = gradient.sum()
        for j in range(d_in):
            decoder_gradient[j] *= batch.error_scale
            centre[i // FEATURE_BLOCK, j] += b_enc_gradient[i] * model.W_enc[i, j]
        _add_penalty_gradient(decoder_gradient, f.sum(), i, batch, model)
        _update_feature(i, decoder_gradient, encoder_gradient, model, moments, scalars)


@compiled_parallel
def update_features(
    parts, starts, entries, batch, residual, model, moments, scalars, b_enc_gradient, centre
):
    """Gradient, projection, Adam and renormalisation of every feature, in one pass.

    parts are boundaries between stretches of features, multiples of FEATURE_BLOCK; the entries
    are feature-major from starts (d_sae + 1). Writes d loss / d b_enc and adds to centre
    (blocks, d_in) each block's sum_i (d loss / d b_enc[i]) * W_enc[i] at the old weights.
    """
    for part in prange(len(parts) - 1):
        _update_part(
            part,
            parts,
            starts,
            entries,
            batch,
            residual,
            model,
            moments,
            scalars,
            b_enc_gradient,
            centre,
        )


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

"""Compiled loops of the CPU step: what follows the encoder's product touches active entries only.

Each token and each feature is one thread's work from beginning to end, and sums over several of
them run over fixed blocks, so no result depends on the number of threads. Plain NumPy arrays in
and out; matrices are feature-major (row i belongs to feature i). No torch here.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit, prange, types
from numba.extending import overload

# Reassociation lets sums vectorise and contraction allows fused multiply-adds; NaN and infinity
# keep their meaning, so a bad batch still shows in the loss.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_OPTIONS = {"cache": True, "fastmath": _FAST, "error_model": "numpy"}


def compiled(function: Callable) -> Callable:
    """Machine code of a function; unwrapped, because tests wrap functions in type checks."""
    return njit(**_OPTIONS)(inspect.unwrap(function))


def compiled_parallel(function: Callable) -> Callable:
    """The same with `prange` spread over threads.

    The body of a `prange` must be one call: Numba may take a variable assigned in such a body
    for a sum over its iterations, and drop writes.
    """
    return njit(**_OPTIONS, parallel=True)(inspect.unwrap(function))


FEATURE_BLOCK = 32
"""Features per partial sum of the centre's gradient; fixed, so that threads do not matter."""


class Weights(NamedTuple):
    """A parameter with Adam's two moments, all of one shape."""

    value: np.ndarray
    exp_avg: np.ndarray
    exp_avg_sq: np.ndarray


class AdamScalars(NamedTuple):
    """Adam's constants of one step, in the parameters' dtype."""

    step_size: np.floating
    """lr / (1 - beta1^t)"""
    root_correction: np.floating
    """sqrt(1 - beta2^t)"""
    beta1_complement: np.floating
    beta2_complement: np.floating
    eps: np.floating


class Entries(NamedTuple):
    """Active entries: which feature (or token), its activation f and the loss's gradient by it."""

    index: np.ndarray
    f: np.ndarray
    gradient: np.ndarray


def _as_float(value):
    raise NotImplementedError("compiled code only")


@overload(_as_float, inline="always")
def _as_float_overload(value):
    if isinstance(value, types.Integer):  # the bits of a bfloat16
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


@compiled
def dot(a, b):
    total = a.dtype.type(0)
    for j in range(a.size):
        total += a[j] * b[j]
    return total


@compiled
def _round_row(i, rows, bits, rounded_bits, norm, error):
    squares, errors = np.float32(0), np.float32(0)
    for j in range(rows.shape[1]):
        tie_to_even = (bits[i, j] >> np.uint32(16)) & np.uint32(1)
        kept = np.uint32(bits[i, j] + np.uint32(0x7FFF) + tie_to_even) >> np.uint32(16)
        rounded_bits[i, j] = kept
        rounded = np.uint32(kept << np.uint32(16)).view(np.float32)
        squares += rounded * rounded
        errors += (rows[i, j] - rounded) * (rows[i, j] - rounded)
    norm[i], error[i] = np.sqrt(squares), np.sqrt(errors)


@compiled_parallel
def round_rows(rows, bits, rounded_bits, norm, error):
    """Round float32 rows (bits: their own) to bfloat16, ties to even.

    Writes the results' bits and, for each row, the norm of the result and of the difference.
    """
    for i in prange(len(rows)):
        _round_row(i, rows, bits, rounded_bits, norm, error)


@compiled
def _is_candidate(screened, lowest, norm, margin):
    return _as_float(screened) >= lowest - margin * norm


@compiled
def _flag(screened, lowest, norm, margin, flags):
    for i in range(screened.size):
        flags[i] = _is_candidate(screened[i], lowest[i], norm[i], margin)


@compiled
def _screen(screened, lowest, norm, margin, candidates):
    """Write the features that may be active on one token; returns their number.

    The flags are a vectorised pass; the sparse search behind it takes eight flags at a time.
    """
    flags = np.empty(screened.size, np.uint8)
    _flag(screened, lowest, norm, margin, flags)
    words = flags[: flags.size - flags.size % 8].view(np.uint64)
    n = 0
    for word in range(words.size):
        if words[word] != 0:
            for i in range(8 * word, 8 * word + 8):
                candidates[n] = i  # overwritten by the next one unless flagged
                n += flags[i]
    for i in range(8 * words.size, flags.size):
        candidates[n] = i
        n += flags[i]
    return n


@compiled
def _count_row(row, screened, bounds, n_candidates):
    lowest, norm, margin = bounds
    n = 0
    for i in range(screened.shape[1]):
        n += _is_candidate(screened[row, i], lowest[i], norm[i], margin[row])
    n_candidates[row] = n


@compiled_parallel
def count_candidates(screened, bounds, n_candidates):
    """Write how many features of each token (chunk, d_sae) the screen would pass on."""
    for row in prange(len(screened)):
        _count_row(row, screened, bounds, n_candidates)


@compiled
def _activate(centred, W_enc, b_enc, n_candidates, features, f):
    """Keep the candidates whose pre-activation is positive at full precision."""
    n = 0
    for k in range(n_candidates):
        i = features[k]
        pre = dot(centred, W_enc[i]) + b_enc[i]
        if pre > 0:
            features[n] = i
            f[n] = pre
            n += 1
    return n


@compiled
def _add_rows(total, coefficients, rows, indices):
    """total += sum_k coefficients[k] * rows[indices[k]], four rows per pass over total."""
    n, width = indices.size, total.size
    whole = n - n % 4
    for k in range(0, whole, 4):
        c0, c1, c2, c3 = (
            coefficients[k],
            coefficients[k + 1],
            coefficients[k + 2],
            coefficients[k + 3],
        )
        r0, r1 = rows[indices[k]], rows[indices[k + 1]]
        r2, r3 = rows[indices[k + 2]], rows[indices[k + 3]]
        for j in range(width):
            total[j] += (c0 * r0[j] + c1 * r1[j]) + (c2 * r2[j] + c3 * r3[j])
    for k in range(whole, n):
        c, row = coefficients[k], rows[indices[k]]
        for j in range(width):
            total[j] += c * row[j]


@compiled
def _decode(x, f, features, decoder, penalty, scales, residual, gradient):
    """Write one token's residual and d loss / d f; returns its squared error and penalty."""
    W_dec, b_dec = decoder
    error_scale, penalty_scale = scales
    for j in range(x.size):
        residual[j] = b_dec[j] - x[j]
    _add_rows(residual, f, W_dec, features)
    l1 = x.dtype.type(0)
    for k in range(f.size):
        i = features[k]
        l1 += f[k] * penalty[i]
        gradient[k] = error_scale * dot(residual, W_dec[i]) + penalty_scale * penalty[i]
    return dot(residual, residual), l1


@compiled
def _activate_and_decode_row(
    row, screened, bounds, inputs, encoder, decoder, penalty, scales, entries, n_active, out
):
    lowest, norm, margin = bounds
    x, centred = inputs
    W_enc, b_enc = encoder
    residual, mse, l1 = out
    features, f, gradient = entries.index[row], entries.f[row], entries.gradient[row]
    passed = _screen(screened[row], lowest, norm, margin[row], features)
    n = _activate(centred[row], W_enc, b_enc, passed, features, f)
    n_active[row] = n
    mse[row], l1[row] = _decode(
        x[row], f[:n], features[:n], decoder, penalty, scales, residual[row], gradient
    )


@compiled_parallel
def activate_and_decode(
    screened, bounds, inputs, encoder, decoder, penalty, scales, entries, n_active, out
):
    """For each token of a chunk: its active entries, its residual and its part of the loss.

    screened (chunk, d_sae), bounds (lowest, norm, margin), inputs (x, centred), encoder
    (W_enc, b_enc), decoder (W_dec, b_dec), penalty (d_sae), scales (2 / batch, l1_coeff / batch).
    Writes the first n_active[row] columns of entries (chunk, d_sae) and out: residual
    (chunk, d_in), squared error and penalty (chunk).
    """
    for row in prange(len(screened)):
        _activate_and_decode_row(
            row,
            screened,
            bounds,
            inputs,
            encoder,
            decoder,
            penalty,
            scales,
            entries,
            n_active,
            out,
        )


@compiled
def append_entries(chunk, n_active, start, flat, n_per_feature):
    """Copy a chunk's entries behind flat[start] and count them by feature; returns the end."""
    end = start
    for row in range(len(n_active)):
        for k in range(n_active[row]):
            i = chunk.index[row, k]
            flat.index[end] = i
            flat.f[end] = chunk.f[row, k]
            flat.gradient[end] = chunk.gradient[row, k]
            n_per_feature[i] += 1
            end += 1
    return end


@compiled
def _collect(by_token, n_active, first, last, cursor, by_feature):
    """Move the entries of features first..last to their places; cursor[0] is first's start."""
    entry = 0
    for token in range(len(n_active)):
        for _ in range(n_active[token]):
            i = by_token.index[entry]
            if first <= i < last:
                slot = cursor[i - first]
                cursor[i - first] = slot + 1
                by_feature.index[slot] = token
                by_feature.f[slot] = by_token.f[entry]
                by_feature.gradient[slot] = by_token.gradient[entry]
            entry += 1


@compiled_parallel
def group_by_feature(by_token, n_active, starts, parts, by_feature):
    """Reorder entries from token-major to feature-major, tokens ascending within a feature.

    starts (d_sae + 1) are the features' offsets; parts are boundaries in features.
    """
    for part in prange(len(parts) - 1):
        first, last = parts[part], parts[part + 1]
        _collect(by_token, n_active, first, last, starts[first:last].copy(), by_feature)


@compiled
def adam(weights, exp_avg, exp_avg_sq, gradient, scalars):
    """Adam (Kingma and Ba 2015, algorithm 1) on one row, in place, as torch writes it."""
    for j in range(weights.size):
        g = gradient[j]
        exp_avg[j] += scalars.beta1_complement * (g - exp_avg[j])
        exp_avg_sq[j] += scalars.beta2_complement * (g * g - exp_avg_sq[j])
        denominator = np.sqrt(exp_avg_sq[j]) / scalars.root_correction + scalars.eps
        weights[j] -= scalars.step_size * exp_avg[j] / denominator


@compiled
def _update_decoder_row(decoder, i, gradient, has_unit_norm, scalars):
    """Project the gradient, step, renormalise (unit-norm rows), or only step."""
    row = decoder.value[i]
    if has_unit_norm:
        parallel = dot(gradient, row)
        for j in range(row.size):
            gradient[j] -= parallel * row[j]
    adam(row, decoder.exp_avg[i], decoder.exp_avg_sq[i], gradient, scalars)
    if has_unit_norm:
        norm = np.sqrt(dot(row, row))
        for j in range(row.size):
            row[j] /= norm


@compiled
def _penalty_gradient(gradient, row, coefficient):
    """Add the gradient of coefficient * ||row||; zero at the zero row, autograd's choice."""
    norm = np.sqrt(dot(row, row))
    if norm > 0:
        for j in range(row.size):
            gradient[j] += coefficient * row[j] / norm


@compiled
def _update_feature(decoder, encoder, i, decoder_gradient, encoder_gradient, kind, scalars):
    is_tied, has_unit_norm = kind
    if is_tied:
        for j in range(decoder_gradient.size):
            decoder_gradient[j] += encoder_gradient[j]
    else:
        adam(
            encoder.value[i], encoder.exp_avg[i], encoder.exp_avg_sq[i], encoder_gradient, scalars
        )
    _update_decoder_row(decoder, i, decoder_gradient, has_unit_norm, scalars)


@compiled
def _update_blocks(
    blocks,
    starts,
    entries,
    inputs,
    decoder,
    encoder,
    kind,
    scales,
    scalars,
    b_enc_gradient,
    centre,
):
    """`update_features` for the features of blocks[0]..blocks[1]."""
    residual, centred = inputs
    error_scale, penalty_scale = scales
    d_sae, d_in = decoder.value.shape
    decoder_gradient = np.empty(d_in, decoder.value.dtype)
    encoder_gradient = np.empty(d_in, decoder.value.dtype)
    for i in range(blocks[0] * FEATURE_BLOCK, min(blocks[1] * FEATURE_BLOCK, d_sae)):
        tokens = entries.index[starts[i] : starts[i + 1]]
        f = entries.f[starts[i] : starts[i + 1]]
        gradient = entries.gradient[starts[i] : starts[i + 1]]
        decoder_gradient[:] = 0
        encoder_gradient[:] = 0
        _add_rows(decoder_gradient, f, residual, tokens)
        _add_rows(encoder_gradient, gradient, centred, tokens)
        b_enc_gradient[i] = gradient.sum()
        for j in range(d_in):
            decoder_gradient[j] *= error_scale
            centre[i // FEATURE_BLOCK, j] += b_enc_gradient[i] * encoder.value[i, j]
        if not kind[1]:
            _penalty_gradient(decoder_gradient, decoder.value[i], penalty_scale * f.sum())
        _update_feature(decoder, encoder, i, decoder_gradient, encoder_gradient, kind, scalars)


@compiled_parallel
def update_features(
    parts, starts, entries, inputs, decoder, encoder, kind, scales, scalars, b_enc_gradient, centre
):
    """Gradient, projection, Adam and renormalisation of every feature, in one pass.

    parts are boundaries in blocks of FEATURE_BLOCK features, entries feature-major from starts,
    inputs (residual, centred), kind (is_tied, has_unit_norm). Writes d loss / d b_enc and adds to
    centre (blocks, d_in) each block's sum_i (d loss / d b_enc[i]) * W_enc[i] at the old weights.
    """
    for part in prange(len(parts) - 1):
        _update_blocks(
            parts[part : part + 2],
            starts,
            entries,
            inputs,
            decoder,
            encoder,
            kind,
            scales,
            scalars,
            b_enc_gradient,
            centre,
        )


@compiled_parallel
def update_features_densely(decoder_gradient, encoder_gradient, decoder, encoder, kind, scalars):
    """`update_features` for gradients (d_sae, d_in) that already exist; overwrites them."""
    for i in prange(len(decoder_gradient)):
        _update_feature(
            decoder, encoder, i, decoder_gradient[i], encoder_gradient[i], kind, scalars
        )


@compiled
def _gate_features(part, f, gradient, penalty, scales, sums):
    error_scale, penalty_scale = scales
    f_sum, gradient_sum, n_active = sums
    first, last = part * FEATURE_BLOCK, min((part + 1) * FEATURE_BLOCK, f.shape[1])
    for row in range(len(f)):
        for i in range(first, last):
            is_active = f[row, i] > 0
            slope = error_scale * gradient[row, i] + penalty_scale * penalty[i]
            gradient[row, i] = slope if is_active else f.dtype.type(0)
            f_sum[i] += f[row, i]
            gradient_sum[i] += gradient[row, i]
            n_active[i] += is_active


@compiled_parallel
def gate_gradient(f, gradient, penalty, scales, sums):
    """Turn residual @ W_dec.T (chunk, d_sae), in place, into d loss / d pre-activations.

    Adds to sums (d_sae each): f, that gradient, and the number of active entries.
    """
    for part in prange(-(-f.shape[1] // FEATURE_BLOCK)):
        _gate_features(part, f, gradient, penalty, scales, sums)

"""The CPU step token by token: which entries are active, what they decode to, what they owe.

`activate` turns a chunk of the encoder's product into the entries that matter; `decode` gives all
tokens their residual and every entry the squared error's gradient. No torch here.
"""

from typing import NamedTuple

import numpy as np
from numba import prange, types
from numba.extending import overload

from sparse_coding.kernels.cpu_loops import add_rows, compiled, compiled_parallel, dot


class Screen(NamedTuple):
    """Bounds that pass on whatever may matter (`cpu_screen` says why)."""

    floor: np.ndarray
    """Pre-activations (d_sae) at or below which an entry does not matter."""
    lowest: np.ndarray
    """The product (d_sae) below which nothing is above the floor, but for `margin * norm`."""
    norm: np.ndarray
    margin: np.ndarray
    rounding: np.floating
    """By what part of itself a product may have been rounded."""
    k: int
    """Only the k largest entries of a token matter; 0: all."""


class TokenResults(NamedTuple):
    """One row per token of the batch."""

    n_entries: np.ndarray
    residual: np.ndarray
    """x_hat - x, shape (batch, d_in)"""
    square: np.ndarray
    penalty: np.ndarray


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
def _flag_largest(product, screen, token, b_enc, flags):
    """Flag what may be among the k largest: what may reach a level that k entries surely reach.

    k blocks of features contain an entry whose lower bound is at least the k-th largest of the
    blocks' maxima; so do k entries.
    """
    margin, rounding = screen.margin[token], screen.rounding
    block = 32
    while block > 1 and product.size // block < 4 * screen.k:
        block //= 2
    maxima = np.zeros(-(-product.size // block), screen.norm.dtype)
    for i in range(product.size):
        p = _as_float(product[i])
        surely = p + b_enc[i] - rounding * abs(p) - margin * screen.norm[i]
        maxima[i // block] = max(maxima[i // block], surely)
    rank = maxima.size - screen.k
    level = np.partition(maxima, rank)[rank] if rank > 0 else screen.norm.dtype.type(0)
    for i in range(product.size):
        needed = level - b_enc[i]
        flags[i] = _as_float(product[i]) >= (
            needed - rounding * abs(needed) - margin * screen.norm[i]
        )


@compiled
def _candidates(product, screen, token, b_enc, features):
    """Write the features that may matter on one token; returns their number.

    Flagging is a vectorised pass; the search for the few set flags takes eight at a time.
    """
    flags = np.empty(product.size, np.uint8)
    if screen.k > 0:
        _flag_largest(product, screen, token, b_enc, flags)
    else:
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
def _count_row(row, product, screen, b_enc, n_candidates):
    features = np.empty(product.shape[1] + 1, np.int32)
    n_candidates[row] = _candidates(product[row], screen, row, b_enc, features)


@compiled_parallel
def count_candidates(product, screen, b_enc, n_candidates):
    """Write how many entries of each of the first tokens (chunk, d_sae) the screen passes on."""
    for row in prange(len(product)):
        _count_row(row, product, screen, b_enc, n_candidates)


# ---- activate ------------------------------------------------------------------------------


@compiled
def _keep_above_floor(centred, model, screen, n_candidates, features, f):
    """Keep the candidates whose pre-activation is above the floor at full precision."""
    n = 0
    for k in range(n_candidates):
        i = features[k]
        pre = dot(centred, model.W_enc[i]) + model.b_enc[i]
        if pre > screen.floor[i]:
            features[n] = i
            f[n] = pre
            n += 1
    return n


@compiled
def _keep_from(level, n, features, f):
    """Keep the entries of at least this activation, in their order."""
    kept = 0
    for k in range(n):
        if f[k] >= level:
            features[kept] = features[k]
            f[kept] = f[k]
            kept += 1
    return kept


@compiled
def _activate_row(row, first, product, screen, batch, model, chunk, n_entries):
    token = first + row
    features, f = chunk.index[row], chunk.f[row]
    n = _candidates(product[row], screen, token, model.b_enc, features)
    n = _keep_above_floor(batch.centred[token], model, screen, n, features, f)
    if 0 < screen.k < n:
        n = _keep_from(np.partition(f[:n], n - screen.k)[n - screen.k], n, features, f)
    if model.bandwidth > 0:
        for k in range(n):
            if f[k] <= model.threshold[features[k]]:
                f[k] = 0
    n_entries[row] = n


@compiled_parallel
def activate(first, product, screen, batch, model, chunk, n_entries):
    """For the tokens from `first` on: which entries matter, and their activations.

    product (chunk, d_sae) is the screen's. The entries of a token are the first n_entries[row]
    columns of its row of `chunk` (chunk, d_sae).
    """
    for row in prange(len(product)):
        _activate_row(row, first, product, screen, batch, model, chunk, n_entries)


@compiled
def append_entries(chunk, n_entries, start, by_token):
    """Copy the entries of a chunk's tokens behind by_token[start]; returns the end."""
    end = start
    for row in range(len(n_entries)):
        for k in range(n_entries[row]):
            by_token.index[end] = chunk.index[row, k]
            by_token.f[end] = chunk.f[row, k]
            end += 1
    return end


@compiled
def drop_below(level, by_token, n_entries):
    """Drop all entries of a batch below an activation; returns how many are left."""
    start, end = 0, 0
    for token in range(len(n_entries)):
        last, first_kept = start + n_entries[token], end
        for k in range(start, last):
            if by_token.f[k] >= level:
                by_token.index[end] = by_token.index[k]
                by_token.f[end] = by_token.f[k]
                end += 1
        n_entries[token] = end - first_kept
        start = last
    return end


# ---- decode --------------------------------------------------------------------------------


@compiled
def _decode_row(token, starts, by_token, batch, model, results):
    span = slice(starts[token], starts[token + 1])
    features, f, gradient = by_token.index[span], by_token.f[span], by_token.gradient[span]
    residual = results.residual[token]
    for j in range(residual.size):
        residual[j] = model.b_dec[j] - batch.x[token, j]
    add_rows(residual, f, model.W_dec, features)
    results.square[token] = dot(residual, residual)
    penalty = f.dtype.type(0)
    for k in range(f.size):
        i = features[k]
        penalty += f[k] * batch.penalty[i]
        slope = batch.error_scale * dot(residual, model.W_dec[i])
        gradient[k] = slope + batch.penalty_scale * batch.penalty[i]
    results.penalty[token] = penalty


@compiled_parallel
def decode(starts, by_token, batch, model, results):
    """Residual, squared error and penalty of every token; the loss's gradient by every f.

    A token's entries are those from starts[token] (batch + 1) on.
    """
    for token in prange(len(results.square)):
        _decode_row(token, starts, by_token, batch, model, results)

"""The GPU step's kernels: one program per tile, token or feature, each sum in a fixed order.

Matrices are contiguous and feature-major (row i of W_enc belongs to feature i). Bits mark the
entries (token, feature) that the screen passes on; `pre` and `gradient` (tokens, d_sae) hold
meaningful numbers there and nowhere else. Only Triton here: no torch, no host.
"""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl

# Places in the vector of a step's constants, which live on the device.
STEP_SIZE = tl.constexpr(0)  # lr / (1 - beta1^t)
ROOT_CORRECTION = tl.constexpr(1)  # sqrt(1 - beta2^t)
BETA1_COMPLEMENT = tl.constexpr(2)
BETA2_COMPLEMENT = tl.constexpr(3)
EPS = tl.constexpr(4)
ERROR_SCALE = tl.constexpr(5)  # 2 / batch: times the residual, the error's gradient by x_hat
PENALTY_SCALE = tl.constexpr(6)  # l1_coeff / batch where the penalty is an L1 norm, else 0
STEP_SCALE = tl.constexpr(7)  # l1_coeff / batch where the penalty is an L0, else 0
BANDWIDTH = tl.constexpr(8)  # how near to its threshold an entry teaches it


def compiled(function: Callable) -> triton.runtime.KernelInterface:
    """A kernel or a part of one; unwrapped, because tests wrap functions in type checks."""
    return triton.jit(inspect.unwrap(function))


def factor_dtype(is_cuda: bool) -> tl.dtype:
    """What the screen multiplies: bfloat16, but float32 in Triton's interpreter, which cannot."""
    return tl.bfloat16 if is_cuda else tl.float32


# ---- parts ---------------------------------------------------------------------------------


@compiled
def is_active(pre, threshold):
    """The rule of which entries are active; NaN is, so that a bad batch shows in the loss."""
    return ~(pre <= threshold)


@compiled
def load_rows(matrix, rows, is_listed, columns, width):
    """matrix[rows] (rows, columns), 0 where not listed or beyond the width."""
    pointers = matrix + rows.to(tl.int64)[:, None] * width + columns[None, :]
    return tl.load(pointers, mask=is_listed[:, None] & (columns < width)[None, :], other=0.0)


@compiled
def count_bits(words):
    """How many bits are set in each word (uint32)."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return (words + (words >> 16)) & 0x3F


@compiled
def adam(weights, exp_avg, exp_avg_sq, gradient, at, is_inside, scalars):
    """Adam (Kingma and Ba 2015, algorithm 1) as torch writes it; the weights are returned.

    Both moments are updated in place.
    """
    mean = tl.load(exp_avg + at, mask=is_inside, other=0.0)
    square = tl.load(exp_avg_sq + at, mask=is_inside, other=0.0)
    mean += tl.load(scalars + BETA1_COMPLEMENT) * (gradient - mean)
    square += tl.load(scalars + BETA2_COMPLEMENT) * (gradient * gradient - square)
    tl.store(exp_avg + at, mean, mask=is_inside)
    tl.store(exp_avg_sq + at, square, mask=is_inside)
    denominator = tl.sqrt(square) / tl.load(scalars + ROOT_CORRECTION) + tl.load(scalars + EPS)
    return weights - tl.load(scalars + STEP_SIZE) * mean / denominator


# ---- screen --------------------------------------------------------------------------------


@compiled
def round_rows(rows, rounded, norm, error, width, padded_width, BLOCK: tl.constexpr):
    """Round a row to bfloat16, padded with zeros; norms of the result and of what it lost."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    exact = tl.load(rows + row * width + columns, mask=columns < width, other=0.0)
    near = exact.to(tl.float32).to(tl.bfloat16)
    tl.store(rounded + row * padded_width + columns, near, mask=columns < padded_width)
    near = near.to(tl.float32).to(exact.dtype)
    tl.store(norm + row, tl.sqrt(tl.sum(near * near, 0)))
    tl.store(error + row, tl.sqrt(tl.sum((exact - near) * (exact - near), 0)))


@compiled
def store_bits(flags, words, rows, n_rows, first_bit, n_bits, BITS: tl.constexpr):
    """Pack flags (rows, BITS) into 32-bit words; the first is number first_bit of its row."""
    bits = flags.to(tl.uint32) << (tl.arange(0, BITS) % 32).to(tl.uint32)[None, :]
    packed = tl.sum(tl.reshape(bits, (flags.shape[0], BITS // 32, 32)), 2)
    n_words = tl.cdiv(n_bits, 32)
    places = first_bit // 32 + tl.arange(0, BITS // 32)
    pointers = words + rows.to(tl.int64)[:, None] * n_words + places[None, :]
    mask = (rows < n_rows)[:, None] & (places < n_words)[None, :]
    tl.store(pointers, packed.to(tl.int32), mask=mask)


@compiled
def product_of_tile(
    x, W_enc, tokens, features, padded_d_in,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """x W_enc^T of a tile, from rounded rows; rows beyond the matrices' ends must be readable."""
    columns = tl.arange(0, DEPTH)
    x += tokens.to(tl.int64)[:, None] * padded_d_in + columns[None, :]
    W_enc += features.to(tl.int64)[None, :] * padded_d_in + columns[:, None]
    product = tl.zeros((TOKENS, FEATURES), tl.float32)
    for _ in range(0, padded_d_in, DEPTH):
        product = tl.dot(tl.load(x).to(FACTOR), tl.load(W_enc).to(FACTOR), product)
        x += DEPTH
        W_enc += DEPTH
    return product


@compiled
def peaks(
    x, W_enc, margin, bias, norm, peak, n_tokens, d_sae, padded_d_in,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """A lower bound of the largest pre-activation in each group of features, token by token."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    bound = product_of_tile(
        x, W_enc, tokens, features, padded_d_in, TOKENS, FEATURES, DEPTH, FACTOR
    )
    is_token, is_feature = tokens < n_tokens, features < d_sae
    bound += tl.load(bias + features, mask=is_feature, other=0.0)[None, :]
    reach = tl.load(norm + features, mask=is_feature, other=0.0)[None, :]
    bound -= tl.load(margin + tokens, mask=is_token, other=0.0)[:, None] * reach
    bound = tl.where(is_feature[None, :], bound, -float("inf"))
    largest = tl.max(tl.reshape(bound, (TOKENS, FEATURES // GROUP, GROUP)), 2)
    groups = tl.program_id(1) * (FEATURES // GROUP) + tl.arange(0, FEATURES // GROUP)
    n_groups = tl.cdiv(d_sae, GROUP)
    pointers = peak + tokens.to(tl.int64)[:, None] * n_groups + groups[None, :]
    tl.store(pointers, largest, mask=is_token[:, None] & (groups < n_groups)[None, :])


@compiled
def screen(
    x, W_enc, margin, lowest, bias, norm, floor, by_token, by_feature, n_tokens, d_sae,
    padded_d_in,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr, DEPTH: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Flag the entries of a tile that may be active, as words of 32 features and of 32 tokens.

    The product itself is not kept.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    product = product_of_tile(
        x, W_enc, tokens, features, padded_d_in, TOKENS, FEATURES, DEPTH, FACTOR
    )
    is_token, is_feature = tokens < n_tokens, features < d_sae
    edge = tl.load(floor + tokens, mask=is_token, other=0.0)[:, None]
    edge -= tl.load(bias + features, mask=is_feature, other=0.0)[None, :]
    edge = tl.maximum(edge, tl.load(lowest + features, mask=is_feature, other=0.0)[None, :])
    reach = tl.load(norm + features, mask=is_feature, other=0.0)[None, :]
    edge -= tl.load(margin + tokens, mask=is_token, other=0.0)[:, None] * reach
    flags = ~(product < edge) & is_token[:, None] & is_feature[None, :]
    store_bits(flags, by_token, tokens, n_tokens, tl.program_id(1) * FEATURES, d_sae, FEATURES)
    store_bits(
        tl.trans(flags), by_feature, features, d_sae, tl.program_id(0) * TOKENS, n_tokens, TOKENS
    )


@compiled
def list_bits(words, listed, n_listed, n_bits, BLOCK: tl.constexpr):
    """List the set bits of a row of n_bits in ascending order, and count them."""
    row = tl.program_id(0).to(tl.int64)
    n_words = tl.cdiv(n_bits, 32)
    listed += row * n_bits
    end = 0
    for first in range(0, n_words, BLOCK):
        places = first + tl.arange(0, BLOCK)
        rest = tl.load(words + row * n_words + places, mask=places < n_words, other=0)
        rest = rest.to(tl.uint32, bitcast=True)
        counts = count_bits(rest).to(tl.int32)
        slots = end + tl.cumsum(counts, 0) - counts
        end += tl.sum(counts, 0)
        for _ in range(tl.max(counts, 0)):
            below = (rest ^ (rest - 1)) >> 1  # ones under each word's lowest set bit
            bit = count_bits(below).to(tl.int32)
            tl.store(listed + slots, places * 32 + bit, mask=rest != 0)
            slots += 1
            rest &= rest - 1
    tl.store(n_listed + row, end)


# ---- token by token ------------------------------------------------------------------------


@compiled
def pre_activate(
    centred, W_enc, b_enc, listed, n_listed, pre, d_in, d_sae,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The pre-activations of one token's listed features, at full precision."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row = tl.load(centred + token * d_in + columns, mask=columns < d_in, other=0.0)
    n = tl.load(n_listed + token)
    for first in range(0, n, ROWS):
        slots = first + tl.arange(0, ROWS)
        is_listed = slots < n
        features = tl.load(listed + token * d_sae + slots, mask=is_listed, other=0)
        weights = load_rows(W_enc, features, is_listed, columns, d_in)
        value = tl.sum(weights * row[None, :], 1) + tl.load(b_enc + features)
        tl.store(pre + token * d_sae + features, value, mask=is_listed)


@compiled
def order(value):
    """Integers that are ordered as floats are, NaN above all."""
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        key = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        key = tl.where(value == value, key, 0x7FFFFFFFFFFFFFFF)
    else:
        bits = value.to(tl.int32, bitcast=True)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = tl.where(value == value, key, 0x7FFFFFFF)
    return key


@compiled
def load_keys(listed, n, pre, first, BLOCK: tl.constexpr):
    """Places in a token's row of `pre` of its listed features, their keys, and which exist."""
    slots = first + tl.arange(0, BLOCK)
    is_listed = slots < n
    features = tl.load(listed + slots, mask=is_listed, other=0)
    keys = order(tl.load(pre + features, mask=is_listed, other=-float("inf")))
    return features, keys, is_listed


@compiled
def silence_all_but(listed, n_listed, pre, k, d_sae, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """Leave a token its k largest listed pre-activations, -inf at the others; ties: the first.

    The k-th largest is found bit by bit, from the highest: a bit belongs to it if at least k keys
    reach what the bits so far make.
    """
    token = tl.program_id(0).to(tl.int64)
    listed += token * d_sae
    pre += token * d_sae
    n = tl.load(n_listed + token)
    if n > k:
        key = order(tl.load(pre))
        one = (key ^ key) + 1
        edge = one << (BITS - 1)  # the lowest integer
        for place in range(BITS):
            candidate = edge ^ (one << (BITS - 1 - place))
            n_above = 0
            for first in range(0, n, BLOCK):
                features, keys, is_listed = load_keys(listed, n, pre, first, BLOCK)
                n_above += tl.sum(((keys >= candidate) & is_listed).to(tl.int32), 0)
            edge = tl.where(n_above >= k, candidate, edge)
        n_above = 0
        for first in range(0, n, BLOCK):
            features, keys, is_listed = load_keys(listed, n, pre, first, BLOCK)
            n_above += tl.sum(((keys > edge) & is_listed).to(tl.int32), 0)
        n_tied = 0
        for first in range(0, n, BLOCK):
            features, keys, is_listed = load_keys(listed, n, pre, first, BLOCK)
            is_tied = ((keys == edge) & is_listed).to(tl.int32)
            is_late = n_tied + tl.cumsum(is_tied, 0) > k - n_above
            is_silent = (keys < edge) | ((is_tied == 1) & is_late)
            tl.store(pre + features, -float("inf"), mask=is_listed & is_silent)
            n_tied += tl.sum(is_tied, 0)


@compiled
def decode(
    x, b_dec, W_dec, threshold, penalty, scalars, listed, n_listed, residual, pre, gradient,
    square, d_in, d_sae, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One token's residual x_hat - x, its square, and the loss's gradient by listed features."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < d_in
    row = tl.load(b_dec + columns, mask=is_inside, other=0.0)
    row -= tl.load(x + token * d_in + columns, mask=is_inside, other=0.0)
    n = tl.load(n_listed + token)
    for first in range(0, n, ROWS):
        slots = first + tl.arange(0, ROWS)
        is_listed = slots < n
        features = tl.load(listed + token * d_sae + slots, mask=is_listed, other=0)
        value = tl.load(pre + token * d_sae + features, mask=is_listed, other=0.0)
        f = tl.where(is_active(value, tl.load(threshold + features)), value, 0.0)
        row += tl.sum(f[:, None] * load_rows(W_dec, features, is_listed, columns, d_in), 0)
    tl.store(residual + token * d_in + columns, row, mask=is_inside)
    tl.store(square + token, tl.sum(row * row, 0))
    row *= tl.load(scalars + ERROR_SCALE)
    for first in range(0, n, ROWS):
        slots = first + tl.arange(0, ROWS)
        is_listed = slots < n
        features = tl.load(listed + token * d_sae + slots, mask=is_listed, other=0)
        weights = load_rows(W_dec, features, is_listed, columns, d_in)
        slope = tl.load(scalars + PENALTY_SCALE) * tl.load(penalty + features)
        slope += tl.sum(weights * row[None, :], 1)
        tl.store(gradient + token * d_sae + features, slope, mask=is_listed)


# ---- feature by feature --------------------------------------------------------------------


@compiled
def threshold_gradient(pre, gradient, threshold, scalars):
    """JumpReLU's straight-through estimate, per entry (2407.14435, equations 11 and 12)."""
    width = tl.load(scalars + BANDWIDTH)
    slope = -(threshold * gradient + tl.load(scalars + STEP_SCALE)) / width
    return tl.where(tl.abs(pre - threshold) < width / 2, slope, 0.0)


@compiled
def add_to(vector, at, value):
    tl.store(vector + at, tl.load(vector + at) + value)


@compiled
def add_to_row(matrix, feature, columns, width, value):
    pointers = matrix + feature * width + columns
    value += tl.load(pointers, mask=columns < width, other=0.0)
    tl.store(pointers, value, mask=columns < width)


@compiled
def accumulate(
    centred, threshold, scalars, listed, n_listed, residual, pre, gradient,
    W_dec_sum, W_enc_sum, f_sum, b_enc_sum, threshold_sum, n_active,
    n_tokens, d_in, d_sae, BLOCK: tl.constexpr, ROWS: tl.constexpr, LEARNS_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Add the gradients of one feature from its listed tokens; also sums over its activity."""
    feature = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    edge, n = tl.load(threshold + feature), tl.load(n_listed + feature)
    decoder = tl.zeros((BLOCK,), centred.dtype.element_ty)
    encoder = tl.zeros((BLOCK,), centred.dtype.element_ty)
    f_total = tl.zeros((ROWS,), centred.dtype.element_ty)
    slope_total, edge_total = f_total, f_total
    n_total = tl.zeros((ROWS,), tl.int64)
    for first in range(0, n, ROWS):
        slots = first + tl.arange(0, ROWS)
        is_listed = slots < n
        tokens = tl.load(listed + feature * n_tokens + slots, mask=is_listed, other=0)
        at = tokens.to(tl.int64) * d_sae + feature
        value = tl.load(pre + at, mask=is_listed, other=-float("inf"))
        slope = tl.load(gradient + at, mask=is_listed, other=0.0)
        if LEARNS_THRESHOLD:
            edge_total += threshold_gradient(value, slope, edge, scalars)
        active = is_active(value, edge)
        f, slope = tl.where(active, value, 0.0), tl.where(active, slope, 0.0)
        decoder += tl.sum(f[:, None] * load_rows(residual, tokens, is_listed, columns, d_in), 0)
        encoder += tl.sum(slope[:, None] * load_rows(centred, tokens, is_listed, columns, d_in), 0)
        f_total, slope_total, n_total = f_total + f, slope_total + slope, n_total + active
    add_to_row(W_dec_sum, feature, columns, d_in, decoder * tl.load(scalars + ERROR_SCALE))
    add_to_row(W_enc_sum, feature, columns, d_in, encoder)
    add_to(f_sum, feature, tl.sum(f_total, 0))
    add_to(b_enc_sum, feature, tl.sum(slope_total, 0))
    add_to(n_active, feature, tl.sum(n_total, 0))
    if LEARNS_THRESHOLD:
        add_to(threshold_sum, feature, tl.sum(edge_total, 0))


@compiled
def update_features(
    W_dec, W_dec_avg, W_dec_avg_sq, W_enc, W_enc_avg, W_enc_avg_sq, W_dec_sum, W_enc_sum, f_sum,
    scalars, d_in, BLOCK: tl.constexpr, IS_TIED: tl.constexpr, HAS_UNIT_NORM: tl.constexpr,
):  # fmt: skip
    """Project the decoder's gradient of one feature, Adam on both rows, renormalise."""
    feature = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < d_in
    at = feature.to(tl.int64) * d_in + columns
    row = tl.load(W_dec + at, mask=is_inside, other=0.0)
    decoder = tl.load(W_dec_sum + at, mask=is_inside, other=0.0)
    encoder = tl.load(W_enc_sum + at, mask=is_inside, other=0.0)
    if IS_TIED:
        decoder += encoder
    else:
        weights = tl.load(W_enc + at, mask=is_inside, other=0.0)
        weights = adam(weights, W_enc_avg, W_enc_avg_sq, encoder, at, is_inside, scalars)
        tl.store(W_enc + at, weights, mask=is_inside)
    if HAS_UNIT_NORM:
        decoder -= tl.sum(decoder * row, 0) * row
    else:  # the penalty's gradient by the row; at a zero row zero, autograd's choice
        norm = tl.sqrt(tl.sum(row * row, 0))
        slope = tl.load(scalars + PENALTY_SCALE) * tl.load(f_sum + feature)
        decoder += tl.where(norm > 0, slope / norm, 0.0) * row
    row = adam(row, W_dec_avg, W_dec_avg_sq, decoder, at, is_inside, scalars)
    if HAS_UNIT_NORM:
        row /= tl.sqrt(tl.sum(row * row, 0))
    tl.store(W_dec + at, row, mask=is_inside)


@compiled
def update_vector(
    vector, exp_avg, exp_avg_sq, gradient, scalars, size, BLOCK: tl.constexpr
):  # fmt: skip
    """Adam on one block of a vector."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_inside = at < size
    weights = tl.load(vector + at, mask=is_inside, other=0.0)
    slope = tl.load(gradient + at, mask=is_inside, other=0.0)
    weights = adam(weights, exp_avg, exp_avg_sq, slope, at, is_inside, scalars)
    tl.store(vector + at, weights, mask=is_inside)

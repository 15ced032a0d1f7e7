"""Do two dictionaries hold the same features? Cosines of directions, correlations of activations.

Mathematics alone: no models, no files. Every quantity has its null here, because a maximum over
thousands of candidates is large for unrelated dictionaries too: the larger the dictionary and the
narrower the layer, the larger.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from numba import get_num_threads, prange
from scipy.optimize import linear_sum_assignment
from scipy.special import stdtrit
from torch import Tensor

from sparse_coding.kernels.cpu_loops import compiled, compiled_parallel
from sparse_coding.metrics import Interval, interval

COSINE_ROWS = 2048  # rows of a cosine matrix at once
CORRELATION_ROWS = 256  # rows of a correlation matrix at once


class Best(NamedTuple):
    """For each feature of one dictionary, the most similar one of the other."""

    value: Float[np.ndarray, " n"]
    partner: Int[np.ndarray, " n"]


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Rows divided by their norms; rows of zeros stay."""
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)


def max_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> tuple[Best, Best]:
    """The largest signed cosine of each row of `a` with a row of `b`, and of each of `b` with `a`.

    The mean of the values is the mean max cosine similarity, MMCS (Sharkey et al. 2022). A
    direction and its opposite are different features: no absolute value is taken. Blockwise,
    never n x m at once.
    """
    a, b = unit_rows(a), unit_rows(b)
    of_a, of_b = [], [a.new_full((len(b),), -2.0), torch.zeros(len(b), dtype=torch.int64)]
    for i, part in enumerate(a.split(COSINE_ROWS)):
        cosine = part @ b.T
        of_a.append(cosine.max(dim=1))
        value, partner = cosine.max(dim=0)
        better = value > of_b[0]
        of_b[0] = torch.where(better, value, of_b[0])
        of_b[1] = torch.where(better, partner + i * COSINE_ROWS, of_b[1])
    values, partners = zip(*of_a, strict=True)
    return (
        Best(torch.cat(values).numpy(), torch.cat(partners).numpy()),
        Best(of_b[0].numpy(), of_b[1].numpy()),
    )


def one_to_one(similarity: Float[np.ndarray, "n m"]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the matching with the largest sum (Hungarian): min(n, m) pairs."""
    return linear_sum_assignment(similarity, maximize=True)


def matched_cosine(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, " k"]:
    """Cosines of the best one-to-one matching of rows, k = min(n, m) of them.

    Their mean is the pairwise mean correlation coefficient, PW-MCC (Song et al. 2025, arXiv
    2505.20254), with signed cosines. Holds the n x m matrix in float32.
    """
    similarity = (unit_rows(a) @ unit_rows(b).T).numpy()
    rows, columns = one_to_one(similarity)
    return torch.from_numpy(similarity[rows, columns])


def random_directions(
    like: Float[Tensor, "n d"], generator: torch.Generator, keep_covariance: bool = False
) -> Float[Tensor, "n d"]:
    """As many random Gaussian rows as `like` has: the null of every cosine.

    With `keep_covariance` they are drawn with the mean and covariance of the unit rows of `like`,
    which explains the similarity that comes from preferring the same few dimensions.
    """
    rows = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    if not keep_covariance:
        return rows
    units = unit_rows(like).double()
    values, vectors = torch.linalg.eigh(torch.cov(units.T, correction=0))
    root = vectors * values.clamp_min(0).sqrt()
    return (rows.double() @ root.T + units.mean(dim=0)).to(like.dtype)


class Codes(NamedTuple):
    """Feature activations of some tokens, of which most are 0: compressed sparse rows."""

    starts: np.ndarray
    """(tokens + 1,) int64: entries of token t are starts[t] : starts[t + 1]."""
    features: np.ndarray
    """(entries,) int32."""
    values: np.ndarray
    """(entries,) float32."""

    @property
    def n_tokens(self) -> int:
        return len(self.starts) - 1

    def take(self, tokens: Int[np.ndarray, " kept"]) -> "Codes":
        """These tokens, in this order."""
        counts = np.diff(self.starts)[tokens]
        starts = _offsets(counts)
        entries = np.repeat(self.starts[tokens] - starts[:-1], counts) + np.arange(starts[-1])
        return Codes(starts, self.features[entries], self.values[entries])

    def keep(self, features: Bool[np.ndarray, " d_sae"]) -> "Codes":
        """These features alone, numbered anew from 0 in their order."""
        kept = features[self.features]
        number = (np.cumsum(features) - 1).astype(np.int32)
        starts = _offsets(kept)[self.starts]
        return Codes(starts, number[self.features[kept]], self.values[kept])


def _offsets(counts: np.ndarray) -> Int[np.ndarray, " n_plus_1"]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def sparse_codes(f: Float[Tensor, "tokens d_sae"]) -> Codes:
    """The entries of `f` that are not 0."""
    tokens, features = f.nonzero(as_tuple=True)
    counts = tokens.bincount(minlength=len(f))
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = f[tokens, features].float()
    return Codes(starts.cpu().numpy(), features.int().cpu().numpy(), values.cpu().numpy())


def join(codes: Iterable[Codes]) -> Codes:
    """Tokens of several codes, one after the other."""
    codes = list(codes)
    return Codes(
        _offsets(np.concatenate([np.diff(one.starts) for one in codes])),
        np.concatenate([one.features for one in codes]),
        np.concatenate([one.values for one in codes]),
    )


def shift(codes: Codes, n_tokens: int) -> Codes:
    """The same tokens, `n_tokens` later and around the end: the null of every correlation.

    Each feature keeps its activations and their order, but meets other text.
    """
    n = n_tokens % codes.n_tokens
    return codes.take(np.roll(np.arange(codes.n_tokens), n))


class Moments(NamedTuple):
    """Per feature, over the tokens counted so far."""

    sum: Float64[np.ndarray, " d_sae"]
    square: Float64[np.ndarray, " d_sae"]
    n_active: np.ndarray


class Correlation:
    """Pearson correlations of every feature of A with every feature of B, streamed over tokens.

    A token adds L0_A x L0_B products to a (d_sae_A, d_sae_B) float64 matrix, so the time grows
    with the active features and not with the size of the dictionaries: 4 x 10^5 times fewer
    products than the dense product at 16,384 features of which 26 are active. Sums of products in
    float64 are exact to about 1e-12; activations are float32. The matrix is `n_bytes` large.
    """

    def __init__(self, d_sae_a: int, d_sae_b: int) -> None:
        self.products = np.zeros((d_sae_a, d_sae_b))
        self.a, self.b = _no_moments(d_sae_a), _no_moments(d_sae_b)
        self.n_tokens = 0

    @staticmethod
    def n_bytes(d_sae_a: int, d_sae_b: int) -> int:
        """Memory of one, in bytes; twice that while `matrix` is made."""
        return 8 * d_sae_a * d_sae_b

    def add(self, a: Codes, b: Codes) -> None:
        """Count tokens; token t of `a` and of `b` are the same place in the text."""
        if a.n_tokens != b.n_tokens:
            raise ValueError(f"{a.n_tokens} tokens of A cannot be paired with {b.n_tokens} of B")
        _add_products(self.products, *a, *b, get_num_threads())
        for moments, codes in ((self.a, a), (self.b, b)):
            _add_moments(moments, codes)
        self.n_tokens += a.n_tokens

    def matrix(self, rows: slice = slice(None)) -> Float64[np.ndarray, "rows d_sae_b"]:
        """The correlations of these features of A; nan for a feature that never varied."""
        n = self.n_tokens
        with np.errstate(divide="ignore", invalid="ignore"):
            covariance = self.products[rows] - np.outer(self.a.sum[rows], self.b.sum / n)
            covariance /= _deviation(self.a, n)[rows, None]
            covariance /= _deviation(self.b, n)[None, :]
        return covariance

    def best(self) -> tuple[Best, Best]:
        """For each feature of A the B most correlated with it, and for each of B the A.

        Correlation nan and partner 0 for a feature that never varied.
        """
        n_a, n_b = self.products.shape
        of_a = Best(np.full(n_a, -np.inf), np.zeros(n_a, np.int64))
        of_b = Best(np.full(n_b, -np.inf), np.zeros(n_b, np.int64))
        for start in range(0, n_a, CORRELATION_ROWS):
            rows = slice(start, min(start + CORRELATION_ROWS, n_a))
            _take_best(self.matrix(rows), start, *of_a, *of_b)
        for best in (of_a, of_b):
            best.value[np.isneginf(best.value)] = np.nan
        return of_a, of_b


@compiled
def _take_best(correlation, start, a_value, a_partner, b_value, b_partner):
    for i in range(correlation.shape[0]):
        for j in range(correlation.shape[1]):
            r = correlation[i, j]  # a comparison with nan is false
            if r > a_value[start + i]:
                a_value[start + i], a_partner[start + i] = r, j
            if r > b_value[j]:
                b_value[j], b_partner[j] = r, start + i


def _no_moments(d_sae: int) -> Moments:
    return Moments(np.zeros(d_sae), np.zeros(d_sae), np.zeros(d_sae, np.int64))


def _add_moments(moments: Moments, codes: Codes) -> None:
    n = len(moments.sum)
    values = codes.values.astype(np.float64)
    moments.sum[:] += np.bincount(codes.features, values, minlength=n)
    moments.square[:] += np.bincount(codes.features, values**2, minlength=n)
    moments.n_active[:] += np.bincount(codes.features, minlength=n)


def _deviation(moments: Moments, n: int) -> Float64[np.ndarray, " d_sae"]:
    """Square root of the summed squared deviations; nan where it is 0."""
    deviation = np.sqrt(np.maximum(moments.square - moments.sum**2 / n, 0))
    return np.where(deviation > 0, deviation, np.nan)


@compiled
def _add_part(
    products, a_starts, a_features, a_values, b_starts, b_features, b_values, part, parts
):
    """One thread's rows of `products`: those whose number leaves the remainder `part`."""
    for t in range(len(a_starts) - 1):
        for i in range(a_starts[t], a_starts[t + 1]):
            if a_features[i] % parts == part:
                value = np.float64(a_values[i])
                row = products[a_features[i]]
                for j in range(b_starts[t], b_starts[t + 1]):
                    row[b_features[j]] += value * b_values[j]


@compiled_parallel
def _add_products(products, a_starts, a_features, a_values, b_starts, b_features, b_values, parts):
    for part in prange(parts):
        _add_part(
            products, a_starts, a_features, a_values, b_starts, b_features, b_values, part, parts
        )


class PairCorrelation(NamedTuple):
    """Correlations of given pairs of features."""

    value: Float64[np.ndarray, " n"]
    """Of each pair over all tokens; nan where one never varied."""
    mean: Interval
    """Over the pairs, with its 95 % interval over groups of tokens."""


def correlation_of_pairs(
    a: Codes, b: Codes, partner: Int[np.ndarray, " n"], group: Int[np.ndarray, " tokens"]
) -> PairCorrelation:
    """Pearson correlation of feature i of A with feature `partner[i]` of B.

    Choose partners on other tokens than these, or the mean is too high by their choice. `group`
    (0 ..) is the document of each token. The interval is the jackknife's, leaving out one group
    at a time, with Student's t: a bootstrap of whole documents loses features of few documents,
    whose correlations are not like the others', and its percentiles lie beside the estimate.
    Holds 7 x groups x n sums in float64.
    """
    n, n_groups, d_sae_b = len(partner), int(group.max()) + 1, int(partner.max()) + 1
    counts = np.bincount(group, minlength=n_groups).astype(float)
    of_a = [np.zeros((n_groups, n)) for _ in range(3)]
    of_b = [np.zeros((n_groups, d_sae_b)) for _ in range(2)]
    _add_pairs(*a, *b, partner, group, *of_a, *of_b)
    sums = [*of_a, *(one[:, partner] for one in of_b)]
    totals = [one.sum(axis=0) for one in (counts, *sums)]
    value = _pearson(*totals)
    without = [
        _mean(
            _pearson(*(total - one[g] for total, one in zip(totals, (counts, *sums), strict=True)))
        )
        for g in range(n_groups)
    ]
    return PairCorrelation(value, _jackknife(_mean(value), np.array(without)))


def _mean(values: Float64[np.ndarray, " n"]) -> float:
    """Over what is not nan."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _jackknife(value: float, without: Float64[np.ndarray, " groups"]) -> Interval:
    """Estimate and t interval from the estimates that each leave out one group."""
    n = len(without)
    variance = (n - 1) / n * np.sum((without - without.mean()) ** 2)
    half = stdtrit(n - 1, 0.975) * math.sqrt(variance) if n > 1 else math.nan
    return Interval(value, value - half, value + half)


def _pearson(n, a, a_square, product, b, b_square):
    """From sums over n tokens, one entry a pair."""
    with np.errstate(divide="ignore", invalid="ignore"):
        variances = (a_square - a**2 / n) * (b_square - b**2 / n)
        return np.where(variances > 0, (product - a * b / n) / np.sqrt(variances), np.nan)


@compiled
def _add_pairs(
    a_starts, a_features, a_values, b_starts, b_features, b_values, partner, group,
    a_sum, a_square, product, b_sum, b_square,
):  # fmt: skip
    now = np.zeros(b_sum.shape[1], np.float64)  # B's activations at one token
    for t in range(len(a_starts) - 1):
        g = group[t]
        for j in range(b_starts[t], b_starts[t + 1]):
            if b_features[j] < len(now):
                now[b_features[j]] = b_values[j]
                b_sum[g, b_features[j]] += b_values[j]
                b_square[g, b_features[j]] += float(b_values[j]) ** 2
        for i in range(a_starts[t], a_starts[t + 1]):
            feature, value = a_features[i], float(a_values[i])
            a_sum[g, feature] += value
            a_square[g, feature] += value**2
            product[g, feature] += value * now[partner[feature]]
        for j in range(b_starts[t], b_starts[t + 1]):
            if b_features[j] < len(now):
                now[b_features[j]] = 0.0


def bootstrap_mean(values: Float[np.ndarray, " n"], n_draws: int = 1000) -> Interval:
    """Mean with its 95 % interval over features, which are what is drawn; nan are left out."""
    values = values[~np.isnan(values)].astype(np.float64)
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    random = np.random.default_rng(0)
    drawn = [values[random.integers(n, size=n)].mean() for _ in range(n_draws)]
    return interval(torch.tensor([values.mean(), *drawn]))

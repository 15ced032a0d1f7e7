"""What a dictionary keeps and loses on held-out activations, as sums that are divided once.

Everything is accumulated in float64 on the CPU, one row of sums per document: means over any set
of documents, and bootstrap intervals over documents, follow without another pass.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import ndtri, stdtrit
from torch import Tensor

from sparse_coding.dictionary import Dictionary


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values, two or more, with Student's t interval."""
    n, mean = len(values), statistics.fmean(values)
    half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def share_interval(n_hits: int, n: int) -> Interval:
    """A share of n independent trials with Wilson's score interval (1927); nan for none."""
    if n == 0:
        return Interval(math.nan, math.nan, math.nan)
    z = float(ndtri(0.975))
    centre = (n_hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(n_hits * (n - n_hits) / n + z * z / 4)
    return Interval(n_hits / n, max(0.0, centre - half), min(1.0, centre + half))


def columns(name: str, estimate: Interval) -> dict[str, float | None]:
    """`name`, `name_low`, `name_high` of a results row; None for what is undefined (0 / 0)."""
    named = zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True)
    return {key: value if math.isfinite(value) else None for key, value in named}


ROW_SUMS = ("n_active", "l1", "cosine", "l2_ratio", "x_hat_square", "x_dot_x_hat")


class ReconstructionSums:
    """Streaming sums of what one dictionary does to rows of activations.

    `squared_error[w, document]` weighs dimension d of the error by `dimension_weights[w, d]` (a
    row of ones alone by default); `rows[name][document]` holds the sums of `ROW_SUMS`;
    `l0_counts[n]` says on how many rows n features were active. A feature is active where its
    activation is not 0. What does not depend on the dictionary is in `ActivationSums`.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        n_documents: int,
        dimension_weights: Float[Tensor, "weightings d_in"] | None = None,
    ) -> None:
        self.dictionary = dictionary
        device, self.d_in = dictionary.W_dec.device, dictionary.d_out
        weights = torch.ones(1, self.d_in) if dimension_weights is None else dimension_weights
        self.dimension_weights = weights.to(device)
        self.norms = dictionary.W_dec.detach().norm(dim=1)
        self.squared_error = torch.zeros(len(weights), n_documents, dtype=torch.float64)
        self.rows = {name: torch.zeros(n_documents, dtype=torch.float64) for name in ROW_SUMS}
        self.n_firings = torch.zeros(dictionary.d_sae, dtype=torch.int64, device=device)
        self.l0_counts = torch.zeros(dictionary.d_sae + 1, dtype=torch.int64)

    @torch.no_grad()
    def add(
        self,
        x: Float[Tensor, "rows d_in"],
        document: Int[Tensor, " rows"],
        target: Float[Tensor, "rows d_out"] | None = None,
    ) -> None:
        """Count rows of raw activations; `document[r]` is the document of row r.

        `target`: of a transcoder, what it should give for x; all but L0 is then of the target.
        """
        f = self.dictionary.encode(x)
        x_hat = self.dictionary.decode(f)
        x = x if target is None else target
        active = f != 0
        n_active = active.sum(dim=1)
        size, x_hat_square = x.norm(dim=1), x_hat.square().sum(dim=1)
        dot = (x * x_hat).sum(dim=1)
        smallest = torch.finfo(x.dtype).tiny
        values = {
            "n_active": n_active,
            "l1": f.abs() @ self.norms,
            "cosine": dot / (size * x_hat_square.sqrt()).clamp_min(smallest),
            "l2_ratio": x_hat_square.sqrt() / size.clamp_min(smallest),
            "x_hat_square": x_hat_square,
            "x_dot_x_hat": dot,
        }
        document = document.cpu()
        for name, sums in self.rows.items():
            sums.index_add_(0, document, values[name].cpu().double())
        errors = (x - x_hat).square() @ self.dimension_weights.T
        self.squared_error.index_add_(1, document, errors.T.cpu().double())
        self.n_firings += active.sum(dim=0)
        self.l0_counts += n_active.cpu().bincount(minlength=len(self.l0_counts))


class ActivationSums:
    """Per document: rows, sum of x and of its weighted squares, from which variances follow.

    `dimension_weights` as in `ReconstructionSums`.
    """

    def __init__(
        self,
        d_in: int,
        n_documents: int,
        dimension_weights: Float[Tensor, "weightings d_in"] | None = None,
    ) -> None:
        weights = torch.ones(1, d_in) if dimension_weights is None else dimension_weights
        self.dimension_weights = weights.cpu().double()
        self.n = torch.zeros(n_documents, dtype=torch.float64)
        self.x = torch.zeros(n_documents, d_in, dtype=torch.float64)
        self.square = torch.zeros(len(weights), n_documents, dtype=torch.float64)

    def add(self, x: Float[Tensor, "rows d_in"], document: Int[Tensor, " rows"]) -> None:
        """Count rows of raw activations."""
        x, document = x.cpu().double(), document.cpu()
        self.n.index_add_(0, document, torch.ones_like(document, dtype=torch.float64))
        self.x.index_add_(0, document, x)
        self.square.index_add_(1, document, (x.square() @ self.dimension_weights.T).T)

    def total_variance(
        self, weights: Float[Tensor, "draws documents"], weighting: int = 0
    ) -> Float[Tensor, " draws"]:
        """Sum over rows and dimensions of w_d (x_d - mean_d)^2, documents counted `weights` times.

        w is row `weighting` of `dimension_weights`; the mean is that of the counted rows.
        """
        square_of_sum = (weights @ self.x).square() @ self.dimension_weights[weighting]
        return weights @ self.square[weighting] - square_of_sum / (weights @ self.n)


def bootstrap_weights(
    present: Bool[Tensor, " documents"], n_draws: int, generator: torch.Generator
) -> Float[Tensor, "draws_plus_1 documents"]:
    """How often each document counts: once in row 0 (the estimate), resampled in the others.

    Only documents that are `present` (have rows) are drawn; the others count 0.
    """
    documents = present.nonzero().flatten()
    drawn = documents[
        torch.randint(len(documents), (n_draws, len(documents)), generator=generator)
    ]
    weights = torch.zeros(n_draws + 1, len(present), dtype=torch.float64)
    weights[0, documents] = 1.0
    weights[1:].scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return weights


def interval(draws: Float[Tensor, " draws"]) -> Interval:
    """Estimate (draw 0) and the 2.5 and 97.5 percentiles of the bootstrap draws after it."""
    low, high = draws[1:].quantile(torch.tensor([0.025, 0.975], dtype=draws.dtype)).tolist()
    return Interval(draws[0].item(), low, high)


def fvu(
    reconstruction: ReconstructionSums,
    activations: ActivationSums,
    weights: Float[Tensor, "draws documents"],
    weighting: int = 0,
) -> Interval:
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2.

    The mean is that of the same rows. In [0, inf): 0 iff x_hat == x, 1 for x_hat = mean. Both
    sums weigh dimensions by row `weighting` of the sums' `dimension_weights`.
    """
    squared_error = reconstruction.squared_error[weighting]
    return interval((weights @ squared_error) / activations.total_variance(weights, weighting))


def mean_per_row(
    sums: Float[Tensor, " documents"],
    n: Float[Tensor, " documents"],
    weights: Float[Tensor, "draws documents"],
) -> Interval:
    """Mean of a per-row quantity over all rows, from its per-document sums."""
    return interval((weights @ sums) / (weights @ n))


def dead_upper_bound(n_rows: int) -> float:
    """Highest firing rate that a feature silent on n rows may have, at 95 % confidence: 3 / n."""
    return 3.0 / n_rows


def density_histogram(
    n_firings: Int[Tensor, " d_sae"], n_rows: int, bin_width: float = 0.25
) -> list[dict[str, Any]]:
    """Histogram of log10(firing rate) in long form; edges of None count the silent features."""
    n_bins = math.ceil(math.log10(n_rows) / bin_width)
    edges = [-(n_bins - i) * bin_width for i in range(n_bins + 1)]
    rates = (n_firings[n_firings > 0].cpu().double() / n_rows).log10()
    # a rate of exactly 1 belongs to the last bin
    bins = ((rates - edges[0]) / bin_width).long().clamp(0, n_bins - 1)
    counts = torch.bincount(bins, minlength=n_bins).tolist()
    edges_and_counts = [(None, None, int((n_firings == 0).sum()))]
    edges_and_counts += zip(edges[:-1], edges[1:], counts, strict=True)
    return [
        {"log10_density_low": low, "log10_density_high": high, "n_features": count,
         "n_tokens": n_rows}
        for low, high, count in edges_and_counts
    ]  # fmt: skip

"""What a dictionary keeps and loses on held-out activations, as sums that are divided once.

Everything is accumulated in float64 on the CPU, one row of sums per document: means over any set
of documents, and bootstrap intervals over documents, follow without another pass.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_coding.dictionary import Dictionary


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float


class ReconstructionSums:
    """Streaming sums for l0, squared error and firing counts of one dictionary.

    `document` indices are 0 .. n_documents - 1. The variance's own sums do not depend on the
    dictionary: see `ActivationSums`.
    """

    def __init__(self, dictionary: Dictionary, n_documents: int) -> None:
        self.dictionary = dictionary
        self.squared_error = torch.zeros(n_documents, dtype=torch.float64)
        self.n_active = torch.zeros(n_documents, dtype=torch.float64)
        device = dictionary.W_dec.device
        self.n_firings = torch.zeros(dictionary.d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, x: Float[Tensor, "rows d_in"], document: Int[Tensor, " rows"]) -> None:
        """Count rows of raw activations; `document[r]` is the document of row r."""
        f = self.dictionary.encode(x)
        active = f > 0
        error = (x - self.dictionary.decode(f)).square().sum(dim=1)
        document = document.cpu()
        self.squared_error.index_add_(0, document, error.cpu().double())
        self.n_active.index_add_(0, document, active.sum(dim=1).cpu().double())
        self.n_firings += active.sum(dim=0)


class ActivationSums:
    """Per document: rows, sum of x and sum of ||x||^2, from which any variance follows."""

    def __init__(self, d_in: int, n_documents: int) -> None:
        self.n = torch.zeros(n_documents, dtype=torch.float64)
        self.x = torch.zeros(n_documents, d_in, dtype=torch.float64)
        self.square = torch.zeros(n_documents, dtype=torch.float64)

    def add(self, x: Float[Tensor, "rows d_in"], document: Int[Tensor, " rows"]) -> None:
        """Count rows of raw activations."""
        x, document = x.cpu().double(), document.cpu()
        self.n.index_add_(0, document, torch.ones_like(document, dtype=torch.float64))
        self.x.index_add_(0, document, x)
        self.square.index_add_(0, document, x.square().sum(dim=1))

    def total_variance(self, weights: Float[Tensor, "draws documents"]) -> Float[Tensor, " draws"]:
        """Sum over rows of ||x - mean||^2 with documents counted `weights` times."""
        mean_square = (weights @ self.x).square().sum(dim=1) / (weights @ self.n)
        return weights @ self.square - mean_square


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
    squared_error: Float[Tensor, " documents"],
    activations: ActivationSums,
    weights: Float[Tensor, "draws documents"],
) -> Interval:
    """Fraction of variance unexplained: sum ||x - x_hat||^2 / sum ||x - mean||^2.

    The mean is that of the same rows. In [0, inf): 0 iff x_hat == x, 1 for x_hat = mean.
    """
    return interval((weights @ squared_error) / activations.total_variance(weights))


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

"""Sparse probes of concepts: few features that tell one concept's documents from all others.

A probe reads features averaged over each document's tokens. Whatever is fitted or chosen is fitted
to the documents that are given for it; scores belong on other documents. Absorption alone is
about tokens. No models, no text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

N_FOLDS = 5
FEATURES_AT_ONCE = 2048  # bounds the float64 copy of the features
MAX_NEWTON = 1024
COSTS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C: the inverse of the L2 penalty
SPARSE_COST = 1.0  # SAEBench's, of probes of few features
MAX_FEATURES, MIN_GAIN = 10, 0.03  # SAEBench's: features of one concept, in F1
MAX_ABSORBERS, MIN_COSINE = 3, 0.1  # SAEBench's, of the fraction of absorption

Fold = tuple[Int[np.ndarray, "_"], Int[np.ndarray, "_"]]  # train, test


# --- choosing and fitting ----------------------------------------------------------------------


def separation(
    features: Float[Tensor, "documents features"],
    positive: Bool[Tensor, "probes documents"],
    negative: Bool[Tensor, "probes documents"],
) -> Float64[Tensor, "probes features"]:
    """|mean of the positives - mean of the negatives| / pooled standard deviation (Cohen's |d|).

    Pooled: sqrt of the sum of squares within both, divided by n - 2. Features that do not vary
    have 0. A document that is neither positive nor negative has no part in that probe.
    """
    groups = torch.stack([positive, negative]).double()
    n = groups.sum(dim=2, keepdim=True)
    found = []
    for x in features.split(FEATURES_AT_ONCE, dim=1):
        x = x.double()
        means, squares = groups @ x / n, groups @ x.square()
        within = (squares - n * means.square()).sum(dim=0)
        difference = (means[0] - means[1]).abs()
        spread = (within.clamp_min(0) / (n.sum(dim=0) - 2).clamp_min(1)).sqrt()
        found.append(torch.where(difference > 0, difference / spread, 0.0))
    return torch.cat(found, dim=1)


def ranked_features(
    features: Float[Tensor, "documents features"],
    positive: Bool[Tensor, "probes documents"],
    negative: Bool[Tensor, "probes documents"],
    k: int,
) -> Int[Tensor, "probes k"]:
    """The k features of the largest `separation`, largest first; of equals the first."""
    found = separation(features, positive, negative)
    return found.sort(dim=1, descending=True, stable=True).indices[:, :k]


def by_parent(
    positive: Bool[Tensor, " documents"], parent: Int[Tensor, " documents"]
) -> tuple[list[Fold], bool]:
    """Folds that leave out whole parents, and whether they do.

    The documents of one parent are alike: a fold that had some of them to learn from would choose
    a probe of that parent. Positives of a single parent leave no choice but folds of documents.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import

    n_parents = min(len(parent[positive].unique()), len(parent[~positive].unique()))
    is_grouped = n_parents >= 2
    if not is_grouped:
        parent = torch.arange(len(parent))
        n_parents = int(min(positive.sum(), (~positive).sum()))
    splitter = StratifiedGroupKFold(min(N_FOLDS, n_parents))
    label = positive.numpy()
    return list(splitter.split(np.zeros(len(label)), label, parent.numpy())), is_grouped


class Probe(NamedTuple):
    """A document is of the concept if x @ weight + bias > 0."""

    weight: Float64[Tensor, " features"]
    bias: float
    cost: float
    """C, the inverse of the L2 penalty on standardised features."""

    def score(self, x: Float[Tensor, "rows features"]) -> Float64[Tensor, " rows"]:
        return x.double() @ self.weight + self.bias


def fit_probes(
    x: Float[Tensor, "documents features"],
    positive: Bool[Tensor, " documents"],
    costs: Sequence[float],
) -> list[Probe]:
    """Logistic regressions with an L2 penalty on standardised features, one per C.

    Both classes weigh alike. Each C starts from the solution of the one before. The weights are
    those of the features as they are.
    """
    from sklearn.linear_model import LogisticRegression

    x = x.double()
    mean, scale = x.mean(dim=0), x.std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    standardised = ((x - mean) / scale).numpy()
    # Activations are far from round, so that methods without second derivatives take a thousand
    # steps. Newton's solves a system as wide as the features.
    solver = "newton-cholesky" if x.shape[1] <= MAX_NEWTON else "lbfgs"
    model = LogisticRegression(
        class_weight="balanced", solver=solver, tol=1e-6, max_iter=1000, warm_start=True
    )
    probes = []
    for cost in costs:
        model.set_params(C=cost).fit(standardised, positive.numpy())
        weight = torch.from_numpy(model.coef_[0].copy()) / scale
        bias = float(model.intercept_[0]) - (weight @ mean).item()
        probes.append(Probe(weight, bias, cost))
    return probes


def fit_probe(
    x: Float[Tensor, "documents features"], positive: Bool[Tensor, " documents"], cost: float
) -> Probe:
    """`fit_probes` with one C."""
    return fit_probes(x, positive, [cost])[0]


def choose_cost(
    x: Float[Tensor, "documents features"],
    positive: Bool[Tensor, " documents"],
    folds: Sequence[Fold],
    costs: Sequence[float] = COSTS,
) -> float:
    """The C of the smallest log loss on documents left out, both classes weighing alike."""
    score = torch.zeros(len(costs), len(x), dtype=torch.float64)
    for train, test in folds:
        probes = fit_probes(x[train], positive[train], costs)
        score[:, test] = torch.stack([probe.score(x[test]) for probe in probes])
    loss = torch.nn.functional.softplus(torch.where(positive, -score, score))
    losses = loss[:, positive].mean(dim=1) + loss[:, ~positive].mean(dim=1)
    return costs[int(losses.argmin())]


def cross_validated_probe(
    x: Float[Tensor, "documents features"],
    positive: Bool[Tensor, " documents"],
    folds: Sequence[Fold],
) -> Probe:
    """Fitted to all documents with the C that the folds choose."""
    return fit_probe(x, positive, choose_cost(x, positive, folds))


# --- scoring -----------------------------------------------------------------------------------


class Scores(NamedTuple):
    """Of one probe: with each draw of the documents."""

    auroc: Float64[Tensor, " draws"]
    average_precision: Float64[Tensor, " draws"]


def weighted_scores(
    score: Float[Tensor, " documents"],
    positive: Bool[Tensor, " documents"],
    weights: Float64[Tensor, "draws documents"],
) -> Scores:
    """AUROC and average precision with documents counted `weights` times.

    AUROC = P(a positive scores above a negative), ties half. Average precision = sum over distinct
    thresholds of the gain in recall times the precision; ties count at once.
    """
    values, place = score.unique(return_inverse=True)
    sums = torch.zeros(2, len(weights), len(values), dtype=torch.float64)
    sums[0].index_add_(1, place, weights * positive)
    sums[1].index_add_(1, place, weights * ~positive)
    hits, misses = sums
    n_hits, n_misses = hits.sum(dim=1), misses.sum(dim=1)
    below = misses.cumsum(dim=1) - misses / 2
    auroc = (hits * below).sum(dim=1) / (n_hits * n_misses)
    at_least = hits.flip(1).cumsum(dim=1).flip(1)
    precision = at_least / (at_least + misses.flip(1).cumsum(dim=1).flip(1)).clamp_min(1e-12)
    return Scores(auroc, (hits * precision).sum(dim=1) / n_hits)


# --- splitting ---------------------------------------------------------------------------------


def f1_by_number(
    features: Float[Tensor, "documents all_features"],
    positive: Bool[Tensor, " documents"],
    folds: Sequence[Fold],
    chosen: Int[Tensor, "folds k"],
    cost: float = SPARSE_COST,
) -> list[float]:
    """F1 on documents left out, of probes of 1, 2 ... k features.

    `chosen` are each fold's features, ranked on what it trains on. C is fixed at 1, as in
    SAEBench's sparse probes.
    """
    k = chosen.shape[1]
    guessed = torch.zeros(k, len(features), dtype=torch.bool)
    for (train, test), ranked in zip(folds, chosen, strict=True):
        x = features[:, ranked]
        for n in range(1, k + 1):
            probe = fit_probe(x[train, :n], positive[train], cost)
            guessed[n - 1, test] = probe.score(x[test, :n]) > 0
    hits = (guessed & positive).sum(dim=1)
    return (2 * hits / (guessed.sum(dim=1) + positive.sum())).tolist()


def n_needed(f1: Sequence[float], min_gain: float = MIN_GAIN) -> int:
    """How many features there are before another one brings less than `min_gain` of F1.

    More than one where a concept's feature has split; two features of which neither brings
    anything alone are not found.
    """
    n = 1
    while n < len(f1) and f1[n] - f1[n - 1] >= min_gain:
        n += 1
    return n


def covering_features(
    parent: Bool[Tensor, " documents"], fires: Bool[Tensor, "documents features"], n: int
) -> list[int]:
    """At most n features that together best tell where the parent fires from where it is silent.

    Greedy: each is the one with the largest gain in (share of the parent's documents where any of
    them fires) - (share of the others), as long as there is a gain. A feature that fires
    everywhere covers everything and tells nothing: its gain is 0.
    """
    chosen: list[int] = []
    left = torch.ones_like(parent)
    for _ in range(n):
        inside, outside = (left & parent).double(), (left & ~parent).double()
        sign = inside / parent.sum().clamp_min(1) - outside / (~parent).sum().clamp_min(1)
        gain = sign @ fires.double()
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        chosen.append(best)
        left &= ~fires[:, best]
    return chosen


class Coverage(NamedTuple):
    """With each draw of the documents."""

    firing: Float64[Tensor, " draws"]
    """Share of the parent's documents where any child fires; nan if the parent never does."""
    silent: Float64[Tensor, " draws"]
    """The same of all other documents: what chance covers."""


def coverage(
    parent: Bool[Tensor, " documents"],
    children: Bool[Tensor, "documents children"],
    weights: Float64[Tensor, "draws documents"],
) -> Coverage:
    """Where any of the children fires."""
    covered = children.any(dim=1)
    shares = [
        (weights @ (of & covered).double()) / (weights @ of.double()) for of in (parent, ~parent)
    ]
    return Coverage(*shares)


# --- absorption --------------------------------------------------------------------------------


class Absorbed(NamedTuple):
    """Of each token."""

    share: Float64[Tensor, " tokens"]
    """Of its projection, by absorbers; 0 where a main feature fires. In [0, 1]."""
    is_silent: Bool[Tensor, " tokens"]
    """No main feature fires."""


def absorbed(
    f: Float[Tensor, "tokens features"],
    W_dec: Float[Tensor, "features d_in"],
    direction: Float64[Tensor, " d_in"],
    main: Int[Tensor, " main"],
    total: Float64[Tensor, " tokens"],
) -> Absorbed:
    """What other features carry of a probe's direction where its main features are silent.

    share = min(1, sum over absorbers of f_i W_dec_i . u / total),   u = direction / |direction|

    after SAEBench (Karvonen et al. 2025, arXiv 2503.09532; Chanin et al. 2024, arXiv 2409.14507).
    Absorbers are the at most 3 features with the largest positive term among those that have
    cosine(W_dec_i, u) >= 0.1. `total` is the token's own projection on u, above 0.
    SAEBench also counts what absorbers add where a main feature fires weakly, and nothing where
    the share is below 0.4; here every share counts, of silent tokens alone.
    """
    u = direction / direction.norm()
    along = W_dec.double() @ u
    may_absorb = along >= MIN_COSINE * W_dec.double().norm(dim=1).clamp_min(1e-12)
    written = f[:, may_absorb].double() * along[may_absorb]
    n = min(MAX_ABSORBERS, written.shape[1])
    share = (written.topk(n, dim=1).values.clamp_min(0).sum(dim=1) / total).clamp(0, 1)
    is_silent = (f[:, main] == 0).all(dim=1)
    return Absorbed(torch.where(is_silent, share, 0.0), is_silent)

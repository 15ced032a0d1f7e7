"""Do the contexts of a unit fall into groups? One group is an answer, and chance has groups too.

Contexts are unit vectors of an embedding that knows nothing of the language model (`intruders`).
They are set against as many random contexts, drawn several times.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MAX_CLUSTERS = 8
N_STARTS = 3
N_DEVIATIONS = 2


class Clusters(NamedTuple):
    """Groups of one unit's contexts."""

    n: int
    """By the gap statistic, 1 to `MAX_CLUSTERS`."""
    likeness: float
    """Mean cosine of two contexts."""
    z: float
    """(likeness - that of random contexts) / their standard deviation; 0 is what chance gives."""


def likeness(vectors: Float[np.ndarray, "n d"]) -> float:
    """Mean cosine of two different rows of unit norm: (||sum e||^2 - n) / (n (n - 1))."""
    n = len(vectors)
    return float((np.square(vectors.sum(axis=0)).sum() - np.square(vectors).sum()) / (n * (n - 1)))


def spreads(vectors: Float[np.ndarray, "n d"], seed: int) -> Float[np.ndarray, " k"]:
    """ln of the squared distances to k centres, k = 1 ... `MAX_CLUSTERS` (k-means)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than centres
        for k in range(1, MAX_CLUSTERS + 1):
            fitted = KMeans(k, n_init=N_STARTS, random_state=seed).fit(vectors)
            found.append(np.log(max(fitted.inertia_, 1e-12)))
    return np.array(found)


class Chance(NamedTuple):
    """Several draws of as many random contexts as a unit has."""

    spreads: Float[np.ndarray, "draws k"]
    likeness: Float[np.ndarray, " draws"]


def chance(random: Sequence[Float[np.ndarray, "n d"]], seed: int = 0) -> Chance:
    """What random contexts give; the same for all units with as many contexts."""
    return Chance(
        np.array([spreads(one, seed) for one in random]),
        np.array([likeness(one) for one in random]),
    )


def context_clusters(
    vectors: Float[np.ndarray, "n d"], by_chance: Chance, seed: int = 0
) -> Clusters:
    """Number of groups by the gap statistic (Tibshirani, Walther and Hastie 2001), and likeness.

    gap_k = mean over random contexts of ln W_k - ln W_k; the number is the smallest k with
    gap_k >= gap_(k+1) - 2 s_(k+1), s their standard deviation times sqrt(1 + 1 / draws); theirs is
    one s, with which one group in six is divided by chance. The null is random contexts, not
    uniform points: text has groups of its own, which are not the unit's.
    """
    nulls = by_chance.spreads
    gaps = nulls.mean(axis=0) - spreads(vectors, seed)
    deviation = nulls.std(axis=0, ddof=1) * np.sqrt(1 + 1 / len(nulls))
    enough = gaps[:-1] >= gaps[1:] - N_DEVIATIONS * deviation[1:]
    n = int(enough.argmax()) + 1 if enough.any() else MAX_CLUSTERS
    own, expected = likeness(vectors), by_chance.likeness
    return Clusters(n, own, float((own - expected.mean()) / expected.std(ddof=1)))

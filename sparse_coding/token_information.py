"""Does a unit stand for a concept, or for tokens that the concept is full of?

Statistics of single tokens on which units fire, as `consistency.Codes` of them. A unit that fires
on "the" is not about English dialogue, however much English dialogue it finds; what a unit says of
the concept beyond the token it stands on is I(concept; fires | token).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from sparse_coding.consistency import Codes

N_SHUFFLES = 5
N_DECILES = 10


class TokenStatistics(NamedTuple):
    """Per unit, nan for one that never fires."""

    entropy: Float64[np.ndarray, " units"]
    """H(token | fires) in nats, with the bias (m - 1) / (2 n) added (Miller 1955)."""
    purity: Float64[np.ndarray, " units"]
    """Share of firings on the most common token."""
    information: Float64[np.ndarray, " units"]
    """I(concept; fires | token) / H(fires), above what chance gives; 0 for a token detector."""


class TokenLabels(NamedTuple):
    """All tokens that were looked at, in the order of the codes."""

    token: Int[np.ndarray, " tokens"]
    concept: Int[np.ndarray, " tokens"]
    n_concepts: int


def firings(codes: Codes, n_units: int) -> list[Int[np.ndarray, " fired"]]:
    """For each unit the tokens on which it fires, in order."""
    rows = np.repeat(np.arange(codes.n_tokens), np.diff(codes.starts))
    order = np.argsort(codes.features, kind="stable")
    ends = np.bincount(codes.features, minlength=n_units).cumsum()
    return np.split(rows[order], ends[:-1])


def token_statistics(
    codes: Codes, n_units: int, labels: TokenLabels, generator: np.random.Generator
) -> TokenStatistics:
    """Statistics of every unit.

    Chance is the mean over `N_SHUFFLES` deals in which the unit fires as often on each token, but
    on any of its occurrences.
    """
    table = _Table(labels, generator)
    found = [_of_unit(rows, table) for rows in firings(codes, n_units)]
    return TokenStatistics(*np.array(found, dtype=np.float64).reshape(n_units, 3).T)


class _Table:
    """Occurrences by token and concept."""

    def __init__(self, labels: TokenLabels, generator: np.random.Generator) -> None:
        _, self.token = np.unique(labels.token, return_inverse=True)
        self.concept, self.n_concepts = labels.concept, labels.n_concepts
        n_tokens = int(self.token.max()) + 1
        cell = self.token * self.n_concepts + self.concept
        counts = np.bincount(cell, minlength=n_tokens * self.n_concepts)
        self.counts = counts.reshape(n_tokens, self.n_concepts)
        self.starts = np.concatenate([[0], self.counts.sum(axis=1).cumsum()])
        # occurrences of each token side by side, in N_SHUFFLES random orders
        self.orders = [
            np.lexsort((generator.random(len(self.token)), self.token)) for _ in range(N_SHUFFLES)
        ]

    def fired(
        self, rows: Int[np.ndarray, " fired"], tokens: Int[np.ndarray, " kinds"]
    ) -> np.ndarray:
        """Firings (kinds, concepts) on each of the sorted `tokens`."""
        kind = np.searchsorted(tokens, self.token[rows])
        cell = kind * self.n_concepts + self.concept[rows]
        counts = np.bincount(cell, minlength=len(tokens) * self.n_concepts)
        return counts.reshape(len(tokens), self.n_concepts)


def _of_unit(rows: Int[np.ndarray, " fired"], table: _Table) -> tuple[float, float, float]:
    n = len(rows)
    if n == 0:
        return np.nan, np.nan, np.nan
    tokens, n_fired = np.unique(table.token[rows], return_counts=True)
    share = n_fired / n
    entropy = -(share * np.log(share)).sum() + (len(tokens) - 1) / (2 * n)
    possible = table.counts[tokens]
    plain = conditional_information(table.fired(rows, tokens), possible)
    places = np.concatenate(
        [start + np.arange(k) for start, k in zip(table.starts[tokens], n_fired, strict=True)]
    )
    chance = np.mean(
        [
            conditional_information(table.fired(order[places], tokens), possible)
            for order in table.orders
        ]
    )
    total = len(table.token)
    rate = n / total
    h = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)) if rate < 1 else np.nan
    return entropy, share.max(), (plain - chance) / total / h


def conditional_information(
    fired: Int[np.ndarray, "kinds concepts"], possible: Int[np.ndarray, "kinds concepts"]
) -> float:
    """n I(concept; fires | token) in nats: sum over tokens of the information of their table.

    `fired` of the `possible` occurrences of each token in each concept; tokens on which the unit
    never fires add nothing.
    """
    silent = possible - fired
    parts = 0.0
    for some in (fired, silent):
        expected = some.sum(axis=1, keepdims=True) * possible / possible.sum(axis=1, keepdims=True)
        met = some > 0
        parts += (some[met] * np.log(some[met] / expected[met])).sum()
    return float(parts)


def purity_by_decile(
    codes: Codes,
    n_units: int,
    is_concept: Int[np.ndarray, "tokens"],
    concept: Int[np.ndarray, " units"],
) -> Float64[np.ndarray, "deciles units"]:
    """Share of a unit's firings that are in its concept, from its weakest tenth to its strongest.

    `is_concept` is each token's concept. A unit that is pure at its strongest alone rises from
    left to right. nan for fewer firings than deciles.
    """
    rows = np.repeat(np.arange(codes.n_tokens), np.diff(codes.starts))
    order = np.lexsort((codes.values, codes.features))
    ends = np.bincount(codes.features, minlength=n_units).cumsum()
    found = np.full((N_DECILES, n_units), np.nan)
    for unit, some in enumerate(np.split(rows[order], ends[:-1])):
        if len(some) >= N_DECILES:
            hits = is_concept[some] == concept[unit]
            found[:, unit] = [part.mean() for part in np.array_split(hits, N_DECILES)]
    return found

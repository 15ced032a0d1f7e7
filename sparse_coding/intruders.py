"""Do contexts of a unit belong together? Four of them and a fifth that is not: which is it?

Likeness is that of character n-grams, which know nothing of any language model: fitted on texts
that are not measured. The same trials can be put to a judge (`judge`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float64, Int

from sparse_coding.examples import N_DECILES, Stream, deciles, spread

N_SHOWN = 5
N_DIMENSIONS = 64


class TextEmbedding:
    """TF-IDF of character 3- to 5-grams, reduced to 64 dimensions (LSA), centred, unit norm.

    Centring takes away what all texts share: without it every pair of texts is alike.
    """

    def __init__(self, texts: Sequence[str], seed: int, n: int = N_DIMENSIONS) -> None:
        from sklearn.decomposition import TruncatedSVD  # slow to import
        from sklearn.feature_extraction.text import TfidfVectorizer

        # min_df: an n-gram of one text says nothing of what it shares with others
        self.counts = TfidfVectorizer(
            analyzer="char", ngram_range=(3, 5), sublinear_tf=True, min_df=2
        )
        counted = self.counts.fit_transform(texts)
        self.axes = TruncatedSVD(min(n, min(counted.shape) - 1), random_state=seed)
        self.mean = self.axes.fit_transform(counted).mean(axis=0)

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "texts d"]:
        """Unit rows; a text without a known n-gram has the row of an average one's opposite."""
        vectors = self.axes.transform(self.counts.transform(texts)) - self.mean
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


class Trial(NamedTuple):
    """Five rows of five groups; the unit fires on all but the one at `answer`, in one decile."""

    rows: Int[np.ndarray, " shown"]
    answer: int
    decile: int


def draw_trials(
    stream: Stream, values: Float[np.ndarray, " rows"], fires: Bool[np.ndarray, " rows"],
    is_quiet: Bool[np.ndarray, " rows"], n: int, same_token: bool, generator: np.random.Generator,
) -> list[Trial]:  # fmt: skip
    """At most n trials for each decile of the activation.

    The intruder is a row in whose context the unit is silent (`is_quiet`), at random or, with
    `same_token`, on one of the tokens that the four have; that makes it like one of them, so that
    chance is below 1 / 5 unless the token is hidden. Deciles of too few groups have none.
    """
    decile = deciles(values, fires)
    token = stream.token[stream.position]
    found = []
    for i in np.repeat(np.arange(N_DECILES), n).tolist():
        four = spread(np.flatnonzero(decile == i), stream.group, N_SHOWN - 1, generator)
        groups = stream.group[four]
        possible = is_quiet & ~np.isin(stream.group, groups)
        if same_token:
            possible &= np.isin(token, token[four])
        rows = np.flatnonzero(possible)
        if len(np.unique(groups)) < N_SHOWN - 1 or not len(rows):
            continue
        answer = int(generator.integers(N_SHOWN))
        intruder = generator.choice(rows)
        found.append(Trial(np.insert(generator.permutation(four), answer, intruder), answer, i))
    return found


def guesses(vectors: Float64[np.ndarray, "trials shown d"]) -> Int[np.ndarray, " trials"]:
    """Of each trial the context with the smallest mean likeness to the others."""
    likeness = vectors @ vectors.swapaxes(1, 2)
    own = np.einsum("tii->ti", likeness)
    return (likeness.sum(axis=2) - own).argmin(axis=1)

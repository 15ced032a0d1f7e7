"""Contexts of a unit: where it fires, weakly to strongly, where it is silent, where nearly not.

A context is a token with the `RADIUS` tokens before and after it, as far as the language model saw
them together and they are of one document. What is resampled and halved is the group: a document,
or all documents that were cut from one file. Arrays alone: no models, no tokenizer.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

RADIUS = 16
N_DECILES = 10
KINDS = ("firing", "random", "same_token", "same_previous", "near_miss")
FIRING, RANDOM, SAME_TOKEN, SAME_PREVIOUS, NEAR_MISS = KINDS
MASK = "\u25a1"  # stands for a token that is hidden

Rows = Int[np.ndarray, " _"]
Embed = Callable[[Sequence[str]], Float[np.ndarray, "texts d"]]


class Stream(NamedTuple):
    """Tokens in reading order. A row is one of those that units see."""

    token: Int[np.ndarray, " positions"]
    """Index into `pieces`."""
    pieces: list[str]
    """What each token stands for as text."""
    segment: Int[np.ndarray, " positions"]
    """Rising; equal where tokens are of one document and were seen together."""
    position: Int[np.ndarray, " rows"]
    """Of each row, rising; never the first of a context."""
    group: Int[np.ndarray, " rows"]


class Context(NamedTuple):
    """The tokens around a row as text; `centre` is the index of the row's own."""

    pieces: list[str]
    centre: int
    rows: Int[np.ndarray, " pieces"]
    """Row of each token, -1 for those that units do not see."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def masked(self) -> str:
        """The text without the row's own token."""
        before, after = self.pieces[: self.centre], self.pieces[self.centre + 1 :]
        return "".join([*before, MASK, *after])


def bounds(
    stream: Stream, rows: Rows, radius: int = RADIUS
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """First position and the one after the last of each row's context."""
    position = stream.position[rows]
    segment = stream.segment[position]
    first = np.searchsorted(stream.segment, segment, "left")
    last = np.searchsorted(stream.segment, segment, "right")
    return np.maximum(first, position - radius), np.minimum(last, position + radius + 1)


def contexts_of(stream: Stream, rows: Rows, radius: int = RADIUS) -> list[Context]:
    """The contexts of some rows, in their order."""
    found = []
    for position, begin, end in zip(
        stream.position[rows], *bounds(stream, rows, radius), strict=True
    ):
        inside = np.arange(begin, end)
        place = np.searchsorted(stream.position, inside).clip(max=len(stream.position) - 1)
        of_row = np.where(stream.position[place] == inside, place, -1)
        pieces = [stream.pieces[token] for token in stream.token[begin:end]]
        found.append(Context(pieces, int(position - begin), of_row))
    return found


def first_half(
    group: Int[np.ndarray, " rows"], generator: np.random.Generator
) -> Bool[np.ndarray, " rows"]:
    """Rows of half of the groups, drawn at random: for finding; scores belong on the others."""
    groups = generator.permutation(np.unique(group))
    return np.isin(group, groups[: len(groups) // 2])


def quiet(
    stream: Stream, fires: Bool[np.ndarray, " rows"], radius: int = RADIUS
) -> Bool[np.ndarray, " rows"]:
    """Rows in whose whole context the unit does not fire."""
    before = np.zeros(len(stream.token) + 1, dtype=np.int64)
    before[stream.position[fires] + 1] = 1
    before = before.cumsum()
    begin, end = bounds(stream, np.arange(len(stream.position)), radius)
    return before[end] == before[begin]


def deciles(
    values: Float[np.ndarray, " rows"], fires: Bool[np.ndarray, " rows"]
) -> Int[np.ndarray, " rows"]:
    """0 for the weakest tenth of the firing rows ... 9 for the strongest, -1 for silent rows."""
    rows = np.flatnonzero(fires)
    found = np.full(len(values), -1)
    for i, part in enumerate(np.array_split(rows[np.argsort(values[rows])], N_DECILES)):
        found[part] = i
    return found


def groups_first(
    rows: Rows, group: Int[np.ndarray, " rows"], used: Sequence[int] | np.ndarray = ()
) -> Rows:
    """The first of each group before the others, which keep their order; `used` are not first."""
    _, first = np.unique(group[rows], return_index=True)
    repeats = np.ones(len(rows), dtype=bool)
    repeats[first] = False
    repeats |= np.isin(group[rows], used)
    return rows[np.argsort(repeats, kind="stable")]


def spread(
    rows: Rows, group: Int[np.ndarray, " rows"], n: int, generator: np.random.Generator,
    used: Sequence[int] | np.ndarray = (),
) -> Rows:  # fmt: skip
    """At most n of `rows` at random; groups repeat, or are among `used`, only where they must."""
    return groups_first(generator.permutation(rows), group, used)[:n]


class Pool(NamedTuple):
    """Rows among which near misses are looked for, with embeddings of their contexts."""

    rows: Rows
    vectors: Float[np.ndarray, "n d"]


def make_pool(
    stream: Stream, rows: Rows, n: int, embed: Embed, generator: np.random.Generator
) -> Pool:
    """At most n of `rows`."""
    drawn = spread(rows, stream.group, n, generator)
    return Pool(drawn, embed([context.text for context in contexts_of(stream, drawn)]))


class Examples(NamedTuple):
    """Rows of one unit in one half of the text, the firing ones first."""

    row: Rows
    kind: Int[np.ndarray, " n"]
    """Index into `KINDS`."""
    decile: Int[np.ndarray, " n"]
    """Of the firing ones among all firings of the half, weakest first; -1 for the others."""
    partner: Int[np.ndarray, " n"]
    """Of a silent one the place of the firing one that it was drawn for; -1 for any."""

    def of(self, *kinds: str) -> Bool[np.ndarray, " n"]:
        return np.isin(self.kind, [KINDS.index(kind) for kind in kinds])

    def against(self, kind: str) -> Bool[np.ndarray, " n"]:
        """Silent ones of a kind, and the firing ones that they are fairly set against.

        Those are their partners: against the same tokens, a rule about the token alone has a
        balanced accuracy of 1/2, whatever the tokens that the unit always fires on.
        """
        silent = self.of(kind)
        if kind == RANDOM:
            return silent | self.of(FIRING)
        silent[self.partner[silent]] = True
        return silent


class Drawn(NamedTuple):
    """Silent rows with the place of each one's partner among the firing rows."""

    rows: Rows
    partner: Rows


def draw_examples(
    stream: Stream, values: Float[np.ndarray, " rows"], fires: Bool[np.ndarray, " rows"],
    half: Bool[np.ndarray, " rows"], pool: Pool, n: int, embed: Embed,
    generator: np.random.Generator,
) -> Examples:  # fmt: skip
    """At most n rows of each kind from one half of the text.

    Firing: as many of every decile of activation. Random: any silent rows. Same token: silent, the
    tokens and their numbers as among the firing ones. Same previous: the tokens before them are.
    Near miss: silent, for each firing row the row of the pool whose context is most like its own,
    of another group.
    """
    decile = deciles(values, fires & half)
    firing = _firing(stream, decile, n, generator)
    silent = half & ~fires
    random = spread(np.flatnonzero(silent), stream.group, n, generator)
    parts = [
        Drawn(firing, np.full(len(firing), -1)),
        Drawn(random, np.full(len(random), -1)),
        _with_same(stream, stream.position, firing, silent, generator),
        _with_same(stream, stream.position - 1, firing, silent, generator),
        _near_misses(stream, firing, silent, pool, embed),
    ]
    kind = np.repeat(np.arange(len(KINDS)), [len(part.rows) for part in parts])
    row, partner = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Examples(row, kind, decile[row], partner)


def _firing(
    stream: Stream, decile: Int[np.ndarray, " rows"], n: int, generator: np.random.Generator
) -> Rows:
    found = np.zeros(0, dtype=np.int64)
    for i in generator.permutation(N_DECILES):
        rows = np.flatnonzero(decile == i)
        chosen = spread(rows, stream.group, n // N_DECILES, generator, stream.group[found])
        found = np.concatenate([found, chosen])
    return found


def _with_same(
    stream: Stream, place: Int[np.ndarray, " rows"], firing: Rows,
    silent: Bool[np.ndarray, " rows"], generator: np.random.Generator,
) -> Drawn:  # fmt: skip
    """Silent rows that have at `place` the tokens of the firing ones, no more often than these."""
    token = stream.token[place]
    rows, partner = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for kind in np.unique(token[firing]):
        own = np.flatnonzero(token[firing] == kind)
        possible = np.flatnonzero(silent & (token == kind))
        rows.append(spread(possible, stream.group, len(own), generator))
        partner.append(own[: len(rows[-1])])
    return Drawn(np.concatenate(rows), np.concatenate(partner))


def _near_misses(
    stream: Stream, firing: Rows, silent: Bool[np.ndarray, " rows"], pool: Pool, embed: Embed
) -> Drawn:
    """At most one row of the pool for each firing row, none twice."""
    rows, partner = [], []
    if len(firing):
        vectors = embed([context.text for context in contexts_of(stream, firing)])
        likeness = vectors @ pool.vectors.T
        group = stream.group[pool.rows]
        likeness[stream.group[firing][:, None] == group] = -np.inf
        likeness[:, ~silent[pool.rows]] = -np.inf
        for i, own in enumerate(likeness):
            best = int(own.argmax())
            if np.isfinite(own[best]):
                rows.append(pool.rows[best])
                partner.append(i)
                likeness[:, best] = -np.inf
    return Drawn(np.array(rows, dtype=np.int64), np.array(partner, dtype=np.int64))

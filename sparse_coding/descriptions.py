"""What a unit fires on, in words: rules over its tokens that are found on one half of the text.

A condition is about the token that the unit fires on, the tokens before it or the document's
source; a rule is one condition or two together; a description is at most `MAX_RULES` rules of
which one must hold. Rules are sought greedily for balanced accuracy on contexts of the finding
half, so what they reach there is too good: scores are of other documents. No language model.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from sparse_coding.probing import weighted_scores
from sparse_coding.token_tags import TAGS

MAX_RULES, MAX_TOKENS = 3, 5
MAX_CANDIDATES = 15  # of each kind
MAX_PAIRED = 30  # conditions that are tried together with every other
# Balanced accuracy that each further value must bring. With 0.02 or 0.04 SAE units' rules have up
# to 0.02 less on held-out documents, random directions' too (smollm2-135m-l12-small).
PENALTY = 0.01


class Evidence(NamedTuple):
    """What conditions can be about, row by row."""

    token: Int[np.ndarray, " rows"]
    """Index into `pieces`."""
    previous: Int[np.ndarray, " rows"]
    """The token before, -1 at the beginning of a context or document."""
    before: Int[np.ndarray, " rows"]
    """The token before that."""
    tags: Bool[np.ndarray, "rows tags"]
    """Which of `token_tags.TAGS` the token has."""
    previous_tags: Bool[np.ndarray, "rows tags"]
    source: Int[np.ndarray, " rows"]
    pieces: list[str]
    sources: list[str]
    """Names of the sources, or concepts, of documents."""

    def take(self, rows: Int[np.ndarray, " n"]) -> "Evidence":
        return Evidence(*(part[rows] for part in self[:6]), self.pieces, self.sources)


class Condition(NamedTuple):
    """One of `values` is there; what values are depends on `kind`, see `matches`."""

    kind: str
    values: tuple

    @property
    def cost(self) -> float:
        return PENALTY * len(self.values)


class Rule(NamedTuple):
    """All conditions hold."""

    conditions: tuple[Condition, ...]


class Description(NamedTuple):
    """One of the rules holds. No rules: never."""

    rules: tuple[Rule, ...]
    share: tuple[float, ...]
    """For each rule the share of firing contexts among those of the finding half where it holds,
    firing and silent ones weighing alike."""
    balanced_accuracy: float
    """On the finding half: too good."""


def matches(condition: Condition, evidence: Evidence) -> Bool[np.ndarray, " rows"]:
    """Where a condition holds."""
    kind, values = condition
    if kind in ("token", "previous", "source"):
        return np.isin(getattr(evidence, kind), values)
    if kind == "sequence":
        held = np.ones(len(evidence.token), dtype=bool)
        parts = (evidence.token, evidence.previous, evidence.before)
        for value, part in zip(reversed(values[0]), parts, strict=False):
            held &= part == value
        return held
    if kind in ("tag", "previous_tag"):
        tags = evidence.tags if kind == "tag" else evidence.previous_tags
        return tags[:, [TAGS.index(value) for value in values]].any(axis=1)
    assert kind in ("prefix", "suffix"), f"no condition is called {kind}"
    tokens, place = np.unique(evidence.token, return_inverse=True)
    test = str.startswith if kind == "prefix" else str.endswith
    return np.array([test(evidence.pieces[token], values) for token in tokens], bool)[place]


def rule_holds(rule: Rule, evidence: Evidence) -> Bool[np.ndarray, " rows"]:
    return np.all([matches(condition, evidence) for condition in rule.conditions], axis=0)


def scores(description: Description, evidence: Evidence) -> Float64[np.ndarray, " rows"]:
    """The largest `share` of the rules that hold, 0 where none does."""
    found = np.zeros(len(evidence.token))
    for rule, share in zip(description.rules, description.share, strict=True):
        found = np.maximum(found, np.where(rule_holds(rule, evidence), share, 0.0))
    return found


# --- words -------------------------------------------------------------------------------------


def in_words(description: Description, evidence: Evidence) -> str:
    """One line, e.g. "tokens ' the', ' The' after a token of kind newline"."""
    rules = [
        " ".join(_condition_in_words(c, evidence) for c in sorted(rule.conditions, key=_order))
        for rule in description.rules
    ]
    return "; or ".join(rules) or "nothing found"


ORDER = ("token", "sequence", "tag", "prefix", "suffix", "previous", "previous_tag", "source")


def _order(condition: Condition) -> int:
    return ORDER.index(condition.kind)


def _condition_in_words(condition: Condition, evidence: Evidence) -> str:
    kind, values = condition
    pieces = evidence.pieces
    if kind == "sequence":
        return f"the end of {''.join(pieces[token] for token in values[0])!r}"
    if kind in ("token", "previous"):
        names = [repr(pieces[token]) for token in values]
    else:
        names = [repr(value) if "fix" in kind else str(value) for value in values]
    if kind == "source":
        names = [evidence.sources[value] for value in values]
    form = {
        "token": "tokens {}",
        "previous": "after {}",
        "tag": "tokens of kind {}",
        "previous_tag": "after a token of kind {}",
        "prefix": "tokens that begin with {}",
        "suffix": "tokens that end with {}",
        "source": "in text of {}",
    }[kind]
    return form.format(", ".join(names))


# --- finding -----------------------------------------------------------------------------------


def class_weights(kind: Int[np.ndarray, " n"], firing: int = 0) -> Float64[np.ndarray, " n"]:
    """Firing contexts weigh 1/2 together, and so do the others, every kind of them alike."""
    weight = np.zeros(len(kind))
    silent = np.setdiff1d(kind, [firing])
    for one in np.unique(kind):
        members = kind == one
        weight[members] = 0.5 / members.sum() / (1 if one == firing else len(silent))
    return weight


def candidates(evidence: Evidence, firing: Bool[np.ndarray, " rows"]) -> list[Condition]:
    """Conditions that hold in firing contexts, the most common of each kind."""
    own = evidence.take(np.flatnonzero(firing))
    found = [
        *_token_sets("token", evidence.token, firing),
        *(Condition("sequence", (s,)) for s in _sequences(own)),
        *(Condition("tag", (TAGS[i],)) for i in np.flatnonzero(own.tags.any(axis=0))),
        *(Condition(kind, (s,)) for kind in ("prefix", "suffix") for s in _ends(own, kind)),
        *_token_sets("previous", evidence.previous, firing),
        *(
            Condition("previous_tag", (TAGS[i],))
            for i in np.flatnonzero(own.previous_tags.any(axis=0))
        ),
    ]
    if len(evidence.sources) > 1:
        found += [Condition("source", (int(s),)) for s in np.unique(own.source)]
    return found


def _token_sets(
    kind: str, token: Int[np.ndarray, " rows"], firing: Bool[np.ndarray, " rows"]
) -> list[Condition]:
    """Single tokens, and the best 2 ... `MAX_TOKENS` of them together."""
    is_token = token >= 0
    inside = Counter(token[firing & is_token].tolist())
    outside = Counter(token[~firing & is_token].tolist())
    n_in, n_out = max(firing.sum(), 1), max((~firing).sum(), 1)
    gain = {t: inside[t] / n_in - outside[t] / n_out for t in inside}
    best = sorted(gain, key=lambda t: (-gain[t], t))[:MAX_CANDIDATES]
    sets = [(t,) for t in best]
    sets += [tuple(best[:n]) for n in range(2, min(MAX_TOKENS, len(best)) + 1)]
    return [Condition(kind, values) for values in sets]


def _sequences(own: Evidence) -> list[tuple[int, ...]]:
    """Pairs and triples of tokens that end on firing ones, each at least twice."""
    rows = np.stack([own.before, own.previous, own.token], axis=1).tolist()
    counts = Counter(tuple(row[-n:]) for row in rows for n in (2, 3) if min(row[-n:]) >= 0)
    return [s for s, n in counts.most_common(MAX_CANDIDATES) if n > 1]


def _ends(own: Evidence, kind: str) -> list[str]:
    """Beginnings (1 to 4 characters, the blank counts) or ends (2 to 4) of two tokens or more."""
    counts: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for token, n in Counter(own.token.tolist()).items():
        piece = own.pieces[token]
        lengths = range(1 if kind == "prefix" else 2, min(4, len(piece) - 1) + 1)
        for end in (piece[:m] if kind == "prefix" else piece[-m:] for m in lengths):
            counts[end] += n
            shared[end] += 1
    return [end for end, _ in counts.most_common(MAX_CANDIDATES) if shared[end] > 1]


def find_description(evidence: Evidence, kind: Int[np.ndarray, " rows"]) -> Description:
    """Greedy choice of rules; `kind` is 0 for firing contexts, other numbers for silent ones.

    Each step adds the rule that raises balanced accuracy most, after `PENALTY` for every value in
    it; silent contexts of every kind weigh alike. A unit for which nothing is worth its penalty
    has no rules.
    """
    firing, weight = kind == 0, class_weights(kind)
    conditions = candidates(evidence, firing)
    if not conditions:
        return Description((), (), 0.5)
    held = np.stack([matches(condition, evidence) for condition in conditions])
    signed = np.where(firing, weight, -weight)
    rules: list[Rule] = []
    share: list[float] = []
    union = np.zeros(len(kind), dtype=bool)
    while len(rules) < MAX_RULES:
        chosen = _best_rule(conditions, held, signed * ~union)
        if chosen is None:
            break
        where = held[list(chosen)].all(axis=0)
        rules.append(Rule(tuple(conditions[i] for i in chosen)))
        share.append(float(weight[where & firing].sum() / weight[where].sum()))
        union |= where
    return Description(tuple(rules), tuple(share), float(0.5 + signed[union].sum()))


def _best_rule(
    conditions: Sequence[Condition],
    held: Bool[np.ndarray, "conditions rows"],
    left: Float64[np.ndarray, " rows"],
) -> tuple[int, ...] | None:
    """Indices of the condition, or the two of different kinds, with the largest gain above 0."""
    cost = np.array([condition.cost for condition in conditions])
    single = held @ left - cost
    head = np.argsort(-single, kind="stable")[:MAX_PAIRED]
    pairs = (held[head][:, None] & held) @ left - cost[head][:, None] - cost
    kinds = np.array([condition.kind for condition in conditions])
    pairs[kinds[head][:, None] == kinds] = -np.inf
    i, j = np.unravel_index(pairs.argmax(), pairs.shape)
    best = int(single.argmax())
    if pairs[i, j] > single[best] + 1e-9 and pairs[i, j] > 1e-9:
        return int(head[i]), int(j)
    return (best,) if single[best] > 1e-9 else None


# --- scoring -----------------------------------------------------------------------------------


class Detection(NamedTuple):
    """With each draw of the groups; nan where a draw has no firing or no silent context."""

    balanced_accuracy: Float64[Tensor, " draws"]
    auroc: Float64[Tensor, " draws"]
    precision: Float64[Tensor, " draws"]
    """nan where nothing is taken for firing."""
    recall: Float64[Tensor, " draws"]


def detect(
    score: Float[np.ndarray, " n"],
    firing: Bool[np.ndarray, " n"],
    weights: Float64[Tensor, "draws n"],
    threshold: float = 0.0,
) -> Detection:
    """A context is taken for a firing one if its score is above `threshold`.

    balanced accuracy = (recall + share of silent contexts that are not taken) / 2; precision is
    that of these contexts, whose base rate is not nature's: see `natural`.
    """
    truth, value = torch.from_numpy(firing), torch.from_numpy(score).double()
    guess = value > threshold
    hits = weights @ (truth & guess).double()
    false = weights @ (~truth & guess).double()
    n, n_silent = weights @ truth.double(), weights @ (~truth).double()
    recall = hits / n
    return Detection(
        (recall + 1 - false / n_silent) / 2,
        weighted_scores(value, truth, weights).auroc,
        hits / (hits + false),
        recall,
    )


class Natural(NamedTuple):
    """At the rate at which the unit fires, over every row; with each draw of the groups."""

    precision: Float64[Tensor, " draws"]
    recall: Float64[Tensor, " draws"]


def natural(
    holds: Bool[np.ndarray, " rows"],
    fires: Bool[np.ndarray, " rows"],
    group: Int[np.ndarray, " rows"],
    weights: Float64[Tensor, "draws groups"],
) -> Natural:
    """Precision and recall of a description on all rows, with `weights` of their groups."""
    n_groups = weights.shape[1]
    hits, taken, firing = (
        weights @ torch.from_numpy(np.bincount(group, which, n_groups))
        for which in (holds & fires, holds, fires)
    )
    return Natural(hits / taken, hits / firing)

"""How many concepts does a unit stand for? Statistics of activity on documents with labels.

A unit is one feature of a dictionary (or half of a signed direction), its activity a number of at
least 0 on each token. Everything here is made of sums per document: `active` tokens, or the `mass`
of the activity. Documents are what is drawn, left out and relabelled, never tokens. Concepts may
have different numbers of tokens: rates are compared, not counts. No models, no text.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

N_DRAWS = 1000
MIN_LIFT = 2.0
FALSE_DISCOVERY_RATE = 0.05
# From planted units (analysis.validate_polysemanticity): on fewer documents n_eff is 5 % too low.
MIN_ACTIVE_TOKENS, MIN_ACTIVE_DOCUMENTS = 50, 40


class Labelled(NamedTuple):
    """Documents, each of one concept."""

    concept: Int[Tensor, " documents"]
    """0 ... n_concepts - 1; every concept has two documents or more."""
    n_tokens: Float64[Tensor, " documents"]
    """Tokens that were looked at."""
    superclass: Int[Tensor, " concepts"]

    @property
    def n_concepts(self) -> int:
        return len(self.superclass)

    @property
    def one_hot(self) -> Float64[Tensor, "concepts documents"]:
        return (self.concept == torch.arange(self.n_concepts)[:, None]).double()

    @property
    def distance(self) -> Float64[Tensor, "concepts concepts"]:
        """0 the same concept, 1/2 the same superclass, 1 otherwise (distance in the tree)."""
        same = self.superclass[:, None] == self.superclass
        return (1 - 0.5 * same.double()).fill_diagonal_(0)

    def relabelled(self, generator: torch.Generator) -> "Labelled":
        """Concepts dealt anew to whole documents: the null of everything here."""
        order = torch.randperm(len(self.concept), generator=generator)
        return self._replace(concept=self.concept[order])

    def draws(
        self, n_draws: int, generator: torch.Generator
    ) -> Float64[Tensor, "draws documents"]:
        """How often each document counts: once in row 0, then drawn with replacement in concepts.

        Every concept keeps its number of documents in every draw.
        """
        weights = torch.zeros(n_draws + 1, len(self.concept), dtype=torch.float64)
        weights[0] = 1
        for c in range(self.n_concepts):
            members = (self.concept == c).nonzero().flatten()
            drawn = members[
                torch.randint(len(members), (n_draws, len(members)), generator=generator)
            ]
            weights[1:].scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        return weights


# --- concentration -----------------------------------------------------------------------------


def concept_sums(
    sums: Float[Tensor, "documents units"],
    labels: Labelled,
    weights: Float64[Tensor, "draws documents"],
) -> Float64[Tensor, "draws concepts units"]:
    """Weighted sums over the documents of each concept, multiplied in the number format of `sums`.

    In float32 that is exact for counts, whose sums are whole numbers below 2^24.
    """
    found = sums.new_zeros(len(weights), labels.n_concepts, sums.shape[1], dtype=torch.float64)
    weights = weights.to(sums.dtype)
    for c in range(labels.n_concepts):
        members = (labels.concept == c).nonzero().flatten()
        found[:, c] = weights[:, members] @ sums[members]
    return found


def concept_shares(
    mass: Float[Tensor, "documents units"],
    labels: Labelled,
    weights: Float64[Tensor, "draws documents"],
) -> Float64[Tensor, "draws concepts units"]:
    """q_c: mass per token in concept c, divided by the sum over concepts. Silent units: nan."""
    n = weights @ (labels.one_hot * labels.n_tokens).T
    rates = concept_sums(mass, labels, weights) / n[:, :, None]
    return rates / rates.sum(dim=1, keepdim=True)


def entropy(shares: Float[Tensor, "*draws concepts units"]) -> Float[Tensor, "*draws units"]:
    """H(q) = -sum_c q_c ln q_c, in nats."""
    return -torch.xlogy(shares, shares).sum(dim=-2)


def effective_number(
    mass: Float[Tensor, "documents units"], labels: Labelled
) -> Float64[Tensor, " units"]:
    """N_eff = exp H(q), the effective number of concepts: 1 for one, n_concepts for evenly all.

    The Hill number of order 1. Entropy of few documents is too small; the jackknife over documents
    takes the first order of that away: with H_d the entropy without document d of concept c(d),
    which has n_c of them,

        H_corrected = H - sum_d (1 - 1 / n_c(d)) (H_d - H)

    which may leave the range of a true N_eff by its own error.
    """
    weights = torch.ones(1, len(mass), dtype=torch.float64)
    mass = mass.double()
    in_concept = concept_sums(mass, labels, weights)[0]
    n = labels.one_hot @ labels.n_tokens
    rates = in_concept / n[:, None]
    total, logs = rates.sum(dim=0), torch.xlogy(rates, rates).sum(dim=0)
    plain = total.log() - logs / total
    c = labels.concept
    without = ((in_concept[c] - mass).clamp_min(0)) / (n[c] - labels.n_tokens)[:, None]
    total_without = total - rates[c] + without
    logs_without = logs - torch.xlogy(rates, rates)[c] + torch.xlogy(without, without)
    left_out = total_without.log() - logs_without / total_without
    # A unit that is active in one document alone has nothing left without it.
    left_out = torch.where(total_without > 0, left_out, plain)
    share = 1 - 1 / labels.one_hot.sum(dim=1)[c]
    corrected = plain - share @ (left_out - plain)
    return corrected.exp()


def rao_entropy(
    mass: Float[Tensor, "documents units"], labels: Labelled
) -> Float64[Tensor, " units"]:
    """Q = sum_cc' q_c q_c' d(c, c'): expected distance of the concepts of two active tokens.

    0 for one concept; two of one superclass count half of two that are further apart (Rao 1982).
    The two tokens are of different documents, so that few documents do not look like one concept:
    squares within a concept are sums over pairs of its documents.
    """
    weights = torch.ones(1, len(mass), dtype=torch.float64)
    mass = mass.double()
    sums = concept_sums(mass, labels, weights)[0]
    squares = concept_sums(mass.square(), labels, weights)[0]
    n_documents = labels.one_hot.sum(dim=1)[:, None]
    n = (labels.one_hot @ labels.n_tokens)[:, None]
    rates = sums / n
    pairs = (sums.square() - squares) / n.square() * n_documents / (n_documents - 1)
    apart = torch.einsum("cu,cd,du->u", rates, labels.distance, rates)
    # Of all pairs, those of one concept are at distance 0 but count in the total.
    total = rates.sum(dim=0).square() - rates.square().sum(dim=0) + pairs.sum(dim=0)
    return apart / total


# --- which concepts ----------------------------------------------------------------------------


class Lifts(NamedTuple):
    """How much more often a unit is active in a concept than in all others."""

    value: Float64[Tensor, "concepts units"]
    """Active tokens per token in the concept / in all others; inf where only there."""
    low: Float64[Tensor, "concepts units"]
    """5th percentile of the bootstrap draws: a one-sided 95 % bound."""


def lifts(
    active: Float[Tensor, "documents units"],
    labels: Labelled,
    weights: Float64[Tensor, "draws documents"],
) -> Lifts:
    """Lifts of all concepts; `weights` are `Labelled.draws`. A silent unit has nan."""
    rate, rest = _rates_in_and_out(active, labels, weights)
    value = rate / rest
    finite = value[1:].nan_to_num(nan=0.0, posinf=torch.finfo(torch.float64).max)
    return Lifts(value[0], finite.quantile(0.05, dim=0, interpolation="lower"))


def lift_p(
    active: Float[Tensor, "documents units"],
    labels: Labelled,
    weights: Float64[Tensor, "draws documents"],
    min_lift: float = MIN_LIFT,
) -> Float64[Tensor, "concepts units"]:
    """p of the hypothesis that a concept's lift is at most `min_lift`; 1 for a silent unit.

    (1 + draws in which it is) / (1 + draws).
    """
    rate, rest = _rates_in_and_out(active, labels, weights)
    n_below = (rate[1:] <= min_lift * rest[1:]).sum(dim=0)
    return (1 + n_below.double()) / len(weights)


def _rates_in_and_out(
    active: Float[Tensor, "documents units"],
    labels: Labelled,
    weights: Float64[Tensor, "draws documents"],
) -> tuple[Float64[Tensor, "draws concepts units"], Float64[Tensor, "draws concepts units"]]:
    """Active tokens per token of each concept, and of all others together."""
    sums = concept_sums(active, labels, weights)
    n = (weights @ (labels.one_hot * labels.n_tokens).T)[:, :, None]
    rest = (sums.sum(dim=1, keepdim=True) - sums) / (n.sum(dim=1, keepdim=True) - n)
    return sums / n, rest


def discoveries(
    p: Float[Tensor, "*shape"], rate: float = FALSE_DISCOVERY_RATE
) -> Bool[Tensor, "*shape"]:
    """Which hypotheses are rejected with this false-discovery rate (Benjamini, Hochberg 1995)."""
    ordered = p.flatten().sort().values
    below = ordered <= rate * torch.arange(1, len(ordered) + 1) / max(len(ordered), 1)
    if not below.any():
        return torch.zeros_like(p, dtype=torch.bool)
    return p <= ordered[below.nonzero().max()]


def n_superclasses(
    significant: Bool[Tensor, "concepts units"], superclass: Int[Tensor, " concepts"]
) -> Int[Tensor, " units"]:
    """Of how many superclasses a unit's concepts are; two or more is polysemantic, strictly."""
    kinds = superclass.unique()
    return torch.stack([significant[superclass == kind].any(dim=0) for kind in kinds]).sum(dim=0)


def eligible(
    active: Float[Tensor, "documents units"],
    min_tokens: int = MIN_ACTIVE_TOKENS,
    min_documents: int = MIN_ACTIVE_DOCUMENTS,
) -> Bool[Tensor, " units"]:
    """Units with enough evidence to be judged; labels have no part in it."""
    return (active.sum(dim=0) >= min_tokens) & ((active > 0).sum(dim=0) >= min_documents)


# --- detection ---------------------------------------------------------------------------------


class Detection(NamedTuple):
    """How well each unit tells its concept from the rest, by the document's largest activity."""

    auroc: Float64[Tensor, " units"]
    average_precision: Float64[Tensor, " units"]
    precision: Float64[Tensor, " units"]
    recall: Float64[Tensor, " units"]
    f1: Float64[Tensor, " units"]


def auroc(
    score: Float[Tensor, "documents units"], is_positive: Bool[Tensor, "documents units"]
) -> Float64[Tensor, " units"]:
    """P(a positive scores above a negative), ties half: from mid-ranks (Mann and Whitney 1947)."""
    n, n_positive = len(score), is_positive.sum(dim=0).double()
    ranks = torch.stack([_mid_ranks(column) for column in score.T], dim=1)
    sum_positive = (ranks * is_positive).sum(dim=0)
    return (sum_positive - n_positive * (n_positive + 1) / 2) / (n_positive * (n - n_positive))


def _mid_ranks(values: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[inverse]


def average_precision(
    score: Float[Tensor, "documents units"], is_positive: Bool[Tensor, "documents units"]
) -> Float64[Tensor, " units"]:
    """sum_n (recall_n - recall_(n-1)) precision_n over distinct thresholds; ties count at once."""
    found = []
    for values, positive in zip(score.T, is_positive.T, strict=True):
        precision, recall = _precision_recall(values, positive)
        found.append((precision * recall.diff(prepend=recall.new_zeros(1))).sum())
    return torch.stack(found)


def _precision_recall(
    values: Float[Tensor, " n"], positive: Bool[Tensor, " n"]
) -> tuple[Float64[Tensor, " thresholds"], Float64[Tensor, " thresholds"]]:
    """At each distinct value as threshold (>=), from the highest."""
    ordered, order = values.sort(descending=True)
    hits = positive[order].double().cumsum(0)
    last = torch.cat([ordered.diff() != 0, ordered.new_ones(1, dtype=torch.bool)]).nonzero()[:, 0]
    return hits[last] / (last + 1), hits[last] / hits[-1]


def best_threshold(
    values: Float[Tensor, " documents"], positive: Bool[Tensor, " documents"]
) -> float:
    """The value at which "at least this" has the largest F1."""
    precision, recall = _precision_recall(values, positive)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
    return values.unique().flip(0)[f1.argmax()].item()


def detection(
    choosing: Float[Tensor, "documents_a units"],
    labels_a: Labelled,
    heldout: Float[Tensor, "documents_b units"],
    labels_b: Labelled,
    concept: Int[Tensor, " units"],
) -> Detection:
    """Scores on held-out documents, with thresholds from the documents for choosing.

    `choosing`, `heldout`: the largest activity in each document.
    """
    truth_a = labels_a.concept[:, None] == concept
    truth = labels_b.concept[:, None] == concept
    pairs = zip(choosing.T, truth_a.T, strict=True)
    threshold = torch.tensor([best_threshold(v, t) for v, t in pairs], dtype=heldout.dtype)
    guessed = (heldout >= threshold) & (heldout > 0)
    hits = (guessed & truth).sum(dim=0).double()
    precision = hits / guessed.sum(dim=0).clamp_min(1)
    recall = hits / truth.sum(dim=0)
    f1 = 2 * hits / (guessed.sum(dim=0) + truth.sum(dim=0))
    return Detection(
        auroc(heldout, truth), average_precision(heldout, truth), precision, recall, f1
    )


def choose_concept(
    score: Float[Tensor, "documents units"], labels: Labelled
) -> Int[Tensor, " units"]:
    """The concept that each unit's largest activity per document detects best, by AUROC."""
    ranks = torch.stack([_mid_ranks(column) for column in score.T], dim=1)
    n = labels.one_hot.sum(dim=1)[:, None]
    sums = labels.one_hot @ ranks
    return ((sums - n * (n + 1) / 2) / (n * (len(score) - n))).argmax(dim=0)


# --- information -------------------------------------------------------------------------------


def mutual_information(
    bins: Int[Tensor, "documents units"], concept: Int[Tensor, " documents"], n_concepts: int
) -> Float64[Tensor, " units"]:
    """I(concept; bin) in nats, from counts of documents; too large for few of them."""
    n_bins = int(bins.max()) + 1
    cell = concept[:, None] * n_bins + bins
    counts = torch.zeros(n_concepts * n_bins, bins.shape[1], dtype=torch.float64)
    counts.scatter_add_(0, cell, torch.ones_like(cell, dtype=torch.float64))
    joint = counts.view(n_concepts, n_bins, -1).transpose(0, 1) / len(bins)
    outer = joint.sum(dim=0, keepdim=True) * joint.sum(dim=1, keepdim=True)
    ratio = torch.where(joint > 0, joint / outer, 1.0)
    return (joint * ratio.log()).sum(dim=(0, 1))


def corrected_mutual_information(
    bins: Int[Tensor, "documents units"],
    labels: Labelled,
    generator: torch.Generator,
    n_shuffles: int = 100,
) -> Float64[Tensor, " units"]:
    """`mutual_information` minus its mean over relabelled documents."""
    plain = mutual_information(bins, labels.concept, labels.n_concepts)
    null = torch.zeros_like(plain)
    for _ in range(n_shuffles):
        shuffled = labels.relabelled(generator).concept
        null += mutual_information(bins, shuffled, labels.n_concepts)
    return plain - null / n_shuffles


def activity_bins(
    score: Float[Tensor, "documents units"], n_bins: int = 4
) -> Int[Tensor, "documents units"]:
    """0 where silent, else 1 ... n_bins by quantiles of the unit's activity where it is active."""
    found = torch.zeros_like(score, dtype=torch.int64)
    for column, bins in zip(score.T, found.T, strict=True):
        active = column > 0
        if active.any():
            edges = column[active].quantile(
                torch.linspace(0, 1, n_bins + 1, dtype=score.dtype)[1:-1]
            )
            bins[active] = 1 + torch.bucketize(column[active], edges)
    return found

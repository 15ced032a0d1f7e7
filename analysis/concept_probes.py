"""Probes of one family of features after another: fitted on source A, scored on source B.

One dictionary's averages are in memory at a time; of each probe only its scores with every draw of
the documents are kept, so that differences between families are paired.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from analysis.controls import UNTRAINED
from analysis.program import Row
from analysis.units import ConceptReading, Split
from sparse_coding.dictionary import Dictionary
from sparse_coding.metrics import columns, interval, t_interval
from sparse_coding.polysemanticity import Labelled
from sparse_coding.probing import (
    SPARSE_COST,
    Fold,
    Probe,
    by_parent,
    cross_validated_probe,
    fit_probe,
    ranked_features,
    weighted_scores,
)
from sparse_coding.unit_activity import ROWS_AT_ONCE

TRUE, SHUFFLED = "true", "shuffled"
ALL = "all"
BASES = ("neuron_basis", "pca", "mlp_neurons")
ALIKE = ("n_documents", "n_documents_fit")  # for all concepts
COUNTED = ("n_positive", "n_parents", "n_parents_fit", "n_tokens")
# of rows that differ in the seed alone
SAME = ("kind", "labels", "family", "architecture", "target_l0", "l1_coeff", "ratio", "k",
        "shares_start")  # fmt: skip


class Probed(NamedTuple):
    """Features of one dictionary; made when their turn comes."""

    facts: Row
    """family, ratio, seed, and of an SAE its name and settings."""
    hook_name: str
    make: Callable[[], Dictionary]

    @property
    def is_basis(self) -> bool:
        """Made of halves of signed axes, of which each is offered to probes as a whole, too."""
        return self.facts["family"] in BASES

    @property
    def is_sae(self) -> bool:
        """Trained or not: its splitting and absorption are looked at."""
        return self.facts["family"] in ("sae", UNTRAINED)


class Averages(NamedTuple):
    """Of features over the tokens of each document, of source A and of source B."""

    a: Float[Tensor, "documents_a features"]
    b: Float[Tensor, "documents_b features"]


@torch.no_grad()
def averages(
    encode: Callable[[Tensor], Tensor], reading: ConceptReading, hook_name: str
) -> Averages:
    """Means of what `encode` makes of the rows of the model's dtype; 0 for an empty document."""

    def of(split: Split) -> Float[Tensor, "documents features"]:
        device, n = reading.lm.device, len(split.labels.concept)
        sums: Tensor | None = None
        parts = (split.acts[hook_name], split.document)
        for x, document in zip(*(part.split(ROWS_AT_ONCE) for part in parts), strict=True):
            f = encode(x.to(device).float())
            if sums is None:
                sums = torch.zeros(n, f.shape[1], device=device)
            sums.index_add_(0, document.to(device), f)
        return sums.cpu() / split.document.bincount(minlength=n).clamp_min(1)[:, None]

    return Averages(of(reading.choosing), of(reading.heldout))


def with_whole_axes(halves: Averages) -> Averages:
    """Signed axes before their positive and negative halves."""

    def widen(x: Tensor) -> Tensor:
        positive, negative = x.chunk(2, dim=1)
        return torch.cat([positive - negative, x], dim=1)

    return Averages(*map(widen, halves))


class Task(NamedTuple):
    """One labelling of the documents, with what is the same for all families."""

    labels: str
    """`TRUE` or `SHUFFLED`."""
    a: Labelled
    b: Labelled
    weights: Float64[Tensor, "draws documents_b"]
    folds: list[list[Fold]]
    """Of source A, for each concept."""
    facts: list[Row]
    """Counts of documents and parents, for each concept."""


def make_task(reading: ConceptReading, n_draws: int, seed: int, is_shuffled: bool = False) -> Task:
    """The true labels, or concepts dealt anew to whole documents of A and of B."""
    generator = torch.Generator().manual_seed(seed)
    splits = reading.choosing, reading.heldout
    a, b = (split.labels for split in splits)
    if is_shuffled:
        a, b = a.relabelled(generator), b.relabelled(generator)
    parent_a, parent_b = (reading.corpus.parent[split.documents] for split in splits)
    folds, facts = [], []
    for c in range(a.n_concepts):
        of_concept, is_grouped = by_parent(a.concept == c, parent_a)
        folds.append(of_concept)
        facts.append({
            "n_documents": len(b.concept),
            "n_positive": int((b.concept == c).sum()),
            "n_parents": len(parent_b[b.concept == c].unique()),
            "n_documents_fit": len(a.concept),
            "n_parents_fit": len(parent_a[a.concept == c].unique()),
            "n_folds": len(of_concept),
            "folds_are_of_parents": is_grouped,
        })  # fmt: skip
    labels = SHUFFLED if is_shuffled else TRUE
    return Task(labels, a, b, b.draws(n_draws, generator), folds, facts)


class Ranked(NamedTuple):
    """Features of one concept, best first."""

    whole: Int[Tensor, " k"]
    """Chosen on source A."""
    in_folds: Int[Tensor, "folds k"]
    """Chosen on what each fold trains on."""


def rank(task: Task, features: Float[Tensor, "documents_a features"], k: int) -> list[Ranked]:
    """The k best features of every concept."""
    positive, negative, n = [], [], []
    for c, folds in enumerate(task.folds):
        is_concept = task.a.concept == c
        n.append(1 + len(folds))
        for members in (torch.arange(len(is_concept)), *(train for train, _ in folds)):
            is_member = torch.zeros_like(is_concept)
            is_member[members] = True
            positive.append(is_concept & is_member)
            negative.append(~is_concept & is_member)
    found = ranked_features(features, torch.stack(positive), torch.stack(negative), k)
    return [Ranked(part[0], part[1:]) for part in found.split(n)]


class Scored(NamedTuple):
    """Probes of one family, labelling and k."""

    facts: Row
    of_concept: list[Row]
    auroc: Float64[Tensor, "concepts draws"]
    average_precision: Float64[Tensor, "concepts draws"]


def probe(
    task: Task, facts: Row, features: Averages, chosen: Sequence[Tensor] | None = None
) -> tuple[Scored, list[Probe]]:
    """One probe per concept of its chosen features; None: of all, with a penalty of its own."""
    scores, probes, of_concept = [], [], []
    for c in range(task.a.n_concepts):
        is_concept = task.a.concept == c
        if chosen is None:
            some = slice(None)
            fitted = cross_validated_probe(features.a, is_concept, task.folds[c])
        else:
            some = chosen[c]
            fitted = fit_probe(features.a[:, some], is_concept, SPARSE_COST)
        score = fitted.score(features.b[:, some])
        scores.append(weighted_scores(score, task.b.concept == c, task.weights))
        probes.append(fitted)
        of_concept.append(task.facts[c] | {"cost": fitted.cost})
    auroc, precision = (torch.stack(part) for part in zip(*scores, strict=True))
    facts = {"labels": task.labels} | facts | {"n_features": features.a.shape[1]}
    return Scored(facts, of_concept, auroc, precision), probes


def probe_rows(scored: list[Scored], names: list[str]) -> list[Row]:
    """With paired differences to the dense probe, and to random directions of that k and ratio."""
    by = {tuple(one.facts[key] for key in ("labels", "family", "ratio", "k")): one
          for one in scored if one.facts["family"] in ("dense", "random_directions")}  # fmt: skip
    rows = []
    for one in scored:
        labels, family, ratio, k = (one.facts[key] for key in ("labels", "family", "ratio", "k"))
        values = {"auroc": one.auroc, "average_precision": centred(one.average_precision)}
        (dense,) = (other for key, other in by.items() if key[:2] == (labels, "dense"))
        values["minus_dense"] = one.auroc - dense.auroc
        random = by.get((labels, "random_directions", ratio, k))
        if random and family != "random_directions":
            values["minus_random"] = one.auroc - random.auroc
        rows += rows_of_concepts({"kind": "probe"} | one.facts, names, values, one.of_concept)
    return rows


def centred(draws: Float64[Tensor, "concepts draws"]) -> Float64[Tensor, "concepts draws"]:
    """Draws moved to have the estimate as their mean, at most 1.

    Documents that are drawn twice stand together in a ranking, which lifts average precision.
    """
    value, drawn = draws[:, :1], draws[:, 1:]
    moved = drawn - drawn.mean(dim=1, keepdim=True) + value
    return torch.cat([value, moved.clamp_max(1)], dim=1)


def rows_of_concepts(
    facts: Row, names: list[str], values: dict[str, Tensor], more: Sequence[Row]
) -> list[Row]:
    """A row per concept, and the mean over those where it is defined as concept "all".

    `values` have an estimate and draws for each concept; of `more`, floats are averaged.
    """
    rows = []
    for c, name in enumerate(names):
        row = facts | {"concept": name} | more[c]
        for key, draws in values.items():
            row |= columns(key, interval(draws[c]))
        rows.append(row)
    mean = facts | {"concept": ALL, "n_concepts": len(names)}
    mean |= {key: more[0][key] for key in ALIKE if key in more[0]}
    mean |= {key: sum(row[key] for row in more) for key in COUNTED if key in more[0]}
    for key, value in more[0].items():
        if isinstance(value, float) and key != "cost":
            mean[key] = sum(row[key] for row in more) / len(more)
    for key, draws in values.items():
        mean |= columns(key, interval(draws.nanmean(dim=0)))
    return [*rows, mean]


def rows_over_seeds(rows: list[Row]) -> list[Row]:
    """Means over the seeds of what has several, with Student's t interval; concept "all" alone."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["concept"] == ALL and row["seed"] is not None:
            key = tuple(row.get(k) for k in SAME)
            groups.setdefault(key, []).append(row)
    found = []
    for group in groups.values():
        if len(group) > 1:
            mean = {k: v for k, v in group[0].items() if all(row.get(k) == v for row in group)}
            for key in group[0]:
                values = [row.get(key) for row in group]
                is_bound = key in SAME or key.endswith(("_low", "_high"))
                if not is_bound and all(isinstance(value, float) for value in values):
                    mean |= columns(key, t_interval(values))
            found.append(mean | {"seed": ALL, "n_seeds": len(group)})
    return found

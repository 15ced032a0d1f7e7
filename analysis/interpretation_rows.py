"""Results of `interpret_units` as rows: of units, their examples, families and contrasts."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from tqdm import tqdm

from analysis.interpretation import (
    INTRUDERS,
    SILENT,
    Family,
    Found,
    Groups,
    Guessed,
    Tools,
    at_natural_rate,
    decile_detections,
    detections,
    estimate,
    find,
    intrusions,
    judged,
    shown_contexts,
)
from analysis.program import Row
from analysis.unit_scores import mean_over_seeds
from sparse_coding.context_clusters import Clusters
from sparse_coding.descriptions import Description, Detection, Natural, in_words
from sparse_coding.examples import KINDS, N_DECILES, RANDOM
from sparse_coding.metrics import columns, share_interval, t_interval

if TYPE_CHECKING:
    from analysis.interpret_units import Config

NEVER = Description((), (), 0.5)
N_SHOWN_SILENT = 2  # examples of each kind of silent contexts in the results


class Measured(NamedTuple):
    """One family's units, by index in the family."""

    family: Family
    found: list[Found]
    detected: dict[int, dict[str, Detection]]
    """By unit, by kind of silent contexts."""
    shuffled: dict[int, dict[str, Detection]]
    """The same with another unit's description."""
    never: dict[int, dict[str, Detection]]
    """The same with a description that never holds."""
    by_decile: dict[int, dict[int, Detection]]
    """By unit, by decile of its activation."""
    natural: dict[int, Natural]
    guessed: dict[int, dict[str, Guessed]]
    grouped: dict[int, Clusters]
    """Of units with contexts enough."""


def measure(cfg: "Config", tools: Tools, groups: Groups, family: Family) -> Measured:
    """Describe and score every unit that fires often enough."""
    held = tools.held
    indices = judged(family, held)
    found = [
        find(tools, family, i, cfg.n_contexts, cfg.seed)
        for i in tqdm(indices, desc=family.name, unit="unit")
    ]
    order = np.random.default_rng(cfg.seed).permutation(len(found))
    others = {int(a): int(b) for a, b in zip(order, np.roll(order, 1), strict=True)}
    return Measured(
        family,
        found,
        {one.index: detections(held, one.scoring, one.description) for one in found},
        {
            one.index: detections(held, one.scoring, found[others[n]].description)
            for n, one in enumerate(found)
            if others[n] != n
        },
        {one.index: detections(held, one.scoring, NEVER) for one in found},
        {one.index: decile_detections(held, one.scoring, one.description) for one in found},
        {one.index: at_natural_rate(held, family, one) for one in found},
        {
            one.index: intrusions(tools, family, one.index, cfg.n_trials, cfg.seed)
            for one in tqdm(found, desc=f"{family.name}, intruders", unit="unit")
        },
        {
            one.index: clusters
            for one in tqdm(found, desc=f"{family.name}, groups", unit="unit")
            if (clusters := groups.of(family, one.index)) is not None
        },
    )


def rows_of(
    cfg: "Config", tools: Tools, families: Sequence[Family]
) -> tuple[list[Row], list[Measured]]:
    """All rows but the judge's; the first family is what the others are set against."""
    generator = torch.Generator().manual_seed(cfg.seed)
    groups = Groups(tools, cfg.n_contexts, cfg.seed)
    measured = [measure(cfg, tools, groups, family) for family in families]
    rows: list[Row] = []
    for one in measured:
        facts = {
            "family": one.family.name,
            "n_sampled": len(one.family.unit),
            "n_units": len(one.found),
        }
        rows += [facts | row for row in family_rows(one, generator)]
        rows += [facts | row for row in intruder_rows(one, cfg.n_draws, generator)]
        rows.append(facts | cluster_row(one))
        rows += [facts | row for row in unit_rows(tools, one)]
    for other in measured[1:]:
        rows += contrast_rows(measured[0], other, generator)
    return rows, measured


# --- families ----------------------------------------------------------------------------------


def over_units(
    name: str, draws: Sequence[Float64[Tensor, " draws"]], generator: torch.Generator
) -> Row:
    """Mean over the units of which the quantity is defined; documents and units are drawn."""
    known = [one for one in draws if one[0].isfinite()]
    if not known:
        return {name: None, f"{name}_n": 0}
    stacked = torch.stack(known, dim=1)
    # a draw without any of a unit's contexts says nothing: the unit keeps its estimate there
    stacked = torch.where(stacked.isfinite(), stacked, stacked[0])
    mean = mean_over_seeds([stacked[0]], [stacked], n_draws=len(stacked) - 1, generator=generator)
    return columns(name, mean.interval) | {f"{name}_n": len(known)}


def family_rows(one: Measured, generator: torch.Generator) -> Iterator[Row]:
    """Scores against each kind of silent contexts, of rules and of both baselines."""
    by = {"rules": one.detected, "shuffled": one.shuffled, "always_negative": one.never}
    finding = [torch.tensor(found.description.balanced_accuracy) for found in one.found]
    for kind in SILENT:
        for described_by, detected in by.items():
            of_kind = [unit[kind] for unit in detected.values() if kind in unit]
            row: Row = {"what": "description", "negatives": kind, "described_by": described_by}
            for field in Detection._fields:
                row |= over_units(field, [getattr(d, field) for d in of_kind], generator)
            if described_by == "rules" and finding:
                row["finding_balanced_accuracy"] = float(torch.stack(finding).mean())
            yield row
    for decile in range(N_DECILES):
        of_decile = [unit[decile] for unit in one.by_decile.values() if decile in unit]
        row = {"what": "decile", "decile": decile + 1, "negatives": RANDOM}
        for field in ("balanced_accuracy", "auroc", "recall"):
            row |= over_units(field, [getattr(d, field) for d in of_decile], generator)
        yield row
    row = {"what": "natural", "rate": rate(one)}
    for field in Natural._fields:
        row |= over_units(field, [getattr(n, field) for n in one.natural.values()], generator)
    yield row


def rate(one: Measured) -> float | None:
    """Mean share of rows on which the units fire."""
    rates = [one.family.fires(found.index).mean() for found in one.found]
    return float(np.mean(rates)) if rates else None


def intruder_rows(one: Measured, n_draws: int, generator: torch.Generator) -> Iterator[Row]:
    """Accuracy of the intruder test, all deciles together and one by one."""
    for intruder in INTRUDERS:
        for masked in (False, True):
            for decile in (None, *range(N_DECILES)):
                right = [
                    right_answers(guessed[intruder], masked, decile)
                    for guessed in one.guessed.values()
                ]
                right = [some for some in right if len(some)]
                row: Row = {"what": "intruder", "intruder": intruder, "chance": 0.2}
                row |= {"token": "hidden" if masked else "shown"}
                row |= {"decile": None if decile is None else decile + 1}
                row |= {"n_trials": sum(map(len, right)), "n_units": len(right)}
                if right:
                    shares = torch.tensor([some.mean() for some in right], dtype=torch.float64)
                    mean = mean_over_seeds([shares], None, n_draws=n_draws, generator=generator)
                    row |= columns("accuracy", mean.interval) | {"accuracy_n": len(right)}
                yield row


def cluster_row(one: Measured) -> Row:
    """Groups of contexts: how many, and how much more alike than random ones; t over units."""
    found = list(one.grouped.values())
    row: Row = {"what": "cluster", "token": "hidden", "n_clustered": len(found)}
    if len(found) < 2:
        return row
    row |= columns("n_clusters", t_interval([clusters.n for clusters in found]))
    row |= columns("likeness_z", t_interval([clusters.z for clusters in found]))
    n_single = sum(clusters.n == 1 for clusters in found)
    return row | columns("one_cluster", share_interval(n_single, len(found)))


def right_answers(guessed: Guessed, masked: bool, decile: int | None) -> np.ndarray:
    is_right = guessed.is_right[masked]
    if decile is None:
        return is_right
    return is_right[[trial.decile == decile for trial in guessed.trials]]


def contrast_rows(sae: Measured, other: Measured, generator: torch.Generator) -> Iterator[Row]:
    """SAE minus control, unit by partner, from the same draws of documents."""
    pairs = sorted(sae.detected.keys() & other.detected.keys())
    for kind in SILENT:
        differences = [
            sae.detected[i][kind].balanced_accuracy - other.detected[i][kind].balanced_accuracy
            for i in pairs
            if kind in sae.detected[i] and kind in other.detected[i]
        ]
        row: Row = {"what": "contrast", "family": other.family.name, "negatives": kind}
        row |= {"n_units": len(differences)}
        yield row | over_units("balanced_accuracy_difference", differences, generator)


# --- units -------------------------------------------------------------------------------------


def unit_rows(tools: Tools, one: Measured) -> Iterator[Row]:
    """One row for each unit and one for each of its shown contexts."""
    held, family = tools.held, one.family
    for found in one.found:
        i = found.index
        facts = {"unit": int(family.unit[i])}
        row: Row = {
            "what": "unit",
            "index": i,
            "rate": float(family.fires(i).mean()),
            "threshold": float(family.threshold[i]),
            "description": in_words(found.description, held.evidence),
            "finding_balanced_accuracy": found.description.balanced_accuracy,
        }
        for kind, detected in one.detected[i].items():
            row[f"{kind}_n"] = int(found.scoring.against(kind).sum())
            for field in Detection._fields:
                row |= columns(f"{kind}_{field}", estimate(getattr(detected, field)))
        for field in Natural._fields:
            row |= columns(f"natural_{field}", estimate(getattr(one.natural[i], field)))
        if i in one.grouped:
            row |= {"n_clusters": one.grouped[i].n, "likeness_z": one.grouped[i].z}
        for intruder, guessed in one.guessed[i].items():
            row[f"intruder_{intruder}_n"] = len(guessed.trials)
            for masked, is_right in guessed.is_right.items():
                name = f"intruder_{intruder}{'_hidden' * masked}"
                row[name] = float(is_right.mean()) if len(is_right) else None
        yield facts | row
        yield from (facts | example for example in example_rows(tools, family, found))


def example_rows(tools: Tools, family: Family, found: Found) -> Iterator[Row]:
    """A firing context of each decile, and a few silent ones, of the scoring half."""
    examples = found.scoring
    chosen = [np.flatnonzero(examples.decile == d)[:1] for d in reversed(range(N_DECILES))]
    chosen += [np.flatnonzero(examples.of(kind))[:N_SHOWN_SILENT] for kind in SILENT]
    places = np.concatenate(chosen)
    shown = shown_contexts(tools.held, family, found.index, examples.row[places])
    for place, context in zip(places.tolist(), shown, strict=True):
        decile = int(examples.decile[place])
        yield {
            "what": "example",
            "kind": KINDS[examples.kind[place]],
            "decile": decile + 1 if decile >= 0 else None,
            "text": context.marked,
            "tokens": list(context.pieces),
            "activations": [float(f"{value:.4g}") for value in context.activations],
            "centre": context.centre,
        }


# --- the judge ---------------------------------------------------------------------------------


def judge_means(rows: Sequence[Row]) -> Iterator[Row]:
    """Means over units of what the judge's rows hold."""
    keys = ("family", "protocol", "described_by")
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    for key, some in groups.items():
        mean: Row = {"what": "judge_mean"} | dict(zip(keys, key, strict=True))
        mean |= {"n_units": len(some)}
        mean |= {n: sum(row.get(n, 0) for row in some) for n in ("n", "n_unparsable")}
        for name in ("balanced_accuracy", "correlation", "accuracy"):
            values = [row[name] for row in some if row.get(name) is not None]
            if len(values) > 1:
                mean |= columns(name, t_interval(values)) | {f"{name}_n": len(values)}
        yield mean

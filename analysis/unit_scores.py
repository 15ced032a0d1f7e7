"""Scores of families of units on the concept corpus: each seed, each family, and differences.

Concepts and thresholds are chosen on source A, everything is measured on source B. Intervals draw
documents (within concepts, the same draws for every family), then seeds, then units.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from analysis.program import Row
from analysis.units import Family, Observed
from sparse_coding.consistency import Codes, sparse_codes
from sparse_coding.metrics import Interval, columns, share_interval
from sparse_coding.polysemanticity import (
    Detection,
    Labelled,
    activity_bins,
    choose_concept,
    concept_shares,
    corrected_mutual_information,
    detection,
    discoveries,
    effective_number,
    eligible,
    entropy,
    lift_p,
    n_superclasses,
    rao_entropy,
)
from sparse_coding.token_information import (
    N_DECILES,
    TokenLabels,
    purity_by_decile,
    token_statistics,
)

N_RELABELLED = 5
UNITS_AT_ONCE = 128  # bounds the (draws, concepts, units) tensors


class Concentration(NamedTuple):
    """The eligible units of one family and seed in one condition."""

    units: Int[Tensor, " eligible"]
    """Indices among the sampled units."""
    n_eff: Float64[Tensor, " eligible"]
    n_eff_draws: Float64[Tensor, "draws eligible"]
    rao: Float64[Tensor, " eligible"]
    significant: Bool[Tensor, "concepts eligible"]
    n_superclasses: Int[Tensor, " eligible"]
    rate: Float64[Tensor, " eligible"]
    n_sampled: int


def concentration(
    active: Float[Tensor, "documents units"],
    mass: Float[Tensor, "documents units"],
    labels: Labelled,
    weights: Float64[Tensor, "draws documents"],
) -> Concentration:
    """Effective numbers, Rao entropies and significant concepts of the units that are eligible."""
    units = eligible(active).nonzero()[:, 0]
    draws = [torch.zeros(len(weights), 0, dtype=torch.float64)]
    for some in units.split(UNITS_AT_ONCE):
        draws.append(entropy(concept_shares(mass[:, some], labels, weights)).exp())
    significant = significant_concepts(active[:, units], labels, weights)
    return Concentration(
        units,
        effective_number(mass[:, units], labels),
        torch.cat(draws, dim=1),
        rao_entropy(mass[:, units], labels),
        significant,
        n_superclasses(significant, labels.superclass),
        active[:, units].double().sum(dim=0) / labels.n_tokens.sum(),
        active.shape[1],
    )


def significant_concepts(
    active: Float[Tensor, "documents units"],
    labels: Labelled,
    weights: Float64[Tensor, "draws documents"],
) -> Bool[Tensor, "concepts units"]:
    """Concepts with a lift over 2, false discoveries controlled over all of them x all units."""
    p = [torch.zeros(labels.n_concepts, 0, dtype=torch.float64)]
    p += [lift_p(some, labels, weights) for some in active.split(UNITS_AT_ONCE, dim=1)]
    return discoveries(torch.cat(p, dim=1))


class Null(NamedTuple):
    """What the same units score when concepts are dealt anew to whole documents."""

    n_eff: float
    polysemantic: float | None
    """None where it was not asked for."""


def relabelled(
    active: Float[Tensor, "documents units"],
    mass: Float[Tensor, "documents units"],
    labels: Labelled,
    generator: torch.Generator,
    n_draws: int = 0,
) -> Null:
    """Means over eligible units: n_eff of `N_RELABELLED` deals, flags of one with `n_draws`."""
    units = eligible(active).nonzero()[:, 0]
    if len(units) == 0:
        return Null(math.nan, None)
    deals = [labels.relabelled(generator) for _ in range(N_RELABELLED)]
    n_eff = [effective_number(mass[:, units], deal).mean().item() for deal in deals]
    if n_draws == 0:
        return Null(statistics.fmean(n_eff), None)
    weights = deals[0].draws(n_draws, generator)
    significant = significant_concepts(active[:, units], deals[0], weights)
    flags = n_superclasses(significant, labels.superclass) >= 2
    return Null(statistics.fmean(n_eff), flags.double().mean().item())


class Details(NamedTuple):
    """More of the eligible units, at one rate."""

    concept: Int[Tensor, " eligible"]
    detection: Detection
    information: Float64[Tensor, " eligible"]
    token_entropy: Float64[np.ndarray, " eligible"]
    token_purity: Float64[np.ndarray, " eligible"]
    beyond_token: Float64[np.ndarray, " eligible"]
    deciles: Float64[np.ndarray, "deciles eligible"]


def details(
    family: Family, seen: Observed, found: Concentration, condition: int, seed: int
) -> Details:
    """Detection of the concept chosen on source A, information, tokens, purity by decile."""
    a, b = family.reading.choosing, family.reading.heldout
    units, threshold = found.units, seen.thresholds[condition][found.units]
    scores = [torch.relu(of.largest[:, units] - threshold) for of in (seen.choosing, seen.heldout)]
    concept = choose_concept(scores[0], a.labels)
    generator = torch.Generator().manual_seed(seed)
    codes = fired(seen.activations[:, units], threshold)
    labels = TokenLabels(
        b.token.numpy(), b.labels.concept[b.document].numpy(), b.labels.n_concepts
    )
    of_tokens = token_statistics(codes, len(units), labels, np.random.default_rng(seed))
    return Details(
        concept,
        detection(scores[0], a.labels, scores[1], b.labels, concept),
        corrected_mutual_information(activity_bins(scores[1]), b.labels, generator, N_RELABELLED),
        *of_tokens,
        purity_by_decile(codes, len(units), labels.concept, concept.numpy()),
    )


def fired(activations: Float[Tensor, "rows units"], threshold: Float[Tensor, " units"]) -> Codes:
    """Rows on which units are above their thresholds."""
    return sparse_codes(torch.relu(activations - threshold))


# --- families ----------------------------------------------------------------------------------


class Mean(NamedTuple):
    """Over units of a family's seeds; draw by draw the same documents in all families."""

    value: float
    draws: Float64[Tensor, " draws"]

    @property
    def interval(self) -> Interval:
        low, high = self.draws.quantile(torch.tensor([0.025, 0.975]).to(self.draws)).tolist()
        return Interval(self.value, low, high)

    def minus(self, other: "Mean") -> Interval:
        return Mean(self.value - other.value, self.draws - other.draws).interval


def mean_over_seeds(
    estimates: Sequence[Float64[Tensor, " units"]],
    draws: Sequence[Float64[Tensor, "draws units"]] | None,
    n_draws: int,
    generator: torch.Generator,
) -> Mean:
    """Mean of the seeds' means over units; documents, seeds and units are drawn together.

    Row 0 of `draws` is each unit's estimate without the correction that `estimates` have, row b
    that of draw b of the documents; None: the documents' part is left out. Draws of a biased
    estimator are biased twice, so they are centred at the corrected estimate.
    """
    of_seeds = []
    for i, estimate in enumerate(estimates):
        picked = torch.randint(len(estimate), (n_draws, len(estimate)), generator=generator)
        if draws is None:
            of_seeds.append(estimate[picked].mean(dim=1))
        else:
            shifted = draws[i][1:] - draws[i][1:].mean(dim=0) + estimate
            of_seeds.append(shifted.gather(1, picked).mean(dim=1))
    seeds = torch.stack(of_seeds)
    chosen = torch.randint(len(seeds), (len(seeds), n_draws), generator=generator)
    value = float(np.mean([estimate.mean().item() for estimate in estimates]))
    return Mean(value, seeds.gather(0, chosen).mean(dim=0))


def family_row(
    seeds: Sequence[Concentration], nulls: Sequence[Null], n_eff: Mean, rao: Mean
) -> Row:
    """One family in one condition, over its seeds that have eligible units."""
    n_units = sum(len(one.units) for one in seeds)
    n_poly = sum(int((one.n_superclasses >= 2).sum()) for one in seeds)
    n_concepts = torch.cat([one.significant.sum(dim=0).double() for one in seeds])
    return {
        "n_units": n_units,
        "rate": torch.cat([one.rate for one in seeds]).mean().item(),
        **columns("n_eff", n_eff.interval),
        "n_eff_null": statistics.fmean(null.n_eff for null in nulls),
        **columns("rao", rao.interval),
        **columns("polysemantic", share_interval(n_poly, n_units)),
        "polysemantic_null": statistics.fmean(flags) if (flags := of_nulls(nulls)) else None,
        "n_significant": n_concepts.mean().item(),
        "share_without_concept": (n_concepts == 0).double().mean().item(),
    }


def of_nulls(nulls: Sequence[Null]) -> list[float]:
    """Their shares of polysemantic units, where they were asked for."""
    return [null.polysemantic for null in nulls if null.polysemantic is not None]


def contrast_row(
    sae: Mean, other: Mean, sae_units: Float64[Tensor, " n"], other_units: Float64[Tensor, " m"]
) -> Row:
    """SAE minus another family: mean effective number, and Cliff's delta over all pairs of units.

    `detectable` is the difference that would be found with power .8.
    """
    difference = sae.minus(other)
    greater = (sae_units[:, None] > other_units).double().mean()
    less = (sae_units[:, None] < other_units).double().mean()
    spread = (sae.draws - other.draws).std().item()
    return {
        **columns("n_eff_difference", difference),
        "cliffs_delta": (greater - less).item(),
        "detectable": (1.96 + 0.84) * spread,
    }


def percentiles(values: Float64[Tensor, " units"]) -> list[float]:
    """The 0th to the 100th, to three digits."""
    levels = torch.linspace(0, 1, 101, dtype=values.dtype)
    return [round(value, 3) for value in values.quantile(levels).tolist()]


def detail_row(seeds: Sequence[Details], n_draws: int, generator: torch.Generator) -> Row:
    """Means over units, intervals from seeds and units."""
    named = {
        "auroc": [one.detection.auroc for one in seeds],
        "average_precision": [one.detection.average_precision for one in seeds],
        "precision": [one.detection.precision for one in seeds],
        "recall": [one.detection.recall for one in seeds],
        "f1": [one.detection.f1 for one in seeds],
        "information": [one.information for one in seeds],
        "token_entropy": [torch.from_numpy(one.token_entropy) for one in seeds],
        "token_purity": [torch.from_numpy(one.token_purity) for one in seeds],
        "beyond_token": [torch.from_numpy(one.beyond_token) for one in seeds],
    }
    named |= {
        f"purity_decile_{d + 1}": [torch.from_numpy(one.deciles[d]) for one in seeds]
        for d in range(N_DECILES)
    }
    row = {}
    for name, values in named.items():
        known = [value[~value.isnan()] for value in values]
        row |= columns(name, mean_over_seeds(known, None, n_draws, generator).interval)
    return row

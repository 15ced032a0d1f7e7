"""Does the measure of polysemanticity measure it? Planted units, nulls, repeats, a known truth.

    python -m analysis.validate_polysemanticity
    python -m analysis.validate_polysemanticity outputs/runs/NAME

A minute on two CPU cores without a run, two to five with one (10 GB). Units are planted with known
shares of concepts on documents like those of the concept corpus: bursts of firings in some
documents, a share of noise in all concepts, rates over two orders of magnitude. Checks, each
against a limit that was set beforehand; the program fails if one is missed:

- separation: n_eff of units of m = 2 and 4 concepts against m = 1 (AUROC at least .95 at m = 2),
  and how often units of each m are called polysemantic;
- calibration: mean n_eff against the planted number (within 5 %);
- false positives: units without any concept, tested for lift 1 by relabelled documents and for
  lift 2 at exactly 2: as often as nominal (its 95 % interval holds .05, or it is below);
- density: mean n_eff of the rarest third of units of each m beside that of the densest third
  (within 5 % of the planted number), and the rank correlation with the firing rate;
- repeats: n_eff on one half of the documents against the other (intraclass correlation);
- superposition: hidden directions of a toy model of 2209.10652, section 2, whose true number of
  features is known: the participation ratio of what each direction reads (Spearman's correlation).

With a run, real features too: sums of two SAE features of different superclasses against single
ones, and repeats of the run's features. Writes results/validate_polysemanticity.json.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from analysis.program import (
    Row,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.errors import UserError
from sparse_coding.settings import Count, CountOrZero, Draws, OutputFile, Seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparse_coding.metrics import Interval
    from sparse_coding.polysemanticity import Labelled

MIXTURES = (1, 2, 4)
NOISE = 0.1  # share of a planted unit's activity that is of any concept
RATES = (5e-4, 3e-2)
BURSTS = (1.2, 8.0)  # mean active tokens of an active document
N_POSITIONS = 60
N_RESAMPLED = 500
MIN_AUROC, MAX_CALIBRATION, MAX_DRIFT = 0.95, 0.05, 0.05


@dataclass(frozen=True)
class Config:
    """How much is planted."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """A finished run's folder, whose features are mixed and measured twice; none: only planted
    units."""
    n_units: Count = 1000
    """Planted units of each kind."""
    n_documents: Count = 200
    """Documents of each concept."""
    n_draws: Draws = 1000
    """Bootstrap draws of the documents."""
    ratio: CountOrZero = 0
    """Of the run's SAEs the first of this ratio; 0: of the largest, which has the most features of
    one concept."""
    n_features: Count = 2000
    """Of the run's features so many are looked at."""
    seed: Seed = 0
    """Of all that is drawn."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU) or a torch device; for the run's language model."""
    output: OutputFile | None = None
    """Results file; by default results/validate_polysemanticity.json in the run, else in
    outputs/results."""
    overwrite: bool = False
    """Replace the results file if it exists."""


TABLE = {
    "check": "{}",
    "of": "{}",
    "value": "{:.3f}",
    "limit": "{}",
    "passed": "{}",
    "n": "{:,}",
}


def main(cfg: Config) -> None:
    """Plant, measure, print, write; a failure if a limit is missed."""
    path = results_path(cfg, "validate_polysemanticity", [cfg.run])

    import torch
    from tqdm import tqdm

    found: list[Row] = []
    device = "cpu"
    if cfg.run is not None:
        from analysis.validate_real import real_features

        found, device = real_features(cfg)
    labels = corpus_like(cfg.n_documents)
    generator = torch.Generator().manual_seed(cfg.seed)
    weights = labels.draws(cfg.n_draws, generator)
    rows: list[Row] = []
    checks = [separation, calibration, false_positives, density, repeats, superposition]
    for check in tqdm(checks, desc="checks", unit="check"):
        rows += check(cfg, labels, weights, generator)
    rows += found
    print_table("Does n_eff measure polysemanticity?", rows, TABLE, "95 % intervals in brackets")
    write_results(path, cfg, rows, device)
    missed = [f"{row['check']} ({row['of']})" for row in rows if row["passed"] is False]
    if missed:
        raise UserError(f"the measure missed its limits: {', '.join(missed)}")


def corpus_like(n_documents: int) -> "Labelled":
    """Labels of as many documents per concept, all of equal length."""
    import torch

    from sparse_coding.concepts import CONCEPTS, superclasses
    from sparse_coding.polysemanticity import Labelled

    concept = torch.arange(len(CONCEPTS)).repeat_interleave(n_documents)
    n_tokens = torch.full((len(concept),), float(N_POSITIONS), dtype=torch.float64)
    return Labelled(concept, n_tokens, superclasses(CONCEPTS))


def plant(
    shares: "Tensor", rate: "Tensor", labels: "Labelled", generator: "torch.Generator"
) -> "tuple[Tensor, Tensor]":
    """Active tokens and mass (documents, units) of units with these shares (concepts, units).

    In concept c a unit fires at rate C q_c rate: in some documents, drawn anew for each unit, a
    burst of firings whose mean length is drawn from `BURSTS`, or longer where that is not enough
    for the rate; each firing's strength is exponential.
    """
    import torch

    n_units = shares.shape[1]
    low, high = BURSTS
    burst = low + (high - low) * torch.rand(n_units, generator=generator)
    per_document = labels.n_concepts * shares * rate * N_POSITIONS  # (concepts, units)
    length = torch.maximum(burst.expand_as(per_document), per_document / 0.9)
    p_active = (per_document / length)[labels.concept]
    length = length[labels.concept]
    met = torch.rand(p_active.shape, generator=generator) < p_active
    active = met * (1 + torch.poisson(length - 1, generator=generator)).clamp(max=N_POSITIONS)
    gamma = torch._standard_gamma(active.clamp_min(1e-6).double(), generator=generator)
    return active, gamma * (active > 0)


def mixture(m: int, n_units: int, labels: "Labelled", generator: "torch.Generator") -> "Tensor":
    """Shares (concepts, units) of m concepts of different superclasses each, and `NOISE`.

    With more concepts than superclasses the rest is of any; m = 0 is no concept in particular.
    """
    import torch

    if m == 0:
        return torch.full((labels.n_concepts, n_units), 1 / labels.n_concepts)
    shares = torch.full((labels.n_concepts, n_units), NOISE / labels.n_concepts)
    for unit in range(n_units):
        order = torch.randperm(labels.n_concepts, generator=generator)
        first: dict[int, int] = {}
        for c in order.tolist():
            first.setdefault(int(labels.superclass[c]), c)
        others = [c for c in order.tolist() if c not in first.values()]
        shares[[*first.values(), *others][:m], unit] += (1 - NOISE) / m
    return shares


def log_uniform(n: int, generator: "torch.Generator") -> "Tensor":
    """Firing rates between the two `RATES`."""
    import torch

    low, high = torch.tensor(RATES).log()
    return (low + (high - low) * torch.rand(n, generator=generator)).exp()


class Planted(NamedTuple):
    """Planted units that are eligible."""

    active: "Tensor"
    mass: "Tensor"
    n_eff: "Tensor"
    truth: "Tensor"
    rate: "Tensor"


def planted(m: int, cfg: Config, labels: "Labelled", generator: "torch.Generator") -> Planted:
    """Units of m concepts, at rates drawn between the two `RATES`."""

    from sparse_coding.polysemanticity import effective_number, eligible, entropy

    shares = mixture(m, cfg.n_units, labels, generator)
    rate = log_uniform(cfg.n_units, generator)
    active, mass = plant(shares, rate, labels, generator)
    kept = eligible(active)
    truth = entropy(shares[:, kept].double()).exp()
    n_eff = effective_number(mass[:, kept], labels)
    return Planted(active[:, kept], mass[:, kept], n_eff, truth, rate[kept])


def resampled(statistic: "Callable[..., float]", *samples: "Tensor", seed: int) -> "Interval":
    """A statistic of samples of units, which are drawn anew, each sample for itself.

    Samples in one tuple are drawn together.
    """
    import torch

    from sparse_coding.metrics import interval

    generator = torch.Generator().manual_seed(seed)
    values = [statistic(*samples)]
    for _ in range(N_RESAMPLED):
        drawn = []
        for sample in samples:
            picked = torch.randint(len(sample), (len(sample),), generator=generator)
            drawn.append(sample[picked])
        values.append(statistic(*drawn))
    return interval(torch.tensor(values, dtype=torch.float64))


def rank_auroc(negative: "Tensor", positive: "Tensor") -> float:
    """P(a positive is larger than a negative), ties half."""
    import torch

    from sparse_coding.polysemanticity import auroc

    score = torch.cat([negative, positive])[:, None]
    truth = torch.arange(len(score))[:, None] >= len(negative)
    return auroc(score, truth).item()


def rank_correlation(pairs: "Tensor") -> float:
    """Spearman's, of two columns."""
    from scipy.stats import spearmanr

    return float(spearmanr(pairs[:, 0].numpy(), pairs[:, 1].numpy()).statistic)


def row(
    check: str, of: str, estimate, n: int, limit: str = "-", passed: bool | None = None
) -> Row:
    """One line of the table; `estimate` is an Interval."""
    value, low, high = estimate
    return {"check": check, "of": of, "value": value, "value_low": low, "value_high": high,
            "limit": limit, "passed": passed, "n": n}  # fmt: skip


# --- checks ------------------------------------------------------------------------------------


def separation(
    cfg: Config, labels: "Labelled", weights: "Tensor", generator: "torch.Generator"
) -> list[Row]:
    """Several concepts against one, at rates over two orders of magnitude."""
    from analysis.unit_scores import concentration
    from sparse_coding.metrics import share_interval

    found = {m: planted(m, cfg, labels, generator) for m in MIXTURES}
    one = found[MIXTURES[0]]
    rows = []
    for m in MIXTURES[1:]:
        value = resampled(rank_auroc, one.n_eff, found[m].n_eff, seed=cfg.seed)
        limit, passed = f">= {MIN_AUROC}", bool(value.value >= MIN_AUROC)
        n = len(one.n_eff) + len(found[m].n_eff)
        rows.append(row("AUROC of n_eff", f"m = {m} against 1", value, n, limit, passed))
    for m, units in found.items():
        flags = concentration(units.active, units.mass, labels, weights).n_superclasses >= 2
        share = share_interval(int(flags.sum()), len(flags))
        # a unit of one concept is called polysemantic by mistake
        passed = None if m > 1 else bool(share.low <= 0.05)
        limit = "-" if m > 1 else "<= 0.05"
        rows.append(row("share called polysemantic", f"m = {m}", share, len(flags), limit, passed))
    return rows


def calibration(
    cfg: Config, labels: "Labelled", weights: "Tensor", generator: "torch.Generator"
) -> list[Row]:
    """Mean n_eff over the planted effective number."""
    rows = []
    for m in (*MIXTURES, 0):
        units = planted(m, cfg, labels, generator)
        ratio = units.n_eff / units.truth
        value = resampled(lambda x: x.mean().item(), ratio, seed=cfg.seed)
        of = f"m = {m}, {units.truth.mean():.2f} effective" if m else "no concept, 14 effective"
        passed = bool(abs(value.value - 1) <= MAX_CALIBRATION)
        rows.append(row("n_eff / planted", of, value, len(ratio), "1 +- 0.05", passed))
    return rows


def false_positives(
    cfg: Config, labels: "Labelled", weights: "Tensor", generator: "torch.Generator"
) -> list[Row]:
    """Tests of lifts where the hypothesis is true, at its bound: a share .05 has p <= .05."""
    import torch

    from sparse_coding.metrics import share_interval
    from sparse_coding.polysemanticity import lift_p

    units = planted(MIXTURES[-1], cfg, labels, generator)
    deal = labels.relabelled(generator)
    draws = deal.draws(len(weights) - 1, generator)
    p = lift_p(units.active, deal, draws, min_lift=1.0)
    # one concept of each unit, because concepts of a unit are not independent
    picked = torch.randint(len(p), (p.shape[1],), generator=generator)
    hits = p[picked, torch.arange(p.shape[1])] <= 0.05
    share = share_interval(int(hits.sum()), len(hits))
    rows = [row("p <= .05", "concepts dealt anew, lift 1", share, len(hits), "nominal or below",
                bool(share.low <= 0.05))]  # fmt: skip

    shares = torch.ones(labels.n_concepts, cfg.n_units)
    shares[0] = 2.0
    active, _ = plant(
        shares / shares.sum(dim=0), log_uniform(cfg.n_units, generator), labels, generator
    )
    p = lift_p(active, labels, weights)
    hits = p[0] <= 0.05
    share = share_interval(int(hits.sum()), len(hits))
    rows.append(row("p <= .05", "lift exactly 2", share, len(hits), "nominal or below",
                    bool(share.low <= 0.05)))  # fmt: skip
    return rows


def density(
    cfg: Config, labels: "Labelled", weights: "Tensor", generator: "torch.Generator"
) -> list[Row]:
    """n_eff must not be a function of how often a unit fires.

    The limit is on means, which families are compared by. Ranks see more than means: an unbiased
    estimate of a bounded number is skewed where there is little evidence.
    """
    import torch

    rows = []
    for m in (*MIXTURES, 0):
        units = planted(m, cfg, labels, generator)
        order = units.rate.argsort()
        ratio = (units.n_eff / units.truth)[order]
        third = len(ratio) // 3
        drift = resampled(mean_difference, ratio[:third], ratio[-third:], seed=cfg.seed)
        of, limit = f"m = {m}" if m else "no concept", f"+- {MAX_DRIFT}"
        passed = bool(abs(drift.value) < MAX_DRIFT)
        rows.append(row("rarest minus densest third", of, drift, 2 * third, limit, passed))
        pairs = torch.stack([units.n_eff / units.truth, units.rate.double()], dim=1)
        value = resampled(rank_correlation, pairs, seed=cfg.seed)
        rows.append(row("rank correlation with rate", of, value, len(pairs)))
    return rows


def mean_difference(a: "Tensor", b: "Tensor") -> float:
    return (a.mean() - b.mean()).item()


def repeats(
    cfg: Config, labels: "Labelled", weights: "Tensor", generator: "torch.Generator"
) -> list[Row]:
    """The same units on two halves of the documents: intraclass correlation ICC(1,1)."""
    import torch

    mass = torch.cat([planted(m, cfg, labels, generator).mass for m in (*MIXTURES, 0)], dim=1)
    pairs = halves(mass, labels)
    value = resampled(intraclass_correlation, pairs, seed=cfg.seed)
    return [row("repeated", "planted, halves of documents", value, len(pairs))]


def halves(mass: "Tensor", labels: "Labelled") -> "Tensor":
    """ln n_eff (units, 2) on every other document; units that are active in both halves."""
    import torch

    from sparse_coding.polysemanticity import Labelled, effective_number

    found = []
    for start in (0, 1):
        part = Labelled(labels.concept[start::2], labels.n_tokens[start::2], labels.superclass)
        found.append(effective_number(mass[start::2], part).log())
    pairs = torch.stack(found, dim=1)
    return pairs[pairs.isfinite().all(dim=1)]


def intraclass_correlation(pairs: "Tensor") -> float:
    """ICC(1,1) of two measurements each (Shrout and Fleiss 1979): shared variance over all."""
    mean = pairs.mean(dim=1)
    between = 2 * mean.var()
    within = (pairs[:, 0] - pairs[:, 1]).square().mean() / 2
    return ((between - within) / (between + within)).item()


def superposition(
    cfg: Config, labels: "Labelled", weights: "Tensor", generator: "torch.Generator"
) -> list[Row]:
    """Directions of a toy model's hidden space, one feature a concept, against what they read."""
    import torch

    from analysis.toy_model_superposition import Config as ToyConfig
    from analysis.toy_model_superposition import train
    from sparse_coding.polysemanticity import effective_number, eligible

    n = labels.n_concepts
    toy = ToyConfig(n_features=n, d_hidden=n // 2, inverse_densities=(20.0,), n_steps=2000)
    W = train(toy, cfg.seed).W[0]  # (features, hidden)
    directions = torch.randn(W.shape[1], cfg.n_units, generator=generator)
    directions[:, : W.shape[1]] = torch.eye(W.shape[1])
    reads = torch.relu(W @ directions)
    truth = reads.sum(dim=0).square() / reads.square().sum(dim=0)
    # a document's feature is on in a third of its tokens, any other in one of a hundred
    of_document = labels.concept[:, None] == torch.arange(n)
    p_on = torch.where(of_document, 1 / 3, 0.01)[:, None, :].expand(-1, N_POSITIONS, -1)
    x = torch.rand(p_on.shape, generator=generator)
    x *= torch.rand(p_on.shape, generator=generator) < p_on
    activation = torch.relu(x @ (W @ directions))
    active, mass = (activation > 0).sum(dim=1).float(), activation.sum(dim=1)
    kept = eligible(active)
    pairs = torch.stack([effective_number(mass[:, kept], labels), truth[kept].double()], dim=1)
    value = resampled(rank_correlation, pairs, seed=cfg.seed)
    of = f"{n} features in {n // 2} dimensions"
    return [row("rank correlation with truth", of, value, len(pairs), ">= 0.9",
                bool(value.value >= 0.9))]  # fmt: skip


if __name__ == "__main__":
    run_program(Config, main)

"""Are SAE features less polysemantic than neurons, other directions and controls?

    python -m analysis.measure_polysemanticity outputs/runs/NAME
    python -m analysis.measure_polysemanticity outputs/runs/NAME --ratio 16 --random-lms

Units read a corpus of labelled documents (sparse_coding/concepts.py). Thresholds and concepts are
chosen on its sources A and everything is measured on its sources B, by other people. Families are
compared at equal firing rates: of each a sample of units, a signed direction as two units, cut so
that it fires on the given share of tokens; a unit that cannot fire so often is ineligible there,
and counted. Beside the rates stand `topk` (per token the k features of the whole dictionary that
write most, k the SAE's L0) and `native` (as it fires). Rows of `what`:

- family: one family in one condition. n_eff: effective number of concepts, 1 to all of them;
  rao: expected distance of two firings' concepts; polysemantic: share of units with concepts of
  two superclasses whose rates are more than twice the rest's (false-discovery rate 5 %); *_null:
  the same units with the concepts dealt anew to whole documents (shares: at the primary rate);
- detail: the same at the primary rate: AUROC, average precision, precision, recall and F1 of the
  concept chosen on A; information with it; token_entropy, token_purity; beyond_token, what firing
  says of the concept where the token is known; purity from the weakest tenth of firings (1) to the
  strongest (10); n_eff_percentiles, of its units;
- family effect, effect: what next-token distributions lose when a unit is taken out where it
  fires: kl in nats per firing, kl_random the same along a random direction; n_eff_effect, the
  effective number of concepts of the mean effect (in two documents of each, not corrected);
- contrast: SAEs minus a family in one condition, from the same draws of documents;
- unit: one unit at the primary rate.

Controls (untrained and frozen-decoder SAEs, SAEs of models with random or shuffled weights) are
trained on first use and kept in RUN/controls. Writes results/polysemanticity.json.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from analysis.program import (
    ConceptConfig,
    Row,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.errors import UserError
from sparse_coding.settings import Count, CountOrZero, OpenFraction, Seed

if TYPE_CHECKING:
    from torch import Tensor

    from analysis.unit_scores import Concentration, Details, Mean, Null
    from analysis.units import Conditions, Family, Observed
    from sparse_coding.polysemanticity import Labelled

BASES = ("neuron_basis", "pca", "ica")
DRAWN = ("random_rotation", "random_directions", "whitened_random")
CONTROLS = ("frozen_decoder", "untrained")  # names as in analysis.controls, which loads torch


@dataclass(frozen=True)
class Config(ConceptConfig):
    """Which units, on which documents, at which rates."""

    ratio: CountOrZero = 0
    """Of the SAEs that families are set against and that have controls; 0: the nearest to 4."""
    families: tuple[Literal[("mlp_neurons", *CONTROLS, *BASES, *DRAWN)], ...] = (
        "mlp_neurons", *CONTROLS, *BASES, *DRAWN,
    )  # fmt: skip
    """What the SAEs are compared with."""
    random_lms: tuple[Literal["random", "shuffled"], ...] = ("random", "shuffled")
    """Also SAEs trained on the run's model with random or shuffled weights."""
    rate: OpenFraction = 0.003
    """The primary firing rate: details, units and the headline are of it."""
    rates: tuple[OpenFraction, ...] = (0.001, 0.003, 0.01, 0.03)
    """All firing rates that families are compared at."""
    concepts: tuple[str, ...] = ()
    """Names of concepts; none: all."""
    n_units: Count = 300
    """Units sampled of each dictionary."""
    n_effects: CountOrZero = 8
    """Units of each dictionary's first seed that are taken out of the model; 0: none."""
    n_tokens_train: CountOrZero = 0
    """Activations that controls and bases learn from; 0: as many as the run's SAEs, without a
    run 300,000."""
    n_tokens_ica: Count = 10_000
    """Of them, how many ICA sees."""
    ica_iterations: Count = 200
    """ICA stops here at the latest."""
    seed: Seed = 0
    """Of samples of units, draws, and the first of three seeds of random directions."""


TABLE = {
    "family": "{}",
    "ratio": "{}",
    "n_seeds": "{}",
    "n_units": "{}",
    "n_sampled": "{}",
    "n_eff": "{:.2f}",
    "n_eff_null": "{:.2f}",
    "rao": "{:.3f}",
    "polysemantic": "{:.2f}",
    "polysemantic_null": "{:.2f}",
    "n_significant": "{:.2f}",
}
DETAILS = {
    "family": "{}", "ratio": "{}", "auroc": "{:.3f}", "precision": "{:.2f}", "recall": "{:.2f}",
    "token_purity": "{:.2f}", "beyond_token": "{:.3f}",
}  # fmt: skip
EFFECTS = {
    "family": "{}", "ratio": "{}", "n_units": "{}", "kl": "{:.4f}", "kl_random": "{:.4f}",
    "n_eff_effect": "{:.2f}", "n_concepts_fired": "{:.1f}",
}  # fmt: skip
CONTRASTS = {
    "family": "{}", "ratio": "{}", "condition": "{}", "n_eff_difference": "{:+.2f}",
    "detectable": "{:.2f}", "cliffs_delta": "{:+.2f}", "polysemantic_difference": "{:+.2f}",
}  # fmt: skip


def main(cfg: Config) -> None:
    """Read the corpus, measure family by family, print, write."""
    if cfg.rate not in cfg.rates:
        raise UserError(
            f"--rate {cfg.rate} is not one of --rates {', '.join(map(str, cfg.rates))}"
        )

    from analysis.controls import without_trained
    from analysis.families import every_family
    from analysis.subjects import load_subjects
    from analysis.units import Conditions
    from sparse_coding.concepts import recipe

    subjects = load_subjects([cfg.source], cfg)
    path = results_path(cfg, "polysemanticity", [subject.run for subject in subjects])
    cfg = without_trained(cfg, subjects)
    conditions = Conditions(cfg.rates)
    rows: list[Row] = []
    measured: list[Measured] = []
    device = "cpu"
    for group in every_family(cfg, subjects):
        found, new = measure(cfg, conditions, group)
        measured.append(found)
        rows += new
        device = str(group[0].reading.lm.device)
    rows += contrasts(cfg, conditions, measured)
    show(cfg, conditions, rows)
    write_results(path, cfg, rows, device, corpus=recipe())


class Measured(NamedTuple):
    """What contrasts need of one family, by condition."""

    facts: Row
    n_eff: "dict[str, Mean]"
    polysemantic: "dict[str, Mean]"
    units: "dict[str, Tensor]"


def measure(
    cfg: Config, conditions: "Conditions", group: "list[Family]"
) -> tuple[Measured, list[Row]]:
    """All conditions of one family, seed by seed."""
    import torch
    from tqdm import tqdm

    from analysis.unit_effects import effect_row
    from analysis.unit_scores import detail_row, percentiles
    from analysis.units import choose_units, observe

    first = group[0]
    facts = {"family": first.name, "ratio": first.facts["ratio"]}
    labels = first.reading.heldout.labels  # and of them the same draws for every family
    weights = labels.draws(cfg.n_draws, torch.Generator().manual_seed(cfg.seed))
    found: dict[str, list[Concentration]] = {name: [] for name in conditions.names}
    nulls: dict[str, list[Null]] = {name: [] for name in conditions.names}
    of_units, effects, rows = [], [], []
    for family in tqdm(group, desc=f"{first.name} {facts['ratio'] or ''}".strip(), unit="seed"):
        units = choose_units(family.dictionary.d_sae, cfg.n_units, cfg.seed)
        seen = observe(family, units, conditions)
        concentrations(cfg, conditions, seen, labels, weights, found, nulls)
        one = found[str(cfg.rate)][-1]
        if len(one.units):
            more, new = unit_details(cfg, conditions, family, seen, one, facts)
            of_units.append(more)
            rows += new
            if family is first:
                effects = unit_effects(cfg, conditions, family, seen, one)
    measured = Measured(facts, {}, {}, {})
    for name in conditions.names:
        rows.append(summarise(cfg, measured, name, found[name], nulls[name], labels))
    if of_units:
        detail = detail_row(of_units, cfg.n_draws, torch.Generator().manual_seed(cfg.seed))
        detail["n_eff_percentiles"] = percentiles(measured.units[str(cfg.rate)])
        rows.append(facts | {"what": "detail", "rate": cfg.rate} | detail)
    if effects:
        effects.append({"what": "family effect", "rate": cfg.rate, **facts, **effect_row(effects)})
    return measured, rows + effects


def concentrations(
    cfg: Config, conditions: "Conditions", seen: "Observed", labels: "Labelled",
    weights: "Tensor", found: "dict[str, list[Concentration]]", nulls: "dict[str, list[Null]]",
) -> None:  # fmt: skip
    """One seed's in every condition, and their nulls, added to `found` and `nulls`."""
    import torch

    from analysis.unit_scores import concentration, relabelled

    generator = torch.Generator().manual_seed(cfg.seed + 1)
    for i, name in enumerate(conditions.names):
        active, mass = seen.heldout.active[i], seen.heldout.mass[i]
        found[name].append(concentration(active, mass, labels, weights))
        n_draws = cfg.n_draws if name == str(cfg.rate) else 0
        nulls[name].append(relabelled(active, mass, labels, generator, n_draws))


def unit_details(
    cfg: Config, conditions: "Conditions", family: "Family", seen: "Observed",
    found: "Concentration", facts: Row,
) -> "tuple[Details, list[Row]]":  # fmt: skip
    """More of one seed's units at the primary rate, and a row for each."""
    from analysis.unit_scores import details

    primary = conditions.names.index(str(cfg.rate))
    more = details(family, seen, found, primary, cfg.seed)
    return more, unit_rows(family, seen, found, more, facts | {"rate": cfg.rate})


def unit_effects(
    cfg: Config, conditions: "Conditions", family: "Family", seen: "Observed",
    found: "Concentration",
) -> list[Row]:  # fmt: skip
    """Rows of the units that are taken out of the model."""
    from analysis.unit_effects import family_effects

    primary = conditions.names.index(str(cfg.rate))
    rows = family_effects(family, seen, found, primary, cfg.n_effects, cfg.seed)
    return [row | {"what": "effect", "rate": cfg.rate} for row in rows]


def summarise(
    cfg: Config, measured: Measured, condition: str, seeds: "list[Concentration]",
    nulls: "list[Null]", labels: "Labelled",
) -> Row:  # fmt: skip
    """The family's row in one condition; what contrasts need goes into `measured`."""
    import torch

    from analysis.unit_scores import family_row, mean_over_seeds

    about = measured.facts | {"what": "family", "condition": condition, "split": "sources B"}
    about |= {"n_concepts": labels.n_concepts, "n_documents": len(labels.concept)}
    about |= {"n_tokens_eval": int(labels.n_tokens.sum())}
    about |= {"n_seeds": len(seeds), "n_sampled": sum(one.n_sampled for one in seeds)}
    kept = [(one, null) for one, null in zip(seeds, nulls, strict=True) if len(one.units)]
    if not kept:
        return about | {"n_units": 0}
    seeds, nulls = [one for one, _ in kept], [null for _, null in kept]
    generator = torch.Generator().manual_seed(cfg.seed)
    draws = [one.n_eff_draws for one in seeds]
    n_eff = mean_over_seeds([one.n_eff for one in seeds], draws, cfg.n_draws, generator)
    rao = mean_over_seeds([one.rao for one in seeds], None, cfg.n_draws, generator)
    flags = [(one.n_superclasses >= 2).double() for one in seeds]
    measured.n_eff[condition] = n_eff
    measured.polysemantic[condition] = mean_over_seeds(flags, None, cfg.n_draws, generator)
    measured.units[condition] = torch.cat([one.n_eff for one in seeds])
    return about | family_row(seeds, nulls, n_eff, rao)


def unit_rows(
    family: "Family", seen: "Observed", found: "Concentration", more: "Details", facts: Row
) -> list[Row]:
    """One row per eligible unit at the primary rate."""
    concepts = family.reading.corpus.concepts
    names = [concept.name for concept in concepts]
    rows = []
    for j, i in enumerate(found.units.tolist()):
        rows.append(
            facts
            | {
                "what": "unit",
                "seed": family.facts["seed"],
                "unit": int(seen.units[i]),
                "n_eff": found.n_eff[j].item(),
                "rao": found.rao[j].item(),
                "n_superclasses": int(found.n_superclasses[j]),
                "significant": ", ".join(
                    name for c, name in enumerate(names) if found.significant[c, j]
                ),
                "concept": names[more.concept[j]],
                "auroc": more.detection.auroc[j].item(),
                "precision": more.detection.precision[j].item(),
                "recall": more.detection.recall[j].item(),
                "token_purity": float(more.token_purity[j]),
                "beyond_token": float(more.beyond_token[j]),
            }
        )
    return rows


def contrasts(cfg: Config, conditions: "Conditions", measured: list[Measured]) -> list[Row]:
    """The first family, SAEs of the chosen ratio, against all others in every condition."""
    from analysis.unit_scores import contrast_row
    from sparse_coding.metrics import columns

    sae, *others = measured
    rows = []
    for other in others:
        for name in conditions.names:
            if name in sae.n_eff and name in other.n_eff:
                row = other.facts | {"what": "contrast", "condition": name}
                row |= contrast_row(
                    sae.n_eff[name], other.n_eff[name], sae.units[name], other.units[name]
                )
                flags = sae.polysemantic[name].minus(other.polysemantic[name])
                rows.append(row | columns("polysemantic_difference", flags))
    return rows


def show(cfg: Config, conditions: "Conditions", rows: list[Row]) -> None:
    """A table per condition, details, contrasts at the primary rate."""
    for name in conditions.names:
        some = [r for r in rows if r["what"] == "family" and r["condition"] == name]
        title = f"firing on {name} of all tokens" if name in map(str, cfg.rates) else name
        known = next((row for row in some if row["n_units"]), {})
        note = f"{known.get('n_tokens_eval', 0):,} tokens of {known.get('n_documents', 0):,} "
        note += f"documents of sources B, {known.get('n_concepts', 0)} concepts; 95 % intervals"
        print_table(title, some, TABLE, note)
    details = [row for row in rows if row["what"] == "detail"]
    print_table(f"each unit's concept, chosen on sources A, rate {cfg.rate}", details, DETAILS)
    effects = [row for row in rows if row["what"] == "family effect"]
    print_table("units taken out where they fire", effects, EFFECTS)
    some = [row for row in rows if row["what"] == "contrast"]
    some = [row for row in some if row["condition"] == str(cfg.rate)]
    print_table("SAEs minus others", some, CONTRASTS)


if __name__ == "__main__":
    run_program(Config, main)

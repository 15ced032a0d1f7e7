"""Which neurons stand for several unrelated things at once, and which SAE features for one each?

    python -m analysis.find_units outputs/runs/NAME --concepts citations dialogue http korean

The question of the field's best-known example: a neuron that fires for academic citations, English
dialogue, HTTP requests and Korean text. Every unit is cut to fire on the same share of tokens of
the concept corpus. On its sources A each family's neurons are ranked by the lift of the named
concept in which they are lifted least, and for each concept the feature is chosen that detects it
best; what is shown of them is measured on sources B. As many random directions as neurons are
searched in the same way: how good the best of so many must be by chance. Rows of `what`:

- unit (from the number of directions on, their negative halves): share_CONCEPT, the share of its
  firings in each named concept; lift_CONCEPT, its rate there over that in all else (none where it
  fires nowhere else), with a one-sided 95 % bound; auroc_CONCEPT of the document's largest
  activation; n_eff; `role`: "several" (one unit for all) or the concept that it was found for;
- context: the text around its largest activations in a document of each concept;
- histogram: firings of a concept (or of all `others`) in a bin of activation, of the first units.

Writes results/find_units.json.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.program import (
    ConceptConfig,
    Row,
    finite,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.errors import UserError
from sparse_coding.settings import Count, CountOrZero, OpenFraction, Seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from analysis.units import ConceptReading
    from sparse_coding.dictionary import Dictionary
    from sparse_coding.unit_activity import Activity

N_BINS = 20  # of a histogram of activations
WINDOW = 12  # tokens before the largest activation in a context; half as many after


@dataclass(frozen=True)
class Config(ConceptConfig):
    """What is looked for, and where."""

    concepts: tuple[str, ...] = ("citations", "dialogue", "http", "korean")
    """Two or more concepts; the others of the corpus are what they are compared with."""
    ratio: CountOrZero = 0
    """Of the run's SAEs the first of this ratio; 0: the nearest to 4."""
    rate: OpenFraction = 0.01
    """Share of all tokens on which every unit fires."""
    n_show: Count = 5
    """Neurons of each family that are shown."""
    seed: Seed = 0
    """Of random directions and draws."""


def main(cfg: Config) -> None:
    """Read the corpus, search, measure, print, write."""
    if len(set(cfg.concepts)) < 2:
        raise UserError("name two or more different --concepts")

    from tqdm import tqdm

    from analysis.families import mlp_of, open_subjects
    from analysis.subjects import load_subjects
    from analysis.units import ConceptReading
    from sparse_coding.concepts import find_concepts, recipe

    if len(find_concepts(cfg.concepts)) == len(find_concepts(())):
        raise UserError(
            "leave out one of the concepts: others are what the named are compared with"
        )
    subjects = load_subjects([cfg.source], cfg)
    path = results_path(cfg, "find_units", [subject.run for subject in subjects])
    opened = open_subjects(cfg, subjects, cfg.ratio)
    sae, origin = opened.of_ratio[0], opened.material.origin
    mlp_hook = mlp_of(opened.hook_name)
    hooks = [opened.hook_name, *([mlp_hook] if mlp_hook else [])]
    reading = ConceptReading(opened.material, opened.corpus, hooks)
    searched = list(families(cfg, reading, sae.dictionary, mlp_hook))
    rows: list[Row] = []
    for name, hook, dictionary in tqdm(searched, desc="searching", unit="family"):
        rows += search(cfg, reading, name, hook, dictionary)
    show(cfg, rows)
    about = {"sae": sae.name, "lm": origin.lm, "hook_name": origin.hook_name, "corpus": recipe()}
    write_results(path, cfg, rows, str(reading.lm.device), **about)


def families(
    cfg: Config, reading: "ConceptReading", sae: "Dictionary", mlp_hook: str | None
) -> "Iterator[tuple[str, str, Dictionary]]":
    """(name, hook, dictionary): neurons and directions around the mean of sources A, the SAE."""
    import torch

    from analysis.families import mlp_neurons
    from sparse_coding.baselines import neuron_basis, random_directions

    hook, device = reading.hooks[0], reading.lm.device
    mean = reading.choosing.acts[hook].double().mean(dim=0)
    n = len(mean)
    if mlp_hook:
        neurons = mlp_neurons(reading, mlp_hook)
        n = max(n, neurons.d_in)
        yield "mlp_neurons", mlp_hook, neurons
    yield "neuron_basis", hook, neuron_basis(mean).to(device)
    generator = torch.Generator().manual_seed(cfg.seed)
    yield "random_directions", hook, random_directions(mean, n, generator).to(device)
    yield "sae", hook, sae


def search(
    cfg: Config, reading: "ConceptReading", name: str, hook: str, dictionary: "Dictionary"
) -> list[Row]:
    """Rows of the units of one family that were chosen on sources A."""
    import torch

    from sparse_coding.polysemanticity import auroc
    from sparse_coding.unit_activity import rate_thresholds, unit_activations, unit_activity

    a, b = reading.choosing, reading.heldout
    every = torch.arange(dictionary.d_sae)
    x = a.acts[hook]
    parts = unit_activations(dictionary, x, every)
    thresholds = rate_thresholds(parts, len(x), (cfg.rate,))
    seen = unit_activity(
        unit_activations(dictionary, x, every), a.document, len(a.labels.concept), thresholds
    )
    named = [[c.name for c in reading.corpus.concepts].index(one) for one in cfg.concepts]
    chosen: list[tuple[int, str]] = []
    if name == "sae":
        score = torch.relu(seen.largest - thresholds[0].nan_to_num(torch.inf))
        for c, concept in zip(named, cfg.concepts, strict=True):
            truth = (a.labels.concept == c)[:, None].expand_as(score)
            chosen.append((int(auroc(score, truth).argmax()), concept))
    worst = least_lift(seen.active[0], a.labels, named)
    chosen += [(int(unit), "several") for unit in worst.argsort(descending=True)[: cfg.n_show]]

    units = torch.tensor([unit for unit, _ in chosen])
    values = torch.cat(list(unit_activations(dictionary, b.acts[hook], units)))
    measured = unit_activity([values], b.document, len(b.labels.concept), thresholds[:, units])
    rows = unit_rows(cfg, reading, measured, thresholds[0, units], named)
    about = {"family": name, "n_searched": dictionary.d_sae, "split": "sources B"}
    for row, (unit, role) in zip(rows, chosen, strict=True):
        row |= about | {"unit": unit, "role": role}
    return [
        *rows,
        *context_rows(cfg, reading, values, rows, named),
        *histogram_rows(cfg, reading, values, thresholds[0, units], rows, named),
    ]


def least_lift(active: "Tensor", labels, named: list[int]) -> "Tensor":
    """(units,): the smallest of the lifts in the named concepts, each over all that is not named.

    0 for a unit that is too rare to be judged.
    """
    import torch

    from sparse_coding.polysemanticity import concept_sums, eligible

    ones = torch.ones(1, len(active), dtype=torch.float64)
    sums = concept_sums(active, labels, ones)[0]
    n = (labels.one_hot @ labels.n_tokens)[:, None]
    others = [c for c in range(labels.n_concepts) if c not in named]
    rest = sums[others].sum(dim=0) / n[others].sum()
    lift = (sums / n)[named] / rest.clamp_min(1e-12)
    return torch.where(eligible(active), lift.min(dim=0).values, 0.0)


def unit_rows(
    cfg: Config, reading: "ConceptReading", seen: "Activity", threshold: "Tensor", named: list[int]
) -> list[Row]:
    """What the chosen units do on sources B."""
    import torch

    from sparse_coding.polysemanticity import auroc, effective_number, lifts

    labels = reading.heldout.labels
    weights = labels.draws(cfg.n_draws, torch.Generator().manual_seed(cfg.seed))
    active = seen.active[0]
    found = lifts(active, labels, weights)
    n_eff = effective_number(seen.mass[0], labels)
    score = torch.relu(seen.largest - threshold)
    n_fired = active.sum(dim=0)
    rows: list[Row] = [
        {"what": "unit", "n_eff": finite(n_eff[j].item()), "n_firings": int(n_fired[j]),
         "n_documents": int((active[:, j] > 0).sum())}
        for j in range(active.shape[1])
    ]  # fmt: skip
    for c, concept in zip(named, cfg.concepts, strict=True):
        truth = labels.concept == c
        share = active[truth].sum(dim=0) / n_fired
        area = auroc(score, truth[:, None].expand_as(score))
        for j, row in enumerate(rows):
            row[f"share_{concept}"] = finite(share[j].item())
            row[f"lift_{concept}"] = finite(found.value[c, j].item())
            row[f"lift_{concept}_low"] = finite(found.low[c, j].item())
            row[f"auroc_{concept}"] = area[j].item()
    return rows


def context_rows(
    cfg: Config, reading: "ConceptReading", values: "Tensor", units: list[Row], named: list[int]
) -> list[Row]:
    """Of each unit and concept the text around its largest activation, of `values` (row, unit)."""
    b = reading.heldout
    tokens = reading.corpus.tokens[b.documents]
    decode = reading.lm.tokenizer.decode
    rows = []
    for j, unit in enumerate(units):
        wanted = cfg.concepts if unit["role"] == "several" else (unit["role"],)
        for c, concept in zip(named, cfg.concepts, strict=True):
            if concept not in wanted:
                continue
            of_concept = (b.labels.concept[b.document] == c).nonzero()[:, 0]
            best = of_concept[values[of_concept, j].argmax()]
            document, place = b.document[best], int(b.position[best])
            text = tokens[document].tolist()
            rows.append(
                {"what": "context", "family": unit["family"], "unit": unit["unit"],
                 "role": unit["role"], "concept": concept, "activation": values[best, j].item(),
                 "before": decode(text[max(0, place - WINDOW) : place]),
                 "token": decode(text[place : place + 1]),
                 "after": decode(text[place + 1 : place + 1 + WINDOW // 2])}
            )  # fmt: skip
    return rows


def histogram_rows(
    cfg: Config, reading: "ConceptReading", values: "Tensor", threshold: "Tensor",
    units: list[Row], named: list[int],
) -> list[Row]:  # fmt: skip
    """Firings in `N_BINS` equal widths, from the threshold to the largest.

    Of a family's first unit for several concepts, and of those for one.
    """
    import numpy as np

    b = reading.heldout
    concept = b.labels.concept[b.document].numpy()
    groups = {name: concept == c for name, c in zip(cfg.concepts, named, strict=True)}
    groups["others"] = ~np.isin(concept, named)
    rows = []
    first = next(j for j, unit in enumerate(units) if unit["role"] == "several")
    for j, unit in enumerate(units):
        if unit["role"] == "several" and j != first:
            continue
        column, cut = values[:, j].numpy(), threshold[j].item()
        if not (column > cut).any():  # nor where it has no threshold, nan
            continue
        edges = np.linspace(cut, column.max(), N_BINS + 1)
        about = {key: unit[key] for key in ("family", "unit", "role", "split")}
        for name, of_group in groups.items():
            counts, _ = np.histogram(column[of_group & (column > cut)], edges)
            for low, high, n in zip(edges[:-1], edges[1:], counts.tolist(), strict=True):
                rows.append(
                    {"what": "histogram", **about, "concept": name, "low": float(low),
                     "high": float(high), "n_firings": n}
                )  # fmt: skip
    return rows


def show(cfg: Config, rows: list[Row]) -> None:
    """Units with their shares and bounds, then their contexts."""
    units = [row for row in rows if row["what"] == "unit"]
    columns = {"family": "{}", "unit": "{}", "role": "{}"}
    columns |= {f"share_{concept}": "{:.2f}" for concept in cfg.concepts}
    columns |= {f"lift_{concept}_low": "{:.1f}" for concept in cfg.concepts}
    columns |= {"n_eff": "{:.2f}", "n_firings": "{:,}"}
    print_table(
        f"Units at rate {cfg.rate}: share of firings in each concept, lower bound of its lift",
        units,
        columns,
        "chosen on sources A, measured on sources B",
    )
    best = {row["family"]: row["unit"] for row in reversed(units) if row["role"] == "several"}
    for row in rows:
        if row["what"] == "context" and (
            row["role"] != "several" or row["unit"] == best[row["family"]]
        ):
            print(context_line(row))


def context_line(row: Row) -> str:
    before, token, after = (row[key].replace("\n", "⏎") for key in ("before", "token", "after"))
    return f"{row['family']} {row['unit']:>6}  {row['concept']:<10} {before}[{token}]{after}"


if __name__ == "__main__":
    run_program(Config, main)

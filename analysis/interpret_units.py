"""What do units stand for, and how well do words say it? Without a language model, or with one.

    python -m analysis.interpret_units outputs/runs/NAME
    python -m analysis.interpret_units pretrained/smollm2-135m-l12-small --n-units 20
    OPENAI_API_KEY=... python -m analysis.interpret_units outputs/runs/NAME \\
        --judge-url http://localhost:8000/v1 --judge-model NAME

Held-out documents are halved. Rules about tokens (which, what before it, what kind) are found on
one half and scored on the other, against silent contexts of four kinds: any, on the same tokens,
after the same tokens, and the most similar ones. Beside every dictionary stand as many neurons and
random directions, cut so that each fires as often as its partner in the dictionary. Intruders: of
five contexts, is the one on which the unit is silent the least like the others? Chance is 0.2.
Groups: into how many clusters do its contexts fall, one allowed, against as many random contexts?
Brackets are 95 % intervals, over documents and units. A judge is asked only if its address is
given; what it is asked and answers is kept beside the results and never asked again.
Writes results/interpret_units.json.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from analysis.program import (
    MeasureConfig,
    Row,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.errors import UserError
from sparse_coding.settings import Count, CountOrZero, Draws, Positive, Range, Seed

if TYPE_CHECKING:
    from analysis.interpretation import Family, Tools
    from analysis.subjects import Origin, Subject
    from sparse_coding.judge import Judge

CONTROLS = ("neuron_basis", "random_directions")
PROTOCOLS = ("detection", "fuzzing", "simulation", "intruder")


@dataclass(frozen=True)
class Config(MeasureConfig):
    """Which units, on how much text, and whether a judge is asked."""

    dictionaries: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run folders, SAE folders, dictionaries of other libraries, or releases."""
    n_units: Count = 50
    """Units sampled of each dictionary; those that fire too rarely are counted."""
    n_tokens: Count = 100_000
    """Held-out tokens, of contexts drawn from all over the held-out text."""
    families: tuple[Literal[CONTROLS], ...] = CONTROLS
    """What stands beside each dictionary, unit by unit at the same firing rate."""
    n_contexts: Annotated[int, Range(10)] = 150
    """Contexts of each kind in each half: firing, any silent ones, silent ones on the same
    tokens, after the same tokens, and the most similar ones."""
    n_trials: Count = 3
    """Intruder trials of each unit in each decile of its activation, for each kind of intruder."""
    n_draws: Draws = 1000
    """Bootstrap draws of documents and units."""
    judge_url: str = ""
    """OpenAI-compatible endpoint up to the version, e.g. http://localhost:8000/v1; empty: none.
    The key is read from OPENAI_API_KEY."""
    judge_model: str = ""
    """The endpoint's name of the judge."""
    judge_protocols: tuple[Literal[PROTOCOLS], ...] = PROTOCOLS
    """What the judge does besides explaining."""
    judge_units: Count = 10
    """Units of each family that the judge is asked about."""
    judge_contexts: Annotated[int, Range(4)] = 20
    """Contexts that a description is tried on, half of them firing."""
    judge_max_calls: CountOrZero = 2500
    """More questions than this are refused before anything is measured."""
    judge_timeout: Positive = 120.0
    """Seconds after which an answer is given up."""
    judge_attempts: Count = 4
    """How often a question is put to an endpoint that does not answer."""
    seed: Seed = 0
    """Of samples of units, contexts, trials, draws and random directions."""


DESCRIPTIONS = {
    "family": "{}", "n_units": "{}", "n_sampled": "{}", "described_by": "{}", "negatives": "{}",
    "balanced_accuracy": "{:.3f}", "finding_balanced_accuracy": "{:.3f}", "auroc": "{:.3f}",
    "precision": "{:.2f}", "recall": "{:.2f}",
}  # fmt: skip
NATURAL = {"family": "{}", "n_units": "{}", "rate": "{:.4f}", "precision": "{:.2f}",
           "recall": "{:.2f}"}  # fmt: skip
DECILES = {"family": "{}", "decile": "{}", "balanced_accuracy": "{:.3f}", "recall": "{:.2f}"}
TRIALS = {"family": "{}", "intruder": "{}", "token": "{}", "n_units": "{}", "n_trials": "{}",
          "accuracy": "{:.3f}"}  # fmt: skip
ABOUT_TRIALS = (
    "token: the one the unit fires on; likeness of character n-grams. An intruder on one of the\n"
    "four's tokens that is shown is like one of them: chance is lower there"
)
CLUSTERS = {"family": "{}", "n_clustered": "{}", "n_clusters": "{:.2f}", "one_cluster": "{:.2f}",
            "likeness_z": "{:.1f}"}  # fmt: skip
ABOUT_CLUSTERS = "tokens hidden; one_cluster: share of units; likeness_z: above random contexts"
CONTRASTS = {"family": "{}", "negatives": "{}", "n_units": "{}",
             "balanced_accuracy_difference": "{:+.3f}"}  # fmt: skip
JUDGED = {
    "family": "{}", "protocol": "{}", "described_by": "{}", "n_units": "{}", "n": "{}",
    "n_unparsable": "{}", "balanced_accuracy": "{:.3f}", "correlation": "{:.3f}",
    "accuracy": "{:.3f}",
}  # fmt: skip


def main(cfg: Config) -> None:
    """Read, measure, print, write."""
    from analysis.subjects import by_origin, load_subjects

    subjects = load_subjects(cfg.dictionaries, cfg, with_other_places=True)
    path = results_path(cfg, "interpret_units", [subject.run for subject in subjects])
    judge = make_judge(cfg, path, len(subjects) * (1 + len(cfg.families)))
    rows: list[Row] = []
    device = "cpu"
    for origin, group in by_origin(subjects).items():
        new, device = interpret(cfg, origin, group, judge)
        rows += new
    show(rows)
    if judge is not None:
        down = "; it stopped answering" if judge.is_down else ""
        print(f"judge: {judge.n_asked} questions asked, {judge.n_known} known from {judge.log}, "
              f"{judge.n_failed} failed{down}")  # fmt: skip
    write_results(path, cfg, rows, device)


def make_judge(cfg: Config, path: Path, n_families: int) -> "Judge | None":
    """None without an address; a `UserError` if the plan needs too many calls."""
    if not cfg.judge_url:
        return None
    if not cfg.judge_model:
        raise UserError("--judge-url needs --judge-model, the endpoint's name of the judge")
    from sparse_coding.judge import Endpoint, Judge, n_questions

    n_units = min(cfg.judge_units, cfg.n_units) * n_families
    n = n_questions(n_units, cfg.judge_contexts, 10, cfg.judge_protocols, 2)
    print(f"judge: at most {n:,} questions about {n_units} units of {n_families} families")
    if n > cfg.judge_max_calls:
        raise UserError(
            f"the judge would be asked up to {n:,} questions, --judge-max-calls allows "
            f"{cfg.judge_max_calls:,}: raise it or lower --judge-units or --judge-contexts"
        )
    endpoint = Endpoint(
        cfg.judge_url, cfg.judge_model, os.environ.get("OPENAI_API_KEY", ""),
        cfg.judge_timeout, cfg.judge_attempts,
    )  # fmt: skip
    return Judge(endpoint, path.with_suffix(".judge.jsonl"))


def interpret(
    cfg: Config, origin: "Origin", group: "Sequence[Subject]", judge: "Judge | None"
) -> tuple[list[Row], str]:
    """Rows of all dictionaries of one place, and the device."""
    from torch import zeros

    from analysis.interpretation import Family, controls, make_tools, matched, read
    from analysis.subjects import Material
    from analysis.units import choose_units

    material = Material(origin, cfg.device)
    material.check(group)
    asked = {
        s.name: (s.dictionary, choose_units(s.dictionary.d_sae, cfg.n_units, cfg.seed))
        for s in group
    }
    mean = material.training_moments(material.origin.hook_name).mean
    beside = controls(cfg.families, mean, cfg.n_units, cfg.seed, material.lm.device)
    held, values = read(material, asked | beside, cfg.n_tokens, cfg.n_draws, cfg.seed)
    tools = make_tools(material, held, cfg.seed)
    rows: list[Row] = []
    for subject in group:
        _, units = asked[subject.name]
        sae = Family("sae", units.numpy(), values[subject.name], zeros(len(units)).numpy())
        families = [sae] + [
            matched(sae, name, chosen.numpy(), values[name], held.is_finding)
            for name, (_, chosen) in beside.items()
        ]
        identity = {"name": subject.name, "lm": origin.lm, "hook_name": origin.hook_name}
        identity |= subject.facts | {"split": "heldout"} | tools.size
        rows += [identity | row for row in of_families(cfg, tools, families, judge)]
    return rows, str(material.lm.device)


def of_families(
    cfg: Config, tools: "Tools", families: "Sequence[Family]", judge: "Judge | None"
) -> list[Row]:
    """Rows of one dictionary and what stands beside it."""
    from analysis.interpretation_rows import judge_means, rows_of
    from analysis.judging import judge_rows

    rows, measured = rows_of(cfg, tools, families)
    if judge is not None:
        answered = [
            row for one in measured for row in judge_rows(cfg, judge, tools, one.family, one.found)
        ]
        rows += [*answered, *judge_means(answered)]
    return rows


def show(rows: Iterable[Row]) -> None:
    """Tables of each dictionary, and its descriptions."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    for name, some in by_name.items():
        what: dict[str, list[Row]] = {}
        for row in some:
            what.setdefault(row["what"], []).append(row)
        show_descriptions(name, what)
        trials = [row for row in what["intruder"] if row["decile"] is None]
        print_table(f"{name}: intruders found, chance 0.2", trials, TRIALS, ABOUT_TRIALS)
        print_table(f"{name}: groups of contexts", what["cluster"], CLUSTERS, ABOUT_CLUSTERS)
        if "contrast" in what:
            print_table(f"{name}: SAE minus others, at equal rates", what["contrast"], CONTRASTS)
        if "judge_mean" in what:
            print_table(f"{name}: the judge's scores", what["judge_mean"], JUDGED,
                        "mean over units")  # fmt: skip


def is_shown(row: Row) -> bool:
    """Once is enough for what is a half by definition."""
    return row["described_by"] != "always_negative" or row["negatives"] == "random"


def show_descriptions(name: str, what: dict[str, list[Row]]) -> None:
    first = what["description"][0]
    print_table(
        f"{name}: descriptions found on one half, scored on the other",
        [row for row in what["description"] if is_shown(row)],
        DESCRIPTIONS,
        f"{first['n_tokens_eval']:,} tokens of {first['n_groups_eval']} held-out documents or "
        "files; finding_balanced_accuracy: on the other half, of all negatives",
    )
    ends = [row for row in what["decile"] if row["decile"] in (1, 5, 10)]
    print_table(f"{name}: from weak (1) to strong firing (10), against random ones", ends, DECILES)
    print_table(f"{name}: descriptions on every token", what["natural"], NATURAL,
                "precision at the rate at which units fire")  # fmt: skip
    for row in [row for row in what.get("unit", []) if row["family"] == "sae"][:10]:
        score = row.get("random_balanced_accuracy")
        print(f"  {row['unit']:>6}  {score or 0:.2f}  {row['description']}")


if __name__ == "__main__":
    run_program(Config, main)

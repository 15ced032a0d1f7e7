"""Collect what the feature browser shows: examples, concepts, logits, kin of every feature.

    python -m analysis.collect_dashboard outputs/runs/NAME
    python -m analysis.collect_dashboard outputs/runs/NAME --saes l1_x04_l0-30_s1 --features 7 9
    python -m analysis.collect_dashboard RELEASE/DICTIONARY --lm gpt2 --hook-name blocks.6...

Densities, histograms, examples and logits are of held-out text; concepts are chosen on sources A
of the concept corpus and measured on sources B. A description (rules about tokens) is found on one
half of the held-out documents and scored on the other, against silent contexts. Beside each
feature stand the MLP neuron of its block that correlates with it most and a random direction,
both cut so that they fire as often. Neighbours: the nearest decoder row in each other SAE of the
run. --n-effects N also takes N features away from the running model, concept by concept.

2,304 features of the demo's ratio 1:4 took 19 minutes on two busy cores and 75 MB; --n-features
takes fewer. Writes results/dashboard/SAE/ in the run (else in outputs): index.json,
features/NNNNN.json, prompts.json. Then: python -m data_visualization.dashboard outputs/runs/NAME
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from analysis.program import MeasureConfig, run_program
from sparse_coding.errors import UserError
from sparse_coding.settings import Count, CountOrZero, Draws, Range, Seed

if TYPE_CHECKING:
    from analysis.subjects import Subject

MIN_DOCUMENTS = 10  # of a concept: fewer make no intervals


@dataclass(frozen=True)
class Config(MeasureConfig):
    """Which features of which dictionaries, on how much text."""

    source: Annotated[str, tyro.conf.Positional] = ""
    """A run folder, an SAE folder, a dictionary of another library, or a release."""
    saes: tuple[str, ...] = ()
    """Names of the run's SAEs; none: the first of the ratio nearest to 4."""
    features: tuple[CountOrZero, ...] = ()
    """Numbers of features; none: all, or `n_features` of them."""
    n_features: CountOrZero = 0
    """So many features, drawn with the seed; 0: all."""
    n_tokens: Count = 100_000
    """Held-out tokens, of contexts drawn from all over the held-out text."""
    n_documents: Annotated[int, Range(MIN_DOCUMENTS)] = 200
    """Documents of each concept and source."""
    n_contexts: Annotated[int, Range(10, or_zero=True)] = 60
    """Contexts of each kind in each half that descriptions are found and scored on; 0: none."""
    n_effects: CountOrZero = 0
    """Features that are taken away from the running model, drawn with the seed."""
    n_draws: Draws = 500
    """Bootstrap draws of documents."""
    seed: Seed = 0
    """Of all that is drawn."""


def main(cfg: Config) -> None:
    """Choose dictionaries, collect each, write."""
    if not cfg.source:
        raise UserError("name a run's folder, a dictionary or a release")
    if cfg.output is not None:
        raise UserError("--output: the dashboard's data always go to results/dashboard")

    from analysis.subjects import load_subjects

    subjects = load_subjects([cfg.source], cfg, with_other_places=not cfg.n_effects)
    chosen = choose(subjects, cfg.saes)
    check_features(cfg, chosen)
    folders = {subject.name: folder_of(cfg, subject) for subject in chosen}

    from analysis.dashboard_data import Collector

    collector = None
    for subject in chosen:
        lm = collector.material.lm if collector else None
        collector = Collector(cfg, subject, subjects, lm)
        collector.write(folders[subject.name])


def choose(subjects: "list[Subject]", names: tuple[str, ...]) -> "list[Subject]":
    """The named ones; without names the first of the ratio that is nearest to 4."""
    known = {subject.name: subject for subject in subjects}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"no SAE {', '.join(unknown)}; there are {', '.join(known)}")
    if names:
        return [known[name] for name in names]
    from analysis.families import AIM

    return [min(subjects, key=lambda s: abs(s.dictionary.d_sae / s.dictionary.d_in - AIM))]


def check_features(cfg: Config, subjects: "list[Subject]") -> None:
    """`UserError` for features that a dictionary does not have."""
    for subject in subjects:
        d_sae = subject.dictionary.d_sae
        wrong = [i for i in cfg.features if not 0 <= i < d_sae]
        if wrong:
            raise UserError(f"--features {wrong[0]}: {subject.name} has 0 to {d_sae - 1}")


def folder_of(cfg: Config, subject: "Subject") -> Path:
    """Where its data go; an existing folder is refused without --overwrite."""
    name = subject.name.replace("/", "_")
    folder = (subject.run or Path("outputs")) / "results" / "dashboard" / name
    if folder.exists() and not cfg.overwrite:
        raise UserError(f"{folder} exists; give --overwrite to collect it anew")
    return folder


if __name__ == "__main__":
    run_program(Config, main)

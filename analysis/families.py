"""The families of units that `measure_polysemanticity` compares, one after the other.

Every family is a list of the same kind of dictionary with different seeds. No measurement here.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from analysis.controls import (
    FROZEN,
    RETRAINED,
    UNTRAINED,
    TrainingActivations,
    controls,
    run_config,
    run_of,
)
from analysis.matched import Families
from analysis.program import ConceptConfig
from analysis.subjects import Material, Origin, Subject
from analysis.units import ConceptReading, Family
from sparse_coding.baselines import neuron_basis
from sparse_coding.concepts import ConceptCorpus, concept_documents, find_concepts
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.harvest import hook_width

if TYPE_CHECKING:
    from analysis.measure_polysemanticity import Config

N_SEEDS = 3  # of random directions
AIM = 4  # the ratio that is studied unless one is asked for
L0_TOKENS = 8192


class Opened(NamedTuple):
    """Dictionaries of one hook, their language model, and the concept corpus in its tokens."""

    subjects: list[Subject]
    ratio: int
    """The one that is studied."""
    material: Material
    corpus: ConceptCorpus

    @property
    def hook_name(self) -> str:
        return self.material.origin.hook_name

    @property
    def of_ratio(self) -> list[Subject]:
        """The SAEs of the studied ratio."""
        return [subject for subject in self.subjects if subject.facts["ratio"] == self.ratio]


def open_subjects(
    cfg: ConceptConfig, subjects: list[Subject], ratio: int, concepts: Sequence[str] = ()
) -> Opened:
    """`ratio` 0: the one nearest to 4; no names of concepts: all."""
    wanted = find_concepts(concepts)
    material = Material(only_origin(subjects), cfg.device)
    corpus = concept_documents(
        material.lm.tokenizer, cfg.n_tokens, n_documents=cfg.n_documents, concepts=wanted
    )
    return Opened(subjects, chosen_ratio(subjects, ratio), material, corpus)


def every_family(cfg: "Config", subjects: list[Subject]) -> Iterator[list[Family]]:
    """The dictionaries ratio by ratio, beginning with the one that others are set against."""
    opened = open_subjects(cfg, subjects, cfg.ratio, cfg.concepts)
    subjects, ratio, material, corpus = opened
    origin, group = material.origin, opened.of_ratio
    settings = run_config(run_of(cfg, group), origin)
    activations = TrainingActivations(settings, material, cfg.n_tokens_train)
    mlp_hook = mlp_of(origin.hook_name) if "mlp_neurons" in cfg.families else None
    hooks = [origin.hook_name, *([mlp_hook] if mlp_hook else [])]
    reading = ConceptReading(material, corpus, hooks)
    k = round(mean_l0(group[0].dictionary, reading))

    for one in (ratio, *sorted({s.facts["ratio"] for s in subjects} - {ratio})):
        of_ratio = [subject for subject in subjects if subject.facts["ratio"] == one]
        yield [
            Family("sae", origin.hook_name, s.dictionary, facts_of(s), reading, k)
            for s in of_ratio
        ]
    for kind in (FROZEN, UNTRAINED):
        if kind in cfg.families:
            yield of_control(kind, cfg, group, activations, reading, k)
    yield from fitted(cfg, group[0].dictionary.d_sae, activations, reading, k)
    if mlp_hook:
        facts = {"ratio": None, "seed": None}
        yield [Family("mlp_neurons", mlp_hook, mlp_neurons(reading, mlp_hook), facts, reading, k)]
    del reading, activations
    for how in cfg.random_lms:
        yield retrained(cfg, group, corpus, how, k)


def only_origin(subjects: list[Subject]) -> Origin:
    """`UserError` if the run has SAEs of several hooks."""
    origins = {subject.origin for subject in subjects}
    if len(origins) > 1:
        hooks = ", ".join(sorted(origin.hook_name for origin in origins))
        raise UserError(f"the run has SAEs of several hooks ({hooks}); give a run of one")
    return origins.pop()


def chosen_ratio(subjects: list[Subject], ratio: int) -> int:
    """`ratio` if the run has it; for 0 the one nearest to 4."""
    ratios = sorted({subject.facts["ratio"] for subject in subjects})
    if ratio and ratio not in ratios:
        raise UserError(f"the run has no SAE of ratio {ratio}; it has {ratios}")
    return ratio or min(ratios, key=lambda one: abs(one - AIM))


def mlp_of(hook_name: str) -> str | None:
    """Where the neurons of the same block's MLP are read, if it is a block's hook."""
    block = re.match(r"blocks\.\d+\.", hook_name)
    return f"{block[0]}mlp.hook_post" if block else None


def mlp_neurons(reading: ConceptReading, hook_name: str) -> Dictionary:
    """The neurons at this hook, both signs, around 0."""
    width = hook_width(reading.lm, hook_name)
    return neuron_basis(torch.zeros(width)).to(reading.lm.device)


def facts_of(subject: Subject) -> dict[str, int | str | None]:
    return {key: subject.facts.get(key) for key in ("ratio", "seed")}


def mean_l0(dictionary: Dictionary, reading: ConceptReading) -> float:
    """Active features per token on source A."""
    x = reading.choosing.acts[reading.hooks[0]]
    some = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:L0_TOKENS]]
    active = dictionary.encode(some.to(dictionary.W_dec.device).float()) != 0
    return max(1.0, active.sum(dim=1).float().mean().item())


def of_control(
    kind: str, cfg: "Config", group: list[Subject], activations: TrainingActivations,
    reading: ConceptReading, k: int, name: str | None = None,
) -> list[Family]:  # fmt: skip
    """The controls of a group's SAEs, seed by seed."""
    made = controls(kind, run_of(cfg, group), group, activations)
    hook = reading.hooks[0]
    return [
        Family(name or kind, hook, made[s.name], facts_of(s), reading, k)
        for s in group
        if s.name in made
    ]


def fitted(
    cfg: "Config", d_sae: int, activations: TrainingActivations, reading: ConceptReading, k: int
) -> Iterator[list[Family]]:
    """Bases and directions that need no SAE; random ones with several seeds."""
    from analysis.measure_polysemanticity import BASES, DRAWN

    names = [name for name in (*BASES, *DRAWN) if name in cfg.families]
    families = Families(activations, names, cfg.n_tokens_ica, cfg.ica_iterations, cfg.seed)
    hook = reading.hooks[0]
    for name in names:
        seeds = range(cfg.seed, cfg.seed + N_SEEDS) if name in DRAWN else [None]
        made = [families.of_size(d_sae, k, seed, (name,))[name] for seed in seeds]
        yield [
            Family(name, hook, dictionary, {"ratio": None, "seed": seed}, reading, k)
            for seed, dictionary in zip(seeds, made, strict=True)
        ]


def retrained(
    cfg: "Config", group: list[Subject], corpus: ConceptCorpus, how: str, k: int
) -> list[Family]:
    """SAEs trained with the same settings on the model with random or shuffled weights."""
    origin = group[0].origin
    lm = f"{origin.lm.partition('@')[0]}@{how}"
    material = Material(dataclasses.replace(origin, lm=lm), cfg.device)
    settings = run_config(run_of(cfg, group), material.origin)
    activations = TrainingActivations(settings, material, cfg.n_tokens_train)
    reading = ConceptReading(material, corpus, [origin.hook_name])
    return of_control(RETRAINED, cfg, group, activations, reading, k, f"sae_{how}_lm")

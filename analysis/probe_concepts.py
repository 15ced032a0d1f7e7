"""How few features tell a concept from all others, how do they split, what is absorbed?

    python -m analysis.probe_concepts outputs/runs/NAME
    python -m analysis.probe_concepts outputs/runs/NAME --ratios 4 16 --concepts python cpp korean

Documents are of the concept corpus (sparse_coding/concepts.py): sources A choose and train,
everything is scored on sources B, by other people. A probe reads features averaged over a
document's tokens: the k with the largest difference of means in pooled standard deviations, in a
logistic regression with SAEBench's L2 penalty (C = 1). The dense probe reads all dimensions of the
activations, with a penalty that is cross-validated with whole parents left out. Of a basis
(neurons, PCA) probes may choose axes as they are and their halves; random directions are as many
halves as the SAE has features. `kind`:

- probe: AUROC and average precision of one concept against the rest, or their mean (concept
  "all"); minus_dense and minus_random are differences of AUROC from the same draws of documents;
- splitting: features of a concept before one more brings less than 0.03 of F1 (at most 10),
  cross-validated on A;
- children: the best feature of the smallest ratio, followed to larger ones: features of cosine 0.5
  or more with it (n_cosine), and of the documents where it fires the share where those, the one or
  the 3 features that cover it best do (near, best, top; chosen on A); *_silent: the same of all
  other documents, which is what a feature that fires everywhere covers too. A seed's ratios start
  with the same rows (shares_start): parents of the next seed are looked for as well;
- absorption: of the tokens of a concept's documents that the dense probe takes for the concept,
  the mean share of its direction that up to 3 other features carry while all its features are
  silent (main_silent: how often they are).

Labels "shuffled" are the null: concepts dealt anew to whole documents of A and of B. Absorption is
to be read beside it and beside untrained SAEs, which have some too: a label is of a document, not
of its tokens, the probe was fitted to documents' means, and models this small have few of the
hierarchies that SAEBench's first letters were chosen for. Intervals: documents of B drawn anew
within concepts; seed "all": Student's t over seeds. Writes results/probe_concepts.json.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from analysis.program import (
    ConceptConfig,
    Row,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.errors import UserError
from sparse_coding.settings import Count, CountOrZero, Range, Ratio, Seed

if TYPE_CHECKING:
    from analysis.concept_probes import Probed
    from analysis.controls import TrainingActivations
    from analysis.subjects import Material, Subject
    from analysis.units import ConceptReading
    from sparse_coding.concepts import ConceptCorpus

MIN_DOCUMENTS = 10  # of a concept and source: fewer leave nothing to cross-validate with
RANDOM = "random_directions"
FITTED = (RANDOM, "neuron_basis", "pca")


@dataclass(frozen=True)
class Config(ConceptConfig):
    """Which features are probed, on which documents."""

    n_documents: Annotated[int, Range(MIN_DOCUMENTS)] = 200
    """Documents of each concept and source."""
    ratios: tuple[Ratio, ...] = ()
    """Of the run's SAEs only those of these ratios; empty: all."""
    families: tuple[Literal[("untrained", *FITTED, "mlp_neurons")], ...] = (
        "untrained", *FITTED, "mlp_neurons",
    )  # fmt: skip
    """What the SAEs are compared with."""
    ks: tuple[Count, ...] = (1, 2, 5, 16)
    """Numbers of features that a probe reads."""
    concepts: tuple[str, ...] = ()
    """Names of concepts; none: all."""
    n_tokens_train: CountOrZero = 0
    """Activations that controls and PCA learn from; 0: as many as the run's SAEs, without a
    run 300,000."""
    seed: Seed = 0
    """Of random directions, shuffled labels and draws."""


FACTS = {"family": "{}", "ratio": "{}", "seed": "{}"}
TABLES = {
    "probe": FACTS | {
        "k": "{}", "auroc": "{:.3f}", "average_precision": "{:.3f}", "minus_dense": "{:+.3f}",
        "minus_random": "{:+.3f}",
    },
    "splitting": FACTS | {"n_needed": "{:.2f}", "f1_of_one": "{:.3f}", "f1_of_needed": "{:.3f}"},
    "children": FACTS | {
        "from_seed": "{}", "n_cosine": "{:.2f}", "best_cosine": "{:.2f}", "near_covers": "{:.2f}",
        "best_covers": "{:.2f}", "best_covers_silent": "{:.2f}", "top_covers": "{:.2f}",
        "top_covers_silent": "{:.2f}",
    },
    "absorption": FACTS | {
        "absorption": "{:.3f}", "main_silent": "{:.3f}", "share_taken": "{:.2f}",
        "n_tokens": "{:,}",
    },
}  # fmt: skip


def main(cfg: Config) -> None:
    """Read the corpus, probe family by family, print, write."""
    if not cfg.ks:
        raise UserError("--ks needs at least one value")
    if len(set(cfg.concepts)) == 1:
        raise UserError("--concepts names one concept; a probe needs another to tell it from")

    from analysis.controls import without_trained
    from analysis.subjects import Material, by_origin, load_subjects
    from sparse_coding.concepts import concept_documents, find_concepts, recipe

    concepts = find_concepts(cfg.concepts)
    subjects = load_subjects([cfg.source], cfg)
    path = results_path(cfg, "probe_concepts", [subject.run for subject in subjects])
    cfg = without_trained(cfg, subjects)
    ratios = sorted({subject.facts["ratio"] for subject in subjects})
    subjects = [s for s in subjects if not cfg.ratios or s.facts["ratio"] in cfg.ratios]
    if not subjects:
        raise UserError(f"the run has no SAE of these --ratios; it has {ratios}")
    rows: list[Row] = []
    lm = corpus = None
    for origin, group in by_origin(subjects).items():
        material = Material(origin, cfg.device, lm)
        lm = material.lm
        corpus = corpus or concept_documents(
            lm.tokenizer, cfg.n_tokens, n_documents=cfg.n_documents, concepts=concepts
        )
        new = probe_hook(cfg, material, group, corpus)
        show(new)
        rows += new
    write_results(path, cfg, rows, str(lm.device), corpus=recipe(concepts))


def probe_hook(
    cfg: Config, material: "Material", group: "list[Subject]", corpus: "ConceptCorpus"
) -> list[Row]:
    """All rows of one hook."""
    import torch
    from tqdm import tqdm

    from analysis.concept_probes import make_task
    from analysis.concept_study import Study
    from analysis.controls import TrainingActivations, run_config, run_of
    from analysis.families import mlp_of
    from analysis.units import ConceptReading
    from sparse_coding.runs import check_memory

    origin, hook = material.origin, material.origin.hook_name
    n_bytes = 8 * len(corpus.documents) * max(subject.dictionary.d_sae for subject in group)
    advice = "ask for fewer --n-documents or smaller --ratios"
    check_memory(n_bytes, torch.device("cpu"), "features of documents", advice)
    # Before the corpus is read: they bring the norm limit that the SAEs were trained with.
    run = run_of(cfg, group)
    activations = TrainingActivations(run_config(run, origin), material, cfg.n_tokens_train)
    mlp_hook = mlp_of(hook) if "mlp_neurons" in cfg.families else None
    hooks = [name for name in dict.fromkeys((hook, mlp_hook)) if name]
    reading = ConceptReading(material, corpus, hooks)
    tasks = [make_task(reading, cfg.n_draws, cfg.seed, how) for how in (False, True)]
    study = Study(reading, hook, tasks, cfg.ks)
    families = list(every_family(cfg, group, activations, reading))
    for family in tqdm(families, desc=f"probes, {hook}", unit="family"):
        study.add(family)
    return [{"lm": origin.lm, "hook_name": hook} | row for row in study.rows()]


def every_family(
    cfg: Config, group: "list[Subject]", activations: "TrainingActivations",
    reading: "ConceptReading",
) -> "Iterator[Probed]":  # fmt: skip
    """Ratio by ratio, from the smallest; then what has none."""
    from analysis.concept_probes import Probed
    from analysis.controls import UNTRAINED, controls, run_of
    from analysis.families import mlp_neurons
    from analysis.matched import Families

    hook, none = activations.hook_name, {"ratio": None, "seed": None}
    names = [name for name in FITTED if name in cfg.families]
    fitted = Families(activations, names, 1, 1, cfg.seed) if names else None
    untrained = (
        controls(UNTRAINED, run_of(cfg, group), group, activations)
        if UNTRAINED in cfg.families
        else {}
    )

    def family(facts: Row, d_sae: int) -> Probed:
        name = facts["family"]
        return Probed(facts, hook, lambda: fitted.of_size(d_sae, 1, names=(name,))[name])

    for ratio, d_sae in sorted({(s.facts["ratio"], s.dictionary.d_sae) for s in group}):
        if RANDOM in names:
            yield family(none | {"family": RANDOM, "ratio": ratio}, d_sae)
        for subject in (s for s in group if s.facts["ratio"] == ratio):
            about = settings_of(subject)
            yield Probed({"family": "sae"} | about, hook, lambda s=subject: s.dictionary)
            if subject.name in untrained:
                control = untrained[subject.name]
                yield Probed({"family": UNTRAINED} | about, hook, lambda one=control: one)
    for name in names:
        if name != RANDOM:
            yield family(none | {"family": name}, 2)
    for other in reading.hooks[1:]:
        neurons = mlp_neurons(reading, other)
        yield Probed(none | {"family": "mlp_neurons"}, other, lambda one=neurons: one)


def settings_of(subject: "Subject") -> Row:
    """What tells a run's SAEs apart."""
    keys = ("architecture", "target_l0", "l1_coeff", "ratio", "seed")
    settings = {"sae": subject.name} | {key: subject.facts.get(key) for key in keys}
    if settings["target_l0"] is not None:
        settings["l1_coeff"] = None  # found in training, another one for each SAE
    return settings


def show(rows: list[Row]) -> None:
    """The means over concepts: one table of probes, splitting, children, absorption each."""
    for kind, table in TABLES.items():
        of_kind = [row for row in rows if row["kind"] == kind and row["concept"] == "all"]
        for labels in ("true", "shuffled"):
            found = [row for row in of_kind if row["labels"] == labels]
            if found:
                title = f"{kind}, {rows[0]['hook_name']}, labels {labels}: mean over concepts"
                print_table(title, found, table)


if __name__ == "__main__":
    run_program(Config, main)

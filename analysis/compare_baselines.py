"""Do SAEs keep more than PCA, ICA, neurons, random directions and controls of the same sparsity?

    python -m analysis.compare_baselines outputs/runs/NAME
    python -m analysis.compare_baselines outputs/runs/NAME --ratios 4 --random-lms
    python -m analysis.compare_baselines RELEASE/DICTIONARY

One SAE of the demo with both random models takes about 20 minutes of one core. A signed direction
counts as two half-rectified features, and of every dictionary each token keeps the k features that
write most; k is the SAE's L0, rounded. What such a cut dictionary writes is scaled by one number,
fitted by least squares (1 for orthonormal directions); coefficients are not fitted token by token.
Controls (SAEs untrained, with a frozen decoder, on the model with random or shuffled weights) are
trained on first use with the run's settings and kept in RUN/controls. Everything is fitted to
training activations and measured on held-out documents; differences from the SAE are paired.
Writes results/compare_baselines.json.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from analysis.program import (
    Row,
    SourceConfig,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.errors import UserError
from sparse_coding.settings import Count, CountOrZero, Ratio, Seed

if TYPE_CHECKING:
    from analysis.subjects import Material, Subject

FITTED = (
    "pca", "pca_leading", "ica", "neuron_basis", "random_rotation", "random_directions",
    "whitened_random",
)  # fmt: skip
CONTROLS = ("untrained", "frozen_decoder")
TOLD = ("architecture", "ratio", "seed")  # of an SAE, in each of its rows


@dataclass(frozen=True)
class Config(SourceConfig):
    """What is compared with what."""

    ratios: tuple[Ratio, ...] = ()
    """Of the run's SAEs only those of these ratios; empty: all."""
    families: tuple[Literal[(*CONTROLS, *FITTED)], ...] = (*CONTROLS, *FITTED)
    """What the SAEs are compared with."""
    random_lms: tuple[Literal["random", "shuffled"], ...] = ("random", "shuffled")
    """Also train and compare SAEs on the run's model with random or shuffled weights."""
    n_tokens_train: CountOrZero = 0
    """Activations that controls and families learn from; 0: as many as the run's SAEs, without a
    run 300,000."""
    n_tokens_ica: Count = 20_000
    """Of them, how many ICA sees: it holds them all in memory, in float64."""
    ica_iterations: Count = 200
    """ICA stops here at the latest; whether it has converged is in the results."""
    n_tokens: Count = 30_000
    """Held-out activations to measure on, or all there are; contexts are drawn at random."""
    n_tokens_ce: Count = 8_000
    """Of them, tokens for cross-entropy, which needs a run of the model per dictionary."""
    seed: Seed = 0
    """Of random directions, rotations, ICA's start and the choice of contexts."""


TABLE = {
    "family": "{}",
    "k": "{}",
    "gain": "{:.2f}",
    "l0": "{:.1f}",
    "fvu": "{:.3f}",
    "fvu_minus_sae": "{:+.3f}",
    "nats_lost": "{:.3f}",
    "nats_lost_minus_sae": "{:+.3f}",
}


def main(cfg: Config) -> None:
    """Fit and train, measure, print, write."""
    from analysis.controls import without_trained
    from analysis.subjects import Material, by_origin, load_subjects

    subjects = load_subjects([cfg.source], cfg)
    path = results_path(cfg, "compare_baselines", [subject.run for subject in subjects])
    cfg = without_trained(cfg, subjects)
    ratios = sorted({subject.facts["ratio"] for subject in subjects})
    subjects = [s for s in subjects if not cfg.ratios or s.facts["ratio"] in cfg.ratios]
    if not subjects:
        raise UserError(f"the run has no SAE of these --ratios; it has {ratios}")
    rows: list[Row] = []
    for origin, group in by_origin(subjects).items():
        base = origin.lm.partition("@")[0]
        for lm in dict.fromkeys((origin.lm, *(f"{base}@{how}" for how in cfg.random_lms))):
            material = Material(dataclasses.replace(origin, lm=lm), cfg.device)
            new = compare(cfg, material, group)
            show(new)
            rows += new
    write_results(path, cfg, rows, str(material.lm.device))


def compare(cfg: Config, material: "Material", group: "list[Subject]") -> list[Row]:
    """The rows of one hook: of the run's own SAEs, or of such trained anew on `material`'s model.

    There they are compared with the fitted families alone.
    """
    import torch

    from analysis.controls import RETRAINED, TrainingActivations, controls, run_config, run_of
    from analysis.matched import Families, PairedEvaluation, entries, measure, scattered

    origin = material.origin
    run = run_of(cfg, group)
    activations = TrainingActivations(run_config(run, origin), material, cfg.n_tokens_train)
    if origin.lm == group[0].origin.lm:
        by_kind = {"sae": {subject.name: subject.dictionary for subject in group}}
        kinds = [kind for kind in CONTROLS if kind in cfg.families]
    else:
        by_kind, kinds = {}, [RETRAINED]
    by_kind |= {kind: controls(kind, run, group, activations) for kind in kinds}
    names = [name for name in FITTED if name in cfg.families]
    families = Families(activations, names, cfg.n_tokens_ica, cfg.ica_iterations, cfg.seed)

    generator = torch.Generator().manual_seed(cfg.seed)
    contexts = scattered(material.token_batches("heldout"), cfg.n_tokens, generator)
    variance = families.data.matrix.diagonal().float()
    hook = origin.hook_name
    evaluation = PairedEvaluation(material.lm, hook, contexts, material.max_norm, variance)
    l0 = evaluation.l0(by_kind["sae"])
    compared = []
    for subject in group:
        name = subject.name
        about = {"lm": origin.lm, "hook_name": hook, "sae": name}
        about |= {f"sae_{key}": subject.facts.get(key) for key in TOLD}
        about["n_tokens_fit"] = activations.n_tokens
        own = {kind: saes[name] for kind, saes in by_kind.items() if name in saes}
        for entry in entries(name, max(1, round(l0[name])), own, families):
            compared.append(entry._replace(facts=about | entry.facts))
    return measure(evaluation, compared, families.data.mean.float(), cfg.n_tokens_ce)


def show(rows: list[Row]) -> None:
    """One table per SAE: what has its sparsity."""
    for name in dict.fromkeys(row["sae"] for row in rows):
        of_sae = [row for row in rows if row["sae"] == name]
        first = of_sae[0]
        print_table(
            f"{name} on {first['lm']} {first['hook_name']}, and others at its L0",
            of_sae,
            TABLE,
            f"{first['n_tokens_eval']:,} held-out tokens of {first['n_documents_eval']} "
            f"documents; cross-entropy on {first['n_tokens_ce']:,} targets of "
            f"{first['n_documents_ce']}, clean {first['ce_clean']:.3f} nats; k -: as it is",
        )


if __name__ == "__main__":
    run_program(Config, main)

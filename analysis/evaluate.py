"""How well do dictionaries reconstruct held-out activations, and what does the model lose?

    python -m analysis.evaluate outputs/runs/NAME
    python -m analysis.evaluate outputs/runs/NAME/saes/l1_x08_l0-30_s0 --n-tokens 1_000_000
    python -m analysis.evaluate gpt2-small-res-jb/blocks.8.hook_resid_pre --text NeelNanda/pile-10k

The demo's six SAEs take about four minutes on two cores with the defaults. Every number is of
documents that were never trained on, without first positions, special tokens and attention sinks
(those rows are reported apart); of a transcoder all but L0 is of its target. Brackets are 95 %
intervals of a bootstrap over documents, the same draws for all dictionaries. Writes
results/evaluate.json and, with the histograms of firing rates, results/evaluate_density.json. What
each column means: analysis/README.md.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from analysis.program import (
    MeasureConfig,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.settings import Count


@dataclass(frozen=True)
class Config(MeasureConfig):
    """What is measured."""

    dictionaries: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run folders, SAE folders, dictionaries of other libraries, or releases."""
    n_tokens: Count = 1_000_000
    """Held-out activations to measure on, or all there are; the number is reported."""
    n_tokens_ce: Count = 20_000
    """Of them, tokens for cross-entropy and KL, which need a run of the whole model each."""
    random_error: bool = True
    """Also measure the control: an error of the same norm in a random direction."""


TABLE = {
    "name": "{}",
    "l0": "{:.1f}",
    "fvu": "{:.3f}",
    "cosine": "{:.3f}",
    "l2_ratio": "{:.3f}",
    "nats_lost": "{:.3f}",
    "kl": "{:.3f}",
    "kl_random_error": "{:.3f}",
    "ce_recovered": "{:.3f}",
    "dead_fraction": "{:.1%}",
}


def main(cfg: Config) -> None:
    """Measure, print, write."""
    from analysis.subjects import Material, by_origin, load_subjects
    from sparse_coding.evaluation import evaluate
    from sparse_coding.metrics import density_histogram

    subjects = load_subjects(cfg.dictionaries, cfg, with_other_places=True)
    path = results_path(cfg, "evaluate", [subject.run for subject in subjects])
    rows, densities = [], []
    for origin, group in by_origin(subjects).items():
        material = Material(origin, cfg.device)
        material.check(group)
        moments = material.training_moments(origin.target_hook_name or origin.hook_name)
        evaluation = material.evaluation(cfg.n_tokens, moments.variance)
        dictionaries = {subject.name: subject.dictionary for subject in group}
        measured = evaluate(
            evaluation, dictionaries, moments.mean, cfg.n_tokens_ce, cfg.random_error
        )
        for subject in group:
            row, n_firings = measured[subject.name]
            identity = {"name": subject.name, "lm": origin.lm, "hook_name": origin.hook_name}
            if origin.target_hook_name:
                identity["hook_name_out"] = origin.target_hook_name
            identity |= subject.facts
            rows.append(identity | {"split": "heldout"} | row)
            bins = density_histogram(n_firings, row["n_tokens_eval"])
            densities += [identity | bin_ for bin_ in bins]
        device = str(material.lm.device)
    first = rows[0]
    print_table(
        "Held-out documents",
        rows,
        TABLE,
        f"{first['n_tokens_eval']:,} tokens of {first['n_documents_eval']} documents; losses on "
        f"{first['n_tokens_ce']:,} targets (nats): clean {first['ce_clean']:.3f}, layer replaced "
        f"by its mean {first['ce_mean']:.2f}, by zero {first['ce_zero']:.2f}",
    )
    write_results(path, cfg, rows, device)
    write_results(path.with_stem(path.stem + "_density"), cfg, densities, device)


if __name__ == "__main__":
    run_program(Config, main)

"""Do dictionaries hold the same features? Every pair of those that are named, both ways.

    python -m analysis.compare_dictionaries outputs/runs/NAME
    python -m analysis.compare_dictionaries RUN_A/saes/l1_x08_l0-30_s0 RUN_B/saes/l1_x08_l0-30_s0
    python -m analysis.compare_dictionaries outputs/runs/A outputs/runs/B --n-tokens 1_000_000

Of each feature of A, the most similar feature of B: by the cosine of their decoder (encoder)
directions within one language model, by the correlation of their activations on the same held-out
text anywhere, between language models and tokenizers too. Partners by correlation are chosen on
one half of the documents and measured on the other. Each mean stands beside its null: random
directions (plain, and with the covariance of B's), and B's activations on shifted text. Brackets
are 95 % intervals: over features for cosines, over documents for correlations. Writes
results/compare_dictionaries.json; what each column means: analysis/README.md.
"""

import itertools
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
from sparse_coding.settings import Count, Seed


@dataclass(frozen=True)
class Config(MeasureConfig):
    """What is compared, and on what."""

    dictionaries: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run folders, SAE folders, dictionaries of other libraries, or releases; two or more."""
    n_tokens: Count = 200_000
    """Held-out tokens that every dictionary encodes, or all there are; the number is reported."""
    min_firings: Count = 10
    """A feature takes part if it is active on as many tokens of either half of the documents."""
    one_to_one: bool = True
    """Also match directions one to one (the Hungarian algorithm; about a minute for 18,432)."""
    seed: Seed = 0
    """Of the random directions."""


TABLE = {
    "a": "{}",
    "b": "{}",
    "decoder_cosine": "{:.3f}",
    "decoder_cosine_null": "{:.3f}",
    "decoder_above_0.7": "{:.0%}",
    "one_to_one_cosine": "{:.3f}",
    "correlation": "{:.3f}",
    "correlation_null": "{:.3f}",
    "correlation_above_0.7": "{:.0%}",
    "n_features_a": "{:,}",
}


def main(cfg: Config) -> None:
    """Encode, compare, print, write."""

    from tqdm import tqdm

    from analysis.similarity import compare, load_sides
    from analysis.subjects import load_subjects
    from sparse_coding.errors import UserError

    subjects = load_subjects(cfg.dictionaries, cfg)
    if len(subjects) < 2:
        raise UserError(f"{len(subjects)} dictionary is named; give two or more, or a run folder")
    path = results_path(cfg, "compare_dictionaries", [subject.run for subject in subjects])
    sides = load_sides(subjects, cfg.n_tokens, cfg.min_firings, cfg.device)
    rows = []
    for a, b in tqdm(list(itertools.combinations(sides, 2)), desc="comparing", unit="pair"):
        rows += compare(a, b, cfg.one_to_one, cfg.seed)
    n_out = sum(one.subject.dictionary.d_sae - len(one.decoder) for one in sides)
    first = rows[0]
    print_table(
        "Of each feature of a, the most similar of b",
        rows,
        TABLE,
        f"correlations on {first['n_tokens_correlation']:,} held-out tokens of "
        f"{first['n_documents_correlation']} documents; {n_out:,} features of all dictionaries "
        f"fire too seldom (under {cfg.min_firings} tokens of either half) and are left out",
    )
    write_results(path, cfg, rows, cfg.device)


if __name__ == "__main__":
    run_program(Config, main)

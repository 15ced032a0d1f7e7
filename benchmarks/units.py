"""How fast are units counted on labelled documents, and in how much memory?

    python -m benchmarks.units

About ten minutes on two cores with the defaults: 10,000 directions read a million tokens of 16
concepts in one pass each. Rows of `what`: thresholds (those that leave each unit its firing rate),
activity (sums per document and unit), n_eff (effective numbers of all units), lifts (all concepts
of all units, a bootstrap of documents). `peak_mb` is the process's largest resident memory so far.
The first two contain the product of activations and directions, whose own time is the row encode.
"""

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sparse_coding.baselines import random_directions
from sparse_coding.config import as_json, environment
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import report_user_errors_in_one_line
from sparse_coding.polysemanticity import Labelled, effective_number, lift_p
from sparse_coding.settings import Count, Draws, OpenFraction, OutputFile, read_settings
from sparse_coding.storage import write_json
from sparse_coding.unit_activity import (
    ROWS_AT_ONCE,
    rate_thresholds,
    unit_activations,
    unit_activity,
)

UNITS_AT_ONCE = 128


@dataclass(frozen=True)
class Config:
    """Sizes of the work."""

    n_units: Count = 10_000
    """Half-rectified directions; even."""
    n_tokens: Count = 1_000_000
    """Tokens, in documents of `document_tokens`."""
    document_tokens: Count = 64
    n_concepts: Count = 16
    d_in: Count = 576
    """Width of the layer."""
    rate: OpenFraction = 0.003
    """Share of tokens on which every unit fires."""
    n_draws: Draws = 200
    """Bootstrap draws of the documents."""
    output: OutputFile = Path("benchmarks/results/units.json")
    """Results file."""


def batches(cfg: Config, what: str) -> Iterator[Float[Tensor, "rows d_in"]]:
    """Activations as they would come from a language model; the same in every pass."""
    generator = torch.Generator().manual_seed(0)
    for start in tqdm(range(0, cfg.n_tokens, ROWS_AT_ONCE), desc=what, unit="batch"):
        n = min(ROWS_AT_ONCE, cfg.n_tokens - start)
        yield torch.randn(n, cfg.d_in, generator=generator)


def encoded(cfg: Config, dictionary: Dictionary, what: str) -> Iterator[Tensor]:
    units = torch.arange(cfg.n_units)
    for x in batches(cfg, what):
        yield from unit_activations(dictionary, x, units)


def corpus(cfg: Config) -> tuple[Tensor, Labelled]:
    """The document of each token, and the documents' concepts."""
    document = torch.arange(cfg.n_tokens) // cfg.document_tokens
    n_tokens = document.bincount().double()
    concept = torch.arange(len(n_tokens)) % cfg.n_concepts
    return document, Labelled(concept, n_tokens, torch.arange(cfg.n_concepts) // 3)


@torch.no_grad()
def measure(cfg: Config) -> Iterator[dict]:
    """A row for each part, in the order in which they need each other."""
    generator = torch.Generator().manual_seed(1)
    dictionary = random_directions(torch.zeros(cfg.d_in), cfg.n_units // 2, generator)
    document, labels = corpus(cfg)
    clock = time.perf_counter()
    for _ in encoded(cfg, dictionary, "encode"):
        pass
    yield row(cfg, "encode", clock)
    clock = time.perf_counter()
    thresholds = rate_thresholds(encoded(cfg, dictionary, "thresholds"), cfg.n_tokens, (cfg.rate,))
    yield row(cfg, "thresholds", clock)
    clock = time.perf_counter()
    parts = encoded(cfg, dictionary, "activity")
    seen = unit_activity(parts, document, len(labels.concept), thresholds)
    yield row(cfg, "activity", clock) | {"firing_rate": seen.active.sum().item() / cfg.n_tokens
                                         / cfg.n_units}  # fmt: skip
    clock = time.perf_counter()
    n_eff = [effective_number(part, labels) for part in seen.mass[0].split(UNITS_AT_ONCE, dim=1)]
    yield row(cfg, "n_eff", clock) | {"mean": torch.cat(n_eff).mean().item()}
    clock = time.perf_counter()
    weights = labels.draws(cfg.n_draws, generator)
    for part in tqdm(seen.active[0].split(UNITS_AT_ONCE, dim=1), desc="lifts", unit="part"):
        lift_p(part, labels, weights)
    yield row(cfg, "lifts", clock)


def row(cfg: Config, what: str, start: float) -> dict:
    seconds = time.perf_counter() - start
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"what": what, "seconds": seconds, "tokens_per_s": cfg.n_tokens / seconds,
            "peak_mb": peak_mb}  # fmt: skip


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    rows = []
    for one in measure(cfg):
        rows.append(one)
        print(one, flush=True)
    content = {"config": as_json(cfg), "environment": environment("cpu"), "rows": rows}
    print(f"written: {write_json(cfg.output, content)}")


if __name__ == "__main__":
    main()

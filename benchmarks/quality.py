"""How well does each architecture learn, here and in other libraries, at equal steps and equal L0?

    python -m benchmarks.quality
    python -m benchmarks.quality --architectures topk jumprelu --ratio 4 --n-steps 1000

All train on the same activations of the embedded model, in the same order, from their libraries'
own initialisations. Each side has the same sweep: every learning rate with the first seed; the
one with the lowest error at the L0 asked for is then run with all seeds. A peer whose sparsity is
set by a coefficient searches it anew for every learning rate, in `n_searches` runs; it may miss
the L0. So ours is trained to the L0 that each peer reached: `vs` names the peer that a row is
compared to.

Columns: `fvu` and `nats_lost` on held-out documents (intervals of a bootstrap over documents);
`gap`: mean over seeds of ours minus theirs in FVU, with the 95 % interval of Student's t over the
seeds' differences. Below 0 ours is better.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from benchmarks.fit import measure_fit
from benchmarks.learners import ARCHITECTURES, FIRST_COEFFICIENTS, LACKS, LEARNERS, Job
from benchmarks.peers import is_installed, peer_versions
from benchmarks.streams import Reading, reading
from sparse_coding.cache import CachedActivations
from sparse_coding.config import as_json, environment
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.evaluation import Evaluation, evaluate, take_tokens
from sparse_coding.harvest import Rows, harvest_to_cache
from sparse_coding.metrics import columns, t_interval
from sparse_coding.settings import (
    Count,
    OutputFile,
    OutputFolder,
    Positive,
    Range,
    Ratio,
    Seed,
    read_settings,
)
from sparse_coding.storage import write_json

N_SAMPLE_TOKENS, N_CHOICE_TOKENS = 8192, 4096


@dataclass(frozen=True)
class Config:
    """What is compared."""

    architectures: tuple[str, ...] = ARCHITECTURES
    """Classes, by our names."""
    peers: tuple[str, ...] = ("dictionary_learning", "sae_lens")
    """Other libraries."""
    lm: str = "smollm2-135m"
    """Language model."""
    hook_name: str = "blocks.12.hook_resid_post"
    """Where its activations are taken."""
    ratio: Ratio = 2
    """Dictionary size, as a multiple of d_in."""
    target_l0: Positive = 30.0
    """Active features per token."""
    n_steps: Annotated[int, Range(20)] = 300
    """Steps of each training."""
    batch_tokens: Count = 1024
    """Tokens per step."""
    lrs: tuple[Positive, ...] = (5e-4, 1.5e-3, 4e-3)
    """Learning rates of the sweep."""
    n_searches: Count = 3
    """Runs per learning rate in which a coefficient is searched."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of the runs that are compared."""
    n_tokens_eval: Count = 20_000
    """Held-out tokens."""
    n_tokens_ce: Count = 2000
    """Of them, how many for the cross-entropy."""
    cache: OutputFolder = Path("outputs/cache")
    """Folder of activation caches."""
    out: OutputFile = Path("benchmarks/results/quality.json")
    """Results file, replaced at the end."""


class Data(NamedTuple):
    """What all train on and are measured on."""

    batches: list[Float[Tensor, "batch d_in"]]
    sample: Float[Tensor, "n d_in"]
    choice: Float[Tensor, "n d_in"]
    """Rows of the cache that nobody trains on; learning rates are chosen by them."""
    evaluation: Evaluation


def check(cfg: Config) -> None:
    """`UserError` for what cannot be compared."""
    for flag, given, allowed in (
        ("--architectures", cfg.architectures, ARCHITECTURES),
        ("--peers", cfg.peers, tuple(LEARNERS)[1:]),
    ):
        unknown = [name for name in given if name not in allowed]
        if unknown:
            raise UserError(f"{flag} {unknown[0]} is unknown; it must be of: {', '.join(allowed)}")
    if len(cfg.seeds) < 2:
        raise UserError(f"--seeds: give two or more of them, not {len(cfg.seeds)}")


def load(cfg: Config) -> Data:
    """Harvest, or read what was harvested."""
    read = reading(cfg.lm, "builtin", cfg.hook_name, 128)
    rows = Rows(read.lm, lambda: read.token_batches("train"), [cfg.hook_name])
    n_batches = cfg.n_steps + -(-N_CHOICE_TOKENS // cfg.batch_tokens)
    n_tokens = n_batches * cfg.batch_tokens
    settings = {"benchmark": "quality", "lm": cfg.lm, "hook": cfg.hook_name, "n_tokens": n_tokens}
    cache = harvest_to_cache(rows, cfg.cache, settings, n_tokens, "bfloat16")
    source = CachedActivations(cache, cfg.hook_name, cfg.batch_tokens, seed=0, n_epochs=1)
    batches = list(source)
    x = torch.cat(batches[cfg.n_steps :])[:N_CHOICE_TOKENS]
    return Data(
        batches[: cfg.n_steps],
        torch.cat(batches[: -(-N_SAMPLE_TOKENS // cfg.batch_tokens)]),
        x,
        _evaluation(cfg, read, rows),
    )


def _evaluation(cfg: Config, read: Reading, rows: Rows) -> Evaluation:
    heldout = take_tokens(read.token_batches("heldout"), cfg.n_tokens_eval)
    return Evaluation(read.lm, cfg.hook_name, heldout, rows.max_norms[cfg.hook_name])


class Trained(NamedTuple):
    """One finished SAE and how it does on `Data.choice`."""

    job: Job
    dictionary: Dictionary
    l0: float
    fvu: float


def train(library: str, job: Job, data: Data) -> Trained:
    """One training."""
    learner = LEARNERS[library](job, data.sample)
    for x in data.batches:
        learner.step(x)
    dictionary = learner.finish().requires_grad_(False)
    fit = measure_fit(dictionary, data.choice, 0.0)
    return Trained(job, dictionary, fit["l0"], fit["fvu"])


def with_best_lr(
    cfg: Config, library: str, first: Job, target_l0: float, data: Data
) -> list[Trained]:
    """The best learning rate's SAEs, one per seed."""
    candidates = []
    for lr in cfg.lrs:
        job = first._replace(lr=lr, seed=cfg.seeds[0])
        for left in reversed(range(cfg.n_searches if _is_searched(library, job) else 1)):
            one = train(library, job, data)
            if left:  # L0 falls about as the coefficient rises
                factor = min(8.0, max(1 / 8, one.l0 / target_l0)) if one.l0 else 1 / 8
                job = job._replace(sparsity=job.sparsity * factor)
        candidates.append(one)
    best = min(candidates, key=lambda one: _score(one, target_l0))
    others = [train(library, best.job._replace(seed=seed), data) for seed in cfg.seeds[1:]]
    return [best, *others]


def _is_searched(library: str, job: Job) -> bool:
    return (library, job.architecture) in FIRST_COEFFICIENTS


def _score(one: Trained, target_l0: float) -> float:
    """The error, with what an L0 away from the target is taken to be worth: 0.1 in FVU per
    doubling (an assumption), twice that below it."""
    if not math.isfinite(one.fvu) or one.l0 == 0:
        return float("inf")
    return one.fvu + 0.1 * abs(math.log2(one.l0 / target_l0)) * (1 if one.l0 > target_l0 else 2)


def compare(cfg: Config, data: Data) -> Iterator[tuple[dict[str, Any], list[Trained]]]:
    """Groups of SAEs that differ in their seed alone, with what they are."""
    installed = [peer for peer in cfg.peers if is_installed(peer)]
    pairs = [
        (architecture, peer)
        for architecture, peer in itertools.product(cfg.architectures, installed)
        if architecture not in LACKS[peer]
    ]
    for architecture, peer in tqdm(pairs, desc="architecture x peer"):
        sparsity = FIRST_COEFFICIENTS.get((peer, architecture), cfg.target_l0)
        sizes = cfg.ratio, sparsity, 0.0, 0, cfg.n_steps, cfg.batch_tokens
        job = Job(architecture, *sizes)
        theirs = with_best_lr(cfg, peer, job, cfg.target_l0, data)
        # A whole number: the k of the TopK family.
        reached = max(1.0, float(round(mean(one.l0 for one in theirs))))
        own = with_best_lr(cfg, "ours", job._replace(sparsity=reached), reached, data)
        for library, saes in ((peer, theirs), ("ours", own)):
            yield {"architecture": architecture, "library": library, "vs": peer}, saes


def measured_rows(
    cfg: Config, data: Data, groups: Sequence[tuple[dict[str, Any], list[Trained]]]
) -> list[dict[str, Any]]:
    """A row per SAE, measured on held-out documents in one pass."""
    named = {
        f"{number}/{one.job.seed}": one.dictionary
        for number, (_, saes) in enumerate(groups)
        for one in saes
    }
    centre = data.sample.mean(dim=0)
    measured = evaluate(data.evaluation, named, centre, cfg.n_tokens_ce)
    return [
        {"what": "sae", **identity, "seed": one.job.seed, "lr": one.job.lr}
        | {"sparsity": one.job.sparsity, "n_steps": cfg.n_steps, "ratio": cfg.ratio}
        | measured[f"{number}/{one.job.seed}"].row
        for number, (identity, saes) in enumerate(groups)
        for one in saes
    ]


def gaps(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ours minus theirs, per architecture and peer, with an interval over seeds."""
    pairs = dict.fromkeys((row["architecture"], row["vs"]) for row in rows)
    for architecture, peer in pairs:
        same = [row for row in rows if (row["architecture"], row["vs"]) == (architecture, peer)]
        by_seed = {
            library: {row["seed"]: row for row in same if row["library"] == library}
            for library in ("ours", peer)
        }
        differences = {
            key: [by_seed["ours"][s][key] - row[key] for s, row in by_seed[peer].items()]
            for key in ("fvu", "nats_lost", "l0")
        }
        yield {
            "what": "gap", "architecture": architecture, "vs": peer,
            "n_seeds": len(differences["fvu"]),
            **columns("gap", t_interval(differences["fvu"])),
            "nats_lost_gap": mean(differences["nats_lost"]), "l0_gap": mean(differences["l0"]),
            "fvu_theirs": mean(row["fvu"] for row in by_seed[peer].values()),
            "l0_theirs": mean(row["l0"] for row in by_seed[peer].values()),
        }  # fmt: skip


def print_gaps(rows: Sequence[dict[str, Any]]) -> None:
    """A line per architecture and peer."""
    print(f"\n{'architecture':<18}{'peer':<21}{'L0':>6}{'their FVU':>11}{'ours minus theirs':>30}")
    for row in rows:
        interval = f"{row['gap']:+.4f} [{row['gap_low']:+.4f}, {row['gap_high']:+.4f}]"
        print(
            f"{row['architecture']:<18}{row['vs']:<21}{row['l0_theirs']:>6.1f}"
            f"{row['fvu_theirs']:>11.4f}{interval:>30}"
        )


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    check(cfg)
    data = load(cfg)
    groups = list(compare(cfg, data))
    rows = measured_rows(cfg, data, groups)
    summary = list(gaps(rows))
    print_gaps(summary)
    content = {"config": as_json(cfg), "environment": environment("cpu")}
    content["environment"] |= {"peers": peer_versions()}
    print(f"\n{write_json(cfg.out, content | {'rows': rows + summary})}")


if __name__ == "__main__":
    main()

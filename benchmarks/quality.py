"""How well does each architecture learn, here and in other libraries, at equal steps and equal L0?

    python -m benchmarks.quality
    python -m benchmarks.quality --architectures topk jumprelu --ratio 4 --n-steps 1000

Some four hours of one core. All train on the same activations of the embedded model, in the same
order, from their libraries' own initialisations. Both sides choose their learning rate alike, at
the first L0 and by the first seed: uphill or downhill on one grid until both neighbours are worse,
on rows that nobody trains on and nothing else is measured on. Then every L0 is trained with every
seed. A peer whose sparsity is set by a coefficient searches it, in at most `n_searches` runs per
learning rate and L0.

A frontier (one architecture by one library) is a file in `parts`, with every row as soon as there
is one; a run that finds it, made with the same settings and peers, goes on from there, and several
may run beside each other on different architectures. Delete it after a change of the code.

Rows: "trial", a run of the first seed and how it did on the rows for choosing; "sae", a compared
run, `fvu` and `nats_lost` on held-out documents (intervals of a bootstrap over documents);
"point", the mean of its seeds (Student's intervals over them); "gap", ours minus theirs at
their L0 (`benchmarks.frontiers`), below 0 ours is better.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from benchmarks.fit import measure_fit
from benchmarks.frontiers import gaps, points, print_gaps
from benchmarks.learners import ARCHITECTURES, FIRST_COEFFICIENTS, LACKS, LEARNERS, Job
from benchmarks.peers import is_installed, peer_versions
from benchmarks.searches import Trials, climb, distance
from benchmarks.streams import Reading, reading
from sparse_coding.cache import CachedActivations
from sparse_coding.config import as_json, environment
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.evaluation import Evaluation, evaluate, take_tokens
from sparse_coding.harvest import Rows, harvest_to_cache
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
from sparse_coding.storage import read_object, write_json
from sparse_coding.text import TokenBatch

N_SAMPLE_TOKENS, N_CHOICE_TOKENS = 8192, 4096
CE_CONTEXTS = 8
"""Contexts per batch of held-out text, each from another part of it."""
L0_IS_NEAR, L0_IS_MET = 0.15, 0.06
"""In log L0, while a learning rate is chosen and afterwards."""
FVU_PER_DOUBLING = 0.045
"""By which the error falls as the L0 doubles, about (TopK, L0 15 to 60); compares unequal L0s."""
KEPT = {
    *(f"{key}{end}" for key in ("l0", "fvu", "nats_lost", "kl", "ce_recovered")
      for end in ("", "_low", "_high")),
    *("dead_fraction", "n_tokens_eval", "n_documents_eval", "n_tokens_ce"),
}  # fmt: skip
"""Columns of `evaluate` that are published."""


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
    target_l0: tuple[Positive, ...] = (30.0, 15.0, 60.0)
    """Active features per token; learning rates are chosen at the first."""
    n_steps: Annotated[int, Range(20)] = 300
    """Steps of each training."""
    batch_tokens: Count = 1024
    """Tokens per step."""
    lrs: tuple[Positive, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    """Learning rates, rising; the search begins in the middle."""
    n_searches: Count = 4
    """Most runs per learning rate and L0 in which a coefficient is searched."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of the runs that are compared."""
    n_tokens_eval: Count = 20_000
    """Held-out tokens."""
    n_tokens_ce: Count = 2000
    """Of them, how many for the cross-entropy."""
    cache: OutputFolder = Path("outputs/cache")
    """Folder of activation caches."""
    parts: OutputFolder = Path("outputs/quality")
    """Folder of finished frontiers."""
    out: OutputFile = Path("benchmarks/results/quality.json")
    """Results file, replaced at the end."""


class Data(NamedTuple):
    """What all train on and are measured on."""

    batches: list[Float[Tensor, "batch d_in"]]
    sample: Float[Tensor, "n d_in"]
    choice: Float[Tensor, "n d_in"]
    """Rows of the cache that nobody trains on; learning rates are chosen by them."""
    evaluation: Evaluation


class HeldOut(Evaluation):
    """Measures any number of times, but runs the blocks before the hook once."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._known: dict[int, Any] = {}

    def _rows(self, batch: TokenBatch) -> Any:
        key = id(batch)  # of `self.batches`, which live as long as this
        if key not in self._known:
            self._known[key] = super()._rows(batch)
        return self._known[key]


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
    if list(cfg.lrs) != sorted(set(cfg.lrs)):
        raise UserError(f"--lrs {' '.join(map(str, cfg.lrs))}: give them rising")


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
    heldout = spread(take_tokens(read.token_batches("heldout"), cfg.n_tokens_eval), CE_CONTEXTS)
    return HeldOut(read.lm, cfg.hook_name, heldout, rows.max_norms[cfg.hook_name])


def spread(batches: Sequence[TokenBatch], n_contexts: int) -> list[TokenBatch]:
    """The same contexts in batches of at most so many, each from all over the text.

    The first batches are then of many documents, and cross-entropies are taken on the first.
    """
    whole = TokenBatch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    n = -(-len(whole.tokens) // n_contexts)
    return [TokenBatch(*(part[i::n] for part in whole)) for i in range(n)]


class Trained(NamedTuple):
    """One finished SAE and how it does on `Data.choice`."""

    job: Job
    dictionary: Dictionary | None
    """None: trained by an earlier run of this program, and not kept."""
    l0: float
    fvu: float

    def error_at(self, target_l0: float) -> tuple[bool, float]:
        """What is least for the best: near the L0 first, then the error, corrected to that L0."""
        if not math.isfinite(self.fvu) or self.l0 == 0:
            return True, math.inf
        is_far = distance(self.l0, target_l0) > 2 * L0_IS_NEAR
        return is_far, self.fvu + FVU_PER_DOUBLING * math.log2(self.l0 / target_l0)


def train(library: str, data: Data, job: Job) -> Trained:
    """One training."""
    learner = LEARNERS[library](job, data.sample)
    for x in data.batches:
        learner.step(x)
    dictionary = learner.finish().requires_grad_(False)
    fit = measure_fit(dictionary, data.choice, 0.0)
    tqdm.write(
        f"{job.architecture} {library} seed {job.seed} lr {job.lr:g} sparsity {job.sparsity:.4g}: "
        f"L0 {fit['l0']:.1f}, FVU {fit['fvu']:.4f}"
    )
    return Trained(job, dictionary, fit["l0"], fit["fvu"])


class Part:
    """What is finished of one frontier: rows in a file, which is written whenever one is added."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.rows: list[dict[str, Any]] = []
        if path.exists() and (found := read_object(path, "settings"))["settings"] == settings:
            self.rows = found["rows"]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        self.rows += rows
        write_json(self.path, {"settings": self.settings, "rows": self.rows}, is_compact=True)

    def of(self, what: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["what"] == what]


def part_of(cfg: Config, architecture: str, library: str) -> Part:
    """That of the same settings and of the library as it is installed."""
    others = ("architectures", "peers", "cache", "parts", "out")
    settings = {key: value for key, value in as_json(cfg).items() if key not in others}
    settings["version"] = peer_versions().get(library)
    return Part(cfg.parts / f"{architecture}_{library}.json", settings)


def complete(cfg: Config, architecture: str, library: str, load_data: Callable[[], Data]) -> Part:
    """A frontier with all its rows; what is missing is trained and measured now."""
    part = part_of(cfg, architecture, library)
    done = {row["target_l0"] for row in part.of("sae")}
    missing = [target for target in cfg.target_l0 if target not in done]
    if not missing:
        return part
    of = {"architecture": architecture, "library": library, "n_steps": cfg.n_steps}
    of["ratio"] = cfg.ratio

    def run(job: Job) -> Trained:
        one = train(library, load_data(), job)
        fvu = one.fvu if math.isfinite(one.fvu) else None
        part.add([{"what": "trial"} | of | _settings(one) | {"l0": one.l0, "fvu": fvu}])
        return one

    first = Job(architecture, cfg.ratio, 0.0, 0.0, cfg.seeds[0], cfg.n_steps, cfg.batch_tokens)
    trials = Trials(run, first, FIRST_COEFFICIENTS.get((library, architecture)))
    trials.all = [_remembered(first, row) for row in part.of("trial")]
    lr = best_lr(cfg, trials)
    for target in missing:
        job = trials.towards(target, lr, cfg.n_searches, L0_IS_MET).job
        saes = [_trained(trials, library, load_data, job._replace(seed=s)) for s in cfg.seeds]
        rows = measured_rows(cfg, load_data(), saes)
        part.add({"what": "sae", "target_l0": target} | of | row for row in rows)
    return part


def _settings(one: Trained) -> dict[str, Any]:
    return {"seed": one.job.seed, "lr": one.job.lr, "sparsity": one.job.sparsity}


def _remembered(first: Job, row: dict[str, Any]) -> Trained:
    """A trial of which the row is left."""
    fvu = math.nan if row["fvu"] is None else row["fvu"]
    return Trained(first._replace(lr=row["lr"], sparsity=row["sparsity"]), None, row["l0"], fvu)


def _trained(trials: Trials, library: str, load_data: Callable[[], Data], job: Job) -> Trained:
    """A trial's SAE, unless another run of this program had it; else one made now."""
    at_hand = (one for one in trials.all if one.job == job and one.dictionary is not None)
    return next(at_hand, None) or train(library, load_data(), job)


def best_lr(cfg: Config, trials: Trials[Trained]) -> float:
    """The rate whose neighbours on the grid are worse at the first L0."""

    def error(place: int) -> tuple[bool, float]:
        one = trials.towards(cfg.target_l0[0], cfg.lrs[place], cfg.n_searches, L0_IS_NEAR)
        return one.error_at(cfg.target_l0[0])

    return cfg.lrs[climb(len(cfg.lrs), (len(cfg.lrs) - 1) // 2, error)]


def measured_rows(cfg: Config, data: Data, saes: Sequence[Trained]) -> list[dict[str, Any]]:
    """A row per SAE of another seed each, measured on held-out documents in one pass."""
    named = {str(one.job.seed): one.dictionary for one in saes}
    measured = evaluate(data.evaluation, named, data.sample.mean(dim=0), cfg.n_tokens_ce)
    return [
        _settings(one) | {k: v for k, v in measured[str(one.job.seed)].row.items() if k in KEPT}
        for one in saes
    ]


def frontiers(cfg: Config) -> list[tuple[str, str]]:
    """Architectures and libraries; ours only where there is a peer to compare it with."""
    installed = [peer for peer in cfg.peers if is_installed(peer)]
    able = {
        name: [peer for peer in installed if name not in LACKS[peer]] for name in cfg.architectures
    }
    return [
        (name, library) for name, peers in able.items() if peers for library in (*peers, "ours")
    ]


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    check(cfg)
    load_data = functools.cache(partial(load, cfg))
    rows = []
    for architecture, library in tqdm(frontiers(cfg), desc="architecture x library"):
        rows += complete(cfg, architecture, library, load_data).rows
    saes = [row for row in rows if row["what"] == "sae"]
    summary = list(gaps(saes))
    print_gaps(summary)
    rows += [*points(saes), *summary]
    content = {"config": as_json(cfg), "environment": environment("cpu")}
    content["environment"] |= {"peers": peer_versions()}
    print(f"\n{write_json(cfg.out, content | {'rows': rows})}")


if __name__ == "__main__":
    main()

"""How many tokens per second does a training step process, here and in other libraries?

    python -m benchmarks.train_step
    python -m benchmarks.train_step --architecture topk --d-in 768 --batch-tokens 2048 8192
    python -m benchmarks.train_step --activations outputs/cache/FINGERPRINT
    python -m benchmarks.train_step --from-initialisation --ratios 8

About half an hour on two cores with every peer (benchmarks/requirements-peers.txt says how to
install them; what is missing is left out). All methods have equal parameters and step on the same
batch in turn, in one process, so that whatever else the machine does falls on all of them; medians
over rounds are reported. The encoder's biases are lowered until the asked number of features is
active; the learning rate is zero, so the whole update is computed and that number stays.

With --from-initialisation each method trains from its own library's initialisation on the same
batches instead, and the rows hold the time (but for the first step, in which some are compiled),
the loss and the sparsity reached.

Columns that are not obvious:
- `exact`: active sets and gradients are float32's, up to the rounding of sums.
- `gemm_peak_fraction`: the 10 x batch x d_in x d_sae operations of a dense step's five matrix
  products, per second, relative to the fastest such product measured in the same run in the dtype
  of the method's encoder. A sparse step needs fewer operations, so this can exceed 1.
- `encode_limit_fraction`: time of x @ W_enc alone in that dtype, relative to the step's. A step
  that computes every pre-activation once cannot exceed 1 by much.
- `peak_mb`: how far the resident memory of a new process rises above what it was before the
  parameters, the optimizer's state and the batch existed (its libraries loaded and every kernel
  run once on a small SAE), at the highest point of three steps. Linux; null elsewhere, and for
  compiled methods, where the compiler's own memory would count.
"""

import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from benchmarks.batches import Case, batches, cached_width, sparse_sae, still_task
from benchmarks.fit import measure_fit
from benchmarks.limits import Limits, memory_available
from benchmarks.methods import Task
from benchmarks.peak_memory import measure_peak_mb
from benchmarks.peers import MethodInfo, choose_methods, peer_versions
from sparse_coding.config import as_json, environment
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.settings import (
    Count,
    OutputFile,
    Positive,
    PositiveOrZero,
    Range,
    Ratio,
    read_settings,
)
from sparse_coding.storage import write_json

N_HELDOUT_BATCHES = 4
SAMPLE_TOKENS = 8192


@dataclass(frozen=True)
class Config:
    """What is timed."""

    architecture: Literal["l1", "topk"] = "l1"
    """Class of SAE; each library's nearest to it."""
    ratios: tuple[Ratio, ...] = (1, 2, 4, 8, 16, 32)
    """Dictionary sizes, as multiples of d_in."""
    d_in: tuple[Count, ...] = ()
    """Widths of the activations; 512 if none is given, or the width of the cache."""
    batch_tokens: tuple[Count, ...] = (2048,)
    """Tokens per step."""
    l0: Positive = 50.0
    """Active features per token; topk's k."""
    methods: tuple[str, ...] = ()
    """Which methods; all if none is given."""
    activations: str = ""
    """random (Gaussian), planted (sparse sums of directions), or the folder of an activation
    cache. If none is given: random, and planted with --from-initialisation."""
    n_rounds: Count = 7
    """Timed steps of each method; one more before them is not counted."""
    memory: bool = True
    """Measure peak memory, in a process of its own per row."""
    from_initialisation: bool = False
    """Train from each library's own initialisation instead."""
    n_steps: Annotated[int, Range(20)] = 300
    """Steps of such a training."""
    lr: Positive = 1e-3
    """Its learning rate."""
    l1_coeff: PositiveOrZero = 3.0
    """Its coefficient of the L1 penalty, beside a squared error summed over d_in."""
    out: OutputFile | None = None
    """Results file, replaced at the end. If none is given: train_step.json, or
    train_from_initialisation.json, in benchmarks/results."""


def check(cfg: Config) -> None:
    """`UserError` for what cannot be measured."""
    if not cfg.ratios or not cfg.batch_tokens:
        raise UserError("--ratios and --batch-tokens need at least one value each")


def cases(cfg: Config) -> list[Case]:
    """Every size, in the order of its arguments."""
    activations = cfg.activations or ("planted" if cfg.from_initialisation else "random")
    n_batches = cfg.n_steps + N_HELDOUT_BATCHES if cfg.from_initialisation else 1
    width = cached_width(activations, n_batches * max(cfg.batch_tokens))
    if width is not None and cfg.d_in not in ((), (width,)):
        raise UserError(f"--d-in {cfg.d_in[0]}: the cache holds activations of width {width}")
    return [
        Case(cfg.architecture, activations, d_in, ratio, batch_tokens, cfg.l0)
        for d_in in cfg.d_in or (width or 512,)
        for batch_tokens in cfg.batch_tokens
        for ratio in cfg.ratios
    ]


def check_memory(every: list[Case], n_methods: int) -> None:
    """`UserError` if the SAEs of the largest case would not fit beside each other."""
    available = memory_available()
    for case in every:
        n_parameters = 2 * case.ratio * case.d_in**2
        n_pre_activations = case.ratio * case.d_in * case.batch_tokens
        # parameters, gradients and two moments each; a dense step's arrays for one at a time
        needed = 16 * n_parameters * n_methods + 32 * n_pre_activations
        if available is not None and needed > available:
            raise UserError(
                f"{n_methods} methods at d_in {case.d_in}, ratio {case.ratio} and "
                f"{case.batch_tokens} tokens need about {needed / 1e9:.0f} GB of the "
                f"{available / 1e9:.0f} GB free: give fewer --methods or smaller sizes"
            )


def time_steps(cfg: Config, case: Case, infos: dict[str, MethodInfo]) -> list[dict[str, Any]]:
    """One row per method, in turns on the same batch, and the machine's limits between them."""
    task, x = still_task(case)
    start = sparse_sae(task, x, case.l0)
    made = {name: info.make(task) for name, info in infos.items()}
    for method in made.values():
        method.load(start)
    limits = Limits(case.batch_tokens, case.d_in, task.d_sae)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in tqdm(range(cfg.n_rounds + 1), desc=_title(case), leave=False):
        for name, method in made.items():
            seconds[name].append(method.timed_step(x))
        limits.round()
    rows = []
    for name, method in made.items():
        step_seconds = median(seconds[name][1:])
        dense_operations = 5 * limits.n_operations / step_seconds
        rows.append(
            _identity(name, infos[name], case)
            | {
                "l0": method.l0(x),
                "dtype": str(method.dtype).removeprefix("torch."),
                "ms_per_step": 1e3 * step_seconds,
                "ms_per_step_min": 1e3 * min(seconds[name][1:]),
                "tokens_per_s": case.batch_tokens / step_seconds,
                "gemm_peak_fraction": dense_operations / limits.gemm_peak(method.dtype),
                "encode_limit_fraction": limits.encode_seconds(method.dtype) / step_seconds,
                "n_rounds": cfg.n_rounds,
            }
        )
    return rows


def train(cfg: Config, case: Case, infos: dict[str, MethodInfo]) -> list[dict[str, Any]]:
    """One row per method; all train on the same batches, step by step in turns."""
    stream = batches(case)
    heldout = torch.cat([next(stream) for _ in range(N_HELDOUT_BATCHES)])
    first = [next(stream) for _ in range(-(-SAMPLE_TOKENS // case.batch_tokens))]
    l1_coeff = 0.0 if case.architecture == "topk" else cfg.l1_coeff
    size = (case.architecture, case.d_in, case.ratio * case.d_in, case.batch_tokens)
    task = Task(*size, torch.cat(first), cfg.n_steps, cfg.lr, l1_coeff, round(case.l0))
    made = {name: info.make(task) for name, info in infos.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for x in tqdm(
        itertools.islice(itertools.chain(first, stream), cfg.n_steps),
        desc=_title(case),
        total=cfg.n_steps,
        leave=False,
    ):
        for name, method in made.items():
            seconds[name].append(method.timed_step(x))
    n_tokens = (cfg.n_steps - 1) * case.batch_tokens
    return [
        _identity(name, infos[name], case)
        | {"n_steps": cfg.n_steps, "lr": cfg.lr, "l1_coeff": l1_coeff, "s": sum(seconds[name][1:])}
        | {"tokens_per_s": n_tokens / sum(seconds[name][1:])}
        | measure_fit(method.to_sae(), heldout, l1_coeff)
        for name, method in made.items()
    ]


def add_comparisons(rows: list[dict[str, Any]], infos: dict[str, MethodInfo]) -> None:
    """How many times faster each method of one case is than others; None if those are missing."""
    speeds = {row["method"]: row["tokens_per_s"] for row in rows}
    peers = [name for name in speeds if infos[name].package]
    exact = [name for name in peers if infos[name].exact]
    baselines = {
        "vs_fastest_fp32_peer": max(exact, key=speeds.get, default=None),
        "vs_fastest_peer": max(peers, key=speeds.get, default=None),
        "vs_plain_fused_bf16": "plain-bfloat16" if "plain-bfloat16" in speeds else None,
    }
    for row in rows:
        for column, name in baselines.items():
            row[column] = name and row["tokens_per_s"] / speeds[name]
        row["fastest_peer"] = baselines["vs_fastest_peer"]


def _title(case: Case) -> str:
    return (
        f"{case.architecture}, d_in {case.d_in}, ratio {case.ratio}, batch {case.batch_tokens}, "
        f"{case.activations} activations"
    )


def _identity(name: str, info: MethodInfo, case: Case) -> dict[str, Any]:
    return {
        "method": name,
        "exact": info.exact,
        "architecture": case.architecture,
        "ratio": case.ratio,
        "d_in": case.d_in,
        "d_sae": case.ratio * case.d_in,
        "batch_tokens": case.batch_tokens,
        "activations": case.activations,
    }


COLUMNS = {
    "ms_per_step": ("ms", "9.1f"),
    "s": ("s", "8.1f"),
    "tokens_per_s": ("tokens/s", "12,.0f"),
    "vs_fastest_peer": ("x peer", "8.2f"),
    "vs_fastest_fp32_peer": ("x fp32 peer", "12.2f"),
    "vs_plain_fused_bf16": ("x plain bf16", "13.2f"),
    "gemm_peak_fraction": ("GEMM peak", "10.0%"),
    "encode_limit_fraction": ("encode limit", "13.0%"),
    "peak_mb": ("peak MB", "9,.0f"),
    "l0": ("L0", "8.2f"),
    "fvu": ("fvu", "8.4f"),
    "loss": ("loss", "9.3f"),
}
"""Columns of the printed table: heading and format."""


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """One case, a line per method."""
    shown = {key: column for key, column in COLUMNS.items() if key in rows[0]}
    widths = {key: int(form.split(",")[0].split(".")[0]) for key, (_, form) in shown.items()}
    print(f"\n{title}")
    headings = "".join(f"{heading:>{widths[key]}}" for key, (heading, _) in shown.items())
    print(f"{'method':<28}{headings}")
    for row in rows:
        cells = [
            "-".rjust(widths[key]) if row[key] is None else format(row[key], form)
            for key, (_, form) in shown.items()
        ]
        print(f"{row['method']:<28}{''.join(cells)}")


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    check(cfg)
    every = cases(cfg)
    infos = choose_methods(cfg.methods, cfg.architecture)
    check_memory(every, len(infos))
    print(f"{len(every)} sizes x {len(infos)} methods, {torch.get_num_threads()} threads")
    results: list[dict[str, Any]] = []
    for case in every:
        rows = (train if cfg.from_initialisation else time_steps)(cfg, case, infos)
        add_comparisons(rows, infos)
        if cfg.memory and not cfg.from_initialisation:
            for row in rows:
                is_compiled = row["method"].endswith("compiled")
                row["peak_mb"] = None if is_compiled else measure_peak_mb(row["method"], case)
        print_table(_title(case), rows)
        results += rows
    threads = {
        "n_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "peers": peer_versions(),
    }
    content = {"config": as_json(cfg), "environment": environment("cpu") | threads}
    name = "train_from_initialisation.json" if cfg.from_initialisation else "train_step.json"
    out = cfg.out or Path("benchmarks/results") / name
    print(f"\n{write_json(out, content | {'rows': results})}")


if __name__ == "__main__":
    main()

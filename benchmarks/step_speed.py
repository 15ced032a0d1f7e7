"""How long does one training step take, fast and by autograd, at a trained SAE's sparsity?

    OMP_WAIT_POLICY=PASSIVE python -m benchmarks.step_speed --d-in 576 --l0 50

About a minute on two cores. Every method steps on the same batch in turn, in one process, so
that whatever else the machine does falls on all of them; the medians over rounds are reported.
The learning rate is zero: the whole update is computed, and the sparsity stays where it was put.
Writes benchmarks/results/step_speed.json: per ratio and method `ms_per_step`, `tokens_per_s` and
`vs_reference`, how many times faster than autograd with fused Adam in float32.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from sparse_coding.config import as_json, environment
from sparse_coding.errors import report_user_errors_in_one_line
from sparse_coding.kernels import Step, make_adam, make_step
from sparse_coding.kernels.cpu import CPUStep
from sparse_coding.sae import ARCHITECTURES
from sparse_coding.storage import write_json


@dataclass(frozen=True)
class Config:
    """What is timed."""

    d_in: int = 512
    """Width of the activations, which are random."""
    ratios: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Dictionary sizes, as multiples of d_in."""
    l0: float = 50.0
    """Active features per token, reached by lowering the encoder's biases."""
    batch_tokens: int = 2048
    """Tokens per step."""
    architecture: Literal["tied_l1", "l1", "norm_weighted_l1"] = "l1"
    """Class of SAE."""
    n_rounds: int = 7
    """Timed steps of each method; one more before them is not counted."""
    out: Path = Path("benchmarks/results/step_speed.json")
    """Results file; replaced."""


def steps(cfg: Config, ratio: int, x: torch.Tensor) -> dict[str, Step]:
    """Each method with an SAE of its own, all equal."""
    made: dict[str, Step] = {}
    for method in ("reference", "fast, float32 product", "fast"):
        sae = ARCHITECTURES[cfg.architecture](
            cfg.d_in, ratio * cfg.d_in, torch.Generator().manual_seed(ratio)
        )
        sae.initialise_sparsity(x, cfg.l0)
        adam = make_adam(sae, lr=0.0)
        if method == "fast, float32 product":
            made[method] = CPUStep(sae, adam, screen_dtype=torch.float32)
        else:
            made[method] = make_step(sae, adam, "auto" if method == "fast" else method)
    return made


def measure(cfg: Config, ratio: int) -> list[dict[str, Any]]:
    """One row per method, in turns on the same batch."""
    x = torch.randn(cfg.batch_tokens, cfg.d_in, generator=torch.Generator().manual_seed(0))
    made = steps(cfg, ratio, x)
    seconds: dict[str, list[float]] = {method: [] for method in made}
    l0: dict[str, float] = {}
    for _ in tqdm(range(cfg.n_rounds + 1), desc=f"ratio {ratio}", leave=False):
        for method, step in made.items():
            start = time.perf_counter()
            statistics = step(x, torch.tensor(0.3))
            seconds[method].append(time.perf_counter() - start)
            l0[method] = statistics.n_active.sum().item() / len(x)
    medians = {method: median(times[1:]) for method, times in seconds.items()}
    return [
        {
            "method": method,
            "ratio": ratio,
            "d_in": cfg.d_in,
            "d_sae": ratio * cfg.d_in,
            "batch_tokens": cfg.batch_tokens,
            "l0": l0[method],
            "ms_per_step": 1e3 * medians[method],
            "ms_per_step_min": 1e3 * min(seconds[method][1:]),
            "tokens_per_s": cfg.batch_tokens / medians[method],
            "vs_reference": medians["reference"] / medians[method],
        }
        for method in made
    ]


def main() -> None:
    report_user_errors_in_one_line()
    cfg = tyro.cli(Config, description=__doc__)
    print(f"{torch.get_num_threads()} threads, {cfg.architecture}, d_in {cfg.d_in}, L0 {cfg.l0:g}")
    rows = []
    for ratio in cfg.ratios:
        for row in measure(cfg, ratio):
            rows.append(row)
            print(
                f"ratio {ratio:2d}  {row['method']:22s} {row['ms_per_step']:9.1f} ms/step "
                f"{row['tokens_per_s']:11,.0f} tokens/s {row['vs_reference']:6.1f} x reference"
            )
    threads = {
        "n_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    content = {"config": as_json(cfg), "environment": environment("cpu") | threads, "rows": rows}
    print(write_json(cfg.out, content))


if __name__ == "__main__":
    main()

"""How long do the comparisons of dictionaries take at 16,384 features, and in how much memory?

    python -m benchmarks.analysis

About five minutes on two cores. Rows of `what`:

- correlation: every feature of A against every feature of B. `ours` streams sparse codes of
  `n_tokens` tokens through `Correlation`; `dense` does what a dense implementation must, the
  product of two (tokens, d_sae) float32 blocks per batch, on as many tokens as
  `--n-tokens-dense`; their matrices are compared on those tokens. Codes have `--l0` active
  features of Zipf-like frequency.
- one_to_one: the Hungarian matching of two dictionaries, of which one is the other in another
  order with noise (`planted`), or another random one (`random`, the slowest case).
- max_cosine: mean max cosine similarity of the same dictionaries.

`peak_mb` is the process's largest resident memory so far, what rows before it took included.
Evaluation against SAEBench's: benchmarks/saebench.py.
"""

import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sparse_coding.config import as_json, environment
from sparse_coding.consistency import Codes, Correlation, matched_cosine, max_cosine
from sparse_coding.errors import report_user_errors_in_one_line
from sparse_coding.settings import Count, OutputFile, read_settings
from sparse_coding.storage import write_json

Row = dict[str, Any]
BATCH = 10_000


@dataclass(frozen=True)
class Config:
    """Sizes of the work."""

    d_sae: Count = 16_384
    """Features of either dictionary; a multiple of l0."""
    d_in: Count = 768
    """Width of the layer."""
    l0: Count = 32
    """Active features per token."""
    n_tokens: Count = 1_000_000
    """Tokens of the streamed correlation."""
    n_tokens_dense: Count = 20_000
    """Tokens of the dense one."""
    output: OutputFile = Path("benchmarks/results/analysis.json")
    """Results file."""


def random_codes(cfg: Config, n_tokens: int, seed: int) -> Codes:
    """One active feature in each of `l0` equal ranges of features, the first ones most often."""
    random = np.random.default_rng(seed)
    width = cfg.d_sae // cfg.l0
    within = (width * random.random((n_tokens, cfg.l0), np.float32) ** 3).astype(np.int32)
    features = within + width * np.arange(cfg.l0, dtype=np.int32)
    values = random.exponential(size=n_tokens * cfg.l0).astype(np.float32)
    return Codes(np.arange(n_tokens + 1) * cfg.l0, features.ravel(), values)


def dense(codes: Codes, tokens: slice, d_sae: int) -> torch.Tensor:
    """(tokens, d_sae) activations."""
    part = codes.take(np.arange(codes.n_tokens)[tokens])
    f = torch.zeros(part.n_tokens, d_sae)
    rows = np.repeat(np.arange(part.n_tokens), np.diff(part.starts))
    f[rows, part.features] = torch.from_numpy(part.values)
    return f


def stream(cfg: Config, a: Codes, b: Codes) -> tuple[Correlation, float]:
    """All tokens, in batches as they would come from a language model; seconds."""
    correlation, clock = Correlation(cfg.d_sae, cfg.d_sae), time.perf_counter()
    for start in tqdm(range(0, a.n_tokens, BATCH), desc="streamed correlation", unit="batch"):
        tokens = np.arange(start, min(start + BATCH, a.n_tokens))
        correlation.add(a.take(tokens), b.take(tokens))
    correlation.best()
    return correlation, time.perf_counter() - clock


def dense_correlation(cfg: Config, a: Codes, b: Codes) -> tuple[torch.Tensor, float]:
    """The same by dense products in float32; seconds of the products and the division alone."""
    products = torch.zeros(cfg.d_sae, cfg.d_sae)
    sums, seconds = [torch.zeros(2, cfg.d_sae), torch.zeros(2, cfg.d_sae)], 0.0
    for start in tqdm(range(0, a.n_tokens, 2000), desc="dense correlation", unit="batch"):
        pair = [dense(codes, slice(start, start + 2000), cfg.d_sae) for codes in (a, b)]
        clock = time.perf_counter()
        products.addmm_(pair[0].T, pair[1])
        for total, f in zip(sums, pair, strict=True):
            total += torch.stack([f.sum(0), f.square().sum(0)])
        seconds += time.perf_counter() - clock
    clock = time.perf_counter()
    n = a.n_tokens
    (a_sum, a_square), (b_sum, b_square) = sums
    products.addr_(a_sum, b_sum, alpha=-1 / n)
    products /= (a_square - a_sum**2 / n).sqrt()[:, None]
    products /= (b_square - b_sum**2 / n).sqrt()[None, :]
    products.nan_to_num_(-2.0).max(dim=1)
    return products, seconds + time.perf_counter() - clock


def correlations(cfg: Config) -> list[Row]:
    """Ours on few tokens and on many, the dense one on few."""
    few = [random_codes(cfg, cfg.n_tokens_dense, seed) for seed in (0, 1)]
    stream(cfg, *(codes.take(np.arange(100)) for codes in few))  # compiles
    found, seconds = stream(cfg, *few)
    rows = [_row("correlation", "ours", seconds, n_tokens=cfg.n_tokens_dense)]
    part = slice(0, 512)
    streamed = found.matrix(part)
    del found
    many = [random_codes(cfg, cfg.n_tokens, seed) for seed in (0, 1)]
    _, seconds = stream(cfg, *many)
    rows.append(_row("correlation", "ours", seconds, n_tokens=cfg.n_tokens))
    del many
    reference, seconds = dense_correlation(cfg, *few)
    rows.append(_row("correlation", "dense", seconds, n_tokens=cfg.n_tokens_dense))
    error = np.nanmax(np.abs(streamed - reference[part].numpy()))
    rows[-1]["largest_difference"] = float(error)
    return rows


def matchings(cfg: Config) -> list[Row]:
    """Cosines and one-to-one matching of a planted and of a random pair."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(cfg.d_sae, cfg.d_in, generator=generator)
    noise = torch.rand(cfg.d_sae, 1, generator=generator) * torch.randn(
        a.shape, generator=generator
    )
    planted = (a + noise)[torch.randperm(cfg.d_sae, generator=generator)]
    rows = []
    for name, b in (("planted", planted), ("random", torch.randn(a.shape, generator=generator))):
        for what, function in (("max_cosine", max_cosine), ("one_to_one", matched_cosine)):
            clock = time.perf_counter()
            function(a, b)
            rows.append(_row(what, name, time.perf_counter() - clock))
            print(rows[-1], flush=True)
    return rows


def _row(what: str, method: str, seconds: float, **more: Any) -> Row:
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    row = {"what": what, "method": method, "seconds": seconds, "peak_mb": peak_mb, **more}
    if "n_tokens" in more:
        row["tokens_per_s"] = more["n_tokens"] / seconds
    return row


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    rows = correlations(cfg) + matchings(cfg)
    content = {"config": as_json(cfg), "environment": environment("cpu"), "rows": rows}
    write_json(cfg.output, content)
    for row in rows:
        print(row)
    print(f"written: {cfg.output}")


if __name__ == "__main__":
    main()

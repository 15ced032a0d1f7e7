"""What this machine can do at most: matrix products at a step's shapes, and memory."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

DTYPES = (torch.float32, torch.bfloat16)


class Limits:
    """Matrix products of one problem size, timed in turns with the methods.

    `round()` times each once; the properties summarise all rounds but the first.
    """

    def __init__(self, batch_tokens: int, d_in: int, d_sae: int) -> None:
        self.n_operations = 2 * batch_tokens * d_in * d_sae
        self._products = {
            (shape, dtype): product
            for dtype in DTYPES
            for shape, product in _products(batch_tokens, d_in, d_sae, dtype).items()
        }
        self._seconds: dict[tuple[str, torch.dtype], list[float]] = {
            key: [] for key in self._products
        }

    def round(self) -> None:
        """Time every product once."""
        for key, product in self._products.items():
            start = time.perf_counter()
            product()
            self._seconds[key].append(time.perf_counter() - start)

    def encode_seconds(self, dtype: torch.dtype) -> float:
        """Median time of x @ W_enc."""
        return median(self._seconds["encode", dtype][1:])

    def gemm_peak(self, dtype: torch.dtype) -> float:
        """Operations per second of the fastest product: best shape, best round."""
        fastest = min(min(times[1:]) for (_, d), times in self._seconds.items() if d == dtype)
        return self.n_operations / fastest


def _products(
    batch_tokens: int, d_in: int, d_sae: int, dtype: torch.dtype
) -> dict[str, Callable[[], torch.Tensor]]:
    """A dense step's three shapes of result: (batch, d_sae), (batch, d_in), (d_sae, d_in)."""
    x = torch.randn(batch_tokens, d_in).to(dtype)
    weights = torch.randn(d_sae, d_in).to(dtype)
    f = torch.randn(batch_tokens, d_sae).to(dtype)
    pre, x_hat, gradient = torch.empty_like(f), torch.empty_like(x), torch.empty_like(weights)
    return {
        "encode": lambda: torch.mm(x, weights.T, out=pre),
        "decode": lambda: torch.mm(f, weights, out=x_hat),
        "gradient": lambda: torch.mm(f.T, x, out=gradient),
    }


def memory_available() -> int | None:
    """Bytes that can be used without swapping; None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])

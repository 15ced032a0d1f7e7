"""A cheap encoder product that finds every entry that may be active, and few others.

The product is taken in bfloat16 where the processor has instructions for it. With x' and w' the
rounded vectors, Cauchy-Schwarz bounds its error by

    |x.w - x'.w'|  <=  |x - x'| |w|  +  |x'| |w - w'|

with the rounding errors as they are in this batch, not as they might be. Sums of d_in terms in
the accumulator's precision add at most d_in eps |x| |w|, once here and once in the exact dot
product that decides later; rounding the product itself moves what lies at the threshold -b_enc
by at most 2^-8 of it. So an active entry always has

    product[token, feature]  >=  lowest[feature] - margin[token] * norm[feature].

"Active" stands for "above the feature's floor": 0 for a ReLU, half a bandwidth below the threshold
for a JumpReLU. Where only a token's k largest matter, its level takes the floor's place.
"""

from collections.abc import Iterator
from typing import NamedTuple

import llvmlite.binding as llvm
import numpy as np
import torch
from numba import prange
from torch import Tensor

from sparse_coding.kernels import cpu_loops as loops
from sparse_coding.kernels.cpu_tokens import Screen

CHUNK_BYTES = 8 * 2**20
"""Size of the product's buffer: it stays in the last-level cache until it has been screened."""


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    features = llvm.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16"))


@loops.compiled
def _round_row(i, rows, bits, rounded_bits, norm, error):
    squares, errors = np.float32(0), np.float32(0)
    for j in range(rows.shape[1]):
        tie_to_even = (bits[i, j] >> np.uint32(16)) & np.uint32(1)
        kept = np.uint32(bits[i, j] + np.uint32(0x7FFF) + tie_to_even) >> np.uint32(16)
        rounded_bits[i, j] = kept
        rounded = np.uint32(kept << np.uint32(16)).view(np.float32)
        squares += rounded * rounded
        errors += (rows[i, j] - rounded) * (rows[i, j] - rounded)
    norm[i], error[i] = np.sqrt(squares), np.sqrt(errors)


@loops.compiled_parallel
def round_rows(rows, bits, rounded_bits, norm, error):
    """Round float32 rows (bits: their own, uint32) to bfloat16 (bits, uint16), ties to even.

    Writes the norm of each result and of its difference from the row.
    """
    for i in prange(len(rows)):
        _round_row(i, rows, bits, rounded_bits, norm, error)


class Memory:
    """Named buffers that grow and are reused from step to step."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """An array that begins with what was last written under this name and dtype."""
        size, key = int(np.prod(shape)), f"{name}.{np.dtype(dtype)}"
        buffer = self._buffers.get(key, np.empty(0, dtype))
        if buffer.size < size:
            grown = self._buffers[key] = np.empty(size * 5 // 4, dtype)
            grown[: buffer.size] = buffer
            buffer = grown
        return buffer[:size].reshape(shape)

    def take_entries(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> loops.Entries:
        return loops.Entries(
            self.take(f"{name}.index", shape, np.int32),
            self.take(f"{name}.f", shape, dtype),
            self.take(f"{name}.gradient", shape, dtype),
        )


class _Rounded(NamedTuple):
    """Rows in the product's dtype, their norms, and the norms of what rounding took."""

    rows: Tensor
    norm: np.ndarray
    error: np.ndarray


def _rounded(name: str, rows: np.ndarray, dtype: torch.dtype, memory: Memory) -> _Rounded:
    norm, error = np.empty(len(rows), rows.dtype), np.zeros(len(rows), rows.dtype)
    if dtype == torch.bfloat16:
        bits = memory.take(name, rows.shape, np.uint16)
        round_rows(rows, rows.view(np.uint32), bits, norm, error)
        return _Rounded(torch.from_numpy(bits).view(torch.bfloat16), norm, error)
    unrounded = torch.from_numpy(rows)
    torch.linalg.vector_norm(unrounded, dim=1, out=torch.from_numpy(norm))
    return _Rounded(unrounded, norm, error)


class Encoder:
    """The products of one batch with all features, chunk by chunk, and their bounds.

    floor (d_sae): pre-activations up to it do not matter; k: nor does what is not among a token's
    k largest (0: all do).
    """

    def __init__(
        self,
        batch: loops.Batch,
        model: loops.Model,
        floor: np.ndarray,
        k: int,
        dtype: torch.dtype,
        memory: Memory,
    ) -> None:
        self._memory = memory
        self._x = _rounded("x", batch.centred, dtype, memory)
        self._W = _rounded("W_enc", model.W_enc, dtype, memory)
        self.screen = _bounds(self._x, self._W, floor, model.b_enc, k)

    def products(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Tokens and their products (chunk, d_sae), bfloat16 as bits; the buffer is reused."""
        x, W_enc = self._x.rows, self._W.rows
        d_sae = len(W_enc)
        for chunk in chunks(len(x), CHUNK_BYTES // (d_sae * x.dtype.itemsize)):
            if x.dtype == torch.bfloat16:
                shape = chunk.stop - chunk.start, d_sae
                product = self._memory.take("product", shape, np.uint16)
                torch.mm(x[chunk], W_enc.T, out=torch.from_numpy(product).view(x.dtype))
            else:
                product = times_transposed(x[chunk], W_enc).numpy()
            yield chunk, product


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T in the dtype of both; float32 through oneDNN, which is up to twice MKL's speed.

    torch.mm asks MKL, whose float32 product leaves AVX-512 unused on AMD processors; the operator
    that Inductor calls goes to oneDNN whatever the processor.
    """
    if a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.T


def chunks(n_tokens: int, chunk_tokens: int) -> Iterator[slice]:
    """Consecutive slices of at least 64 tokens each, but for the last."""
    size = max(64, chunk_tokens)
    for start in range(0, n_tokens, size):
        yield slice(start, min(start + size, n_tokens))


def _bounds(x: _Rounded, W: _Rounded, floor: np.ndarray, b_enc: np.ndarray, k: int) -> Screen:
    d_in, scalar = W.rows.shape[1], W.norm.dtype.type
    precision = np.finfo(W.norm.dtype).eps
    norm = W.norm + W.error
    W_error = np.max(W.error / np.maximum(norm, np.finfo(norm.dtype).tiny))
    sums = 2 * (d_in + 8) * precision
    # The last factor is for the rounding of the norms themselves.
    margin = (x.error + scalar(W_error + sums) * (x.norm + x.error)) * scalar(1.01)
    rounding = scalar(1.02 * 2**-8 if x.rows.dtype == torch.bfloat16 else 4 * precision)
    needed = floor - b_enc
    lowest = needed - rounding * np.abs(needed)
    return Screen(floor, lowest, norm, margin, rounding, k)

"""Which entries (token, feature) of a batch may be active, from a product in bfloat16.

With x' and w' the rounded vectors, Cauchy-Schwarz bounds what the product may be wrong by,

    |x.w - x'.w'|  <=  |x - x'| |w|  +  |x'| |w - w'|,

with the rounding errors as they are in this batch, not as they might be. The sums of d_in terms,
once on the tensor cores (which truncate) and once in the exact dot product that decides later,
add at most 2 d_in eps |x| |w|. So an entry above its feature's floor (0 for a ReLU, half a
bandwidth below the threshold for JumpReLU) always has

    product[token, feature]  >=  lowest[feature] - margin[token] * norm[feature].

Where only a token's k largest matter, the same bounds give a floor of its own to each token
(`Screen.raise_floors`).
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

TILE_TOKENS, TILE_FEATURES, TILE_DEPTH = 128, 128, 64
"""Of the product; compiled for compute capability 8.0 and 9.0, it spills no registers."""

LIST_WORDS = 1024
"""Words of 32 bits that are listed at a time: up to a d_sae of 32,768 at once."""


class Listed(NamedTuple):
    """Places in ascending order, in the first `n` columns of each row."""

    places: Tensor
    n: Tensor


class Entries(NamedTuple):
    """The entries that may be active: each token's features, and each feature's tokens."""

    by_token: Listed
    by_feature: Listed


class _Rounded(NamedTuple):
    """Rows in bfloat16, their norms, and the norms of what rounding took."""

    rows: Tensor
    norm: Tensor
    error: Tensor


class Screen:
    """Rounds a batch (batch, d_in) and W_enc (d_sae, d_in) once; then lists entries.

    `kernels` is the module `gpu_triton`, which is imported only where Triton is installed.
    """

    def __init__(
        self, kernels: ModuleType, centred: Tensor, W_enc: Tensor, b_enc: Tensor, floor: Tensor
    ) -> None:
        self._kernels = kernels
        x, W = self._rounded(centred, TILE_TOKENS), self._rounded(W_enc, TILE_FEATURES)
        precision = torch.finfo(torch.float32).eps
        norm = W.norm + W.error
        W_error = (W.error / norm.clamp(min=torch.finfo(norm.dtype).tiny)).max()
        sums = 2 * (centred.shape[1] + 8) * precision
        # The last factor is for the rounding of the norms themselves.
        margin = (x.error + (W_error + sums) * (x.norm + x.error)) * 1.01
        self._slack = 4 * precision
        lowest = floor - b_enc - self._slack * (floor.abs() + b_enc.abs())
        self._x, self._W, self._b_enc = x.rows, W.rows, b_enc.float()
        self._margin, self._norm, self._lowest = margin.float(), norm.float(), lowest.float()
        self._floor = torch.full_like(self._margin, -torch.inf)

    def _rounded(self, rows: Tensor, tile: int) -> _Rounded:
        """Padded with zeros to whole tiles, so that the product needs no masks."""
        n, width = rows.shape
        padded_width = round_up(width, TILE_DEPTH)
        shape = round_up(n, tile), padded_width
        rounded = torch.empty(shape, dtype=torch.bfloat16, device=rows.device)
        rounded[n:].zero_()
        norm, error = torch.empty(2, n, dtype=rows.dtype, device=rows.device)
        self._kernels.round_rows[(n,)](
            rows, rounded, norm, error, width, padded_width, BLOCK=power_of_two(padded_width)
        )
        return _Rounded(rounded, norm, error)

    def raise_floors(self, k: int, is_shared: bool) -> None:
        """Rule out what is not among a token's k largest, or if shared the k * batch of all.

        The largest entry of a group of features is at least its lower bound, so the k-th largest
        of all groups' bounds is at most the k-th largest entry. With four groups or more for each
        of the k, hardly more than k entries pass.
        """
        n_tokens, d_sae = len(self._margin), len(self._norm)
        group = min(TILE_FEATURES, power_of_two(d_sae // (4 * k) // 2 + 1))
        peak = self._margin.new_empty(n_tokens, ceil_div(d_sae, group))
        bias = self._b_enc - self._slack * self._b_enc.abs()
        vectors = self._margin, bias, self._norm
        self._launch(self._kernels.peaks, self._x, vectors, (peak,), n_tokens, GROUP=group)
        if is_shared:
            edge = peak.flatten().topk(k * n_tokens, sorted=False).values.amin()
        else:
            edge = peak.topk(k, dim=1, sorted=False).values.amin(dim=1)
        self._floor.copy_(edge - self._slack * edge.abs())

    def entries(self, tokens: slice) -> Entries:
        """The entries of some tokens, which start at a multiple of `TILE_TOKENS`."""
        n_tokens, d_sae = tokens.stop - tokens.start, len(self._norm)
        like = {"dtype": torch.int32, "device": self._x.device}
        by_token = torch.empty(n_tokens, ceil_div(d_sae, 32), **like)
        by_feature = torch.empty(d_sae, ceil_div(n_tokens, 32), **like)
        bias = self._b_enc + self._slack * self._b_enc.abs()
        vectors = self._margin[tokens], self._lowest, bias, self._norm, self._floor[tokens]
        results = by_token, by_feature
        self._launch(self._kernels.screen, self._x[tokens.start :], vectors, results, n_tokens)
        return Entries(self._listed(by_token, d_sae), self._listed(by_feature, n_tokens))

    def _launch(
        self,
        kernel: Any,
        x: Tensor,
        vectors: tuple[Tensor, ...],
        results: tuple[Tensor, ...],
        n_tokens: int,
        **constants: int,
    ) -> None:
        """A kernel on every tile of the product of some rounded tokens with all features."""
        d_sae = len(self._norm)
        kernel[ceil_div(n_tokens, TILE_TOKENS), ceil_div(d_sae, TILE_FEATURES)](
            x,
            self._W,
            *vectors,
            *results,
            n_tokens,
            d_sae,
            self._x.shape[1],
            TOKENS=TILE_TOKENS,
            FEATURES=TILE_FEATURES,
            DEPTH=TILE_DEPTH,
            FACTOR=self._kernels.factor_dtype(self._x.is_cuda),
            num_warps=8,
            **constants,
        )

    def _listed(self, words: Tensor, n_bits: int) -> Listed:
        n_rows, n_words = words.shape
        places = torch.empty(n_rows, n_bits, dtype=torch.int32, device=words.device)
        n = torch.empty(n_rows, dtype=torch.int32, device=words.device)
        block = min(LIST_WORDS, power_of_two(n_words))
        self._kernels.list_bits[(n_rows,)](words, places, n, n_bits, BLOCK=block)
        return Listed(places, n)


def ceil_div(n: int, size: int) -> int:
    return -(-n // size)


def round_up(n: int, size: int) -> int:
    return ceil_div(n, size) * size


def power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << (n - 1).bit_length()

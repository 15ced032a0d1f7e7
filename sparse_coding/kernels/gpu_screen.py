"""Which entries (token, feature) of a batch may be active, from a product in bfloat16.

With x' and w' the rounded vectors, Cauchy-Schwarz bounds what the product may be wrong by,

    |x.w - x'.w'|  <=  |x - x'| |w|  +  |x'| |w - w'|,

with the rounding errors as they are in this batch, not as they might be. The sums of d_in terms,
once on the tensor cores (which truncate) and once in the exact dot product that decides later,
add at most 2 d_in eps |x| |w|. So an entry above its feature's floor (0 for a ReLU, half a
bandwidth below the threshold for JumpReLU) always has

    product[token, feature]  >=  lowest[feature] - margin[token] * norm[feature].
"""

from types import ModuleType
from typing import NamedTuple

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
        lowest = floor - b_enc - 4 * precision * (floor.abs() + b_enc.abs())
        self._x, self._W = x.rows, W.rows
        self._margin, self._norm, self._lowest = margin.float(), norm.float(), lowest.float()

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

    def entries(self, tokens: slice) -> Entries:
        """The entries of some tokens, which start at a multiple of `TILE_TOKENS`."""
        n_tokens, d_sae = tokens.stop - tokens.start, len(self._norm)
        like = {"dtype": torch.int32, "device": self._x.device}
        by_token = torch.empty(n_tokens, ceil_div(d_sae, 32), **like)
        by_feature = torch.empty(d_sae, ceil_div(n_tokens, 32), **like)
        self._kernels.screen[ceil_div(n_tokens, TILE_TOKENS), ceil_div(d_sae, TILE_FEATURES)](
            self._x[tokens.start :],
            self._W,
            self._margin[tokens],
            self._lowest,
            self._norm,
            by_token,
            by_feature,
            n_tokens,
            d_sae,
            self._x.shape[1],
            TOKENS=TILE_TOKENS,
            FEATURES=TILE_FEATURES,
            DEPTH=TILE_DEPTH,
            FACTOR=self._kernels.factor_dtype(self._x.is_cuda),
            num_warps=8,
        )
        return Entries(self._listed(by_token, d_sae), self._listed(by_feature, n_tokens))

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

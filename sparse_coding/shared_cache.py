"""One activation cache for several processes: the first writes it, the others keep step.

Nothing here knows how activations are made.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparse_coding.cache import CacheWriter
from sparse_coding.processes import Processes


class NoWriter(contextlib.nullcontext):
    """Stands for the writer in the other processes: takes the same rows, keeps their number."""

    def __init__(self, n_tokens: int, n_tokens_done: int) -> None:
        super().__init__(self)
        self.n_tokens, self.n_tokens_done = n_tokens, n_tokens_done

    def append(self, activations: object, tokens: Int[Tensor, " rows"], documents: object) -> None:
        self.n_tokens_done += len(tokens)

    def finish(self, extra: object) -> None:
        pass


def cache_writer(
    processes: Processes,
    root: Path,
    settings: dict[str, Any],
    hooks: dict[str, int],
    n_tokens: int,
    dtype: torch.dtype,
) -> CacheWriter | NoWriter:
    """`CacheWriter(root, ...)` in the first process; all others go on from where it does."""
    if not processes.is_first:
        return NoWriter(n_tokens, processes.of_first(0))
    writer = CacheWriter(root, settings, hooks, n_tokens, dtype)
    processes.of_first(writer.n_tokens_done)
    return writer

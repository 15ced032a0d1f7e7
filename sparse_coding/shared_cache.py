"""One activation cache for several processes: the first writes it, the others keep step.

Nothing here knows how activations are made.
"""

import contextlib
from collections.abc import Callable

from jaxtyping import Int
from torch import Tensor

from sparse_coding.cache import CacheWriter
from sparse_coding.cache_files import Place
from sparse_coding.processes import Processes


class NoWriter(contextlib.nullcontext):
    """Stands for the writer in the other processes: takes the same rows, keeps their number."""

    def __init__(self, n_tokens: int, n_tokens_done: int, place: Place) -> None:
        super().__init__(self)
        self.n_tokens, self.n_tokens_done, self.place = n_tokens, n_tokens_done, place

    def append(
        self,
        activations: object,
        tokens: Int[Tensor, " rows"],
        documents: object,
        place: object,
    ) -> None:
        self.n_tokens_done += len(tokens)

    def finish(self, extra: object) -> None:
        pass


def written_by_first(
    processes: Processes, make_writer: Callable[[], CacheWriter], n_tokens: int
) -> CacheWriter | NoWriter:
    """The writer, made in the first process; all others go on from where it does."""
    if not processes.is_first:
        return NoWriter(n_tokens, *processes.of_first((0, Place())))
    writer = make_writer()
    processes.of_first((writer.n_tokens_done, writer.place))
    return writer

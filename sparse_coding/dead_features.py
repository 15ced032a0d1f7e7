"""Which features have been silent for long, told to the host without making it wait."""

import torch
from jaxtyping import Int
from torch import Tensor

PERIOD = 8
"""Steps between two lists; by then the device has long counted."""


class DeadFeatures:
    """The features that have not fired for `dead_after_tokens`, as a list that comes late.

    How long the list is decides the shapes of what is computed with it, and to ask a GPU stops the
    host. So every `PERIOD` steps the list becomes what was silent `PERIOD` steps before. On every
    device alike, so that all of them train the same; a feature that fires meanwhile stays on it.
    """

    def __init__(self, tokens_since_fired: Int[Tensor, " d_sae"], dead_after_tokens: int) -> None:
        self._tokens_since_fired, self._dead_after_tokens = tokens_since_fired, dead_after_tokens
        self._current = torch.zeros_like(tokens_since_fired, dtype=torch.bool)
        self._next = self._current.clone()
        is_cuda = tokens_since_fired.is_cuda
        self._n_next = torch.zeros(1, dtype=torch.int64, pin_memory=is_cuda)
        self._counted = torch.cuda.Event() if is_cuda else None
        self._features = self._listed(0)

    def at(self, step: int) -> Int[Tensor, " n_dead"]:
        """The list for one step; to be called once for each, in their order."""
        if step % PERIOD == 0:
            if self._counted is not None:
                self._counted.synchronize()
            self._current.copy_(self._next)
            self._features = self._listed(int(self._n_next[0]))
            self._next.copy_(self._tokens_since_fired >= self._dead_after_tokens)
            self._count_next()
        return self._features

    def _listed(self, n: int) -> Int[Tensor, " n"]:
        # not nonzero(), which would wait to learn its length
        return self._current.argsort(descending=True, stable=True)[:n]

    def _count_next(self) -> None:
        self._n_next.copy_(self._next.sum(), non_blocking=True)
        if self._counted is not None:
            self._counted.record()

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name; `restored()` goes after copying into them."""
        return {"dead.current": self._current, "dead.next": self._next}

    def restored(self) -> None:
        """Take note of new contents of `tensors()`. Waits for the device."""
        self._features = self._listed(int(self._current.sum()))
        self._count_next()

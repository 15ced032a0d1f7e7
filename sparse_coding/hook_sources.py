"""Batches of several hooks at once: aligned rows of caches, or straight from the model.

Where rows come from and which of them count is the harvest's affair.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.harvest import Rows, Seen, joined_columns
from sparse_coding.sources import KeyedPermutation, ShuffledRows
from sparse_coding.text import TokenBatch


class AlignedSources:
    """Several sources of equal length and seed as one: batches by hook name, rows aligned."""

    def __init__(self, sources: dict[str, ShuffledRows]) -> None:
        self.sources = sources

    def take_part(self, part: slice) -> None:
        """Deliver only these rows of every batch from the next `iter` on."""
        for source in self.sources.values():
            source.part = part

    @property
    def n_batches(self) -> int | None:
        return next(iter(self.sources.values())).n_batches

    def __iter__(self) -> Iterator[dict[str, Float32[Tensor, "batch _"]]]:
        self.load_state_dict(self.state_dict())  # an error may have left some a batch further
        for batches in zip(*self.sources.values(), strict=True):
            yield dict(zip(self.sources, batches, strict=True))

    def state_dict(self) -> dict[str, int]:
        """The position of all: that of the last one, which moves on after all others have."""
        return next(reversed(self.sources.values())).state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; takes effect at the next `iter`."""
        for source in self.sources.values():
            source.load_state_dict(state)


def side_by_side(
    batch: dict[str, Float[Tensor, "rows _"]], hook_names: Sequence[str]
) -> Float[Tensor, "rows columns"]:
    """Aligned rows of several hooks joined into one; those of one hook as they are."""
    return joined_columns([batch[name] for name in hook_names])


class Window(NamedTuple):
    """The rows among which a streaming source shuffles, and how many token batches gave them."""

    number: int
    rows: dict[str, Float[Tensor, "rows _"]]
    n_token_batches: int


class StreamingSources:
    """Batches by hook name straight from the model, without a cache; endless.

    Rows are shuffled within windows of about `buffer_tokens` (whole token batches; rows that fill
    no batch are left out, under one batch per window) by a keyed permutation of (seed, window).
    To resume, the text before the current window is tokenised again, the window harvested again.

    `is_stopped` is asked before every token batch, also before one that is only tokenised. If it
    says yes, iterating ends before the next window, at whose start the position then is. Several
    processes ask equally often; all must be told the same.
    """

    def __init__(
        self,
        rows: Rows,
        batch_tokens: int,
        seed: int,
        buffer_tokens: int,
        is_stopped: Callable[[], Any] = lambda: False,
    ) -> None:
        if buffer_tokens < batch_tokens:
            raise UserError(f"a buffer of {buffer_tokens} tokens holds no batch of {batch_tokens}")
        self.rows, self.batch_tokens, self.seed = rows, batch_tokens, seed
        self.buffer_tokens, self.is_stopped = buffer_tokens, is_stopped
        self.window = self.n_delivered_in_window = 0
        self.n_token_batches = 0  # consumed before the current window, over all passes
        self._held: Window | None = None
        self._part = slice(None)

    def take_part(self, part: slice) -> None:
        """Deliver only these rows of every batch from now on."""
        self._part = part

    def __iter__(self) -> Iterator[dict[str, Float32[Tensor, "batch _"]]]:
        n_held = self._held.n_token_batches if self._holds_current() else 0
        seen = self.rows.seen(self._token_batches(self.n_token_batches + n_held))
        while True:
            if not self._holds_current():
                self._held = self._fill(seen)
            if self._held is None:
                return
            window = self._held.rows
            n = len(next(iter(window.values())))
            order = KeyedPermutation(n, (self.seed, self.window))
            while (self.n_delivered_in_window + 1) * self.batch_tokens <= n:
                first = self.n_delivered_in_window * self.batch_tokens
                places = np.arange(first, first + self.batch_tokens)[self._part]
                chosen = torch.from_numpy(order(places))
                self.n_delivered_in_window += 1
                yield {name: x[chosen.to(x.device)].float() for name, x in window.items()}
            self.window += 1
            self.n_token_batches += self._held.n_token_batches
            self.n_delivered_in_window = 0

    def _holds_current(self) -> bool:
        return self._held is not None and self._held.number == self.window

    def _token_batches(self, n_skipped: int) -> Iterator[TokenBatch]:
        while True:
            for batch in self.rows.token_batches():
                if self.is_stopped():
                    return
                if n_skipped:
                    n_skipped -= 1
                else:
                    yield batch

    def _fill(self, seen: Iterator[Seen]) -> Window | None:
        """The next window; None if nothing more comes before it is full."""
        parts: dict[str, list[Tensor]] = {name: [] for name in self.rows.hook_names}
        n_rows = 0
        for n_used, (acts, tokens, _) in enumerate(map(self.rows.keep, seen), 1):
            for name, x in acts.items():
                parts[name].append(x)
            n_rows += len(tokens)
            if n_rows >= self.buffer_tokens:
                joined = {name: torch.cat(part) for name, part in parts.items()}
                return Window(self.window, joined, n_used)
        return None

    def state_dict(self) -> dict[str, int]:
        """The position: window, place in it, and the token batches before it."""
        return {
            "seed": self.seed,
            "window": self.window,
            "n_token_batches": self.n_token_batches,
            "n_delivered_in_window": self.n_delivered_in_window,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; takes effect at the next `iter`."""
        self.seed, self.window = state["seed"], state["window"]
        self.n_token_batches = state["n_token_batches"]
        self.n_delivered_in_window = state["n_delivered_in_window"]


def take_sample(
    sources: AlignedSources | StreamingSources, n_tokens: int
) -> dict[str, Float32[Tensor, "n _"]]:
    """About `n_tokens` rows per hook from the coming batches, which still come afterwards."""
    position = sources.state_dict()
    parts: dict[str, list[Tensor]] = {}
    n = 0
    for batch in sources:
        for name, x in batch.items():
            parts.setdefault(name, []).append(x)
            n_batch = len(x)
        n += n_batch
        if n >= n_tokens:
            break
    sources.load_state_dict(position)
    return {name: torch.cat(part) for name, part in parts.items()}

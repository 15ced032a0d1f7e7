"""Sources of activations: endless batches with a position, from which a run resumes exactly.

Where activations come from is a source's own affair (disk, memory, a live model, toy data); the
trainer cannot tell. Nothing here reads files or knows of models.
"""

import hashlib
import itertools
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Event, Semaphore, Thread
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from sparse_coding.errors import UserError

MAX_JOIN_SECONDS = (
    2.0  # for what a thread is just doing; longer than any shard or tokenising takes
)
_END = object()


@runtime_checkable
class ActivationSource(Protocol):
    """Batches of activations with a position: batches delivered, plus the seed of their order.

    Iterating goes on from the position, so a source restored from a state dict delivers exactly
    the batches that the interrupted one would have.
    """

    d_in: int

    def __iter__(self) -> Iterator[Float32[Tensor, "batch d_in"]]:
        """Float32 batches on the source's device, endless or to the end of its epochs."""
        ...

    def state_dict(self) -> dict[str, int]:
        """The position, as JSON content."""
        ...

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; takes effect at the next `iter`."""
        ...


def ahead(
    items: Iterable[Any],
    n: int = 2,
    waited: Callable[[float], None] | None = None,
    every: float | None = None,
) -> Iterator[Any]:
    """The same items in their order; a thread makes up to n of them in advance.

    Whenever `every` seconds pass without one, `waited` is told for how many none has come; what
    it raises ends the wait. A thread that is stuck then is left alone: it ends with the process.
    """
    results: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
    free, closed = Semaphore(n), Event()
    thread = Thread(target=_make, args=(items, results, free, closed), daemon=True)
    thread.start()
    try:
        while True:
            item, error = _next_of(results, waited, every)
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
            free.release()
    finally:
        closed.set()
        free.release()
        thread.join(MAX_JOIN_SECONDS)


def _make(items: Iterable[Any], results: SimpleQueue, free: Semaphore, closed: Event) -> None:
    try:
        for item in items:
            results.put((item, None))
            free.acquire()
            if closed.is_set():
                return
        results.put((_END, None))
    except BaseException as error:  # noqa: BLE001 - raised where the item would have come
        results.put((None, error))


def _next_of(
    results: SimpleQueue, waited: Callable[[float], None] | None, every: float | None
) -> tuple[Any, BaseException | None]:
    start = time.monotonic()
    while True:
        try:
            return results.get(timeout=every)
        except Empty:
            if waited is not None:
                waited(time.monotonic() - start)


class ShuffledRows(ActivationSource):
    """The order of batches over a fixed set of rows; subclasses load the rows.

    Epoch e visits row KeyedPermutation(n_rows, (seed, e))(i) at its i-th place, so every row comes
    once per epoch and sources of equally many rows and equal seed agree row by row. Every batch
    has exactly `batch_tokens` rows: the last one of an epoch is filled from the next epoch, and
    what is left over after `n_epochs` (None: endless) is not delivered. `n_batches` in all.
    """

    def __init__(
        self, n_rows: int, d_in: int, batch_tokens: int, seed: int, n_epochs: int | None
    ) -> None:
        if batch_tokens < 1 or n_rows < 1:
            raise UserError(f"cannot make batches of {batch_tokens} from {n_rows} rows: need >= 1")
        if n_epochs is not None and n_epochs * n_rows < batch_tokens:
            raise UserError(
                f"{n_epochs} epochs of {n_rows} rows do not fill one batch of {batch_tokens}: "
                "use more tokens, more epochs or a smaller batch"
            )
        self.n_rows, self.d_in, self.batch_tokens, self.seed = n_rows, d_in, batch_tokens, seed
        self.n_batches = None if n_epochs is None else n_epochs * n_rows // batch_tokens
        self.n_delivered = 0
        self.part = slice(None)
        """Which rows of each batch are delivered; the position is that of whole batches."""

    @abstractmethod
    def load(self, numbers: Iterable[int]) -> Iterator[Float32[Tensor, "batch d_in"]]:
        """The batches with those numbers; their rows are `indices(number)`."""

    def __iter__(self) -> Iterator[Float32[Tensor, "batch d_in"]]:
        numbers = itertools.count(self.n_delivered)
        if self.n_batches is not None:
            numbers = range(self.n_delivered, self.n_batches)
        for n_before, batch in enumerate(self.load(numbers), self.n_delivered):
            self.n_delivered = n_before + 1  # before the batch is used: its user may save
            yield batch

    def indices(self, number: int) -> Int64[np.ndarray, " batch"]:
        """Which rows batch `number`, counted from 0 over all epochs, has; in its order."""
        places = np.arange(self.batch_tokens)[self.part] + number * self.batch_tokens
        epochs = places // self.n_rows
        rows = np.empty_like(places)
        for epoch in range(epochs[0], epochs[-1] + 1):
            inside = epochs == epoch
            permutation = KeyedPermutation(self.n_rows, (self.seed, epoch))
            rows[inside] = permutation(places[inside] - epoch * self.n_rows)
        return rows

    def state_dict(self) -> dict[str, int]:
        return {
            "n_delivered": self.n_delivered,
            "seed": self.seed,
            "n_rows": self.n_rows,
            "batch_tokens": self.batch_tokens,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position; `UserError` if it belongs to other rows or another batch size."""
        if {type(state.get(name)) for name in self.state_dict()} != {int}:
            raise UserError(f"no source can resume from {state}: its four parts are integers")
        if not 0 <= state["n_delivered"] < 2**40:
            raise UserError(f"no source can resume after {state['n_delivered']} batches")
        for name in ("n_rows", "batch_tokens"):
            if state[name] != getattr(self, name):
                raise UserError(
                    f"cannot resume with {name} {getattr(self, name)}: the interrupted run had "
                    f"{state[name]}; give the same settings again"
                )
        self.n_delivered, self.seed = state["n_delivered"], state["seed"]


class TensorActivations(ShuffledRows):
    """A source over rows in memory, on the tensor's device."""

    def __init__(
        self,
        x: Float[Tensor, "n d_in"],
        batch_tokens: int,
        seed: int,
        n_epochs: int | None = None,
    ) -> None:
        super().__init__(*x.shape, batch_tokens, seed, n_epochs)
        self.x = x

    def load(self, numbers: Iterable[int]) -> Iterator[Float32[Tensor, "batch d_in"]]:
        for number in numbers:
            yield self.x[torch.from_numpy(self.indices(number)).to(self.x.device)].float()


class KeyedPermutation:
    """A pseudo-random bijection of range(n), computed from (n, key) and never stored.

    A balanced Feistel network (Luby and Rackoff 1988) permutes the next even power of two, at
    most 4n; values outside range(n) are sent through again until they fall inside (cycle walking,
    Black and Rogaway 2002). Good enough to shuffle data, not to keep secrets.
    """

    n_rounds = 8  # with 6, ordered pairs are visibly uneven for n < 20 (chi-square over keys)

    def __init__(self, n: int, key: tuple[int, ...]) -> None:
        assert 0 < n <= 2**62, f"{n} elements"
        self.n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        digest = hashlib.sha256(repr([int(part) for part in key]).encode()).digest()
        self._round_keys = np.frombuffer(digest, "<u4")[: self.n_rounds]

    def __call__(self, indices: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Where each index (in range(n)) is sent."""
        values = self._feistel(indices)
        outside = np.flatnonzero(values >= self.n)
        while len(outside):
            values[outside] = self._feistel(values[outside])
            outside = outside[values[outside] >= self.n]
        return values

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        mask = 2**self._half_bits - 1
        left = (values >> self._half_bits).astype(np.uint32)
        right = (values & mask).astype(np.uint32)
        for key in self._round_keys:
            left, right = right, left ^ (_mix(right ^ key) & np.uint32(mask))
        return (left.astype(np.int64) << self._half_bits) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint32 in which every input bit moves every output bit.

    The finaliser of MurmurHash3 (Appleby 2011).
    """
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))

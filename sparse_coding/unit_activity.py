"""Activity of units on labelled documents in one streaming pass: sums per document and unit.

Units that fire at different rates cannot be compared as they are: a dense one meets every concept.
So a unit is cut at a threshold that leaves it a given rate, u = relu(a - threshold), and several
rates are counted side by side. Memory is documents x units x rates, whatever the number of tokens.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numba import prange
from torch import Tensor

from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.kernels.cpu_loops import compiled, compiled_parallel

ROWS_AT_ONCE = 2048
MAX_EXCESS = 1.25  # of a unit's rate over the one that was asked for, or below it
UNIT_BLOCK = 32  # units of one thread's turn

Activations = Iterable[Float[Tensor, "rows units"]]


def unit_activations(
    dictionary: Dictionary, x: Float[Tensor, "rows d_in"], units: Int[Tensor, " units"]
) -> Iterator[Float[Tensor, "some units"]]:
    """Activations of these features alone, some rows at a time, in float32 on the CPU."""
    for rows in x.split(ROWS_AT_ONCE):
        encoded = dictionary.encode(rows.to(dictionary.W_dec.device).float())
        yield encoded[:, units.to(encoded.device)].float().cpu()


def rate_thresholds(
    parts: Activations, n_rows: int, rates: Sequence[float]
) -> Float[Tensor, "rates units"]:
    """Thresholds above which each unit is active on a share `rates` of the `n_rows` rows.

    Rows of equal activation (a model in bfloat16 has many) are all above or none, whichever is
    nearer to the rate. nan where a unit is not above 0 on so many rows, or where so many rows are
    equal that no threshold is near. Holds the largest values alone.
    """
    n_above = [math.floor(rate * n_rows) for rate in rates]
    if min(n_above) < 1 or max(rates) >= 1:
        raise UserError(
            f"rates {', '.join(map(str, rates))} of {n_rows:,} tokens: each must be below 1 and "
            "leave at least one token"
        )
    keep = math.ceil(MAX_EXCESS * max(n_above)) + 1
    largest, waiting, n_waiting = None, [], 0
    for part in parts:
        waiting.append(part.T)
        n_waiting += len(part)
        if n_waiting >= keep:  # a merge costs as much as what it merges
            largest = _largest(largest, waiting, keep)
            waiting, n_waiting = [], 0
    if waiting:
        largest = _largest(largest, waiting, keep)
    return torch.stack([_threshold(largest, n) for n in n_above])


def _threshold(largest: Float[Tensor, "units kept"], n: int) -> Float[Tensor, " units"]:
    """Above which about n values are; `largest` are each unit's, sorted."""
    if n > largest.shape[1]:
        return torch.full_like(largest[:, 0], torch.nan)
    value = largest[:, n - 1]
    n_greater = (largest > value[:, None]).sum(dim=1)
    n_with = (largest >= value[:, None]).sum(dim=1)
    next_lower = torch.where(largest < value[:, None], largest, -torch.inf).amax(dim=1)
    n_with = torch.where(next_lower.isfinite(), n_with, 2 * largest.shape[1])  # not all are seen
    includes = n_with - n <= n - n_greater
    threshold = torch.where(includes, next_lower.clamp_min(0), value)
    n_found = torch.where(includes, n_with, n_greater)
    is_near = (n_found <= MAX_EXCESS * n) & (n_found >= n / MAX_EXCESS)
    return torch.where((value > 0) & is_near, threshold, torch.nan)


def _largest(
    before: Float[Tensor, "units kept"] | None, waiting: list[Tensor], n: int
) -> Float[Tensor, "units kept"]:
    joined = torch.cat(waiting if before is None else [before, *waiting], dim=1)
    return joined.topk(min(n, joined.shape[1]), dim=1).values


class Activity(NamedTuple):
    """Sums over the tokens of each document."""

    active: Float[Tensor, "rates documents units"]
    """Tokens on which the unit is above its threshold."""
    mass: Float[Tensor, "rates documents units"]
    """Sum of relu(a - threshold)."""
    largest: Float[Tensor, "documents units"]
    """Largest activation, whatever the threshold; 0 at least."""


def unit_activity(
    parts: Activations,
    document: Int[Tensor, " rows"],
    n_documents: int,
    thresholds: Float[Tensor, "rates units"],
) -> Activity:
    """One pass over activations; `document` says which document each row is of.

    A threshold of nan is above everything: the unit is never active at that rate.
    """
    n_rates, n_units = thresholds.shape
    active = np.zeros((n_rates, n_documents, n_units), dtype=np.float32)
    mass = np.zeros_like(active)
    largest = np.zeros((n_documents, n_units), dtype=np.float32)
    limits = thresholds.nan_to_num(nan=math.inf).float().contiguous().numpy()
    documents = document.long().contiguous().numpy()
    start = 0
    for part in parts:
        rows = documents[start : start + len(part)]
        if len(rows) == len(part):  # the compiled loop does not look where it reads
            _count(part.contiguous().numpy(), rows, limits, active, mass, largest)
        start += len(part)
    if start != len(documents):
        raise ValueError(f"{start} rows of activations for {len(documents)} rows of documents")
    return Activity(torch.from_numpy(active), torch.from_numpy(mass), torch.from_numpy(largest))


@compiled
def _count_block(a, documents, limits, active, mass, largest, first, last):
    n_rates = len(limits)
    for t in range(len(a)):
        d = documents[t]
        for u in range(first, last):
            value = a[t, u]
            if value > largest[d, u]:
                largest[d, u] = value
            for r in range(n_rates):
                if value > limits[r, u]:
                    active[r, d, u] += np.float32(1)
                    mass[r, d, u] += value - limits[r, u]


@compiled_parallel
def _count(a, documents, limits, active, mass, largest):
    n_units = a.shape[1]
    n_blocks = (n_units + UNIT_BLOCK - 1) // UNIT_BLOCK
    for block in prange(n_blocks):
        first = block * UNIT_BLOCK
        _count_block(
            a, documents, limits, active, mass, largest, first, min(first + UNIT_BLOCK, n_units)
        )

"""Searches by runs: the learning rate of least error, and the coefficient that gives an L0.

Every run is one training, so both ask for as few as they can.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from benchmarks.learners import Job

LARGEST_FACTOR = 8.0
"""By which a coefficient moves at most from one run to the next."""
LEAST_SLOPE = 0.3
"""In magnitude, of log L0 against log coefficient; what is flatter, or rises, is noise."""


def climb(n: int, start: int, error: Callable[[int], Any]) -> int:
    """The place among 0 ... n - 1, reached downhill from `start`, whose neighbours are no better.

    `error` is called once for each place that is looked at, the next higher place first.
    """
    known: dict[int, Any] = {}

    def at(place: int) -> Any:
        if place not in known:
            known[place] = error(place)
        return known[place]

    best = start
    while True:
        neighbours = [place for place in (best + 1, best - 1) if 0 <= place < n]
        better = next((place for place in neighbours if at(place) < at(best)), None)
        if better is None:
            return best
        best = better


def distance(l0: float, target: float) -> float:
    """How far off an L0 is, on the scale of its logarithm."""
    return abs(math.log(l0 / target)) if l0 > 0 else math.inf


def next_coefficient(points: Sequence[tuple[float, float]], target: float) -> float:
    """The coefficient to be tried next for an L0 of `target`, from (coefficient, L0) known so far.

    On the straight line of log L0 against log coefficient through the two points closest to the
    target, or with slope -1 where there is one point or the line is no falling one.
    """
    living = sorted((p for p in points if p[1] > 0), key=lambda point: distance(point[1], target))
    if not living:
        return min(coefficient for coefficient, _ in points) / LARGEST_FACTOR
    (coefficient, l0), *others = living
    others = [point for point in others if point[0] != coefficient]
    slope = -1.0
    if others:
        run = math.log(others[0][0] / coefficient)
        slope = min(math.log(others[0][1] / l0) / run, -LEAST_SLOPE)
    exponent = math.log(target / l0) / slope
    largest = math.log(LARGEST_FACTOR)
    return coefficient * math.exp(max(-largest, min(largest, exponent)))


class Run(Protocol):
    """A finished run."""

    job: Job
    l0: float


R = TypeVar("R", bound=Run)


class Trials(Generic[R]):
    """The runs of one job at several learning rates, each made towards an L0.

    Without a `first_coefficient` the library is told the L0 itself.
    """

    def __init__(
        self, run: Callable[[Job], R], first: Job, first_coefficient: float | None
    ) -> None:
        self.run, self.first, self.first_coefficient = run, first, first_coefficient
        self.all: list[R] = []

    def towards(self, target_l0: float, lr: float, n_runs: int, tolerance: float) -> R:
        """The run that came closest, once one is within `tolerance` or `n_runs` more are made."""
        if self.first_coefficient is None:
            job = self.first._replace(lr=lr, sparsity=target_l0)
            return next((one for one in self.all if one.job == job), None) or self._try(job)
        for _ in range(n_runs):
            closest = self._closest(target_l0, lr)
            if closest and distance(closest.l0, target_l0) <= tolerance:
                break
            self._try(self.first._replace(lr=lr, sparsity=self._coefficient(target_l0, lr)))
        return self._closest(target_l0, lr)

    def _try(self, job: Job) -> R:
        self.all.append(self.run(job))
        return self.all[-1]

    def _closest(self, target_l0: float, lr: float | None = None) -> R | None:
        """Of all, or of those of one learning rate."""
        some = [one for one in self.all if lr in (None, one.job.lr)]
        return min(some, key=lambda one: distance(one.l0, target_l0), default=None)

    def _coefficient(self, target_l0: float, lr: float) -> float:
        same = [one for one in self.all if one.job.lr == lr]
        if not same:  # what gave about this L0 at another learning rate does so here
            closest = self._closest(target_l0)
            if closest is None:
                return self.first_coefficient
            same = [closest]
        return next_coefficient([(one.job.sparsity, one.l0) for one in same], target_l0)

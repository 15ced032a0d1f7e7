"""Frontiers of (L0, error), and ours minus theirs at the L0 that theirs has, paired by seed."""

import math
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from sparse_coding.metrics import columns, t_interval

Row = dict[str, Any]
MEASURES = ("fvu", "nats_lost")
POINT = ("l0", *MEASURES, "dead_fraction")


def at_l0(points: Sequence[tuple[float, float]], l0: float) -> float:
    """The value at `l0` of a frontier of (L0, value): quadratic in log L0.

    Through the three points nearest to it, fewer if there are fewer; a point's own value at it.
    Beyond the points it is an extrapolation.
    """
    at = math.log(l0)
    logs = sorted(((math.log(x), y) for x, y in points), key=lambda point: abs(point[0] - at))[:3]
    return sum(
        y * math.prod((at - other) / (x - other) for other, _ in logs if other != x)
        for x, y in logs
    )


def points(rows: Sequence[Row]) -> Iterator[Row]:
    """Per architecture, library and L0 asked for: means with Student's interval over the seeds."""
    keys = ("architecture", "library", "target_l0", "lr", "sparsity", "n_steps", "ratio",
            "n_tokens_eval", "n_documents_eval", "n_tokens_ce")  # fmt: skip
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for values, group in groups.items():
        intervals = (columns(key, t_interval([row[key] for row in group])) for key in POINT)
        yield {"what": "point", **dict(zip(keys, values, strict=True)), "n_seeds": len(group)} | (
            {key: value for interval in intervals for key, value in interval.items()}
        )


def gaps(rows: Sequence[Row]) -> Iterator[Row]:
    """Of every architecture, peer and L0 asked for, with Student's interval over the seeds.

    `beyond`: by what share the peer's mean L0 lies outside the L0s of ours (0: inside).
    """
    own = [row for row in rows if row["library"] == "ours"]
    kinds = dict.fromkeys(
        (row["architecture"], row["library"], row["target_l0"])
        for row in rows
        if row["library"] != "ours"
    )
    for architecture, peer, target in kinds:
        frontier = [row for row in own if row["architecture"] == architecture]
        theirs = [
            row
            for row in rows
            if (row["architecture"], row["library"], row["target_l0"])
            == (architecture, peer, target)
        ]
        if frontier:
            yield {
                "what": "gap",
                "architecture": architecture,
                "vs": peer,
                "target_l0": target,
            } | (_gap(frontier, theirs))


def _gap(frontier: Sequence[Row], theirs: Sequence[Row]) -> Row:
    differences: dict[str, list[float]] = {key: [] for key in MEASURES}
    for row in theirs:
        same_seed = [one for one in frontier if one["seed"] == row["seed"]]
        for key in MEASURES:
            points = [(one["l0"], one[key]) for one in same_seed]
            differences[key].append(at_l0(points, row["l0"]) - row[key])
    l0 = mean(row["l0"] for row in theirs)
    lowest, highest = (end(row["l0"] for row in frontier) for end in (min, max))
    return {
        "n_seeds": len(theirs),
        "l0_theirs": l0,
        "beyond": max(0.0, lowest / l0 - 1, l0 / highest - 1),
        "fvu_theirs": mean(row["fvu"] for row in theirs),
        "nats_lost_theirs": mean(row["nats_lost"] for row in theirs),
        **columns("fvu_gap", t_interval(differences["fvu"])),
        **columns("nats_lost_gap", t_interval(differences["nats_lost"])),
    }


def print_gaps(rows: Sequence[Row]) -> None:
    """The table of README.md: a line per architecture, peer and L0."""
    print("\n| class | peer | their L0 | their FVU | ours minus theirs: FVU | nats lost |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        cells = [row["architecture"], row["vs"], f"{row['l0_theirs']:.1f}"]
        cells += [f"{row['fvu_theirs']:.3f}"]
        cells += [_with_interval(row, key, n) for key, n in (("fvu_gap", 3), ("nats_lost_gap", 2))]
        print(f"| {' | '.join(cells)} |")


def _with_interval(row: Row, key: str, n_digits: int) -> str:
    estimate, low, high = (f"{row[key + end]:+.{n_digits}f}" for end in ("", "_low", "_high"))
    return f"{estimate} [{low}, {high}]"

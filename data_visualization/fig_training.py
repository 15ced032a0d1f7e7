"""How did training go: what is unexplained, how many features are active, how many never fire?

    python -m data_visualization.fig_training RUN_FOLDER

Seconds; also while the run goes on. Reads RUN_FOLDER/metrics.jsonl, writes RUN_FOLDER/figures/
fig_training.png and .pdf.
"""

import re

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from data_visualization.style import (
    GREY,
    LOOK,
    WIDTH,
    Row,
    caption,
    check_rows,
    count,
    main,
    ratio_colour,
    ratio_label,
    span,
)

MEASURES = {
    "fvu": "fraction of variance unexplained",
    "l0": "active features per token",
    "dead_fraction": "dead features",
}
NAME = re.compile(r"(?P<group>.*_x(?P<ratio>\d+)_(?:l0-(?P<target>[\d.]+))?.*)_s\d+$")
LINES = ("-", "--", ":", "-.")
TARGET = "L0 asked for"


def draw(rows: list[Row]) -> Figure:
    """A line per ratio and setting: the mean over seeds, and thin ones of each.

    `ValueError` if a key is missing or a name does not say its ratio.
    """
    check_rows(rows, ["name"], ["n_tokens", "step", *MEASURES])
    names = list(dict.fromkeys(row["name"] for row in rows))
    told = {name: NAME.match(name) for name in names}
    unknown = [name for name, found in told.items() if not found]
    if unknown:
        raise ValueError(f"{unknown[0]} does not say its ratio and seed, as l1_x04_c1.0_s0 does")
    groups: dict[str, list[str]] = {}
    for name, found in sorted(told.items(), key=lambda item: (int(item[1]["ratio"]), item[0])):
        groups.setdefault(found["group"], []).append(name)
    ratio = {group: int(told[members[0]]["ratio"]) for group, members in groups.items()}
    targets = sorted({float(found["target"]) for found in told.values() if found["target"]})
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 2.5))
        for ax, measure in zip(figure.subplots(1, 3), MEASURES, strict=True):
            draw_measure(ax, rows, groups, ratio, measure)
        for target in targets:
            figure.axes[1].axhline(target, color=GREY, linestyle=(0, (5, 3)), linewidth=0.8,
                                   label=f"_{TARGET}")  # fmt: skip
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if targets:
            handles.append(figure.axes[1].lines[-1])
            labels.append(TARGET)
        figure.legend(handles, labels, loc="outside upper center", ncols=6)
        caption(figure, small_print(rows, groups))
    return figure


def draw_measure(
    ax: Axes, rows: list[Row], groups: dict[str, list[str]], ratio: dict[str, int], measure: str
) -> None:
    """Means are of the steps that all seeds have logged."""
    drawn: dict[int, int] = {}
    for group, members in groups.items():
        colour = ratio_colour(ratio[group])
        style = LINES[drawn.setdefault(ratio[group], 0) % len(LINES)]
        drawn[ratio[group]] += 1
        curves = [
            {row["n_tokens"]: row[measure] for row in rows if row["name"] == name}
            for name in members
        ]
        for name, curve in zip(members, curves, strict=True):
            if len(members) > 1:
                ax.plot(curve.keys(), curve.values(), style, color=colour, linewidth=0.5,
                        alpha=0.5, label=f"_{name}")  # fmt: skip
        shared = [n for n in curves[0] if all(n in curve for curve in curves)]
        mean = [sum(curve[n] for curve in curves) / len(curves) for n in shared]
        ax.plot(
            shared, mean, style, color=colour, linewidth=1.4, label=label(group, ratio, groups)
        )
    ax.set_xlabel("training tokens")
    ax.xaxis.set_major_formatter(lambda n, _: count(n))
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.set_ylabel(MEASURES[measure])
    if measure == "l0":
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
        ax.yaxis.set_major_formatter(lambda n, _: f"{n:g}")
        ax.yaxis.set_minor_locator(NullLocator())
    else:
        ax.set_ylim(0, None)
    if measure == "dead_fraction":
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")


def label(group: str, ratio: dict[str, int], groups: dict[str, list[str]]) -> str:
    """The ratio; the whole name where one ratio has several settings or hooks."""
    alike = [other for other in groups if ratio[other] == ratio[group]]
    if len(alike) == 1:
        return ratio_label(ratio[group])
    return group.replace("hook_resid_", "")


def small_print(rows: list[Row], groups: dict[str, list[str]]) -> str:
    n_seeds = span(len(members) for members in groups.values())
    last = max(row["step"] for row in rows)
    return (
        f"Of {len(groups)} settings with {n_seeds} seeds each, {last:,} steps: means over seeds "
        "thick, single seeds thin. Each point is the mean of the batches since the one before, of "
        "training tokens; what the finished autoencoders do on held-out documents is in "
        "fig_reconstruction."
    )


if __name__ == "__main__":
    main(draw, "metrics.jsonl", "fig_training", __doc__.splitlines()[0])

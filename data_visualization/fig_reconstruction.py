"""How much of the activations, and of the model's prediction, do the autoencoders keep?

    python -m data_visualization.fig_reconstruction RUN_FOLDER

Seconds. Reads RUN_FOLDER/summary.json, writes RUN_FOLDER/figures/fig_reconstruction.png and .pdf.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from data_visualization.style import (
    GREY,
    LOOK,
    WIDTH,
    Row,
    caption,
    check_rows,
    count,
    main,
    markers,
    ratio_colour,
    ratio_label,
    span,
)

OTHER = ("name", "architecture", "hook_name", "lm", "seed", "target_l0")
NUMBERS = (
    "ratio", "l1_coeff", "l0", "l0_low", "l0_high", "fvu", "fvu_low", "fvu_high",
    "nats_lost", "nats_lost_low", "nats_lost_high", "n_tokens_trained", "n_tokens_eval",
    "n_tokens_ce", "ce_clean",
)  # fmt: skip
MEASURES = {
    "fvu": "fraction of variance unexplained",
    "nats_lost": "nats lost per token",
}
L0_LABEL = "L0 (active features per token)"
RATIO_LABEL = "ratio (width of the layer : features)"
SAME_L0 = 1.5  # L0s within this factor count as one: the question is then what the ratio buys


def draw(rows: list[Row]) -> Figure:
    """FVU and nats lost, a row of panels per hook.

    Against L0; or, where all SAEs of several ratios have nearly the same L0, against the ratio.
    `ValueError` if a key is missing.
    """
    check_rows(rows, OTHER, NUMBERS)
    return draw_measures(rows, MEASURES)


def draw_measures(rows: list[Row], measures: dict[str, str]) -> Figure:
    """A column of panels for each measure, with its label; every row has it with an interval."""
    by_ratio = compares_ratios(rows)
    hooks = list(dict.fromkeys(row["hook_name"] for row in rows))
    marker = markers(row["architecture"] for row in rows)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.7 + 2.3 * len(hooks)))
        panels = figure.subplots(len(hooks), len(measures), squeeze=False)
        for hook, line in zip(hooks, panels, strict=True):
            of_hook = [row for row in rows if row["hook_name"] == hook]
            for (measure, label), ax in zip(measures.items(), line, strict=True):
                draw_panel(ax, of_hook, measure, marker, by_ratio)
                ax.set_ylabel(label)
            if len(hooks) > 1:
                line[0].set_title(hook)
        draw_legend(figure, rows, marker, by_ratio)
        caption(figure, small_print(rows))
    return figure


def compares_ratios(rows: list[Row]) -> bool:
    """Whether the rows differ in their ratio but hardly in their L0."""
    l0s = [row["l0"] for row in rows]
    return len({row["ratio"] for row in rows}) > 1 and max(l0s) < SAME_L0 * min(l0s)


def draw_panel(
    ax: Axes, rows: list[Row], measure: str, marker: dict[str, str], by_ratio: bool
) -> None:
    """One measure: points with their intervals, and the lines that join them."""
    x = "ratio" if by_ratio else "l0"
    for row in rows:
        draw_point(ax, row, x, measure, marker[row["architecture"]])
    for line in joined(rows, by_ratio):
        xs, ys = [row[x] for row in line], [row[measure] for row in line]
        colour = "0.75" if by_ratio else ratio_colour(line[0]["ratio"])
        ax.plot(xs, ys, color=colour, linewidth=0.8, zorder=1.5, label="_line")
    scale_y(ax, rows, measure)
    scale_x(ax, rows, by_ratio)


def draw_point(ax: Axes, row: Row, x: str, y: str, marker: str) -> None:
    colour = ratio_colour(row["ratio"])
    ax.plot([row[x]] * 2, [row[f"{y}_low"], row[f"{y}_high"]], color=colour, label="_interval")
    if x == "l0":
        ax.plot([row["l0_low"], row["l0_high"]], [row[y]] * 2, color=colour, label="_interval")
    ax.plot(
        row[x], row[y], marker, color=colour, markeredgecolor="white", markeredgewidth=0.4,
        label=f"_{row['name']}", zorder=3,
    )  # fmt: skip


def joined(rows: list[Row], by_ratio: bool) -> list[list[Row]]:
    """The rows that a line joins: the ratios of one sparsity, or the sparsities of one ratio."""
    series: dict[tuple, list[Row]] = {}
    for row in rows:
        sparsity = row["target_l0"] or row["l1_coeff"]
        key = (row["architecture"], row["seed"], sparsity if by_ratio else row["ratio"])
        series.setdefault(key, []).append(row)
    x = "ratio" if by_ratio else "l0"
    return [sorted(line, key=lambda row: row[x]) for line in series.values() if len(line) > 1]


def scale_y(ax: Axes, rows: list[Row], measure: str) -> None:
    """Logarithmic where all values are positive and spread widely, else linear from zero."""
    lowest = min(row[f"{measure}_low"] for row in rows)
    highest = max(row[f"{measure}_high"] for row in rows)
    if highest > 4 * lowest > 0:
        ax.set_yscale("log")
        tick_plainly(ax.yaxis, highest / lowest)
    else:
        ax.set_ylim(min(0, 1.1 * lowest), 1.1 * highest)


def scale_x(ax: Axes, rows: list[Row], by_ratio: bool) -> None:
    if by_ratio:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator(sorted({row["ratio"] for row in rows})))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: ratio_label(ratio)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.margins(x=0.08)
        ax.set_xlabel(RATIO_LABEL)
        return
    lowest, highest = min(row["l0_low"] for row in rows), max(row["l0_high"] for row in rows)
    if highest > 2 * lowest > 0:
        ax.set_xscale("log")
        tick_plainly(ax.xaxis, highest / lowest)
    else:
        ax.set_xlim(lowest / 1.2, 1.2 * highest)
    ax.set_xlabel(L0_LABEL)


def tick_plainly(axis: Axis, spread: float) -> None:
    """Plain numbers on a logarithmic axis, more of them where it spans less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread > 10 else (1, 1.5, 2, 3, 4, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def draw_legend(figure: Figure, rows: list[Row], marker: dict[str, str], by_ratio: bool) -> None:
    """Ratios by colour, unless the axis says them; architectures by marker, if several."""
    handles = []
    if not by_ratio:
        for ratio in sorted({row["ratio"] for row in rows}):
            colour = ratio_colour(ratio)
            handles.append(Line2D([], [], color=colour, marker="o", label=ratio_label(ratio)))
    if len(marker) > 1:
        for name, shape in marker.items():
            handles.append(Line2D([], [], color=GREY, marker=shape, linestyle="", label=name))
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 8))


def small_print(rows: list[Row]) -> str:
    """What was measured on what: model, hook, tokens, intervals."""

    def tokens(key: str) -> str:
        return span((row[key] for row in rows), count)

    subject = ", ".join(dict.fromkeys(f"{row['lm']} {row['hook_name']}" for row in rows))
    clean = span((row["ce_clean"] for row in rows), "{:.2f}".format)
    l0 = span((row["l0"] for row in rows), "{:.1f}".format)
    return (
        f"{subject}; trained on {tokens('n_tokens_trained')} tokens; L0 {l0}. Held out: "
        f"{tokens('n_tokens_eval')} tokens, for cross-entropy {tokens('n_tokens_ce')} "
        f"(clean {clean} nats). Bars: 95 % intervals, bootstrap over documents. "
        "Lower is better in both panels."
    )


if __name__ == "__main__":
    main(draw, "summary.json", "fig_reconstruction", __doc__.splitlines()[0])

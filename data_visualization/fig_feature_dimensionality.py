"""How do features share dimensions as inputs get sparser, and do SAEs find them again?

    python -m data_visualization.fig_feature_dimensionality outputs

Seconds. Reads FOLDER/results/feature_dimensionality.json, writes
FOLDER/figures/fig_feature_dimensionality.png and .pdf.
"""

import random

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

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
    span,
)

# The paper's polytopes: each of n vertices in d dimensions has d / n of them.
POLYTOPES = {
    "alone": 1,
    "tetrahedron": 3 / 4,
    "triangle": 2 / 3,
    "antipodal pair": 1 / 2,
    "pentagon": 2 / 5,
    "square antiprism": 3 / 8,
}
TICKS = (1, 1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100)
ASIDE = {"pentagon": "bottom", "square antiprism": "top"}
JITTER = 0.03  # of the value, to both sides
STEP = 0.025  # of the value, from one architecture to the next


def draw(rows: list[Row]) -> Figure:
    """Dimensionality of every feature, and the share that SAEs recover, against 1 / (1 - S).

    `ValueError` if a key is missing.
    """
    of = {
        kind: [row for row in rows if row.get("kind") == kind]
        for kind in ("feature", "model", "sae", "null")
    }
    check_rows(of["feature"], (), ("inverse_density", "dimensionality"))
    check_rows(of["model"], (), ("inverse_density", "dimensions_per_feature"))
    panels = 2 if of["sae"] else 1
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 1.2 + 2.4 * panels))
        axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        draw_dimensionality(axes[0], of["feature"], of["model"])
        if of["sae"]:
            check_rows(of["sae"] + of["null"], ("architecture",), ("ratio", "recovered_90"))
            draw_recovery(axes[1], of["sae"], of["null"])
        scale_x(axes[-1], of["model"])
        caption(figure, small_print(of))
    return figure


def draw_dimensionality(ax: Axes, features: list[Row], models: list[Row]) -> None:
    """A point per feature, the polytopes' lines, and dimensions per feature of the whole model."""
    for value in POLYTOPES.values():
        ax.axhline(value, color="0.8", linewidth=0.6, zorder=1, label="_polytope")
    generator = random.Random(0)
    xs = [row["inverse_density"] * (1 + generator.uniform(-JITTER, JITTER)) for row in features]
    ys = [row["dimensionality"] for row in features]
    ax.plot(
        xs, ys, "o", color="C0", alpha=0.35, markersize=2.5, markeredgewidth=0,
        label="one feature: D", zorder=2,
    )  # fmt: skip
    draw_line(ax, models, "dimensions_per_feature", "C1", "s", "whole model: dimensions / ||W||²")
    names = ax.secondary_yaxis("right")
    names.set_yticks(list(POLYTOPES.values()), [*POLYTOPES])
    names.tick_params(length=0)
    for text in names.get_yticklabels():  # two lines are nearer than their names are high
        text.set_va(ASIDE.get(text.get_text(), "center_baseline"))
    names.spines["right"].set_visible(False)
    ax.set_ylim(0, 1.08)
    ax.grid(visible=False)
    ax.set_ylabel("dimensions of a feature")
    ax.legend(loc="upper right")


def draw_recovery(ax: Axes, saes: list[Row], null: list[Row]) -> None:
    """Shares of the represented features that dictionaries on the hidden activations recover."""
    marker = markers(row["architecture"] for row in saes)
    for i, (name, shape) in enumerate(marker.items()):
        aside = 1 + STEP * (i - (len(marker) - 1) / 2)  # intervals stand beside each other
        of_name = [
            row | {"inverse_density": row["inverse_density"] * aside}
            for row in saes
            if row["architecture"] == name
        ]
        draw_line(ax, of_name, "recovered_90", f"C{i + 2}", shape, name)
    draw_line(ax, null, "recovered_90", GREY, "", "random (null)")
    ax.set_ylim(-0.03, 1.05)
    ax.set_ylabel("features recovered by SAEs")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=len(marker) + 1)


def draw_line(ax: Axes, rows: list[Row], key: str, colour: str, marker: str, label: str) -> None:
    """Means joined by a line, with their intervals if there are any."""
    rows = sorted(rows, key=lambda row: row["inverse_density"])
    xs = [row["inverse_density"] for row in rows]
    look = {"color": colour, "linestyle": "-" if marker else "--", "zorder": 3}
    ax.plot(xs, [row[key] for row in rows], marker=marker, markersize=3.5, label=label, **look)
    for row in rows:
        if row.get(f"{key}_low") is not None:
            ends = max(row[f"{key}_low"], 0.0), min(row[f"{key}_high"], 1.0)
            ax.plot([row["inverse_density"]] * 2, ends, color=colour, label="_interval")


def scale_x(ax: Axes, models: list[Row]) -> None:
    lowest, highest = (f(row["inverse_density"] for row in models) for f in (min, max))
    ax.set_xscale("log")
    ax.set_xlim(lowest / 1.08, highest * 1.08)
    ax.xaxis.set_major_locator(FixedLocator(TICKS))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("1 / (1 - S): a feature is on in one of so many inputs")


def small_print(of: dict[str, list[Row]]) -> str:
    """What the models are, and what is drawn of them."""
    first = of["model"][0]
    n_seeds = span(row["dimensions_per_feature_n"] for row in of["model"])
    text = (
        f"Toy models of {first['n_features']} features in {first['d_hidden']} dimensions (Elhage "
        f"et al. 2022). Points: features with ||W|| > 0.5, of one seed. Lines: means of {n_seeds} "
        "seeds, bars their 95 % intervals, Student's t, cut at 0 and 1."
    )
    if of["sae"]:
        ratio = span(row["ratio"] for row in of["sae"])
        rows = span((row["n_tokens_trained"] for row in of["sae"]), count)
        text += (
            f" Below: SAEs of ratio 1:{ratio} on {rows} rows of hidden activations; recovered "
            "features have a cosine above 0.9 to one of theirs."
        )
    return text


if __name__ == "__main__":
    main(
        draw,
        "results/feature_dimensionality.json",
        "fig_feature_dimensionality",
        __doc__.splitlines()[0],
    )

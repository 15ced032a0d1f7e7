"""How well do words say what units fire on: SAE features, neurons and random directions?

    python -m data_visualization.fig_interpretability RUN_FOLDER

Seconds. Reads RUN_FOLDER/results/interpret_units.json, writes RUN_FOLDER/figures/
fig_interpretability.png and .pdf.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_visualization.style import (
    LOOK,
    WIDTH,
    Row,
    caption,
    check_rows,
    count,
    is_number,
    main,
    ratio_label,
    span,
)

FAMILIES = {
    "sae": ("SAE features", "#0072b2", "o"),
    "neuron_basis": ("neurons", "0.25", "s"),
    "random_directions": ("random directions", "0.6", "^"),
}
NEGATIVES = {
    "random": "any silent token",
    "near_miss": "most similar contexts",
    "same_previous": "after the same tokens",
    "same_token": "the same tokens",
}
AIM = 4  # the ratio whose deciles are drawn
TEXT = ("name", "family", "hook_name")


def draw(rows: list[Row]) -> Figure:
    """Scores of descriptions by ratio (or hook), by strength of firing, and intruders found.

    `ValueError` if there are no descriptions, or a family has no label.
    """
    of_rules = [row for row in rows if row.get("described_by") == "rules"]
    scored = [row for row in of_rules if row.get("balanced_accuracy") is not None]
    check_rows(scored, TEXT, ["balanced_accuracy", "n_units", "n_tokens_eval", "n_groups_eval"])
    unknown = {row["family"] for row in rows} - FAMILIES.keys()
    if unknown:
        raise ValueError(f"there is no label for the family {min(unknown)}")
    groups = list(dict.fromkeys(group(row, rows) for row in sorted(scored, key=order)))
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 4.7))
        above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
        axes = above.subplots(1, len(NEGATIVES), sharey=True)
        for ax, (kind, title) in zip(axes, NEGATIVES.items(), strict=True):
            some = [row for row in scored if row["negatives"] == kind]
            draw_points(ax, some, rows, groups, "balanced_accuracy", 0.5)
            ax.set_title(title)
        axes[0].set_ylabel("balanced accuracy of rules")
        left, right = below.subplots(1, 2, width_ratios=(1.2, 1))
        draw_deciles(left, rows)
        intruders = [row for row in rows if row.get("what") == "intruder" and row["decile"] is None
                     and row["intruder"] == "random" and row["token"] == "hidden"
                     and row.get("accuracy") is not None]  # fmt: skip
        draw_points(right, intruders, rows, groups, "accuracy", 0.2)
        right.set_ylabel("intruders found")
        handles, labels = axes[0].get_legend_handles_labels()
        above.legend(handles, labels, loc="outside upper center", ncols=3)
        caption(figure, small_print(scored))
    return figure


def order(row: Row) -> tuple:
    return row["hook_name"], row.get("ratio") or 0, row["name"]


def group(row: Row, rows: list[Row]) -> str:
    """What stands on the x axis: hooks if there are several, else ratios, else names."""
    if len({one["hook_name"] for one in rows}) > 1:
        return row["hook_name"].removeprefix("blocks.").replace("hook_resid_", "")
    return ratio_label(row["ratio"]) if row.get("ratio") else row["name"]


def draw_points(
    ax: Axes, some: list[Row], rows: list[Row], groups: list[str], key: str, chance: float
) -> None:
    """One point per dictionary with its interval, families side by side."""
    ax.axhline(chance, color="0.5", linestyle=":", linewidth=0.9, label="_chance")
    for i, (family, (label, colour, marker)) in enumerate(FAMILIES.items()):
        for place, name in enumerate(groups):
            points = [r for r in some if r["family"] == family and group(r, rows) == name]
            points.sort(key=order)
            for j, row in enumerate(points):
                x = place + (i - 1) * 0.27 + (j - (len(points) - 1) / 2) * 0.07
                ax.plot([x, x], [row[f"{key}_low"], row[f"{key}_high"]], color=colour,
                        linewidth=0.7, label="_interval")  # fmt: skip
                ax.plot(x, row[key], marker, color=colour, markersize=2.8,
                        label=label if place == j == 0 else f"_{label}")  # fmt: skip
    ax.set_xticks(range(len(groups)), groups)
    ax.grid(False, axis="x")
    ax.set_xlim(-0.5, len(groups) - 0.5)


def draw_deciles(ax: Axes, rows: list[Row]) -> None:
    """From weak to strong firing, of the ratio nearest to 4: the mean over its dictionaries."""
    deciles = [row for row in rows if row.get("what") == "decile"
               and row.get("balanced_accuracy") is not None]  # fmt: skip
    ratios = {row.get("ratio") or AIM for row in deciles}
    if not ratios:
        raise ValueError("there are no scores by decile of activation to draw")
    ratio = min(ratios, key=lambda one: abs(one - AIM))
    ax.axhline(0.5, color="0.5", linestyle=":", linewidth=0.9, label="_chance")
    for family, (label, colour, marker) in FAMILIES.items():
        shown = [row for row in deciles if row["family"] == family
                 and (row.get("ratio") or AIM) == ratio]  # fmt: skip
        for name in dict.fromkeys(row["name"] for row in shown):
            line = [row for row in shown if row["name"] == name]
            x = [row["decile"] for row in line]
            ax.plot(x, [row["balanced_accuracy"] for row in line], "-", color=colour, alpha=0.35,
                    linewidth=0.7, label=f"_{name}")  # fmt: skip
            if all(is_number(row.get("balanced_accuracy_low")) for row in line):
                low, high = ([row[f"balanced_accuracy_{end}"] for row in line]
                             for end in ("low", "high"))  # fmt: skip
                ax.fill_between(x, low, high, color=colour, alpha=0.06, linewidth=0)
        places = sorted({row["decile"] for row in shown})
        means = []
        for place in places:
            values = [row["balanced_accuracy"] for row in shown if row["decile"] == place]
            means.append(sum(values) / len(values))
        ax.plot(places, means, f"{marker}-", color=colour, markersize=3.5, label=label)
    ax.set_xticks(range(1, 11))
    ax.set_xlabel(f"decile of activation, {ratio_label(ratio)}")
    ax.set_ylabel("balanced accuracy of rules")


def small_print(rows: list[Row]) -> str:
    n_tokens = span((row["n_tokens_eval"] for row in rows), count)
    n_groups, n_units = (span(row[key] for row in rows) for key in ("n_groups_eval", "n_units"))
    return (
        "Rules about tokens, found on one half of the held-out documents and scored on the other "
        f"({n_tokens} tokens of {n_groups} documents or files) against four kinds of "
        f"silent tokens; {n_units} units each, neurons and directions cut "
        "to fire as often as their partner in the SAE. One point per dictionary, bars and bands: "
        "95 % intervals over documents and units; dotted: chance. Intruders: of five contexts, "
        "the one where the unit is silent is told by its likeness to the others, its token hidden."
    )


if __name__ == "__main__":
    main(draw, "results/interpret_units.json", "fig_interpretability", __doc__.splitlines()[0])

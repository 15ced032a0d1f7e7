"""How many concepts do units stand for, at equal firing rates, SAE features beside all else?

    python -m data_visualization.fig_polysemanticity RUN_FOLDER

Seconds. Reads RUN_FOLDER/results/polysemanticity.json, writes RUN_FOLDER/figures/
fig_polysemanticity.png and .pdf.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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

TEXT = ("family", "condition", "ratio")
NUMBERS = (
    "n_units", "n_sampled", "n_seeds", "n_eff", "n_eff_low", "n_eff_high", "n_eff_null",
    "polysemantic", "polysemantic_low", "polysemantic_high", "n_documents", "n_tokens_eval",
    "n_concepts",
)  # fmt: skip
FAMILIES = {
    "sae": "SAE",
    "frozen_decoder": "SAE, frozen decoder",
    "untrained": "SAE untrained",
    "sae_random_lm": "SAE of random weights",
    "sae_shuffled_lm": "SAE of shuffled weights",
    "mlp_neurons": "MLP neurons",
    "neuron_basis": "residual neurons",
    "random_rotation": "random rotation",
    "pca": "PCA",
    "ica": "ICA",
    "random_directions": "random directions",
    "whitened_random": "random, whitened",
}
OTHER = ("native", "topk")  # conditions that are no rate
MEASURES = {
    "n_eff": "effective number of concepts",
    "polysemantic": "share polysemantic",
}


def draw(rows: list[Row]) -> Figure:
    """Both measures at the primary rate, and the effective number against the rate.

    `ValueError` if a key is missing or a family has no label.
    """
    families = [row for row in rows if row.get("what") == "family" and row["n_units"]]
    check_rows([row | {"name": row["family"]} for row in families], TEXT, NUMBERS)
    unknown = {row["family"] for row in families} - FAMILIES.keys()
    if unknown:
        raise ValueError(f"there is no label for the family {min(unknown)}")
    rates = [row["rate"] for row in rows if row.get("what") == "detail"]
    if not rates:
        raise ValueError("there are no rows of details, which say the primary rate")
    primary = str(rates[0])
    shown = [row for row in families if row["condition"] == primary]
    labels = list(dict.fromkeys(label(row) for row in sorted(shown, key=place)))
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 1.2 + 0.19 * len(labels) + 2.2))
        grid = figure.subplots(2, 2, height_ratios=[0.19 * len(labels) + 0.4, 2.2])
        for ax, measure in zip(grid[0], MEASURES, strict=True):
            draw_families(ax, shown, measure, labels)
        grid[0, 1].set_yticklabels([])
        draw_rates(grid[1, 0], families)
        draw_distributions(grid[1, 1], rows)
        caption(figure, small_print(families, shown, primary))
    return figure


def label(row: Row) -> str:
    name = FAMILIES[row["family"]]
    return f"{name} {ratio_label(row['ratio'])}" if row["family"] == "sae" else name


def place(row: Row) -> tuple[int, int]:
    return list(FAMILIES).index(row["family"]), row["ratio"] or 0


def colour(row: Row) -> str:
    if row["family"] == "sae":
        return ratio_colour(row["ratio"])
    return "0.15" if row["family"] == "mlp_neurons" else GREY


def draw_families(ax: Axes, rows: list[Row], measure: str, labels: list[str]) -> None:
    """A line per family; a tick where the same units stand when concepts are dealt anew."""
    for row in rows:
        y = labels.index(label(row))
        ends = [row[f"{measure}_low"], row[f"{measure}_high"]]
        ax.plot(ends, [y, y], color=colour(row), label="_interval")
        ax.plot(row[measure], y, "o", color=colour(row), label=f"_{label(row)}", zorder=3)
        ax.plot(row[f"{measure}_null"], y, "|", color="0.7", markersize=8, label="_null")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(1 if measure == "n_eff" else 0, None)
    ax.set_xlabel(MEASURES[measure])


HIGHLIGHTED = ("sae", "mlp_neurons", "frozen_decoder", "random_directions")


def draw_rates(ax: Axes, rows: list[Row]) -> None:
    """The effective number of some families against the rate at which they are cut."""
    for name in dict.fromkeys(label(row) for row in sorted(rows, key=place)):
        line = [row for row in rows if label(row) == name and row["condition"] not in OTHER]
        if line and line[0]["family"] in HIGHLIGHTED:
            x = [100 * float(row["condition"]) for row in line]
            style = "--" if line[0]["family"] == "random_directions" else "-"
            marker = {"frozen_decoder": "s"}.get(line[0]["family"], "o")
            ax.plot(x, [row["n_eff"] for row in line], style, marker=marker, markersize=3,
                    color=colour(line[0]), label=name)  # fmt: skip
            ax.fill_between(
                x, [row["n_eff_low"] for row in line], [row["n_eff_high"] for row in line],
                color=colour(line[0]), alpha=0.15, linewidth=0, label="_interval",
            )  # fmt: skip
    rates = sorted(
        {100 * float(row["condition"]) for row in rows if row["condition"] not in OTHER}
    )
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ax.set_xticks([], minor=True)
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    ax.set_xlabel("tokens that a unit fires on, %")
    ax.set_ylabel(MEASURES["n_eff"])
    ax.legend(loc="upper left", fontsize=6.5, ncols=2)


def draw_distributions(ax: Axes, rows: list[Row]) -> None:
    """Share of units with at most so many effective concepts, all seeds together."""
    for row in sorted((row for row in rows if row.get("what") == "detail"), key=place):
        if row["family"] in HIGHLIGHTED:
            values = row["n_eff_percentiles"]
            share = [i / (len(values) - 1) for i in range(len(values))]
            style = "--" if row["family"] == "random_directions" else "-"
            ax.plot(values, share, style, color=colour(row), label=f"_{label(row)}")
    ax.set_xlim(1, None)
    ax.set_ylim(0, 1)
    ax.set_xlabel(MEASURES["n_eff"])
    ax.set_ylabel("share of units with at most so many")


def small_print(families: list[Row], shown: list[Row], primary: str) -> str:
    """What was measured on what, what is matched, what the bars are."""

    def numbers(key: str) -> str:
        return span((row[key] for row in shown), count)

    return (
        f"Every unit is cut to fire on {100 * float(primary):g} % of the tokens, but in the panel "
        f"of rates; {numbers('n_units')} of {numbers('n_sampled')} sampled units of a family can "
        f"and are judged. {numbers('n_tokens_eval')} held-out tokens of "
        f"{numbers('n_documents')} documents of {numbers('n_concepts')} concepts. Polysemantic: "
        "more than twice as often in concepts of two superclasses (false-discovery rate 5 %). "
        "Bars and bands: 95 % intervals from documents, seeds and units (share: units). Grey "
        "ticks: the same units when concepts are dealt anew to whole documents."
    )


if __name__ == "__main__":
    main(draw, "results/polysemanticity.json", "fig_polysemanticity", __doc__.splitlines()[0])

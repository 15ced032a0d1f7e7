"""Of which concepts are weak firings, and of which strong ones: a neuron beside SAE features?

    python -m data_visualization.fig_histogram RUN_FOLDER

Seconds. Reads RUN_FOLDER/results/find_units.json, writes RUN_FOLDER/figures/fig_histogram.png and
.pdf.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_visualization.style import LOOK, WIDTH, Row, caption, check_rows, count, main

OTHERS = "others"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
NAMES = {
    "mlp_neurons": "MLP neuron",
    "neuron_basis": "residual neuron",
    "random_directions": "random direction",
    "sae": "SAE feature",
}
WITH_SEVERAL = ("mlp_neurons", "random_directions")  # one unit of each for all concepts together
N_COLUMNS = 3


def draw(rows: list[Row]) -> Figure:
    """A panel per unit: firings by activation, stacked by concept, the largest at the bottom.

    `ValueError` if there are no rows of histograms.
    """
    bins = [row for row in rows if row.get("what") == "histogram"]
    check_rows([row | {"name": row.get("family", "a unit")} for row in bins],
               ["family", "unit", "role", "concept"], ["low", "high", "n_firings"])  # fmt: skip
    concepts = [name for name in dict.fromkeys(row["concept"] for row in bins) if name != OTHERS]
    colours = dict(zip(concepts, COLOURS, strict=False)) | {OTHERS: "0.75"}
    panels = units(bins, concepts)
    n_rows = -(-len(panels) // N_COLUMNS)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.9 + 1.55 * n_rows))
        axes = figure.subplots(n_rows, N_COLUMNS, squeeze=False).flatten()
        for ax, (family, unit) in zip(axes, panels, strict=False):
            some = [row for row in bins if (row["family"], row["unit"]) == (family, unit)]
            draw_unit(ax, some, colours)
            ax.set_title(f"{NAMES.get(family, family)} {unit}")
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        for ax in axes[: len(panels) : N_COLUMNS]:
            ax.set_ylabel("firings")
        for ax in axes[max(0, len(panels) - N_COLUMNS) : len(panels)]:
            ax.set_xlabel("activation")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
        caption(figure, small_print(bins))
    return figure


def units(bins: list[Row], concepts: list[str]) -> list[tuple[str, int]]:
    """The first unit that was found for all concepts, of some families; the SAE's for each."""
    found = {}
    for row in bins:
        if row["role"] == "several" and row["family"] in WITH_SEVERAL:
            found.setdefault(row["family"], (row["family"], row["unit"]))
    for name in concepts:
        of_concept = [row for row in bins if row["role"] == name]
        if of_concept:
            found[name] = (of_concept[0]["family"], of_concept[0]["unit"])
    return list(dict.fromkeys(found.values()))


def draw_unit(ax: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    role = rows[0]["role"]  # a unit may have been found twice
    base: dict[float, int] = {}
    for concept, colour in colours.items():
        line = [row for row in rows if row["concept"] == concept and row["role"] == role]
        low = [row["low"] for row in line]
        ax.bar(
            low, [row["n_firings"] for row in line], [row["high"] - row["low"] for row in line],
            [base.get(x, 0) for x in low], align="edge", color=colour, label=concept,
        )  # fmt: skip
        for row in line:
            base[row["low"]] = base.get(row["low"], 0) + row["n_firings"]
    ax.grid(False, axis="x")
    ax.xaxis.set_major_locator(MaxNLocator(4))
    ax.yaxis.set_major_locator(MaxNLocator(4))


def small_print(bins: list[Row]) -> str:
    n = {}
    for row in bins:
        key = row["family"], row["unit"], row["role"]
        n[key] = n.get(key, 0) + row["n_firings"]
    few, many = count(min(n.values())), count(max(n.values()))
    return (
        f"Every unit is cut to fire equally often on text that chose it; here, on other people's "
        f"text, they fire {few} to {many} times. Others: the corpus's remaining concepts. Neuron "
        "and direction: of all, the ones in which the least of the named concepts is lifted most."
    )


if __name__ == "__main__":
    main(draw, "results/find_units.json", "fig_histogram", __doc__.splitlines()[0])

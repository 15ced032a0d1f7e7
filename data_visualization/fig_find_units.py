"""Which neurons fire for several unrelated things, and which SAE features for one each?

    python -m data_visualization.fig_find_units RUN_FOLDER

Seconds. Reads RUN_FOLDER/results/find_units.json, writes RUN_FOLDER/figures/fig_find_units.png
and .pdf.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_visualization.style import LOOK, WIDTH, Row, caption, check_rows, count, main, span

TEXT = ("family", "role")
NUMBERS = ("unit", "n_eff", "n_firings", "n_searched")
FAMILIES = {
    "mlp_neurons": "MLP neuron",
    "neuron_basis": "residual neuron",
    "random_directions": "random direction",
    "sae": "SAE feature",
}
SEVERAL = "several"
OTHERS = "others"


def draw(rows: list[Row]) -> Figure:
    """A line per unit, a column per concept: the share of the unit's firings.

    Above the units of each family that were found as one for all concepts, below the SAE features
    that were found for one concept each. `ValueError` if a key is missing.
    """
    units = [row for row in rows if row.get("what") == "unit" and row.get("n_firings")]
    check_rows([row | {"name": row.get("family", "a row")} for row in units], TEXT, NUMBERS)
    unknown = {row["family"] for row in units} - FAMILIES.keys()
    if unknown:
        raise ValueError(f"there is no label for the family {min(unknown)}")
    concepts = [key.removeprefix("share_") for key in units[0] if key.startswith("share_")]
    several = [row for row in units if row["role"] == SEVERAL and row["family"] != "sae"]
    single = [row for row in units if row["role"] != SEVERAL]
    with matplotlib.rc_context(LOOK | {"axes.grid": False}):
        heights = [len(several), len(single)]
        figure = Figure(figsize=(WIDTH, 1.4 + 0.19 * sum(heights)))
        axes = figure.subplots(2, 1, height_ratios=heights, sharex=True)
        draw_shares(axes[0], several, concepts, "one unit for all of them")
        draw_shares(axes[1], single, concepts, "one feature for each of them")
        caption(figure, small_print(units))
    return figure


def draw_shares(ax: Axes, rows: list[Row], concepts: list[str], title: str) -> None:
    """Shares as shades with their numbers; the rest of the firings is in the last column."""
    shares = [[row[f"share_{concept}"] for concept in concepts] for row in rows]
    shares = [[*line, 1 - sum(line)] for line in shares]
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            colour = "white" if share > 0.5 else "0.2"
            ax.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=7, color=colour)
    ax.set_xticks(range(len(concepts) + 1), [*concepts, OTHERS])
    ax.set_yticks(range(len(rows)), [label(row) for row in rows])
    ax.tick_params(length=0, top=False, bottom=False)
    ax.spines[:].set_visible(False)
    ax.set_title(title)


def label(row: Row) -> str:
    """What it is, its number, its effective number of concepts."""
    return f"{FAMILIES[row['family']]} {row['unit']} ({row['n_eff']:.1f})"


def small_print(rows: list[Row]) -> str:
    """How the units were found, on what they are shown."""

    def numbers(key: str) -> str:
        return span((row[key] for row in rows), count)

    return (
        "Share of each unit's firings in the named concepts and in all others of the corpus, on "
        f"sources that did not choose it ({numbers('n_firings')} firings). Of "
        f"{numbers('n_searched')} units of a family, all cut to fire equally often, those are "
        "shown whose least lift over other text was the largest. In brackets the effective "
        "number of concepts."
    )


if __name__ == "__main__":
    main(draw, "results/find_units.json", "fig_find_units", __doc__.splitlines()[0])

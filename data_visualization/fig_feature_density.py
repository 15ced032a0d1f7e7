"""How often do the features fire, and how many never do?

    python -m data_visualization.fig_feature_density RUN_FOLDER

Seconds. Reads RUN_FOLDER/results/feature_density.json, writes
RUN_FOLDER/figures/fig_feature_density.png and .pdf.
"""

import math
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from numpy import ndarray

from data_visualization.style import (
    LOOK,
    WIDTH,
    Row,
    caption,
    check_rows,
    count,
    is_number,
    main,
    ratio_colour,
    ratio_label,
    span,
)

OTHER = ("name", "architecture", "hook_name", "seed", "log10_density_low", "log10_density_high")
NUMBERS = ("ratio", "l1_coeff", "n_features", "n_tokens")
COLUMNS = 3
SILENT_COLOUR = "#b5413a"
SILENT_WIDTH = 0.35  # decades
SILENT_GAP = 0.4  # decades between the features that never fire and the rarest that do


class Histogram(NamedTuple):
    """One SAE: its features' shares between consecutive edges, and the silent ones' share."""

    hook_name: str
    ratio: float
    l1_coeff: float
    name: str
    n_features: int
    edges: list[float]
    shares: list[float]
    silent: float


def draw(rows: list[Row]) -> Figure:
    """Histograms of log10 firing density, a panel per hook and ratio, never firing set apart.

    Heights are shares of all features of an SAE. Several SAEs of one ratio are outlined, the
    smaller l1_coeff lighter. `ValueError` if a key is missing or a bin is no interval.
    """
    check_rows(rows, OTHER, NUMBERS)
    check_bins(rows)
    panels = by_panel(histograms(rows))
    rarest = min((row["log10_density_low"] for row in rows if not is_silent(row)), default=-4)
    several_hooks = len({row["hook_name"] for row in rows}) > 1
    n_lines, n_columns = math.ceil(len(panels) / COLUMNS), min(len(panels), COLUMNS)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.7 + 1.4 * n_lines))
        grid = figure.subplots(n_lines, n_columns, sharex=True, sharey=True, squeeze=False)
        for ax in grid.flat[len(panels) :]:
            ax.remove()
        for ax, panel in zip(grid.flat, panels, strict=False):
            draw_panel(ax, panel, silent_left=rarest - SILENT_GAP)
            ax.set_title(panel_title(panel, several_hooks))
        label_axes(grid, len(panels), rarest)
        caption(figure, small_print(rows, panels))
    return figure


def is_silent(row: Row) -> bool:
    return row["log10_density_low"] is None


def check_bins(rows: list[Row]) -> None:
    for row in rows:
        bounds = row["log10_density_low"], row["log10_density_high"]
        rises = all(map(is_number, bounds)) and bounds[0] < bounds[1]
        if not rises and bounds != (None, None):
            raise ValueError(
                f"{row['name']} has a bin from {bounds[0]} to {bounds[1]}; it must rise, or be "
                "null to null for the features that never fired"
            )


def histograms(rows: list[Row]) -> list[Histogram]:
    """The SAEs in the order of hook, ratio, coefficient, name."""
    by_sae: dict[tuple, list[Row]] = {}
    for row in rows:
        key = (row["hook_name"], row["ratio"], row["l1_coeff"], row["name"])
        by_sae.setdefault(key, []).append(row)
    return [histogram(by_sae[key]) for key in sorted(by_sae)]


def histogram(rows: list[Row]) -> Histogram:
    """The histogram of one SAE's rows; a bin that no row names is empty."""
    n_features = sum(row["n_features"] for row in rows)
    if n_features == 0:
        raise ValueError(f"{rows[0]['name']} has no features: every n_features is 0")
    fired = [row for row in rows if not is_silent(row)]
    counts = {row["log10_density_low"]: row["n_features"] for row in fired}
    edges = sorted({*counts, *(row["log10_density_high"] for row in fired)})
    return Histogram(
        hook_name=rows[0]["hook_name"],
        ratio=rows[0]["ratio"],
        l1_coeff=rows[0]["l1_coeff"],
        name=rows[0]["name"],
        n_features=n_features,
        edges=edges,
        shares=[counts.get(low, 0) / n_features for low in edges[:-1]],
        silent=1 - sum(counts.values()) / n_features,
    )


def by_panel(saes: list[Histogram]) -> list[list[Histogram]]:
    panels: dict[tuple, list[Histogram]] = {}
    for sae in saes:
        panels.setdefault((sae.hook_name, sae.ratio), []).append(sae)
    return list(panels.values())


def draw_panel(ax: Axes, panel: list[Histogram], silent_left: float) -> None:
    """One ratio: filled if it is one SAE, else outlines from light to dark."""
    alone = len(panel) == 1
    coefficients = sorted({sae.l1_coeff for sae in panel})
    width = SILENT_WIDTH / len(panel)
    for i, sae in enumerate(panel):
        strength = (coefficients.index(sae.l1_coeff) + 1) / len(coefficients)
        colour = mixed_with_white(ratio_colour(sae.ratio), strength)
        if sae.shares:
            ax.stairs(sae.shares, sae.edges, fill=alone, color=colour, linewidth=0.9)
        red = mixed_with_white(to_rgb(SILENT_COLOUR), strength)
        ax.bar(silent_left + i * width, sae.silent, width, align="edge", color=red)
    if alone:
        ax.annotate(
            f"{100 * panel[0].silent:.1f} %", (silent_left, panel[0].silent), (0, 2),
            textcoords="offset points", color=SILENT_COLOUR, fontsize=6.5,
        )  # fmt: skip


def mixed_with_white(colour: tuple[float, ...], strength: float) -> tuple[float, ...]:
    kept = 0.25 + 0.75 * strength  # the lightest outline is still seen
    return tuple(1 - kept * (1 - channel) for channel in colour[:3])


def panel_title(panel: list[Histogram], several_hooks: bool) -> str:
    n_features = span((sae.n_features for sae in panel), "{:,}".format)
    title = f"{ratio_label(panel[0].ratio)}, {n_features} features"
    return f"{panel[0].hook_name}\n{title}" if several_hooks else title


def label_axes(grid: ndarray, n_panels: int, rarest: float) -> None:
    """Powers of ten below the lowest panel of each column, zero under the bin set apart."""
    powers = range(math.ceil(rarest), 1)
    positions = [rarest - SILENT_GAP + SILENT_WIDTH / 2, *powers]
    labels = ["0", *(f"$10^{{{power}}}$" for power in powers)]
    n_columns = grid.shape[1]
    for i, ax in enumerate(grid.flat[:n_panels]):
        ax.set_xticks(positions, labels)
        ax.set_xlim(rarest - SILENT_GAP - 0.15, 0.05)
        ax.grid(axis="x", visible=False)
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        if i % n_columns == 0:
            ax.set_ylabel("share of features")
        if i + n_columns >= n_panels:
            ax.tick_params(labelbottom=True)
            ax.set_xlabel("share of tokens a feature fires on")


def small_print(rows: list[Row], panels: list[list[Histogram]]) -> str:
    hooks = ", ".join(dict.fromkeys(row["hook_name"] for row in rows))
    tokens = span((row["n_tokens"] for row in rows), count)
    text = f"{hooks}; {tokens} held-out tokens. Red: features that fired on none of them."
    if any(len(panel) > 1 for panel in panels):
        text += " Several autoencoders of one ratio are outlined, a smaller l1_coeff lighter."
    return text


if __name__ == "__main__":
    main(draw, "results/feature_density.json", "fig_feature_density", __doc__.splitlines()[0])

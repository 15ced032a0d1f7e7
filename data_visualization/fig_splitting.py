"""What becomes of a concept's feature in larger dictionaries: does it split, is it absorbed?

    python -m data_visualization.fig_splitting RUN_FOLDER

Seconds. Reads RUN_FOLDER/results/probe_concepts.json, writes RUN_FOLDER/figures/fig_splitting.png
and .pdf.
"""

from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from data_visualization.style import (
    LOOK,
    WIDTH,
    Row,
    caption,
    check_rows,
    is_number,
    main,
    ratio_axis,
    span,
)

COLOURS = {"sae": "#0072b2", "untrained": "0.5"}
LABELS = {"sae": "trained", "untrained": "untrained"}
NULL = "null: shuffled labels (absorbed), all other documents (covered)"


class Panel(NamedTuple):
    """A measure, and beside it what chance gives: of the same rows or of others."""

    label: str
    key: str
    rows: list[Row]
    null_key: str = ""
    null_rows: list[Row] = []


def draw(rows: list[Row]) -> Figure:
    """Features that a concept needs, what others absorb, what a feature's children cover.

    Means over concepts. `ValueError` if no row is of splitting.
    """
    shown = [panel for panel in panels(rows) if panel.rows]
    if not shown or shown[0].key != "n_needed":
        raise ValueError("there are no rows of splitting; the run needs SAEs")
    for panel in shown:
        check_rows([row | {"name": f"a row of {row['kind']}"} for row in panel.rows],
                   ["family"], ["ratio", panel.key])  # fmt: skip
    n_lines = -(-len(shown) // 2)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.9 + 1.75 * n_lines))
        axes = figure.subplots(n_lines, 2, squeeze=False).flatten()
        for ax, panel in zip(axes, shown, strict=False):
            draw_panel(ax, panel)
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        for ax in axes[max(0, len(shown) - 2) : len(shown)]:
            ax.set_xlabel("ratio of the dictionary to the layer")
        families = {row["family"] for row in shown[0].rows}
        handles = [Line2D([], [], color=colour, marker="o", label=LABELS[family])
                   for family, colour in COLOURS.items() if family in families]  # fmt: skip
        handles.append(
            Line2D([], [], color="0.2", linestyle=":", marker="o", fillstyle="none", label=NULL)
        )
        figure.legend(handles=handles, loc="outside upper center", ncols=3)
        caption(figure, small_print(shown))
    return figure


def panels(rows: list[Row]) -> list[Panel]:
    """Children are the next seed's where there are any: a seed's own start with the same rows."""

    def of(kind: str, labels: str) -> list[Row]:
        return over_seeds([
            row for row in rows
            if row.get("concept") == "all" and row.get("kind") == kind
            and row.get("labels") == labels and row.get("family") in COLOURS
        ])  # fmt: skip

    children = of("children", "true")
    children = [row for row in children if not row.get("shares_start")] or children
    return [
        Panel("features a concept needs", "n_needed", of("splitting", "true")),
        Panel("share absorbed by others", "absorption", of("absorption", "true"), "absorption",
              of("absorption", "shuffled")),
        Panel("covered by the best child", "best_covers", children, "best_covers_silent",
              children),
        Panel("covered by the best three", "top_covers", children, "top_covers_silent", children),
    ]  # fmt: skip


def over_seeds(rows: list[Row]) -> list[Row]:
    """The means over seeds where there are any, else the single seed's."""
    seeds = [row for row in rows if row.get("seed") == "all"]
    return seeds or [row for row in rows if row.get("seed") is not None]


def series(rows: list[Row], family: str) -> list[list[Row]]:
    """A line per hook, architecture and sparsity, by ratio."""
    lines: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["family"] == family:
            key = tuple(row.get(k) for k in ("hook_name", "architecture", "target_l0", "l1_coeff"))
            lines.setdefault(key, []).append(row)
    return [sorted(line, key=lambda row: row["ratio"]) for line in lines.values()]


def draw_panel(ax: Axes, panel: Panel) -> None:
    for i, (family, colour) in enumerate(COLOURS.items()):
        shift = 1.05 ** (2 * i - 1)  # intervals beside each other
        for line in series(panel.rows, family):
            draw_line(ax, line, panel.key, shift, color=colour, label=LABELS[family])
        for line in series(panel.null_rows, family):
            draw_line(ax, line, panel.null_key, shift, color=colour, linestyle=":",
                      fillstyle="none", label=f"{LABELS[family]}, null")  # fmt: skip
    ratios = sorted({row["ratio"] for row in panel.rows})
    low, high = ax.get_ylim()
    ax.set_ylim(min(0, low), high + 0.05 * (high - min(0, low)))
    ax.set_ylabel(panel.label)
    ratio_axis(ax, ratios)
    ax.set_xticks([], minor=True)
    ax.margins(x=0.15)


def draw_line(ax: Axes, line: list[Row], key: str, shift: float, **look) -> None:
    xs = [row["ratio"] * shift for row in line]
    ax.plot(xs, [row[key] for row in line], marker="o", **look)
    for x, row in zip(xs, line, strict=True):
        ends = [row.get(f"{key}_low"), row.get(f"{key}_high")]
        if all(map(is_number, ends)):
            ax.plot([x, x], ends, color=look["color"], linewidth=0.8, label="_interval")


def small_print(shown: list[Panel]) -> str:
    rows = shown[0].rows
    n_seeds = max(row.get("n_seeds", 1) for row in rows)
    bars = f"Student's t over {n_seeds} seeds" if n_seeds > 1 else "over documents"
    text = (
        f"Means over {span(row['n_concepts'] for row in rows)} concepts, "
        f"{span(row['n_documents'] for row in rows)} documents of sources B; bars: 95 % "
        f"intervals, {bars}. Needed: features before one more brings less than 0.03 of F1. "
        "Absorbed: what up to three other features carry of the concept's direction where all "
        "its own are silent."
    )
    children = [row for panel in shown if "covers" in panel.key for row in panel.rows]
    if children:
        own = any(row.get("shares_start") for row in children)
        text += (
            " Covered: the smallest ratio's feature of a concept, followed into larger "
            f"dictionaries of {'the same' if own else 'another'} seed"
            f"{', which start with its rows' if own else ''}: share of the documents where it "
            "fires that its children fire on too. A trained line says something where it is "
            "above its null and the untrained one."
        )
    return text


if __name__ == "__main__":
    main(draw, "results/probe_concepts.json", "fig_splitting", __doc__.splitlines()[0])

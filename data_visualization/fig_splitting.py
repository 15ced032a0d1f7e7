"""What becomes of a concept's feature in larger dictionaries: does it split, is it absorbed?

    python -m data_visualization.fig_splitting RUN_FOLDER

Seconds. Reads RUN_FOLDER/results/probe_concepts.json, writes RUN_FOLDER/figures/fig_splitting.png
and .pdf.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_visualization.style import LOOK, WIDTH, Row, caption, check_rows, main, ratio_label, span

COLOURS = {"sae": "#0072b2", "untrained": "0.5"}
LABELS = {"sae": "trained", "untrained": "untrained"}
COVERS = {"best_covers": ("best child", "o"), "top_covers": ("best three", "s")}


def draw(rows: list[Row]) -> Figure:
    """Features that a concept needs, what a feature's children cover, what others absorb.

    Means over concepts. `ValueError` if no row is of splitting.
    """
    means = [row for row in rows if row.get("concept") == "all" and row.get("labels") == "true"]
    needed, children, absorbed = (
        over_seeds([row for row in means if row["kind"] == kind])
        for kind in ("splitting", "children", "absorption")
    )
    if not needed:
        raise ValueError("there are no rows of splitting; the run needs SAEs")
    check_rows(
        [row | {"name": row["family"]} for row in needed], ["family"], ["ratio", "n_needed"]
    )
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 2.7))
        left, middle, right = figure.subplots(1, 3)
        draw_by_ratio(left, needed, "n_needed", "features needed")
        draw_children(middle, children)
        draw_by_ratio(right, absorbed, "absorption", "absorbed share")
        named = [ax.get_legend_handles_labels() for ax in (left, middle)]
        handles, labels = ([*first, *second] for first, second in zip(*named, strict=True))
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        caption(figure, small_print(needed))
    return figure


def over_seeds(rows: list[Row]) -> list[Row]:
    """The means over seeds where there are any, else the single seed's."""
    seeds = [row for row in rows if row["seed"] == "all"]
    return seeds or [row for row in rows if row["seed"] is not None]


def draw_by_ratio(ax: Axes, rows: list[Row], key: str, label: str) -> None:
    for family, colour in COLOURS.items():
        line = sorted((row for row in rows if row["family"] == family), key=lambda r: r["ratio"])
        if line:
            ratios = [row["ratio"] for row in line]
            ax.plot(ratios, [row[key] for row in line], "o-", color=colour, label=LABELS[family])
            for row in line:
                ax.plot([row["ratio"]] * 2, [row[f"{key}_low"], row[f"{key}_high"]],
                        color=colour, linewidth=0.8, label="_interval")  # fmt: skip
    ax.set_ylim(0, None)
    ax.set_ylabel(label)
    ratio_axis(ax, rows)


def draw_children(ax: Axes, rows: list[Row]) -> None:
    """Of the next seed's dictionaries, which do not start with the parent's rows."""
    shown = [row for row in rows if not row.get("shares_start") and row["family"] == "sae"]
    for key, (label, marker) in COVERS.items():
        line = sorted(shown, key=lambda row: row["ratio"])
        ratios = [row["ratio"] for row in line]
        for suffix, style, where in (("", "-", ""), ("_silent", ":", ", elsewhere")):
            ax.plot(ratios, [row[key + suffix] for row in line], marker + style, color="#d55e00",
                    fillstyle="none" if suffix else "full", label=label + where)  # fmt: skip
            for row in line:
                ends = [row[f"{key}{suffix}_low"], row[f"{key}{suffix}_high"]]
                ax.plot([row["ratio"]] * 2, ends, color="#d55e00", linewidth=0.7,
                        label="_interval")  # fmt: skip
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("share of documents")
    ratio_axis(ax, shown)


def ratio_axis(ax: Axes, rows: list[Row]) -> None:
    ratios = sorted({row["ratio"] for row in rows})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ratios, [ratio_label(ratio) for ratio in ratios])
    ax.set_xticks([], minor=True)
    ax.margins(x=0.15)
    ax.set_xlabel("ratio")


def small_print(rows: list[Row]) -> str:
    n = span(row["n_concepts"] for row in rows)
    documents = span(row["n_documents"] for row in rows)
    seeds = span(row.get("n_seeds", 1) for row in rows)
    return (
        f"Means over {n} concepts, {documents} documents of sources B; bars: 95 % intervals over "
        f"{seeds} seeds. Needed: features before one more brings less than 0.03 of F1. Middle: "
        "the smallest ratio's feature of a concept, followed into another seed's dictionaries: "
        "share of the documents where it fires that its children cover (full), and of all other "
        "documents (open), which chance covers too. Absorbed: what up to three other features "
        "carry of the concept's direction where all its own are silent."
    )


if __name__ == "__main__":
    main(draw, "results/probe_concepts.json", "fig_splitting", __doc__.splitlines()[0])

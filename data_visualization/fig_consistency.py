"""Which conditions make dictionaries learn the same features?

    python -m data_visualization.fig_consistency outputs

Seconds. Reads FOLDER/results/consistency.json, writes FOLDER/figures/fig_consistency.png and .pdf.
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
    main,
    ratio_axis,
    ratio_colour,
    ratio_label,
    span,
)

MEASURES = {
    "decoder_cosine": "mean of the largest cosine",
    "correlation": "mean correlation with the partner",
}
MATRICES = {"ratio": "ratios", "layer": "layers", "model": "language models"}
TEXT = ("condition", "a", "b", "lm_a", "hook_name_a")
NUMBERS = ("correlation", "correlation_null", "n_pairs", "n_tokens_correlation", "ratio_a")


def draw(rows: list[Row]) -> Figure:
    """Similarity of ratios against ratio, above; matrices of every kind of condition, below.

    `ValueError` if a key is missing.
    """
    summary = [row for row in rows if row.get("what") == "condition"]
    check_rows(summary, TEXT, NUMBERS)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 5.2))
        above, below = figure.subfigures(2, 1, height_ratios=(1.15, 1))
        by_ratio = [row for row in summary if is_ratio(row["a"]) and is_ratio(row["b"])]
        for ax, measure in zip(above.subplots(1, 2), MEASURES, strict=True):
            draw_ratios(ax, by_ratio, measure)
        handles, labels = above.axes[0].get_legend_handles_labels()
        above.legend(handles, labels, loc="outside upper center", ncols=7)
        drawn = {kind: matrix(summary, kind) for kind in MATRICES}
        drawn = {kind: found for kind, found in drawn.items() if found[0]}
        widths = [1 + len(labels) for labels, _ in drawn.values()]
        axes = below.subplots(1, len(drawn), squeeze=False, width_ratios=widths)[0]
        for ax, (kind, (names, cells)) in zip(axes, drawn.items(), strict=True):
            draw_matrix(ax, MATRICES[kind], names, cells)
        caption(figure, small_print(summary))
    return figure


def is_ratio(label: str) -> bool:
    return label.startswith("ratio ")


def ratio_of(label: str) -> int:
    return int(label.removeprefix("ratio "))


def draw_ratios(ax: Axes, rows: list[Row], measure: str) -> None:
    """A line per ratio of b, over the ratios of a; its null dashed in the same colour."""
    ratios = sorted({ratio_of(row["a"]) for row in rows})
    for to in ratios:
        of_b = sorted(
            (row for row in rows if ratio_of(row["b"]) == to), key=lambda r: ratio_of(r["a"])
        )
        xs, colour = [ratio_of(row["a"]) for row in of_b], ratio_colour(to)
        ax.plot(xs, [row[measure] for row in of_b], "o-", color=colour, markersize=3,
                label=f"in {ratio_label(to)}")  # fmt: skip
        for row in of_b:
            if row.get(f"{measure}_low") is not None:
                ends = row[f"{measure}_low"], row[f"{measure}_high"]
                ax.plot([ratio_of(row["a"])] * 2, ends, color=colour, label="_interval")
        null = [row[f"{measure}_null"] for row in of_b]
        ax.plot(xs, null, "--", color=colour, linewidth=0.7, label="_null")
    ratio_axis(ax, ratios)
    ax.set_ylim(-0.05, 1)
    ax.set_xlabel("ratio whose features seek a partner")
    ax.set_ylabel(MEASURES[measure])


def matrix(summary: list[Row], kind: str) -> tuple[list[str], dict[tuple[str, str], float]]:
    """Labels in order, and the correlation of each pair; with itself it is that of other seeds."""
    conditions = (kind, "random") if kind == "model" else (kind,)
    of_kind = [row for row in summary if row["condition"] in conditions]
    cells = {(row["a"], row["b"]): row["correlation"] for row in of_kind}
    own = {what(row): row["correlation"] for row in summary if row["condition"] == "seed"}
    for row in of_kind:
        cells[row["a"], row["a"]] = own[what(row)]
    return list(dict.fromkeys(row["a"] for row in of_kind)), cells


def what(row: Row) -> tuple:
    """The SAEs on the left of a comparison; their seeds alone differ."""
    return row["lm_a"], row["hook_name_a"], row["ratio_a"]


def draw_matrix(
    ax: Axes, title: str, labels: list[str], cells: dict[tuple[str, str], float]
) -> None:
    """Rows seek a partner among columns."""
    values = [[cells.get((a, b), float("nan")) for b in labels] for a in labels]
    ax.imshow(values, cmap="viridis", vmin=0, vmax=1)
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value == value:  # not nan
                colour = "black" if value > 0.6 else "white"
                ax.text(x, y, f"{value:.2f}".lstrip("0"), color=colour, ha="center", va="center",
                        fontsize=6)  # fmt: skip
    short = [short_label(label) for label in labels]
    ax.set_xticks(range(len(labels)), short, rotation=45, ha="right", fontsize=6.5)
    ax.set_yticks(range(len(labels)), short, fontsize=6.5)
    ax.grid(visible=False)
    ax.set_title(title)


def short_label(label: str) -> str:
    """1:8, 12, smollm2 random ..."""
    if is_ratio(label):
        return ratio_label(ratio_of(label))
    label = label.removeprefix("layer ").rsplit("/", 1)[-1]
    return label.replace("@", "\n").replace("smollm2-135m", "smollm2")


def small_print(summary: list[Row]) -> str:
    """What was compared, on how much, and what the lines are."""
    tokens = span((row["n_tokens_correlation"] for row in summary), count)
    n = span(row["n_pairs"] for row in summary)
    return (
        "Of each feature of one dictionary, the most similar feature of another one of another "
        "seed. Correlations: partners chosen on one half of the held-out documents, measured on "
        f"the other ({tokens} tokens). Dashed: the null (random directions; shifted text). Bars: "
        f"95 % intervals, Student's t over {n} pairs of seeds. Matrices: correlation of rows' "
        "features with their partners among the columns'; on the diagonal, of another seed."
    )


if __name__ == "__main__":
    main(draw, "results/consistency.json", "fig_consistency", __doc__.splitlines()[0])

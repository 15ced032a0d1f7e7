"""What do autoencoders keep that PCA, ICA, neurons and random directions of the same L0 do not?

    python -m data_visualization.fig_baselines RUN_FOLDER

Seconds. Reads RUN_FOLDER/results/compare_baselines.json, writes RUN_FOLDER/figures/
fig_baselines.png and .pdf.
"""

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
    count,
    main,
    ratio_colour,
    ratio_label,
    span,
)

Place = tuple[str, str]  # model, hook

TEXT = ("lm", "hook_name", "sae", "family", "k")
NUMBERS = (
    "sae_ratio", "l0", "fvu", "fvu_low", "fvu_high", "nats_lost", "nats_lost_low",
    "nats_lost_high", "n_tokens_fit", "n_tokens_eval", "n_documents_eval", "n_tokens_ce",
    "n_documents_ce", "ce_clean",
)  # fmt: skip
MEASURES = {"fvu": "fraction of variance unexplained", "nats_lost": "nats lost per token"}
AS_IT_IS = "SAE as it is"
FAMILIES = {
    "sae": "SAE, each token's k features",
    "frozen_decoder": "SAE with a frozen decoder",
    "untrained": "SAE untrained",
    "pca": "PCA, each token's k axes",
    "pca_leading": "PCA, the leading k axes",
    "ica": "ICA",
    "neuron_basis": "neurons",
    "random_rotation": "random rotation",
    "random_directions": "random directions",
    "whitened_random": "random directions, whitened",
}
BAND = 0.7  # of a family's line, for its points one above the other


def draw(rows: list[Row]) -> Figure:
    """FVU and nats lost of every family; a second line of panels has the FVU on random models.

    `ValueError` if a key is missing. What a model with random weights loses is not drawn: it
    predicts nothing that it could lose.
    """
    check_rows([row | {"name": row.get("family", "a row")} for row in rows], TEXT, NUMBERS)
    unknown = {row["family"] for row in rows} - FAMILIES.keys()
    if unknown:
        raise ValueError(f"there is no label for the family {min(unknown)}")
    lines = panels(rows)
    labels = [family_labels(rows, {place for place, _ in line}) for line in lines]
    heights = [0.5 + 0.17 * len(of_line) for of_line in labels]
    has_several_hooks = len({row["hook_name"] for row in rows}) > 1
    highest = 1.03 * max(row["fvu_high"] for row in rows)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.8 + sum(heights)))
        grid = figure.subplots(len(lines), 2, squeeze=False, sharey="row", height_ratios=heights)
        for axes, line, of_line in zip(grid, lines, labels, strict=True):
            for ax, (place, measure) in zip(axes, line, strict=False):
                draw_panel(ax, [row for row in rows if of(row) == place], measure, of_line)
                ax.set_title("\n".join(place) if has_several_hooks else place[0])
                if measure == "fvu":
                    ax.set_xlim(0, highest)
            for ax in axes[len(line) :]:
                ax.set_visible(False)
        draw_legend(figure, rows)
        caption(figure, small_print(rows))
    return figure


def of(row: Row) -> Place:
    return row["lm"], row["hook_name"]


def panels(rows: list[Row]) -> list[list[tuple[Place, str]]]:
    """Lines of at most two panels: both measures where the run's own model is, then the others."""
    places = list(dict.fromkeys(of(row) for row in rows))
    others = [place for place in places if place[0] != rows[0]["lm"]]
    lines = [[(place, key) for key in MEASURES] for place in places if place not in others]
    return lines + [
        [(place, "fvu") for place in others[i : i + 2]] for i in range(0, len(others), 2)
    ]


def label(row: Row) -> str:
    return AS_IT_IS if row["k"] is None else FAMILIES[row["family"]]


def family_labels(rows: list[Row], places: set[Place]) -> list[str]:
    """Those that occur there, always in the same order."""
    found = {label(row) for row in rows if of(row) in places}
    return [name for name in (AS_IT_IS, *FAMILIES.values()) if name in found]


def draw_panel(ax: Axes, rows: list[Row], measure: str, labels: list[str]) -> None:
    """One measure of one model: a line per family, a point with its interval per SAE."""
    saes = list(dict.fromkeys(row["sae"] for row in rows))
    for row in rows:
        offset = (saes.index(row["sae"]) + 0.5) / len(saes) - 0.5
        y = labels.index(label(row)) + BAND * offset
        colour = ratio_colour(row["sae_ratio"])
        ax.plot(
            [row[f"{measure}_low"], row[f"{measure}_high"]], [y] * 2, color=colour,
            linewidth=0.8, label="_interval",
        )  # fmt: skip
        ax.plot(
            row[measure], y, "o", color=colour, markersize=3.5, markeredgecolor="white",
            markeredgewidth=0.3, label=f"_{row['sae']} {row['family']}", zorder=3,
        )  # fmt: skip
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(min(0, 1.1 * min(row[f"{measure}_low"] for row in rows)), None)
    ax.set_xlabel(MEASURES[measure])


def draw_legend(figure: Figure, rows: list[Row]) -> None:
    ratios = sorted({row["sae_ratio"] for row in rows})
    if len(ratios) > 1:
        handles = [
            Line2D([], [], color=ratio_colour(ratio), marker="o", label=ratio_label(ratio))
            for ratio in ratios
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=8)


def small_print(rows: list[Row]) -> str:
    """What was measured on what, how sparsity was matched, what the bars are."""

    def numbers(key: str) -> str:
        return span((row[key] for row in rows), count)

    k = span((row["k"] for row in rows if row["k"] is not None), "{:g}".format)
    ratios = ", ".join(ratio_label(ratio) for ratio in sorted({row["sae_ratio"] for row in rows}))
    hooks = ", ".join(dict.fromkeys(row["hook_name"] for row in rows))
    text = (
        f"{hooks}; SAEs of ratio {ratios}. All but the SAE as it is keep the k = {k} features per "
        "token that write most, k being the SAE's L0, scaled by one number that fits training "
        f"rows best. Fitted to {numbers('n_tokens_fit')} training tokens. Held out: "
        f"{numbers('n_tokens_eval')} tokens of {numbers('n_documents_eval')} documents, for "
        f"cross-entropy {numbers('n_tokens_ce')} of {numbers('n_documents_ce')}. Bars: 95 % "
        "intervals, bootstrap over documents. Lower is better."
    )
    unfinished = dict.fromkeys(row["lm"] for row in rows if row.get("has_converged") is False)
    if unfinished:
        text += f" On {' and '.join(unfinished)} ICA was stopped before it had converged."
    return text


if __name__ == "__main__":
    main(draw, "results/compare_baselines.json", "fig_baselines", __doc__.splitlines()[0])

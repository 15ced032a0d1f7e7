"""How few features of each family tell a concept from all others, on text by other people?

    python -m data_visualization.fig_probe_concepts RUN_FOLDER

Seconds. Reads RUN_FOLDER/results/probe_concepts.json, writes RUN_FOLDER/figures/
fig_probe_concepts.png and .pdf.
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
    ratio_colour,
    ratio_label,
    span,
)

TEXT = ("lm", "hook_name", "labels", "family", "ratio", "seed", "concept")
MEASURES = {"auroc": "AUROC", "average_precision": "average precision"}
NUMBERS = ("k", "n_documents", "n_documents_fit", "n_concepts") + tuple(
    f"{measure}{end}" for measure in MEASURES for end in ("", "_low", "_high")
)
FAMILIES = {
    "untrained": ("SAE untrained", "C1", "v"),
    "random_directions": ("random directions", "C3", "s"),
    "neuron_basis": ("residual neurons", "C5", "D"),
    "pca": ("PCA", "C4", "^"),
    "mlp_neurons": ("MLP neurons", "C2", "P"),
}
AIM = 4  # the ratio that families are set against is the nearest to it
DENSE = "dense probe"


def draw(rows: list[Row]) -> Figure:
    """Above the families beside the SAEs of one ratio, below the SAEs of all ratios.

    Left AUROC, right average precision, against k, as means over concepts. `ValueError` if a key
    is missing.
    """
    rows = [row for row in rows if row.get("kind") == "probe" and row.get("concept") == "all"]
    check_rows([row | {"name": row.get("family", "a row")} for row in rows], TEXT, NUMBERS)
    hooks = list(dict.fromkeys((row["lm"], row["hook_name"]) for row in rows))
    lines = []
    for hook in hooks:
        of_hook = summed_up([row for row in rows if (row["lm"], row["hook_name"]) == hook])
        ratios = sorted({row["ratio"] for row in of_hook if row["family"] == "sae"})
        lines.append((hook, of_hook, [min(ratios, key=lambda ratio: abs(ratio - AIM))]))
        if len(ratios) > 1:
            lines.append((hook, of_hook, ratios))
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.7 + 2.3 * len(lines)))
        grid = figure.subplots(len(lines), 2, squeeze=False, sharex=True)
        for axes, (hook, of_hook, ratios) in zip(grid, lines, strict=True):
            for ax, measure in zip(axes, MEASURES, strict=True):
                draw_panel(ax, of_hook, measure, ratios)
            what = f"ratio {ratio_label(ratios[0])}" if len(ratios) == 1 else "all ratios"
            axes[0].set_title(f"{what}, {hook[1]}" if len(hooks) > 1 else what)
            axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
        for ax in grid[-1]:
            ax.set_xlabel("k, features that a probe reads")
        caption(figure, small_print(rows))
    return figure


def summed_up(rows: list[Row]) -> list[Row]:
    """Rows over seeds in place of the seeds' own, where there are some."""

    def key(row: Row) -> tuple:
        return tuple(row.get(k) for k in ("labels", "family", "target_l0", "ratio", "k"))

    over_seeds = {key(row) for row in rows if row["seed"] == "all"}
    return [row for row in rows if row["seed"] == "all" or key(row) not in over_seeds]


def draw_panel(ax: Axes, rows: list[Row], measure: str, ratios: list[int]) -> None:
    """The SAEs of these ratios; of one ratio also what has no ratio or that one."""
    true = [row for row in rows if row["labels"] == "true"]
    ks = sorted({row["k"] for row in true if row["family"] != "dense"})
    for row in (row for row in true if row["family"] == "dense"):
        low, high = row[f"{measure}_low"], row[f"{measure}_high"]
        ax.axhspan(low, high, color="0.93", linewidth=0, label="_interval")
        ax.axhline(row[measure], color="0.2", linestyle="--", label=DENSE)
    series = [("sae", r, f"SAE {ratio_label(r)}", ratio_colour(r), "o") for r in ratios]
    if len(ratios) == 1:
        series += [
            (family, ratio, *look)
            for family, look in FAMILIES.items()
            for ratio in (*ratios, None)
        ]
    for i, (family, ratio, label, colour, marker) in enumerate(series):
        found = [row for row in true if row["family"] == family and row["ratio"] == ratio]
        shift = 1.045 ** (i - (len(series) - 1) / 2)  # intervals beside each other
        for start, line in enumerate(by_seed(found)):
            values = [row[measure] for row in line]
            bars = [[row[measure] - row[f"{measure}_low"] for row in line],
                    [row[f"{measure}_high"] - row[measure] for row in line]]  # fmt: skip
            ax.errorbar(
                [row["k"] * shift for row in line], values, bars, color=colour, marker=marker,
                markeredgecolor="white", markeredgewidth=0.3, elinewidth=0.8,
                label=f"_{label} {start}" if start else label,
            )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(ks, [f"{k:g}" for k in ks])
    ax.minorticks_off()
    low, high = ax.get_ylim()
    ax.set_ylim(low, min(high, 1.002 + 0.02 * (1 - low)))
    ax.set_ylabel(MEASURES[measure])


def by_seed(rows: list[Row]) -> list[list[Row]]:
    """Lines to draw: rows of one seed and setting, in the order of k."""
    lines: dict[tuple, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["k"]):
        key = (row["seed"], row.get("architecture"), row.get("target_l0"), row.get("l1_coeff"))
        lines.setdefault(key, []).append(row)
    return list(lines.values())


def small_print(rows: list[Row]) -> str:
    """What is read, chosen and scored on what; what the bars are."""

    def numbers(key: str) -> str:
        return span((row[key] for row in rows), count)

    models = ", ".join(dict.fromkeys(row["lm"] for row in rows))
    hooks = ", ".join(dict.fromkeys(row["hook_name"] for row in rows))
    seeds = {row.get("n_seeds", 1) for row in rows}
    bars = "bootstrap over documents within concepts"
    if max(seeds) > 1:
        bars += f" (families) or Student's t over {max(seeds)} seeds (SAEs)"
    null = [row["auroc"] for row in rows if row["labels"] != "true" and row["family"] == "sae"]
    shuffled = (
        f" With labels shuffled, SAEs' AUROC is {span(null, '{:.2f}'.format)}." if null else ""
    )
    return (
        f"{models}, {hooks}. Means over {numbers('n_concepts')} concepts, each against the rest. "
        "Probes are logistic regressions on k features averaged over a document's tokens; "
        f"features are chosen on {numbers('n_documents_fit')} documents of sources A, "
        f"scores are of {numbers('n_documents')} of sources B. Dashed: a probe of all residual "
        f"dimensions. Bars: 95 % intervals, {bars}. Higher is better.{shuffled}"
    )


if __name__ == "__main__":
    main(draw, "results/probe_concepts.json", "fig_probe_concepts", __doc__.splitlines()[0])

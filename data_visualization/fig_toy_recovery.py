"""Which dictionaries recover planted features, and at which ratio and coefficient?

    python -m data_visualization.fig_toy_recovery outputs

Seconds. Reads FOLDER/results/recover_toy_features.json, writes FOLDER/figures/fig_toy_recovery.png
and .pdf. With rows of a phase diagram, that too.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D

from data_visualization.style import (
    GREY,
    LOOK,
    MARKERS,
    WIDTH,
    Row,
    caption,
    check_rows,
    count,
    main,
    ratio_label,
    span,
)

TEXT = ("setting", "kind", "architecture", "l1_coeff", "target_l0")
MEASURES = {
    "recovered_90": "true features recovered",
    "f1": "F1 of their firing",
}
PHASE = {
    "recovered_90": ("true features recovered", "{:.0%}"),
    "n_false": ("false features", "{:.0f}"),
}
NUMBERS = (
    "ratio", "d_in", "n_features", "true_l0", "n_rows", "n_tokens_trained",
    *(key for score in {**MEASURES, **PHASE} for key in (score, f"{score}_n")),
)  # fmt: skip
SPREAD = 0.8  # width of a group of points, where groups are 1 apart


def draw(rows: list[Row]) -> Figure:
    """Recovery by setting and architecture; below it ratio x coefficient, a line per setting.

    `ValueError` if a key is missing.
    """
    check_rows(rows, TEXT, NUMBERS)
    fixed = [row for row in rows if row["l1_coeff"] is not None]
    steered = [row for row in rows if row["l1_coeff"] is None]
    phases = list(dict.fromkeys(row["setting"] for row in fixed))
    groups = grouped(steered)
    n_bands = (len(MEASURES) if groups else 0) + len(phases)
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.9 + 1.9 * n_bands))
        grid = GridSpec(n_bands, 2, figure)
        if groups:
            looks = looks_of(steered)
            for i, measure in enumerate(MEASURES):
                draw_groups(figure.add_subplot(grid[i, :]), groups, measure, looks)
            draw_legend(figure, looks)
        for i, setting in enumerate(phases, n_bands - len(phases)):
            of_setting = [row for row in fixed if row["setting"] == setting]
            for j, measure in enumerate(PHASE):
                draw_phase(figure.add_subplot(grid[i, j]), of_setting, measure, left=j == 0)
        caption(figure, small_print(rows))
    return figure


def grouped(rows: list[Row]) -> dict[str, list[Row]]:
    """What is compared side by side, by label: one setting, ratio and target L0 each.

    Baselines, whose ratio is their own, stand in every group of their setting; null
    dictionaries in that of their ratio.
    """
    saes = [row for row in rows if row["kind"] == "sae"]
    keys = list(dict.fromkeys((r["setting"], r["ratio"], r["target_l0"]) for r in saes))
    several = [len({key[i] for key in keys}) > 1 for i in range(3)]
    groups = {}
    for setting, ratio, target in keys:
        label = setting.replace("_", "\n")
        if several[1]:
            label += f"\n{ratio_label(ratio)}"
        if several[2] and len({key[2] for key in keys if key[0] == setting}) > 1:
            label += f"\nL0 {target:g}"
        groups[label] = [
            row for row in rows
            if row["setting"] == setting
            and (row["kind"] == "baseline" or row["ratio"] == ratio)
            and (row["kind"] != "sae" or row["target_l0"] == target)
        ]  # fmt: skip
    return groups


def looks_of(rows: list[Row]) -> dict[str, dict]:
    """Colour and marker of each architecture: SAEs in colour, baselines hollow, no null."""
    looks: dict[str, dict] = {}
    for row in rows:
        name, kind = row["architecture"], row["kind"]
        if name in looks or kind == "null":
            continue
        marker = MARKERS[len(looks) % len(MARKERS)]
        if kind == "sae":
            looks[name] = {"marker": marker, "color": f"C{len(looks) % 10}"}
        else:
            looks[name] = {"marker": marker, "color": "0.2", "markerfacecolor": "white"}
    return looks


def draw_groups(
    ax: Axes, groups: dict[str, list[Row]], measure: str, looks: dict[str, dict]
) -> None:
    """Points with their intervals, side by side in each group; the null as a band."""
    places = {name: SPREAD * ((i + 0.5) / len(looks) - 0.5) for i, name in enumerate(looks)}
    for x, rows in enumerate(groups.values()):
        for row in rows:
            low, high = bounds(row, measure)
            if row["kind"] == "null":
                ends = x - SPREAD / 2, x + SPREAD / 2
                ax.fill_between(ends, low, high, color="0.85", linewidth=0, label="_null interval")
                ax.plot(ends, [row[measure]] * 2, color=GREY, linestyle="--", label="_null")
                continue
            look, place = looks[row["architecture"]], x + places[row["architecture"]]
            ax.plot([place] * 2, [low, high], color=look["color"], label="_interval")
            ax.plot(place, row[measure], **look, label=f"_{row['architecture']}", zorder=3)
    ax.set_ylim(-0.03, 1.05)
    ax.set_xlim(-0.5, len(groups) - 0.5)
    ax.set_xticks(range(len(groups)), groups)
    ax.grid(axis="x", visible=False)
    ax.set_ylabel(MEASURES[measure])


def bounds(row: Row, measure: str) -> tuple[float, float]:
    """The interval, cut at 0 and 1 as no share lies outside; the value alone if of one seed."""
    ends = [row[measure] if row.get(f"{measure}_{end}") is None else row[f"{measure}_{end}"]
            for end in ("low", "high")]  # fmt: skip
    return max(ends[0], 0.0), min(ends[1], 1.0)


def draw_phase(ax: Axes, rows: list[Row], measure: str, left: bool) -> None:
    """Ratio x coefficient as a map, each cell with its mean."""
    ratios = sorted({row["ratio"] for row in rows})
    l1_coeffs = sorted({row["l1_coeff"] for row in rows})
    cells = [[float("nan")] * len(l1_coeffs) for _ in ratios]
    for row in rows:
        cells[ratios.index(row["ratio"])][l1_coeffs.index(row["l1_coeff"])] = row[measure]
    name, form = PHASE[measure]
    highest = 1.0 if measure in MEASURES else max(1.0, max(row[measure] for row in rows))
    ax.imshow(cells, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=highest)
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            colour = "black" if value > 0.6 * highest else "white"
            ax.text(x, y, form.format(value), color=colour, ha="center", va="center", fontsize=7)
    ax.set_xticks(range(len(l1_coeffs)), [f"{c:g}" for c in l1_coeffs])
    ax.set_yticks(range(len(ratios)), [ratio_label(ratio) for ratio in ratios])
    ax.grid(visible=False)
    ax.set_title(f"{rows[0]['setting']}, {rows[0]['architecture']}: {name}")
    ax.set_xlabel("sparsity coefficient")
    if left:
        ax.set_ylabel("ratio")


def draw_legend(figure: Figure, looks: dict[str, dict]) -> None:
    handles = [Line2D([], [], linestyle="", label=name, **look) for name, look in looks.items()]
    handles.append(Line2D([], [], color=GREY, linestyle="--", label="random (null)"))
    figure.legend(handles=handles, loc="outside upper center", ncols=6)


def small_print(rows: list[Row]) -> str:
    """What was planted, fitted and measured."""

    def of(key: str) -> str:
        return span((row[key] for row in rows), count)

    trained = span((row["n_tokens_trained"] for row in rows if row["kind"] == "sae"), count)
    return (
        f"{of('n_features')} true features in {of('d_in')} dimensions, {of('true_l0')} per row. "
        f"SAEs trained on {trained} rows; scores on {of('n_rows')} fresh ones. Recovered: cosine "
        "above 0.9 to a feature that fires; false: below 0.5 to every true one. F1: of the "
        "feature that one-to-one assignment gives to each true one. Bars: 95 % intervals, "
        f"Student's t over {of('f1_n')} seeds, each with its own truth and data, cut at 0 and 1."
    )


if __name__ == "__main__":
    main(draw, "results/recover_toy_features.json", "fig_toy_recovery", __doc__.splitlines()[0])

"""How fast is a training step beside the peers', and beside what the machine could do?

    python -m data_visualization.fig_speed benchmarks

Seconds. Reads FOLDER/results/train_step.json, writes FOLDER/figures/fig_speed.png and .pdf.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_visualization.style import LOOK, WIDTH, Row, caption, check_rows, main, ratio_axis, span

TEXT = ("method", "architecture", "dtype", "exact")
NUMBERS = ("ratio", "d_in", "batch_tokens", "tokens_per_s", "encode_limit_fraction", "n_rounds",
           "ms_per_step_min", "vs_fastest_peer", "vs_fastest_fp32_peer")  # fmt: skip
OURS = "auto"
PEERS = {
    "sae_lens": ("SAELens", "#d55e00"),
    "dictionary_learning": ("dictionary_learning", "#009e73"),
    "sparsify": ("sparsify", "#cc79a7"),
}
BLUE = "#0072b2"


def draw(rows: list[Row]) -> Figure:
    """Tokens per second against ratio, and our speed over that of the fastest peers.

    `ValueError` if a key is missing or there is no row of our own.
    """
    check_rows([row | {"name": row.get("method", "a method")} for row in rows], TEXT, NUMBERS)
    ours = {row["ratio"]: row for row in rows if row["method"] == OURS}
    if not ours:
        raise ValueError(f"no row is of the method {OURS}")
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 2.9))
        left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
        draw_speeds(left, rows, ours)
        draw_ratios(right, ours)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        caption(figure, small_print(rows))
    return figure


def best(rows: list[Row], library: str, dtype: str) -> dict[float, Row]:
    """By ratio the fastest way to run this peer."""
    found: dict[float, Row] = {}
    for row in sorted(rows, key=lambda row: row["tokens_per_s"]):
        if row["method"].startswith(library) and row["dtype"] == dtype:
            found[row["ratio"]] = row
    return found


def draw_line(ax: Axes, line: dict[float, Row], style: str, **look) -> None:
    """Medians, and of each a stroke up to its fastest round."""
    for ratio in line:
        speeds = [line[ratio]["tokens_per_s"],
                  1000 * line[ratio]["batch_tokens"] / line[ratio]["ms_per_step_min"]]  # fmt: skip
        ax.plot([ratio] * 2, speeds, color=look["color"], linewidth=0.8, label="_fastest round")
    ratios = sorted(line)
    ax.plot(ratios, [line[r]["tokens_per_s"] for r in ratios], style, **look)


def draw_speeds(ax: Axes, rows: list[Row], ours: dict[float, Row]) -> None:
    ratios = sorted(ours)
    limit = [ours[r]["tokens_per_s"] / ours[r]["encode_limit_fraction"] for r in ratios]
    ax.plot(ratios, limit, ":", color="0.3", label="limit: one product x W_enc")
    draw_line(ax, ours, "o-", color=BLUE, linewidth=1.6, label="this project")
    for library, (label, colour) in PEERS.items():
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            line = best(rows, library, dtype)
            if line:
                draw_line(ax, line, style, color=colour, marker="s", markersize=3,
                          label=f"{label}, {dtype}")  # fmt: skip
    ax.set_yscale("log")
    ax.set_ylabel("tokens per second")
    ratio_axis(ax, ratios)


def draw_ratios(ax: Axes, ours: dict[float, Row]) -> None:
    ratios = sorted(ours)
    ax.axhline(1, color="0.6", linewidth=0.8, label="_one")
    for key, style, label in (("vs_fastest_fp32_peer", "-", "peers in float32"),
                              ("vs_fastest_peer", "--", "peers in bfloat16 too")):  # fmt: skip
        values = [ours[r][key] for r in ratios]
        ax.plot(ratios, values, f"o{style}", color=BLUE, label=label)
        ax.annotate(f"{values[-1]:.1f}", (ratios[-1], values[-1]), xytext=(4, -2),
                    textcoords="offset points", fontsize=7)  # fmt: skip
    ax.set_ylim(0, 1.3 * ax.get_ylim()[1])  # room for the legend
    ax.set_ylabel("times the fastest peer")
    ax.legend(loc="upper left")
    ratio_axis(ax, ratios)
    ax.set_xlabel("ratio of the dictionary to the layer")


def small_print(rows: list[Row]) -> str:
    return (
        f"Architecture {', '.join(sorted({row['architecture'] for row in rows}))}, layer of "
        f"{span(row['d_in'] for row in rows)}, batches of "
        f"{span(row['batch_tokens'] for row in rows)} tokens, median of "
        f"{span(row['n_rounds'] for row in rows)} interleaved rounds in one process; strokes "
        "reach up to the fastest round. "
        "Ours is exact: the same step as float32 autograd up to rounding. Of each peer the "
        "fastest way to run it, compiled or not. The limit is the time of one product of "
        "activations and encoder in bfloat16, without which there is no step."
    )


if __name__ == "__main__":
    main(draw, "results/train_step.json", "fig_speed", __doc__.splitlines()[0])

"""Do dictionaries keep as much of every layer and model?

    python -m data_visualization.fig_layers RUN_FOLDER

Seconds. Reads RUN_FOLDER/summary.json, writes RUN_FOLDER/figures/fig_layers.png and .pdf. A run
has several layers if it was given several --hook-name; rows of other models may stand beside them.
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

TEXT = ("name", "lm", "hook_name")
NUMBERS = ("ratio", "l0", "fvu", "fvu_low", "fvu_high", "nats_lost", "nats_lost_low",
           "nats_lost_high", "dead_fraction", "n_tokens_eval", "n_documents_eval")  # fmt: skip
MEASURES = {
    "fvu": "fraction of variance unexplained",
    "nats_lost": "nats lost per token",
    "dead_fraction": "dead features",
}


def draw(rows: list[Row]) -> Figure:
    """Grouped bars: a group per layer (and model), a bar per ratio, the mean over its SAEs.

    `ValueError` if a key is missing, or if SAEs of one ratio differ in more than seed and place:
    a mean over architectures or sparsities says nothing.
    """
    check_rows(rows, TEXT, NUMBERS)
    settings = {(row.get("architecture"), row.get("target_l0") or row.get("l1_coeff"))
                for row in rows}  # fmt: skip
    if len(settings) > 1:
        raise ValueError("the rows are of several architectures or sparsities; give those of one")
    places = list(dict.fromkeys((row["lm"], row["hook_name"]) for row in rows))
    ratios = sorted({row["ratio"] for row in rows})
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 2.9))
        for ax, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
            draw_measure(ax, rows, places, ratios, measure)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=8)
        caption(figure, small_print(rows))
    return figure


def draw_measure(
    ax: Axes, rows: list[Row], places: list[tuple[str, str]], ratios: list[int], measure: str
) -> None:
    """Bars begin at 0; whiskers are each SAE's own interval, of shares of dead features none."""
    width = 0.8 / len(ratios)
    for i, ratio in enumerate(ratios):
        for g, place in enumerate(places):
            here = [row for row in rows if (row["lm"], row["hook_name"]) == place]
            some = [row for row in here if row["ratio"] == ratio]
            if not some:
                continue
            left = g - 0.4 + i * width
            mean = sum(row[measure] for row in some) / len(some)
            ax.bar(left, mean, width, align="edge", color=ratio_colour(ratio),
                   label=ratio_label(ratio) if g == 0 else "_bar")  # fmt: skip
            for j, row in enumerate(some):
                if f"{measure}_low" in row:
                    x = left + width * (j + 1) / (len(some) + 1)
                    ax.plot([x, x], [row[f"{measure}_low"], row[f"{measure}_high"]],
                            color="0.1", linewidth=0.8, label="_interval")  # fmt: skip
    ax.set_xticks(range(len(places)), [short(place, places) for place in places],
                  rotation=90 if len(places) > 4 else 0)  # fmt: skip
    ax.grid(False, axis="x")
    ax.set_ylim(0, None)
    ax.set_ylabel(MEASURES[measure])
    if measure == "dead_fraction":
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")


def short(place: tuple[str, str], places: list[tuple[str, str]]) -> str:
    """The hook without what all have; the model too, if there are several."""
    lm, hook = place
    name = hook.replace("blocks.", "").replace("hook_resid_", "").replace(".hook_", ".")
    return f"{lm.split('/')[-1]}\n{name}" if len({lm for lm, _ in places}) > 1 else name


def small_print(rows: list[Row]) -> str:
    models = ", ".join(dict.fromkeys(row["lm"] for row in rows))
    tokens, documents = (span((row[key] for row in rows), count)
                         for key in ("n_tokens_eval", "n_documents_eval"))  # fmt: skip
    l0 = span((row["l0"] for row in rows), "{:.1f}".format)
    return (
        f"{models}; L0 {l0}; {tokens} held-out tokens of {documents} documents. Bars: means over "
        "the autoencoders of a ratio, whiskers each one's 95 % interval over documents. Dead: "
        "silent on all of these tokens."
    )


if __name__ == "__main__":
    main(draw, "summary.json", "fig_layers", __doc__.splitlines()[0])

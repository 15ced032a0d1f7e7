"""Do our architectures keep as much as the peers' of the same name, at the same sparsity?

    python -m data_visualization.fig_quality benchmarks

Seconds. Reads FOLDER/results/quality.json, writes FOLDER/figures/fig_quality.png and .pdf.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_visualization.style import LOOK, WIDTH, Row, caption, check_rows, count, main, span

TEXT = ("architecture", "library")
NUMBERS = ("l0", "l0_low", "l0_high", "fvu", "fvu_low", "fvu_high", "nats_lost", "nats_lost_low",
           "nats_lost_high", "n_steps", "ratio", "n_tokens_eval", "n_documents_eval",
           "n_tokens_ce", "n_seeds")  # fmt: skip
MEASURES = {"fvu": "FVU", "nats_lost": "nats lost"}
N_COLUMNS = 4
TICKS = (1, 2, 3, 5, 10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480, 960)
NARROWEST = 2.0  # of the L0 axis: highest over lowest
LIBRARIES = {
    "ours": ("this project", "#0072b2", "o"),
    "sae_lens": ("SAELens", "#d55e00", "s"),
    "dictionary_learning": ("dictionary_learning", "#009e73", "^"),
}
TITLES = {
    "l1": "L1", "norm_weighted_l1": "L1, norm-weighted", "gated": "Gated", "topk": "TopK",
    "batch_topk": "BatchTopK", "matryoshka": "Matryoshka", "jumprelu": "JumpReLU",
    "p_anneal": "p-anneal", "tied_l1": "L1, tied", "jumprelu_target": "JumpReLU, target",
}  # fmt: skip


def draw(rows: list[Row]) -> Figure:
    """Per architecture a panel of FVU, one of nats lost: a frontier per library.

    `ValueError` if a key is missing or a library has no label.
    """
    points = [row for row in rows if row.get("what") == "point"]
    check_rows(
        [row | {"name": f"{row.get('library')} {row.get('architecture')}"} for row in points],
        TEXT, NUMBERS,
    )  # fmt: skip
    unknown = {row["library"] for row in points} - LIBRARIES.keys()
    if unknown:
        raise ValueError(f"there is no label for the library {min(unknown)}")
    names = list(dict.fromkeys(row["architecture"] for row in points))
    n_blocks = -(-len(names) // N_COLUMNS)
    handles = {}
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.9 + 2.6 * n_blocks))
        for i, block in enumerate(figure.subfigures(n_blocks, 1, squeeze=False).flatten()):
            axes = block.subplots(2, N_COLUMNS, sharex="col")
            shown = names[N_COLUMNS * i : N_COLUMNS * (i + 1)]
            for column, name in zip(axes.T, shown, strict=False):
                some = [row for row in points if row["architecture"] == name]
                for ax, measure in zip(column, MEASURES, strict=True):
                    draw_frontiers(ax, some, measure)
                    handles |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
                column[0].set_title(TITLES.get(name, name))
                column[1].set_xlabel("L0")
            for ax, label in zip(axes[:, 0], MEASURES.values(), strict=True):
                ax.set_ylabel(label)
            for ax in axes[:, len(shown) :].flatten():
                ax.set_axis_off()
        labels = [label for label, *_ in LIBRARIES.values() if label in handles]
        figure.legend([handles[k] for k in labels], labels, loc="outside upper center", ncols=3)
        caption(figure, small_print(points))
    return figure


def draw_frontiers(ax: Axes, rows: list[Row], measure: str) -> None:
    """A line with bars per library; ours last, so that it is above."""
    for library in reversed(LIBRARIES):
        label, colour, marker = LIBRARIES[library]
        some = sorted((row for row in rows if row["library"] == library), key=lambda r: r["l0"])
        for row in some:
            ends = row[f"{measure}_low"], row[f"{measure}_high"]
            ax.plot([row["l0"]] * 2, ends, color=colour, linewidth=0.7, label="_interval")
        if some:
            ax.plot([row["l0"] for row in some], [row[measure] for row in some], color=colour,
                    marker=marker, markersize=3.5, label=label)  # fmt: skip
    ax.set_xscale("log")
    ax.margins(0.12)
    low, high = ax.get_xlim()
    wider = max(1.0, NARROWEST * low / high) ** 0.5
    ax.set_xlim(low / wider, high * wider)
    ticks = [n for n in TICKS if low / wider <= n <= high * wider]
    ax.set_xticks(ticks, [f"{n:g}" for n in ticks])
    ax.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))


def small_print(rows: list[Row]) -> str:
    return (
        f"FVU: fraction of variance unexplained on "
        f"{span((r['n_tokens_eval'] for r in rows), count)} held-out tokens of "
        f"{span(r['n_documents_eval'] for r in rows)} documents. Nats lost per token: "
        f"{span((r['n_tokens_ce'] for r in rows), count)} of them. Ratio "
        f"1:{span(r['ratio'] for r in rows)}, {span(r['n_steps'] for r in rows)} steps, the same "
        f"tokens for all. Means of {span(r['n_seeds'] for r in rows)} seeds, bars: 95 % intervals "
        "(Student's t). Lower and further left is better. Every library's learning rate is "
        "chosen on one grid."
    )


if __name__ == "__main__":
    main(draw, "results/quality.json", "fig_quality", __doc__.splitlines()[0])

"""Do our architectures keep as much as the peers' of the same name, at the same sparsity?

    python -m data_visualization.fig_quality benchmarks

Seconds. Reads FOLDER/results/quality.json, writes FOLDER/figures/fig_quality.png and .pdf.
"""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_visualization.style import LOOK, WIDTH, Row, caption, check_rows, count, main, span

TEXT = ("architecture", "library", "seed")
NUMBERS = ("l0", "l0_low", "l0_high", "fvu", "fvu_low", "fvu_high", "nats_lost", "nats_lost_low",
           "nats_lost_high", "n_steps", "ratio", "n_tokens_eval", "n_documents_eval",
           "n_tokens_ce")  # fmt: skip
MEASURES = {"fvu": "FVU", "nats_lost": "nats lost"}
N_COLUMNS = 4
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
    """Per architecture a panel of FVU, one of nats lost: a point per library and seed.

    `ValueError` if a key is missing or a library has no label.
    """
    saes = [row for row in rows if row.get("what") == "sae"]
    check_rows([row | {"name": f"{row.get('library')} {row.get('architecture')}"} for row in saes],
               TEXT, NUMBERS)  # fmt: skip
    unknown = {row["library"] for row in saes} - LIBRARIES.keys()
    if unknown:
        raise ValueError(f"there is no label for the library {min(unknown)}")
    names = list(dict.fromkeys(row["architecture"] for row in saes))
    n_blocks = -(-len(names) // N_COLUMNS)
    handles = {}
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 0.9 + 2.6 * n_blocks))
        for i, block in enumerate(figure.subfigures(n_blocks, 1, squeeze=False).flatten()):
            axes = block.subplots(2, N_COLUMNS, sharex="col")
            shown = names[N_COLUMNS * i : N_COLUMNS * (i + 1)]
            for column, name in zip(axes.T, shown, strict=False):
                some = [row for row in saes if row["architecture"] == name]
                for ax, measure in zip(column, MEASURES, strict=True):
                    draw_architecture(ax, some, measure)
                    handles |= dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
                column[0].set_title(TITLES.get(name, name))
                column[1].set_xlabel("L0")
            for ax, label in zip(axes[:, 0], MEASURES.values(), strict=True):
                ax.set_ylabel(label)
            for ax in axes[:, len(shown) :].flatten():
                ax.set_axis_off()
        labels = [label for label, *_ in LIBRARIES.values() if label in handles]
        shown = [handles[label] for label in labels]
        figure.legend(shown, labels, loc="outside upper center", ncols=3)
        caption(figure, small_print(saes))
    return figure


def draw_architecture(ax: Axes, rows: list[Row], measure: str) -> None:
    """Ours last, so that it is above; the same of our own set beside another peer is one point."""
    shown = set()
    for library in reversed(LIBRARIES):
        label, colour, marker = LIBRARIES[library]
        for row in rows:
            place = (library, row["l0"], row[measure])
            if row["library"] != library or place in shown:
                continue
            is_first = not any(of == library for of, *_ in shown)
            shown.add(place)
            ax.plot([row["l0_low"], row["l0_high"]], [row[measure]] * 2, color=colour,
                    linewidth=0.7, label="_interval")  # fmt: skip
            ax.plot([row["l0"]] * 2, [row[f"{measure}_low"], row[f"{measure}_high"]],
                    color=colour, linewidth=0.7, label="_interval")  # fmt: skip
            ax.plot(row["l0"], row[measure], marker, color=colour, markersize=4,
                    label=label if is_first else f"_{label}")  # fmt: skip
    ax.margins(0.15)
    low, high = ax.get_xlim()
    if high - low < 1:  # of TopK's all are the same but for rounding
        ax.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
    ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))


def small_print(rows: list[Row]) -> str:
    n_seeds = len({row["seed"] for row in rows})
    return (
        f"FVU: fraction of variance unexplained on "
        f"{span((r['n_tokens_eval'] for r in rows), count)} held-out tokens of "
        f"{span(r['n_documents_eval'] for r in rows)} documents. Nats lost per token: "
        f"{span((r['n_tokens_ce'] for r in rows), count)} of them. Ratio "
        f"1:{span(r['ratio'] for r in rows)}, {span(r['n_steps'] for r in rows)} steps, "
        f"{n_seeds} seeds, the same tokens for all. Lower and further left is better; bars: 95 % "
        "intervals over documents. All at the best of equal sweeps of the learning rate; ours is "
        "trained to the L0 that each peer reached."
    )


if __name__ == "__main__":
    main(draw, "results/quality.json", "fig_quality", __doc__.splitlines()[0])

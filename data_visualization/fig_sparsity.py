"""What does sparsity cost the language model that runs on reconstructions?

    python -m data_visualization.fig_sparsity RUN_FOLDER

Seconds. Reads RUN_FOLDER/summary.json, writes RUN_FOLDER/figures/fig_sparsity.png and .pdf.
"""

import math

import matplotlib
from matplotlib.figure import Figure

from data_visualization.fig_reconstruction import NUMBERS, OTHER, draw_measures
from data_visualization.style import GREY, LOOK, Row, check_rows, main

MEASURES = {"kl": "KL from the clean model, nats", "perplexity": "perplexity of the next token"}


def draw(rows: list[Row]) -> Figure:
    """Divergence and perplexity, against L0 or the ratio; dotted: the clean model's perplexity.

    `ValueError` if a key is missing.
    """
    check_rows(rows, OTHER, (*NUMBERS, "kl", "kl_low", "kl_high"))
    rows = [row | perplexity(row) for row in rows]
    figure = draw_measures(rows, MEASURES)
    hooks = list(dict.fromkeys(row["hook_name"] for row in rows))
    with matplotlib.rc_context(LOOK):
        for hook, ax in zip(hooks, figure.axes[1::2], strict=True):
            clean = next(math.exp(row["ce_clean"]) for row in rows if row["hook_name"] == hook)
            ax.axhline(clean, color=GREY, linestyle=":", label="clean")
            ax.set_ylim(0, None) if ax.get_yscale() == "linear" else ax.set_ylim(
                0.95 * clean, None
            )
            ax.annotate("clean model", (0.02, clean), xycoords=("axes fraction", "data"),
                        xytext=(0, -8), textcoords="offset points", ha="left", fontsize=6.5,
                        color=GREY)  # fmt: skip
    return figure


def perplexity(row: Row) -> Row:
    """exp of the cross-entropy, clean plus what is lost."""
    ends = {"": row["nats_lost"], "_low": row["nats_lost_low"], "_high": row["nats_lost_high"]}
    return {f"perplexity{end}": math.exp(row["ce_clean"] + lost) for end, lost in ends.items()}


if __name__ == "__main__":
    main(draw, "summary.json", "fig_sparsity", __doc__.splitlines()[0])

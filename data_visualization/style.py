"""What all figures share: look, colours, reading rows, saving, the command line.

Figures read JSON and draw; this module must not import torch or sparse_coding.
"""

import argparse
import math
import sys
import textwrap
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from data_visualization.files import parsed, read_json, read_text, refuse, whole_file

Row = dict[str, Any]

WIDTH = 6.5  # inches: the text width of a page
CAPTION_CHARACTERS = 136  # that fit into WIDTH at the size of the small print
GREY = "0.45"
MARKERS = "osD^vPX"
LOOK = {
    "figure.dpi": 200,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.labelcolor": "0.2",
    "axes.edgecolor": "0.6",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "grid.linewidth": 0.6,
    "xtick.color": "0.6",
    "ytick.color": "0.6",
    "xtick.labelcolor": "0.2",
    "ytick.labelcolor": "0.2",
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.0,
    "lines.markersize": 4.5,
    "pdf.fonttype": 42,  # text in a PDF stays text
}

OF_ANOTHER_VERSION = (LookupError, TypeError, AttributeError, ArithmeticError, StopIteration)
"""What drawing raises of rows that do not hold what it reads."""


def ratio_colour(ratio: float) -> tuple[float, float, float, float]:
    """The colour of a ratio, the same in every figure: dark 1:1 to light 1:64."""
    return matplotlib.colormaps["viridis"](min(max(math.log2(ratio) / 6, 0.0), 0.9))


def ratio_label(ratio: float) -> str:
    return f"1:{ratio:g}"


def ratio_axis(ax: Axes, ratios: list[float]) -> None:
    """The x axis of these ratios, each doubling as wide."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(ratios, [ratio_label(ratio) for ratio in ratios])


def markers(architectures: Iterable[str]) -> dict[str, str]:
    """One marker per architecture, in the order of appearance."""
    distinct = list(dict.fromkeys(architectures))
    return {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(distinct)}


def count(n: float) -> str:
    """A count in words as short as its exactness allows: 950, 30k, 1.25M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"


def span(values: Iterable[float], form: Callable[[float], str] = "{:g}".format) -> str:
    """All values in few words: the value if there is one, else smallest to largest."""
    values = list(values)
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file; `ValueError` in one line if there are none."""
    content = read_json(path, "give the folder of a finished run")
    rows = content.get("rows") if isinstance(content, dict) else None
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f'{path} has no rows; expected {{"config": ..., "rows": [{{...}}]}}')
    return rows


def read_lines(path: Path) -> list[Row]:
    """The rows of a file of JSON lines; a last line that was broken off is left out.

    `ValueError` in one line if there are none, or another line is broken.
    """
    rows = []
    lines = read_text(path, "give the folder of a run").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parsed(line, f"{path}, line {number},"))
        except ValueError:
            if number < len(lines):
                raise
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has no rows; expected one {{...}} in each line")
    return rows


def check_rows(rows: list[Row], text: Iterable[str], numbers: Iterable[str]) -> None:
    """`ValueError` naming the first row that lacks a key or holds no number where one belongs."""
    if not rows:
        raise ValueError("there are no rows to draw")
    text, numbers = list(text), list(numbers)
    for row in rows:
        name = row.get("name", "a row without a name")
        missing = [key for key in (*text, *numbers) if key not in row]
        if missing:
            raise ValueError(f"{name} lacks {', '.join(missing)}; every row needs them")
        for key in numbers:
            if not is_number(row[key]):
                raise ValueError(
                    f"{name} has {key} = {repr(row[key]):.100}; it must be a finite number"
                )


def is_number(value: object) -> bool:
    """Whether it can be drawn: no truth value, no NaN, nothing beyond a float's largest."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def caption(figure: Figure, text: str) -> None:
    """Small print under the panels, as wide as the figure."""
    lines = textwrap.fill(text, CAPTION_CHARACTERS)
    figure.supxlabel(lines, x=0.01, ha="left", fontsize=6.5, color=GREY)


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write NAME.png and NAME.pdf, each whole or not at all, and return their paths.

    The same figure gives the same bytes: no date is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, undated in (("png", {"Software": None}), ("pdf", {"CreationDate": None})):
        path = folder / f"{name}.{kind}"
        with whole_file(path) as temporary, matplotlib.rc_context(LOOK):
            figure.savefig(temporary, format=kind, metadata=undated)
        paths.append(path)
    return paths


def show(paths: Iterable[Path]) -> None:
    """Show saved PNGs under the cell of a notebook; elsewhere do nothing."""
    if "ipykernel" in sys.modules:
        from IPython.display import Image, display

        for path in paths:
            if path.suffix == ".png":
                display(Image(filename=path, width=int(100 * WIDTH)))


def main(draw: Callable[[list[Row]], Figure], source: str, name: str, description: str) -> None:
    """The command line of a figure: RUN_FOLDER/`source` in, RUN_FOLDER/figures/`name`.* out."""
    parser = argparse.ArgumentParser(prog=f"python -m data_visualization.{name}")
    parser.description = description
    parser.add_argument(
        "run_folder", type=Path, help=f"a run's folder, or outputs: it holds {source}"
    )
    folder = parser.parse_args().run_folder
    path = folder / source
    try:
        rows = read_lines(path) if path.suffix == ".jsonl" else read_rows(path)
        paths = save(draw(rows), folder / "figures", name)
    except (ValueError, OSError) as error:
        refuse(error)
    except OF_ANOTHER_VERSION as error:
        refuse(f"{path} is of another version ({type(error).__name__}: {error}); make it anew")
    for path in paths:
        print(path)

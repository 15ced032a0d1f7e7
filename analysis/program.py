"""What the programs of this folder share: settings of a measurement, results, tables.

Imported before the command line is read, so nothing heavy is imported here.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from sparse_coding.config import as_json, environment
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.settings import Count, Draws, OutputFile, Range, read_settings
from sparse_coding.storage import write_json

Row = dict[str, Any]


@dataclass(frozen=True)
class MeasureConfig:
    """Which activations are measured, and where the results go. Empty: as the dictionary was made.

    A run of this project and a SAELens folder say themselves what they were trained on; for other
    dictionaries `lm` and `hook_name` must be given.
    """

    lm: str = ""
    """Language model, as in easy_training_base.py."""
    hook_name: str = ""
    """Where its activations are read, e.g. blocks.12.hook_resid_post."""
    target_hook_name: str = ""
    """Where what a transcoder decodes belongs, e.g. blocks.12.hook_mlp_out."""
    text: str = ""
    """builtin, a local file or folder, or a hub data set; empty: the dictionary's own, else
    builtin."""
    text_field: str = ""
    """The field of a jsonl, parquet or hub record that holds the text; empty: the run's, else
    text."""
    context_length: Annotated[int, Range(2, or_zero=True)] = 0
    """Tokens the language model sees at once; 0: the dictionary's, else 128."""
    bos: Literal["", "auto", "always", "never"] = ""
    """Whether a context begins with the BOS token; empty: the dictionary's, else auto."""
    heldout_fraction: Annotated[float, Range(0, 1, is_open=True, or_zero=True)] = 0.0
    """Share of the documents held out; 0: the run's, else 0.05."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU) or a torch device."""
    dtype: Literal["", "auto", "bfloat16", "float16", "float32"] = ""
    """Number format of the language model; empty: the run's, else auto."""
    output: OutputFile | None = None
    """Results file; by default results/PROGRAM.json in the one run that was given, else in
    outputs/results."""
    overwrite: bool = False
    """Replace the results file if it exists."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig(MeasureConfig):
    """What the programs share that set dictionaries against others of the same activations.

    Controls that are trained (untrained and frozen-decoder SAEs, SAEs of other models) need the
    settings of a run, and are of its own activations: without a run, or with flags that name other
    activations, they are left out.
    """

    source: Annotated[str, tyro.conf.Positional]
    """A finished run's folder, best one with several ratios and seeds; or one dictionary: an SAE's
    folder, one of another library, a release."""


@dataclass(frozen=True, kw_only=True)
class ConceptConfig(SourceConfig):
    """What the programs share that read the concept corpus with a dictionary's language model."""

    n_documents: Count = 200
    """Documents of each concept and source."""
    n_tokens: Count = 64
    """Tokens of a document."""
    n_draws: Draws = 1000
    """Bootstrap draws of the documents."""


Config = TypeVar("Config")


def run_program(config: type[Config], main: Callable[[Config], None]) -> None:
    """Read the command line into `config` and call `main` with it; user errors are one line."""
    report_user_errors_in_one_line()
    description = (sys.modules["__main__"].__doc__ or "").strip()
    main(read_settings(config, description=description))


def results_path(cfg: Any, program: str, runs: Iterable[Path | None]) -> Path:
    """Where the results will be written; an existing file is refused without --overwrite.

    `runs` are the run folders that the dictionaries belong to (None: no run).
    """
    folders = set(runs)
    run = folders.pop() if len(folders) == 1 else None
    path = cfg.output or (run or Path("outputs")) / "results" / f"{program}.json"
    if path.exists() and not cfg.overwrite:
        raise UserError(f"{path} exists; give --output for another file or --overwrite")
    return path


def write_results(path: Path, cfg: Any, rows: Sequence[Row], device: str, **more: Any) -> None:
    """Write {"config", "environment", "rows"}; `more` joins the config. Prints the path."""
    config = as_json(cfg) if dataclasses.is_dataclass(cfg) else dict(cfg)
    content = {"config": config | more, "environment": environment(device), "rows": list(rows)}
    write_json(path, content)
    print(f"written: {path}")


def finite(value: float) -> float | None:
    """A value of a results row: None for what is undefined (0 / 0) or infinite."""
    return value if math.isfinite(value) else None


def print_table(title: str, rows: Sequence[Row], columns: dict[str, str], note: str = "") -> None:
    """Rows as a table: `columns` maps a key to its format; `x_low`, `x_high` become brackets."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for i, key in enumerate(columns):
        table.add_column(key, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row, key, form) for key, form in columns.items()))
    # A number that is cut off is worse than a line that is too long.
    width = Console(width=10_000).measure(table).maximum
    Console(width=max(width, Console().width)).print(table)
    if note:
        print(note)


def cell(row: Row, key: str, form: str) -> str:
    """One value with its interval, e.g. `0.21 [0.19, 0.23]`; `-` where there is none."""
    value = row.get(key)
    if value is None:
        return "-"
    text = form.format(value)
    if row.get(f"{key}_low") is None:
        return text
    low, high = (form.format(row[f"{key}_{end}"]) for end in ("low", "high"))
    return f"{text} [{low}, {high}]"

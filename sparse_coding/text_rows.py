"""Rows of any text: waited for, read to their end, each of them text, left out or an error."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparse_coding.errors import UserError
from sparse_coding.sources import ahead

SAY_SECONDS = 60.0  # without a row, until a line says so; then again and again
END_SECONDS = 600.0  # longer than the hub's client tries again by itself


def watched(rows: Iterable[Any], name: str) -> Iterator[Any]:
    """The same rows or documents; says so when none comes for long, and at last raises."""
    return ahead(rows, 8, partial(_waited, name), SAY_SECONDS)


def _waited(name: str, seconds: float) -> None:
    if seconds >= END_SECONDS:
        raise UserError(
            f"text {name!r} gave nothing for {seconds:.0f} s: look at the connection or the disk, "
            "then start again (with --resume); whole shards and checkpoints are kept"
        )
    print(
        f"text {name!r}: nothing for {seconds:.0f} s, still waiting (until {END_SECONDS:.0f} s)",
        file=sys.stderr,
        flush=True,
    )


@dataclass
class Skipping:
    """What becomes of rows that hold no text: an error, or left out, counted and reported."""

    is_wanted: bool
    n: int = 0
    first: str = ""

    @contextmanager
    def row(self, place: str) -> Iterator[None]:
        """Reads one row: whatever is wrong with it becomes a line that names the place."""
        try:
            yield
        except (ValueError, RecursionError) as error:  # also of numbers and nesting too long
            line = str(error) if isinstance(error, UserError) else f"{place} is broken: {error}"
            if not self.is_wanted:
                raise UserError(
                    f"{line}; mend it or ask for broken lines to be skipped (skip_broken_lines)"
                ) from None
            self.n += 1
            self.first = self.first or line

    def report(self, name: str) -> None:
        if self.n:
            print(f"{name}: {self.n} broken lines skipped ({self.first})", file=sys.stderr)


def rows_to_the_end(rows: Iterable[Any], name: str) -> Iterator[tuple[int, Any]]:
    """Numbered rows; what breaks them off is one line."""
    number = -1
    try:
        for number, row in enumerate(rows):
            yield number, row
    except Exception as error:  # the hub's client raises a dozen kinds
        raise UserError(
            f"text {name!r} broke off after {number + 1} rows ({type(error).__name__}: {error}): "
            "start again (with --resume); whole shards and checkpoints are kept"
        ) from None


def field_text(row: Any, field: str, place: str) -> str:
    """The text in a row's field; `UserError` if there is none."""
    if not isinstance(row, dict) or field not in row:
        raise UserError(no_field(place, field, list(row) if isinstance(row, dict) else []))
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {field!r} holds {type(text).__name__}, not text")
    text.encode()  # JSON can escape half a surrogate pair, which is no character: a ValueError
    return text


def no_field(place: str, field: str, found: list[str]) -> str:
    """The line about a row or a file without the field."""
    return f"{place} has no field {field!r}; found {', '.join(map(repr, found)) or 'no fields'}"

"""Settings read from a command line: what each value may be stands beside its field.

    n_tokens: Count = 1000            # --n-tokens 0 is refused in one line, before any work
    rates: tuple[OpenFraction, ...]   # each value is checked
    output: OutputFile | None = None  # a place that cannot be written is refused at once

Imported before anything heavy is; nothing here works.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_type_hints

from sparse_coding.errors import UserError

MAX = 10**12
"""Of any number: what is larger was mistyped, and would not fit an integer of 64 bits."""


class Range(NamedTuple):
    """The numbers from `low` to `high`, both among them unless it is open."""

    low: int | float
    high: int | float = MAX
    is_open: bool = False
    or_zero: bool = False
    """0 stands for something of its own."""

    def refusal(self, value: int | float) -> str:
        """What it must be instead, nothing if it lies in the range; NaN and infinity never do."""
        inside = self.low < value < self.high if self.is_open else self.low <= value <= self.high
        if inside or (self.or_zero and value == 0):
            return ""
        return f"{MAX:,} or less" if MAX < value < math.inf else str(self)

    def __str__(self) -> str:
        low, high = f"{self.low:,g}", f"{self.high:,}"
        if self.high < MAX:
            allowed = f"between {low} and {high}" if self.is_open else f"from {low} to {high}"
        else:
            allowed = f"more than {low}" if self.is_open else f"{low} or more"
        return allowed + (", or 0" if self.or_zero else "")


class Place(NamedTuple):
    """A path that is going to be written: a file, or a folder; what is above it may be missing."""

    is_file: bool

    def refusal(self, path: Path) -> str:
        """What it must be instead, nothing if it can be written as far as can be told."""
        try:
            exists = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        except OSError as error:
            return f"a path that can be written ({error.strerror})"
        if self.is_file and path.is_dir():
            return "a file, not a folder"
        if exists != path.absolute() and not exists.is_dir():
            return f"a path that can be written ({exists} is no folder)"
        if not os.access(exists, os.W_OK):
            return f"a path that can be written ({exists} is not yours to write)"
        return ""


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what NumPy, torch and scikit-learn all take
Draws = Annotated[int, Range(1, 10**6)]
"""Of a bootstrap: its weights are held in memory."""
Processes = Annotated[int, Range(1, 1024)]
Ratio = Annotated[int, Range(1, 4096)]
Positive = Annotated[float, Range(0, is_open=True)]
PositiveOrZero = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
OpenFraction = Annotated[float, Range(0, 1, is_open=True)]
OutputFile = Annotated[Path, Place(is_file=True)]
OutputFolder = Annotated[Path, Place(is_file=False)]

Settings = TypeVar("Settings")


def read_settings(
    cls: type[Settings],
    arguments: Sequence[str] | None = None,
    *,
    description: str | None = None,
    prog: str | None = None,
    default: Settings | None = None,
) -> Settings:
    """A dataclass read from a command line, by default the process's own, every value possible.

    What is unknown or of another type ends the process with a line and status 2.
    """
    import tyro  # slow to import; only programs that read a command line need it

    given = None if arguments is None else list(arguments)
    start = {} if default is None else {"default": default}
    cfg = tyro.cli(cls, prog=prog, description=description, args=given, **start)
    return checked(cfg)


def checked(cfg: Settings) -> Settings:
    """The same settings; `UserError` that names the first flag whose value cannot be."""
    for field, limit in limits(type(cfg)).items():
        given = getattr(cfg, field)
        for value in given if isinstance(given, tuple) else (given,):
            refusal = "" if value is None else limit.refusal(value)
            if refusal:
                raise UserError(f"{flag(field)} {value} is not possible; it must be {refusal}")
    return cfg


def limits(cls: type) -> dict[str, Range | Place]:
    """What each field's values may be; fields whose every value is right are left out."""
    hints = get_type_hints(cls, include_extras=True)
    found = ((field.name, _limit_in(hints[field.name])) for field in dataclasses.fields(cls))
    return {name: limit for name, limit in found if limit is not None}


def _limit_in(hint: Any) -> Range | Place | None:
    parts = (_limit_in(part) for part in get_args(hint))
    return (
        hint if isinstance(hint, Range | Place) else next((part for part in parts if part), None)
    )


def flag(field: str) -> str:
    """How a field is written on a command line."""
    return "--" + field.replace("_", "-")

"""Files read and written: JSON of any origin in one line if it is bad, output whole or not at all;
and the end of a program whose arguments or files are bad."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 2**30
"""Of a file that is read at once: ten times the largest that is written here."""


def read_text(path: Path, advice: str) -> str:
    """A file's text, bytes that are no UTF-8 replaced; `ValueError` if it is missing or huge."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {advice}")
    n_bytes = path.stat().st_size
    if n_bytes > MAX_BYTES:
        raise ValueError(f"{path} has {n_bytes:,} bytes; at most {MAX_BYTES:,} are read")
    # a line that breaks off within a character must not take the others with it
    return path.read_bytes().decode("utf-8", errors="replace")


def read_json(path: Path, advice: str) -> Any:
    """What a JSON file holds; `ValueError` in one line if it is missing or broken."""
    return parsed(read_text(path, advice), str(path))


def parsed(text: str, what: str) -> Any:
    """What a JSON text says; `ValueError` if it is broken, or nests deeper than Python reads."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from None


def refuse(reason: object) -> NoReturn:
    """End the program with one line on stderr and status 2, as argparse does."""
    line = " ".join(str(reason)[:4000].split())  # it may quote a stranger's file
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that becomes it when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""Documents read from local .txt, .jsonl and .parquet files, one after the other.

Bad input is a `UserError` that names the file and the line. This module must not split,
shuffle or tokenise.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparse_coding.errors import UserError
from sparse_coding.storage import sha256

SUFFIXES = (".txt", ".jsonl", ".parquet")


class Document(NamedTuple):
    """One text; `source` is the part of the mixture it belongs to, `id` names it within."""

    text: str
    source: str
    id: str


def text_files(path: Path) -> list[Path]:
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [file for file in found if file.is_file() and file.suffix in SUFFIXES]
    if not files:
        raise UserError(f"{path} holds no text; allowed are files {', '.join(SUFFIXES)}")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{file} is empty")
    return files


@dataclass
class FileReader:
    """Reads `path`, a file or a folder; counts the broken lines of its last reading.

    A document's `source` is the file, or in a folder the first folder below it (the folder
    itself for files that lie directly in it); its `id` is the file's name and the line or row.
    """

    path: Path
    text_field: str
    skip_broken_lines: bool
    n_skipped: int = 0

    def __post_init__(self) -> None:
        self.files = text_files(self.path)

    def documents(self) -> Iterator[Document]:
        self.n_skipped = 0
        readers = {".txt": self._txt, ".jsonl": self._jsonl, ".parquet": self._parquet}
        for file in self.files:
            name = self._name(file)
            source = name.split("/")[0] if "/" in name else self.path.name
            for place, text in readers[file.suffix](file):
                if text.strip():
                    yield Document(text, source, f"{name}:{place}")
        if self.n_skipped:
            print(f"{self.path}: {self.n_skipped} broken lines skipped", file=sys.stderr)

    def fingerprint_fields(self) -> dict:
        """What determines the documents: the field, and every file's name, size and checksum."""
        files = [[self._name(file), file.stat().st_size, sha256(file)] for file in self.files]
        return {"text_field": self.text_field, "files": files}

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix() if self.path.is_dir() else file.name

    def _txt(self, file: Path) -> Iterator[tuple[int, str]]:
        if self.path.is_dir():
            yield 0, "".join(line for _, line in _lines(file))
            return
        start, lines, n_blank = 1, [], 0
        for number, line in _lines(file):
            n_blank = 0 if line.strip() else n_blank + 1
            if n_blank == 2:
                yield start, "".join(lines).strip("\n")
                start, lines = number + 1, []
            lines.append(line if line.strip() else "\n")
        yield start, "".join(lines).strip("\n")

    def _jsonl(self, file: Path) -> Iterator[tuple[int, str]]:
        for number, line in _lines(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                text = field_text(row, self.text_field, f"{file}, line {number}")
                text.encode()  # JSON can escape half a surrogate pair, which is no character
            except UserError:
                raise
            except (ValueError, RecursionError) as error:  # also of numbers and nesting too long
                if not self.skip_broken_lines:
                    raise UserError(
                        f"{file}, line {number} is broken: {error}; mend it or ask for broken "
                        "lines to be skipped (skip_broken_lines)"
                    ) from None
                self.n_skipped += 1
                continue
            yield number, text

    def _parquet(self, file: Path) -> Iterator[tuple[int, str]]:
        from pyarrow import ArrowException, parquet

        field, number = self.text_field, 0
        try:
            names = parquet.read_schema(file).names
            if names.count(field) != 1:
                raise UserError(_no_field(str(file), field, names))
            # A text that is there once and meant a thousand times stays there once.
            with parquet.ParquetFile(file, read_dictionary=[field]) as table:
                for batch in table.iter_batches(batch_size=256, columns=[field]):
                    for text in batch.column(0):
                        number += 1
                        yield number, field_text({field: text.as_py()}, field, f"{file}, {number}")
        except (ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file} is no whole parquet file: {reason}") from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file; only a line feed ends a line."""
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file}, line {number} is not UTF-8 ({error.reason}): convert the file"
                ) from None


def field_text(row: Any, field: str, place: str) -> str:
    if not isinstance(row, dict) or field not in row:
        raise UserError(_no_field(place, field, list(row) if isinstance(row, dict) else []))
    if not isinstance(row[field], str):
        raise UserError(f"{place}: field {field!r} holds {type(row[field]).__name__}, not text")
    return row[field]


def _no_field(place: str, field: str, found: list[str]) -> str:
    return f"{place} has no field {field!r}; found {', '.join(map(repr, found)) or 'no fields'}"

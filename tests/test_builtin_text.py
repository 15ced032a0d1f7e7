"""The builtin text: shares, repeats, pieces, cache. Built from made-up sources or from tqdm."""

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_coding import builtin_text
from sparse_coding.builtin_text import Source, build, cut, read_code, read_docstrings
from sparse_coding.errors import UserError
from sparse_coding.text import load_text

ROOT = Path(__file__).parents[1]
HEADER = (
    "This very licence header is repeated in every file and long enough to count as a paragraph."
)


def words(n, seed):
    rng = random.Random(seed)
    letters = string.ascii_lowercase + "éß漢\n"
    return " ".join("".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(n))


def planted(sizes, *, n_chars=3000, shared=False):
    """A reader of made-up parents; with `shared`, each starts with the same paragraph."""

    def read(package, files):
        for i in range(sizes[package]):
            paragraphs = [words(60, seed=f"{package}{i}/{j}") for j in range(n_chars // 300)]
            yield (
                f"file{i}",
                "\n\n".join([HEADER.upper() if i % 2 else HEADER] * shared + paragraphs),
            )

    return read


def build_rows(tmp_path, sources):
    path = build(tmp_path, sources, minimum_bytes=1)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_source_takes_no_more_than_its_share(tmp_path):
    read = planted({"numpy": 60, "tqdm": 300})
    sources = (
        Source("prose", ("numpy",), read, 1.0, 10**9, "none"),
        Source("code", ("tqdm",), read, 0.25, 10**9, "none"),
    )
    rows = build_rows(tmp_path, sources)
    size = {
        s: sum(len(r["text"].encode()) for r in rows if r["source"] == s)
        for s in ("prose", "code")
    }
    share = size["code"] / sum(size.values())
    assert 0.22 < share <= 0.25  # a whole parent less than the share at most
    assert len({r["id"] for r in rows if r["source"] == "prose"}) == 60


def test_a_package_gives_no_more_than_its_bytes(tmp_path):
    read = planted({"numpy": 20}, n_chars=50_000)  # about 55 kB each
    source = Source("prose", ("numpy",), read, 1.0, 190_000, "none")
    n_bytes = sum(len(r["text"].encode()) for r in build_rows(tmp_path, (source,)))
    assert 100_000 < n_bytes <= 190_000


def test_a_repeated_paragraph_is_kept_once_whatever_its_case(tmp_path):
    source = Source("prose", ("numpy",), planted({"numpy": 20}, shared=True), 1.0, 10**9, "none")
    rows = build_rows(tmp_path, (source,))
    assert len(rows) == 20
    assert sum(HEADER.lower() in row["text"].lower() for row in rows) == 1


def test_equal_texts_of_two_packages_are_kept_once(tmp_path):
    def read(package, files):
        yield "file", words(200, seed=5)

    rows = build_rows(tmp_path, (Source("prose", ("numpy", "tqdm"), read, 1.0, 10**9, "none"),))
    assert len(rows) == 1


def test_builtin_pieces_of_one_parent_are_on_one_side_of_the_split(tmp_path, monkeypatch):
    source = Source(
        "prose", ("numpy",), planted({"numpy": 40}, n_chars=50_000), 1.0, 10**9, "none"
    )
    path = build(tmp_path, (source,), minimum_bytes=1)
    monkeypatch.setattr(builtin_text, "build", lambda cache: path)
    loaded = load_text("builtin", heldout_fraction=0.3)
    parents = {
        split: {d.id.rpartition("#")[0] for d in loaded.documents(split)}
        for split in ("train", "heldout")
    }
    assert parents["train"] and parents["heldout"]
    assert not parents["train"] & parents["heldout"]
    assert any(d.id.endswith("#1") for d in loaded.documents("train"))


def test_any_prefix_of_the_builtin_text_is_a_fair_mixture(tmp_path):
    read = planted({"numpy": 300, "tqdm": 300})
    sources = tuple(
        Source(name, (package,), read, 1.0, 10**9, "none")
        for name, package in (("p", "numpy"), ("q", "tqdm"))
    )
    first = build_rows(tmp_path, sources)[:150]
    n = sum(row["source"] == "p" for row in first)
    # hypergeometric: 150 of 600, half of them p; five standard deviations
    assert abs(n - 75) < 5 * (150 * 0.25 * 450 / 599) ** 0.5


def test_pieces_of_a_cut_text_hold_all_of_it_in_order():
    lines = [words(30, seed=n).replace("\n", " ") for n in range(900)]
    for whole in ("\n\n".join(lines), "\n".join(lines), "x" * 70_001):
        pieces = cut(whole)
        assert "".join(pieces).replace("\n", "") == whole.replace("\n", "")
        assert len(pieces) > 1 and all(5_000 <= len(piece) <= 20_000 for piece in pieces)
    assert cut("x" * 199) == []


def test_a_text_with_paragraphs_is_cut_between_paragraphs_only():
    lines = [words(30, seed=n).replace("\n", " ") for n in range(900)]
    paragraphs = {"\n".join(lines[n : n + 10]) for n in range(0, 900, 10)}
    pieces = cut("\n\n".join(sorted(paragraphs)))
    assert len(pieces) > 1
    assert {p for piece in pieces for p in piece.split("\n\n")} == paragraphs


def test_the_cache_spares_building_again(tmp_path):
    sources = (
        Source("docstrings", ("tqdm", "not-installed"), read_docstrings, 1.0, 10**6, "as tqdm"),
    )
    written = build(tmp_path, sources, minimum_bytes=1).stat().st_mtime_ns
    assert build(tmp_path, sources, minimum_bytes=1).stat().st_mtime_ns == written


def test_another_process_builds_the_same_bytes(tmp_path):
    program = """
import sys
from sparse_coding.builtin_text import Source, build, read_docstrings
source = Source("docstrings", ("tqdm",), read_docstrings, 1.0, 10**6, "as tqdm")
print(build(sys.argv[1], (source,), minimum_bytes=1))
"""
    built = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    first, second = (Path(path) for path in built)
    assert first.name == second.name and first.read_bytes() == second.read_bytes() != b""


def test_no_module_gives_both_its_code_and_its_docstrings(tmp_path):
    names = {"docstrings": read_docstrings, "code": read_code}
    rows = build_rows(
        tmp_path, tuple(Source(n, ("tqdm",), r, 1.0, 10**6, "as tqdm") for n, r in names.items())
    )
    modules = {
        n: {r["id"].split("/", 1)[1].split("#")[0] for r in rows if r["source"] == n}
        for n in names
    }
    assert modules["docstrings"] and modules["code"]
    assert not modules["docstrings"] & modules["code"]


def test_another_version_of_a_package_is_another_text(monkeypatch):
    source = (Source("docstrings", ("tqdm",), read_docstrings, 1.0, 10**6, "as tqdm"),)
    before = builtin_text.recipe(source)
    monkeypatch.setattr(builtin_text.metadata, "version", lambda package: "0.0")
    assert builtin_text.recipe(source) != before


def test_too_little_builtin_text_is_refused_with_what_to_do(tmp_path):
    source = Source("prose", ("not-installed",), planted({}), 1.0, 10**9, "none")
    with pytest.raises(UserError, match="only 0.0 MB of builtin text.*pip install -r"):
        build(tmp_path, (source,), minimum_bytes=10**6)
    assert not list(tmp_path.iterdir())


def test_the_declared_sources_keep_code_and_bible_within_their_limits():
    share = {source.name: source.share for source in builtin_text.SOURCES}
    assert share["code"] <= 0.25 and share["bible"] <= 0.2

"""Files from outside, damaged at random: every reader accepts them or refuses them in one line.

    FUZZ_CASES=3000 FUZZ_RESULTS=benchmarks/results/fuzz.json python -m pytest tests/test_fuzz.py

damages a valid file of each of `fuzz_readers.READERS` that many times and writes what became of
it; the default is a few dozen, always the same ones. Whatever a file holds, its reader must end
within HANG_SECONDS, ask for no more than MAX_ALLOCATION beyond what is in use, write nothing but
in its own target, and raise nothing but its refusal, which is one line.
"""

import faulthandler
import io
import json
import os
import resource
import shutil
import signal
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from fuzz_readers import OUT, READERS, Reader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_coding.config import environment
from sparse_coding.storage import write_json

N_CASES = int(os.environ.get("FUZZ_CASES", "50"))
RESULTS = os.environ.get("FUZZ_RESULTS")
MAX_ALLOCATION = 2**30
HANG_SECONDS = 20
MAX_LINE = 5_000  # characters of a refusal
ODD_BYTES = (b"", b"\0", b"\xff\xfe", b"NaN", b"Infinity", b"-1", b"null", b"[]", b"{}", b'""',
             b"1e999", b"9" * 30, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"../", b"\n",
             b"\r\n", b"\xed\xa0\x80", b"cos\nsystem\n", b"\x8e" + b"\xff" * 7)  # fmt: skip
HOSTILE_TEXT = "<script>alert(1)</script><img src=x onerror=alert(1)>"
ODD_VALUES = (None, True, -1, 0, 1, 1.5, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"), "",
              "../../escaped", "/etc/passwd", HOSTILE_TEXT, "a\nb", "\ud800", "9" * 1000, [], {},
              [[]], [1] * 1000, {"a": {}}, [2**62, 2**62], [-1, 5])  # fmt: skip
ODD_NAMES = ("../escaped", "/escaped", "a/../../escaped", "..\\escaped", "C:escaped", "a//b", "",
             "a\0b", "CON", "x" * 300, "a/cfg.json/b", OUT, "b.txt")  # fmt: skip
Damage = tuple[str, float, float, int]


class Hang(BaseException):
    """Not an Exception: no reader may take it for damage."""


@st.composite
def damages(draw: st.DrawFn) -> list[Damage]:
    """A few kinds of damage at places given as shares of the file's length."""
    place = st.floats(0, 1, exclude_max=True)
    kinds = st.sampled_from(("flip", "cut", "remove", "repeat", "insert", "replace", "length",
                             "inside", "inside", "inside"))  # fmt: skip
    return draw(st.lists(st.tuples(kinds, place, place, st.integers(0, 9999)), min_size=1,
                         max_size=3))  # fmt: skip


def damaged(content: bytes, damage: Damage) -> bytes:
    kind, first, second, n = damage
    if kind == "inside":
        return damaged_inside(content, damage)
    a, b = sorted((int(first * len(content)), int(second * len(content))))
    odd, n_bytes = ODD_BYTES[n % len(ODD_BYTES)], n % 9
    huge = bytes([n % 256, 255, 255, 255, 255, 255, 255, 127])[:n_bytes]
    return {
        "flip": content[:a] + bytes(byte ^ 1 << n % 8 for byte in content[a : a + 1])
        + content[a + 1 :],
        "cut": content[:a],
        "remove": content[:a] + content[b:],
        "repeat": content[:b] + content[a:],
        "insert": content[:a] + odd + content[a:],
        "replace": content[:a] + odd + content[a + len(odd) :],
        "length": content[:a] + huge + content[a + n_bytes :],
    }[kind]  # fmt: skip


def damaged_inside(content: bytes, damage: Damage) -> bytes:
    """One part of a whole zip, one value of a valid JSON text (of a safetensors file: of its
    header), so that the reader gets past the outermost check."""
    _, first, second, n = damage
    if content[:4] == b"PK\x03\x04":
        return damaged_zip(content, damage)
    length = int.from_bytes(content[:8], "little")
    head = content[8 : 8 + length]
    for start, text, end in ((b"", content, b""), (None, head, content[8 + length :])):
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError):
            continue
        changed = json.dumps(with_odd_value(tree, first, n)).encode()
        return (len(changed).to_bytes(8, "little") if start is None else start) + changed + end
    lines = content.splitlines(keepends=True)
    i = int(first * len(lines))
    if len(lines) < 2 or n % 2:
        return damaged(content, ("replace", first, second, n))
    return b"".join([*lines[:i], damaged_inside(lines[i], damage), b"\n", *lines[i + 1 :]])


def damaged_zip(content: bytes, damage: Damage) -> bytes:
    _, first, second, n = damage
    changed = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old:
            members = [(member, old.read(member)) for member in old.infolist()]
    except Exception:  # noqa: BLE001 - whatever the unpackers raise
        return content  # damaged before
    with zipfile.ZipFile(changed, "w") as new:
        for i, (member, data) in enumerate(members):
            if i == n % len(members):
                if n // len(members) % 4:
                    inner = ("flip", "replace", "length", "insert", "cut", "repeat")[n % 6]
                    data = damaged(data, (inner, second, first, n))
                else:
                    member.filename = ODD_NAMES[int(first * len(ODD_NAMES))]
                    member.external_attr = (0o120777 if n % 2 else 0o644) << 16  # a link, or not
            new.writestr(member, data)
    return changed.getvalue()


def with_odd_value(tree: Any, place: float, n: int) -> Any:
    """One of all values in a JSON tree, itself among them, replaced, or left out."""
    places = [(top := [tree], 0)]
    for holder, key in places:
        value = holder[key]
        keys = (
            value
            if isinstance(value, dict)
            else range(len(value))
            if isinstance(value, list)
            else ()
        )
        places += [(value, inner) for inner in keys]
    holder, key = places[int(place * len(places))]
    if n % 7 == 0 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = ODD_VALUES[n % len(ODD_VALUES)]
    return top[0]


@contextmanager
def limits() -> Iterator[None]:
    """More memory, or more time than a small file can need, is an error, not a wait."""

    def hang(*_: object) -> None:
        raise Hang(f"not done after {HANG_SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG_SECONDS)
    faulthandler.dump_traceback_later(3 * HANG_SECONDS, exit=True)  # stuck where no signal gets
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_ALLOCATION, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def check_refusal(error: BaseException) -> None:
    """One line, and no allocation failed behind it: a reader must know before it asks."""
    assert "\n" not in str(error) and len(str(error)) < MAX_LINE, str(error)[:MAX_LINE]
    cause: BaseException | None = error
    while cause is not None:
        assert not isinstance(cause, MemoryError), repr(error)
        assert "allocate memory" not in str(cause), str(cause)
        cause = cause.__cause__ or cause.__context__


def read_damaged(reader: Reader, original: Path, damage: list[Damage], which: int) -> str:
    """`accepted` or `refused`; raises if a promise of this file is not kept."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary) / "outer" / "inner"
        shutil.copytree(original, root)
        path = root / reader.name
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        file = files[which % len(files)]
        content = file.read_bytes()
        for one in damage:
            content = damaged(content, one)
        file.write_bytes(content)
        before = sorted(Path(temporary).rglob("*"))
        try:
            with limits():
                reader.read(path)
            outcome = "accepted"
        except reader.refusal as error:
            check_refusal(error)
            outcome = "refused"
        after = (p for p in Path(temporary).rglob("*") if not p.is_relative_to(root / OUT))
        assert sorted(after) == before
    return outcome


@pytest.fixture(autouse=True)
def no_type_checks() -> Iterator[None]:
    """Users run without them: what they would refuse must be refused by the code itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """What became of the cases, one row per reader; written to RESULTS at the end."""
    found: list[dict[str, Any]] = []
    yield found
    if RESULTS:
        config = {
            "n_cases": N_CASES,
            "max_allocation": MAX_ALLOCATION,
            "hang_seconds": HANG_SECONDS,
        }
        content = {"config": config, "environment": environment("cpu"), "rows": found}
        write_json(RESULTS, content)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_a_damaged_file_is_read_or_refused_in_one_line(reader, tmp_path, rows):
    path = tmp_path / reader.name
    path.parent.mkdir(exist_ok=True)
    reader.write(path)
    reader.read(path)
    shutil.rmtree(tmp_path / OUT, ignore_errors=True)
    counts: Counter[str] = Counter()
    seconds = []

    @settings(
        max_examples=N_CASES, deadline=None, derandomize=True,
        database=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damages(), st.integers(0, 99))
    def read(damage, which):
        start = time.perf_counter()
        counts[read_damaged(reader, tmp_path, damage, which)] += 1
        seconds.append(time.perf_counter() - start)

    read()
    rows.append({
        "reader": reader.name, "n_cases": counts.total(), "n_refused": counts["refused"],
        "n_accepted": counts["accepted"], "seconds": sum(seconds), "slowest_seconds": max(seconds),
    })  # fmt: skip

"""Files that are either whole or absent: atomic writes, JSON, checksums. No pickle is written."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparse_coding.errors import DISK_ERRORS, UserError


@contextmanager
def disk_errors_in_one_line(path: Path) -> Iterator[None]:
    """A disk that is full, broken or not ours to write on, as a `UserError` that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in DISK_ERRORS:
            raise
        # safetensors passes the system's error on in words alone
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path} cannot be written: {reason}. What was written before is whole: make room, "
            "then start again (a training run with --resume)"
        ) from None


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in `path`'s folder that becomes `path` when the block ends without error.

    The data are flushed to the disk before the rename, so after a crash `path` holds either its
    old content or all of the new one. `UserError` if the disk is full or refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors_in_one_line(path):
        make_folder(path.parent)
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors' files are for us alone
            os.replace(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def bytes_below(folder: Path) -> int:
    """Of all files in a folder and in those below it; 0 if it is not there."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def remove_abandoned(folder: Path) -> None:
    """Delete what killed processes left half written anywhere below a folder that we lock."""
    ours, safetensors = (".*.tmp", ".*.old"), ".tmp*"  # which writes beside, then renames
    for path in [found for pattern in (*ours, safetensors) for found in folder.rglob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # gone with a folder before it


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def make_folder(folder: Path) -> None:
    """With all above it; what is new outlives a power cut, as the files in it do."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in new:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # makes the rename itself durable
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(folder: str | Path, marker: str, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without error.

    `UserError` if `folder` exists and `overwrite` is not set, or if it is neither empty nor one
    that holds a file named `marker`.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} exists; choose another folder or allow overwriting")
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_empty and not (folder / marker).is_file():
        raise UserError(f"{folder} is of another kind ({marker} is missing); it is kept")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors_in_one_line(folder):
            temporary.mkdir(parents=True)
            yield temporary
            _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(written: Path, folder: Path) -> None:
    """Two renames, so that what was there before stays whole until what replaces it is."""
    retired = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(retired)
    try:
        written.rename(folder)
        _sync_folder(folder.parent)
    except OSError:
        if retired.exists():
            retired.rename(folder)
        raise
    shutil.rmtree(retired, ignore_errors=True)


def write_json(path: str | Path, content: Any, is_compact: bool = False) -> Path:
    """Write `content` as readable JSON (NaN and infinity refused) and return the path.

    Compact: without white space, for large files that programs read.
    """
    path = Path(path)
    form: dict[str, Any] = {"separators": (",", ":")} if is_compact else {"indent": 2}
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, **form)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; a missing or broken file is a `UserError` that names it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of numbers and nesting too long
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_object(path: str | Path, *parts: str) -> dict[str, Any]:
    """The object in a JSON file; `UserError` unless each of `parts` is an object within it."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; it is damaged or of another kind")
    for part in parts:
        if not isinstance(content.get(part), dict):
            raise UserError(f"{path} has no object {part!r}; it is damaged or of another version")
    return content


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(content: Any) -> str:
    """16 hexadecimal digits that depend on nothing but the JSON content (key order ignored)."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]

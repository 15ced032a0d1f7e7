"""A dictionary's folder is written whole or not at all, and only a dictionary's is replaced."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparse_coding.errors import UserError


def holds_files(path: Path, names: tuple[str, ...]) -> bool:
    """Whether a folder has files of all those names."""
    return all((path / name).is_file() for name in names)


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
        raise UserError(f"{folder} is not an SAE's folder ({marker} is missing); it is kept")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(written: Path, folder: Path) -> None:
    """Two renames, so that what was there before stays whole until what replaces it is."""
    retired = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(retired)
    written.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)

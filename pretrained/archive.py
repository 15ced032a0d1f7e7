"""Unpacking zip archives that a stranger made; nothing of them is executed or followed.

Everything is judged before the first byte is written: names that leave the folder, links, devices
and archives that grow beyond the limits are refused as a whole.
"""

import shutil
import stat
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sparse_coding.errors import UserError
from sparse_coding.storage import atomic_path


class Limits(NamedTuple):
    """What an archive may unpack to."""

    n_files: int = 10_000
    n_bytes: int = 50 * 10**9
    ratio: float = 100.0
    """Unpacked bytes per packed byte; float32 weights reach about 1.1, JSON about 10."""
    slack_bytes: int = 10**6
    """A member up to this size may have any ratio."""
    reserved: frozenset[str] = frozenset()
    """Names that no member may have or lie below, in lower case."""


# Everything that may be packed in a zip and read by Python's own module.
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
# What a mode's file type may say: nothing (made on Windows), a file, a folder.
TYPES = {0, stat.S_IFREG, stat.S_IFDIR}
ENCRYPTED = 0x1  # bit of `flag_bits`


def safe_name(name: str) -> PurePosixPath:
    """A relative path that stays below the folder it is joined to on every system.

    `UserError` for an absolute one, `..`, `.`, an empty part, a backslash, a colon (drives,
    streams) or a control character.
    """
    parts = name.split("/")
    is_odd = any(ord(character) < 32 or character in "\\:\x7f" for character in name)
    if is_odd or any(part in ("", ".", "..") for part in parts):
        raise UserError(f"the path {name!r} could leave its folder; nothing of it is used")
    return PurePosixPath(name)


def unpack(path: Path, folder: Path, limits: Limits = Limits()) -> list[Path]:  # noqa: B008
    """Unpack a zip below `folder` and return its files; `UserError` if anything in it is odd.

    Each file appears whole or not at all; a file that stands in its place is replaced.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _checked(archive.infolist(), limits)
            _refuse_full_disk(members, folder)
            return [_unpack_one(archive, member, folder) for member in members]
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a whole zip archive ({error}); remove it") from None
    except UserError as error:
        raise UserError(f"{path} is refused: {error}") from None
    except Exception as error:  # four unpackers read a hostile file, and each raises what it likes
        raise UserError(f"{path} cannot be unpacked ({error or type(error).__name__})") from None


def _checked(members: list[zipfile.ZipInfo], limits: Limits) -> list[zipfile.ZipInfo]:
    """The archive's files, folders left out."""
    for member in members:
        _refuse_odd(member, limits)
    files = [member for member in members if not member.is_dir()]
    if len(members) > limits.n_files:
        raise UserError(f"it holds {len(members):,} entries; at most {limits.n_files:,} may be")
    n_bytes = sum(member.file_size for member in files)
    if n_bytes > limits.n_bytes:
        raise UserError(f"it unpacks to {n_bytes:,} bytes; at most {limits.n_bytes:,} may be")
    _refuse_collisions(member.filename for member in files)
    return files


def _refuse_odd(member: zipfile.ZipInfo, limits: Limits) -> None:
    name = member.orig_filename  # `filename` is cut at a null character
    safe_name(name.removesuffix("/"))
    if name.split("/")[0].casefold() in limits.reserved:
        raise UserError(f"{name!r} would replace a file that is not the archive's")
    if stat.S_IFMT(member.external_attr >> 16) not in TYPES:
        raise UserError(f"{name!r} is a link or a device, not a file")
    if member.flag_bits & ENCRYPTED:
        raise UserError(f"{name!r} is encrypted")
    if member.compress_type not in METHODS:
        raise UserError(f"{name!r} is packed by the unknown method {member.compress_type}")
    ratio = member.file_size / max(member.compress_size, 1)
    if member.file_size > limits.slack_bytes and ratio > limits.ratio:
        raise UserError(
            f"{name!r} unpacks to {ratio:,.0f} times its size; at most {limits.ratio:,.0f} may be"
        )


def _refuse_collisions(names: Iterable[str]) -> None:
    """Two members in one place, also on a file system that ignores case, or below a file."""
    seen: set[str] = set()
    folders: set[str] = set()
    for name in names:
        key = name.casefold()
        above = {str(parent) for parent in PurePosixPath(key).parents}
        if key in seen or key in folders or above & seen:
            raise UserError(f"{name!r} is in the way of another entry")
        seen.add(key)
        folders |= above


def _refuse_full_disk(members: list[zipfile.ZipInfo], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    n_bytes, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
    if n_bytes > free:
        raise UserError(f"it unpacks to {n_bytes:,} bytes and {folder} has {free:,} free")


def _unpack_one(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> Path:
    target = folder / member.filename
    # The module reads no further than the size in the directory and compares the checksum.
    with atomic_path(target) as temporary:
        with archive.open(member) as source, open(temporary, "wb") as file:
            shutil.copyfileobj(source, file, 2**20)
        if temporary.stat().st_size != member.file_size:
            raise UserError(f"{member.filename!r} ends early")
    return target

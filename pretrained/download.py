"""One file from one address: resumed where it broke off, verified, and whole or absent.

A download that breaks off leaves `.NAME.part` beside its place and `.NAME.part.json`, the
server's name for that version of the file (ETag or date). It is continued only if the server
confirms the version; otherwise it begins anew. Nothing here knows of releases.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparse_coding.errors import UserError
from sparse_coding.storage import read_object, sha256, write_json

ATTEMPTS = 5
PAUSE_SECONDS = 1.0  # doubled after each attempt
TIMEOUT_SECONDS = 30.0  # without a byte
BLOCK = 2**20


class Unreachable(UserError):
    """The server was not reached; what is here already stays for the next attempt."""


class Interrupted(Unreachable):
    """The server was reached and failed: worth another attempt at once."""


class Remote(NamedTuple):
    """A file somewhere else, and what is published about it."""

    url: str
    size: int | None = None
    """Bytes."""
    sha256: str | None = None
    git_sha1: str | None = None
    """Git's object id: SHA-1 of "blob SIZE\\0" and the content."""
    headers: Mapping[str, str] = {}
    """Sent to the url's own host only."""


def download(remote: Remote, path: Path) -> Path:
    """Fetch a file to `path` with a progress bar; `UserError` in one line if it cannot be had.

    What is published about it is verified; a file that fails is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            _receive(remote, part, path.name)
            break
        except Interrupted:
            if attempt == ATTEMPTS - 1:
                raise
    verify(remote, part)
    os.replace(part, path)
    _state(part).unlink(missing_ok=True)
    return path


def stated_size(remote: Remote) -> int | None:
    """Bytes, as published or as the server says; None where neither does or it is not reached."""
    if remote.size is not None:
        return remote.size
    import httpx2
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    headers = {"Accept-Encoding": "identity"} | dict(remote.headers)
    try:
        response = get_session().head(remote.url, headers=headers, timeout=TIMEOUT_SECONDS)
    except (OfflineModeIsEnabled, httpx2.HTTPError, httpx2.InvalidURL):
        return None  # the download itself says what is wrong
    length = response.headers.get("content-length")
    return int(length) if length and response.status_code == 200 else None


def verify(remote: Remote, path: Path) -> None:
    """`UserError`, and the file is gone, unless it is what is published."""
    found = {
        "size": path.stat().st_size,
        "sha256": sha256(path) if remote.sha256 else None,
        "git_sha1": git_sha1(path) if remote.git_sha1 else None,
    }
    for key, value in found.items():
        expected = getattr(remote, key)
        if expected is not None and value != expected:
            path.unlink()
            _state(path).unlink(missing_ok=True)
            raise UserError(
                f"{remote.url} came with {key} {value} where {expected} is published; it was "
                "removed: fetch it again, and if it happens again do not trust the source"
            )


def git_sha1(path: Path) -> str:
    """Git's object id of a file."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _receive(remote: Remote, part: Path, name: str) -> None:
    """Append what is missing; `Unreachable` if the connection fails."""
    import httpx2
    from huggingface_hub import get_session
    from huggingface_hub.errors import OfflineModeIsEnabled

    start, version = _begun(part)
    headers = {"Accept-Encoding": "identity"} | dict(remote.headers)
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": version}
    try:
        with get_session().stream(
            "GET", remote.url, headers=headers, timeout=TIMEOUT_SECONDS
        ) as response:
            if not _is_complete(response, start):
                _refuse_bad_status(remote.url, response.status_code)
                start = _first_byte(response, start, version, part)
                _write_body(response, remote, part, start, name)
    except OfflineModeIsEnabled:
        raise Unreachable(f"{remote.url} is out of reach: HF_HUB_OFFLINE is set") from None
    except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
        raise Unreachable(f"{remote.url} is out of reach ({error})") from None
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        n = part.stat().st_size if part.exists() else 0
        reason = str(error) or type(error).__name__
        raise Interrupted(
            f"{remote.url} broke off after {n:,} bytes ({reason}); the same command goes on there"
        ) from None


def _begun(part: Path) -> tuple[int, str]:
    """Bytes that are here, and the version they are of; (0, "") if that is not known."""
    if not (part.is_file() and _state(part).is_file()):
        return 0, ""
    version = read_object(_state(part)).get("version")
    is_known = isinstance(version, str) and version
    return (part.stat().st_size, version) if is_known else (0, "")


def _is_complete(response: Any, start: int) -> bool:
    """Whether all bytes are here already: there is none after the last."""
    is_empty_range = response.status_code == 416
    return is_empty_range and response.headers.get("content-range") == f"bytes */{start}"


def _refuse_bad_status(url: str, status: int) -> None:
    if status in (200, 206, 416):
        return
    if status in (404, 410):
        raise UserError(f"{url} does not exist (status {status})")
    if status in (401, 403):
        raise UserError(
            f"{url} asks for permission (status {status}): accept the terms on its page, then "
            "`hf auth login`"
        )
    raise Interrupted(f"{url} answered with status {status}; try again later")


def _version(headers: Mapping[str, str]) -> str:
    """What identifies a version of a file: a strong ETag, else the date of its last change."""
    etag = headers.get("etag", "")
    return etag if etag.startswith('"') else headers.get("last-modified", "")


def _first_byte(response: Any, start: int, version: str, part: Path) -> int:
    """Where the body begins: at `start` in the same version, or at 0 and nothing is left here."""
    is_whole = response.status_code == 200
    begins_there = response.headers.get("content-range", "").startswith(f"bytes {start}-")
    if not is_whole and start and begins_there and _version(response.headers) == version:
        return start
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)
    if not is_whole:
        address = str(response.url).partition("?")[0]  # what follows may be a signature
        raise Interrupted(f"{address} has another version now; repeat the command")
    return 0


def _write_body(response: Any, remote: Remote, part: Path, start: int, name: str) -> None:
    from tqdm import tqdm

    length = response.headers.get("content-length")
    total = start + int(length) if length else remote.size
    _refuse_wrong_size(remote, part, start, total)
    write_json(_state(part), {"version": _version(response.headers)})
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None)
    with bar, open(part, "ab") as file:
        for block in response.iter_raw():
            file.write(block)
            bar.update(len(block))
            if total is not None and file.tell() > total:
                raise UserError(f"{remote.url} sends more than the {total:,} bytes it has")
        file.flush()
        os.fsync(file.fileno())


def _refuse_wrong_size(remote: Remote, part: Path, start: int, total: int | None) -> None:
    if remote.size is not None and total is not None and total != remote.size:
        raise UserError(
            f"{remote.url} is {total:,} bytes where {remote.size:,} are published; not fetched"
        )
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        raise UserError(
            f"{remote.url} needs {total - start:,} bytes and {part.parent} has {free:,} free"
        )

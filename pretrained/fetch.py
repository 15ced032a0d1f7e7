"""Fetch dictionaries that others trained, once, verified, into a folder of this machine.

    python -m pretrained.fetch --list                                # all releases
    python -m pretrained.fetch --list gpt2-small-res-jb              # one release's dictionaries
    python -m pretrained.fetch pythia-70m-deduped-sm                 # all of it
    python -m pretrained.fetch gemma-scope-2b-pt-res --layer 12
    python -m pretrained.fetch gemma-scope-2b-pt-res --file layer_12/width_65k/average_l0_21
    python -m pretrained.fetch owner/name --file folder              # any Hugging Face repository

The folder is outputs/cache/pretrained/RELEASE, or what --cache or the environment variable
SPARSE_CODING_PRETRAINED names instead of outputs/cache/pretrained. A download that breaks off is
continued by the same command. HF_ENDPOINT names another hub; HF_HUB_OFFLINE=1 keeps it quiet.
"""

import fcntl
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from pretrained.archive import Limits, safe_name, unpack
from pretrained.catalogue import (
    HERE,
    Dictionary,
    Release,
    dictionary_table,
    find_release,
    nearest,
    release_table,
    releases,
)
from pretrained.download import Remote, Unreachable, download, git_sha1, stated_size
from sparse_coding.errors import UserError, report_user_errors_in_one_line, without_secrets
from sparse_coding.settings import CountOrZero, OutputFolder, Positive, read_settings
from sparse_coding.storage import read_object, sha256, write_json

RECORD, LOCK = "fetched.json", ".lock"
RESERVED = frozenset({RECORD, LOCK})
"""The store's own files, which nothing of a release may replace."""


def default_cache() -> Path:
    """Where fetched dictionaries are kept unless a command says otherwise."""
    folder = os.environ.get("SPARSE_CODING_PRETRAINED")
    return Path(folder) if folder else HERE.parent / "outputs" / "cache" / "pretrained"


@dataclass(frozen=True)
class FetchConfig:
    """Fetch dictionaries that others trained."""

    release: Annotated[str, tyro.conf.Positional] = ""
    """A release of the manifest, or a Hugging Face repository owner/name."""
    dictionary: tuple[str, ...] = ()
    """Dictionaries of the release by name; everything where nothing is chosen."""
    layer: tuple[CountOrZero, ...] = ()
    """Dictionaries of these layers."""
    file: tuple[str, ...] = ()
    """Files or folders by their path in the release, listed here or not."""
    list: bool = False
    """Only print what there is."""
    cache: OutputFolder = field(default_factory=default_cache)
    """Folder for what is fetched."""
    max_gb: Positive = 20.0
    """Ask before fetching more than this: stop, and say how much it is."""


def fetch(
    release: Release, dictionaries: Sequence[Dictionary], cache: Path, max_gb: float = 20.0
) -> list[Path]:
    """Folders (or single files) of the dictionaries, fetched unless they are there."""
    if release.kind == "embedded":
        return [_embedded(release, dictionary) for dictionary in dictionaries]
    dictionaries = dictionaries or [Dictionary(release.name, "")]
    store = Store(cache / release.name)
    places = [store.place(d.path) for d in dictionaries]
    if _missing(release, dictionaries, store):
        with store.locked():
            missing = _missing(release, dictionaries, store)  # others may just have fetched it
            if missing and release.archive:
                _fetch_archive(release, store, max_gb)
            elif missing:
                _fetch_each(release, missing, store, max_gb)
    for place in places:
        if not place.exists():
            raise UserError(f"{release.name} came without {place.relative_to(store.folder)}")
    return places


def fetched(source: str, cache: Path | None = None) -> Path:
    """The folder or file of one dictionary: a path that exists, or what is fetched from a release.

    `source` is then RELEASE/DICTIONARY, RELEASE/PATH, owner/name/PATH on the hub, or a release of
    one dictionary.
    """
    if Path(source).exists():
        return Path(source)
    parts = source.split("/")
    if Path(parts[0] or "/").exists():
        raise UserError(f"{source} does not exist")
    n_parts = 1 if parts[0] in releases() else 2
    name, rest = "/".join(parts[:n_parts]), "/".join(parts[n_parts:])
    release = find_release(name)
    is_known = rest in {d.name for d in release.dictionaries}
    is_name = rest and (is_known or release.archive or release.kind != "hub")
    chosen = release.choose([rest] if is_name else [], [], [rest] if rest and not is_name else [])
    if len(chosen) != 1:
        raise UserError(f"{source} is {len(chosen)} dictionaries; name one as {name}/DICTIONARY")
    return fetch(release, chosen, cache or default_cache())[0]


def _missing(
    release: Release, dictionaries: Sequence[Dictionary], store: "Store"
) -> list[Dictionary]:
    """What is not here whole; only reads, so it needs no lock and no permission to write."""
    missing = [d for d in dictionaries if not store.has(release.archive or d.path)]
    if release.archive:
        missing = [d for d in missing if not _is_unpacked(release, store.place(d.path))]
    return missing


def _is_unpacked(release: Release, place: Path) -> bool:
    """Whether somebody unpacked it there by hand."""
    return all((place / name).is_file() for name in release.files)


def _embedded(release: Release, dictionary: Dictionary) -> Path:
    folder = HERE / release.source / dictionary.path
    lost = [name for name in release.files if not (folder / name).is_file()]
    if lost:
        raise UserError(
            f"{folder} lacks {', '.join(lost)}: {release.name} is part of the repository; "
            "check it out anew"
        )
    return folder


class Store:
    """A release's folder: its files, and a record of what came whole, from where."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, path: str) -> Path:
        """Where a path of the release is kept; "" is the release itself."""
        if _is_reserved(path):
            raise UserError(f"the path {path!r} is kept for the cache's own file")
        return self.folder / safe_name(path) if path else self.folder

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other processes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / LOCK, "w")  # noqa: SIM115 - closed below
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.folder} is being fetched by another process") from None
            yield

    def record(self) -> dict[str, dict[str, Any]]:
        """By path of a dictionary or archive: {file: {"url", "size", "sha256"}}.

        The size is None, and the rest is absent, until all of its files are here.
        """
        path = self.folder / RECORD
        if not os.path.exists(path):  # unlike Path.exists, false also where nothing may be read
            return {}
        record = read_object(path)
        for files in record.values():
            each = files.values() if isinstance(files, dict) else [None]
            if not all(isinstance(facts, dict) and "size" in facts for facts in each):
                raise UserError(f"{path} is damaged; remove it, and what is here is fetched anew")
        return record

    def has(self, path: str) -> bool:
        """Whether it came whole, and all its files still have their sizes."""
        files = self.record().get(path)
        return bool(files) and all(
            # unlike Path.is_file, false also of a name that no file can have
            os.path.isfile(self.folder / name)
            and (self.folder / name).stat().st_size == facts["size"]
            for name, facts in files.items()
        )

    def expect(self, path: str, names: Iterable[str]) -> None:
        """Note what a dictionary will consist of, before its first file is here."""
        files = {name: {"size": None} for name in names}
        write_json(self.folder / RECORD, self.record() | {path: files})

    def listed(self, path: str) -> set[str]:
        """All files at or below `path` that were ever fetched or begun; of "", every one."""
        names = {name for files in self.record().values() for name in files}
        return {name for name in names if not path or f"{name}/".startswith(f"{path}/")}

    def enter(self, path: str, files: dict[str, str | None]) -> None:
        """Note that a dictionary is whole; `files`: where each came from, None if by hand."""
        facts = {
            name: {
                "url": url and without_secrets(url),
                "size": (self.folder / name).stat().st_size,
                "sha256": sha256(self.folder / name),
            }
            for name, url in files.items()
        }
        write_json(self.folder / RECORD, self.record() | {path: facts})


def _is_reserved(name: str) -> bool:
    """Whether it is, or lies below, a file of the store, also where case is ignored."""
    return name.split("/")[0].casefold() in RESERVED


def _fetch_archive(release: Release, store: Store, max_gb: float) -> None:
    path = store.place(release.archive)
    remote = _plain_or_hub(release, release.archive, path)
    if not _is_it(remote, path):
        _refuse_too_much(release, [remote], max_gb)
        _get(remote, path)
    files = unpack(path, store.folder, Limits(reserved=RESERVED))
    names = {file.relative_to(store.folder).as_posix(): remote.url for file in files}
    store.enter(release.archive, names)
    path.unlink()


def _plain_or_hub(release: Release, name: str, path: Path) -> Remote:
    """Where the archive is; offline, for one that was put there by hand, without its facts."""
    if release.kind == "url":
        return Remote(release.source + name, release.size, release.sha256)
    from pretrained.hub import file_url, list_files

    try:
        remote = list_files(release.source, name)[name]
    except Unreachable as error:
        remote = Remote(file_url(release.source, name))
        if not path.is_file():
            raise UserError(by_hand(error, [(remote.url, path)])) from None
    return remote._replace(
        size=release.size or remote.size, sha256=release.sha256 or remote.sha256
    )


def _fetch_each(
    release: Release, dictionaries: Sequence[Dictionary], store: Store, max_gb: float
) -> None:
    found: dict[str, dict[str, Remote]] = {}
    for dictionary in dictionaries:
        try:
            found[dictionary.path] = _remotes(release, dictionary)
        except Unreachable as error:
            _accept_by_hand(release, dictionary.path, store, error)
    wanted = {
        name: remote
        for files in found.values()
        for name, remote in files.items()
        if not _is_it(remote, store.place(name))
    }
    _refuse_too_much(release, wanted.values(), max_gb)
    for path, files in found.items():
        store.expect(path, files)
        for name in files:
            if name in wanted:
                _get(wanted.pop(name), store.place(name))
        store.enter(path, {name: remote.url for name, remote in files.items()})


def _refuse_too_much(release: Release, wanted: Iterable[Remote], max_gb: float) -> None:
    n_bytes = sum(stated_size(remote) or 0 for remote in wanted)
    if n_bytes > max_gb * 1e9:
        choose = "" if release.archive else "choose with --dictionary, --layer or --file, or "
        raise UserError(
            f"{release.name}: this is {n_bytes / 1e9:.1f} GB; {choose}allow it with "
            f"--max-gb {math.ceil(n_bytes / 1e9)}"
        )


def _remotes(release: Release, dictionary: Dictionary) -> dict[str, Remote]:
    """A dictionary's files by their path in the release."""
    names = _known_names(release, dictionary.path)
    if release.kind == "url":
        return {name: Remote(release.source + name) for name in names}
    from pretrained.hub import list_files

    files = list_files(release.source, dictionary.path)
    lost = [name for name in names if name not in files]
    if not lost:
        names += [f"{dictionary.path}/{name}" for name in release.optional]
        return {name: files[name] for name in names if name in files}
    if dictionary in release.dictionaries:
        raise UserError(f"{release.source} lacks {', '.join(lost)}{nearest(lost[0], files)}")
    # somebody's own choice of a path: all that is there, but what a copy of a cache brings along
    return {name: remote for name, remote in files.items() if not _is_reserved(name)}


def _known_names(release: Release, path: str) -> list[str]:
    """What the manifest says must be at `path`."""
    return [f"{path}/{name}" for name in release.files] if release.files else [path]


def _accept_by_hand(release: Release, path: str, store: Store, error: Unreachable) -> None:
    """Without the hub: what lies there is used if it is all there, and not entered as verified."""
    from pretrained.hub import file_url, page_url

    listed = store.listed(path) - {f"{path}/{name}" for name in release.optional}
    names = sorted(listed.union(_known_names(release, path) if release.files else []))
    places = {name: store.place(name) for name in names or [path]}
    lost = {name: place for name, place in places.items() if not _is_present(place)}
    if not lost:
        print(f"not verified ({error}): {store.place(path)}", file=sys.stderr)
        return
    address = file_url if names else page_url  # perhaps a folder
    wanted = [(address(release.source, name), place) for name, place in lost.items()]
    raise UserError(by_hand(error, wanted)) from None


def _is_present(place: Path) -> bool:
    """A file, or a folder with something in it."""
    names = os.listdir(place) if os.path.isdir(place) else []
    return os.path.isfile(place) or any(not name.startswith(".") for name in names)


def _is_it(remote: Remote, path: Path) -> bool:
    """Whether a file is there already, by hand or from before, and is what is published."""
    return (
        path.is_file()
        and remote.size in (None, path.stat().st_size)
        and (remote.sha256 is None or sha256(path) == remote.sha256)
        and (remote.git_sha1 is None or git_sha1(path) == remote.git_sha1)
    )


def _get(remote: Remote, path: Path) -> None:
    try:
        download(remote, path)
    except Unreachable as error:
        raise UserError(by_hand(error, [(remote.url, path)])) from None


def by_hand(error: Exception, wanted: Sequence[tuple[str, Path]]) -> str:
    """What failed, what is missing, and where to put it."""
    files = "; ".join(f"{url} as {path}" for url, path in wanted)
    return f"{error}. By hand: save {files}, then repeat the command"


def main() -> None:
    """The command line."""
    report_user_errors_in_one_line()
    cfg = read_settings(FetchConfig, prog="python -m pretrained.fetch", description=__doc__)
    if not cfg.release:
        if not cfg.list:
            raise UserError("name a release; --list shows all")
        print(release_table(releases().values()), end="")
        return
    release = find_release(cfg.release)
    chosen = release.choose(cfg.dictionary, cfg.layer, [path.rstrip("/") for path in cfg.file])
    if cfg.list:
        print(dictionary_table(chosen), end="")
        return
    for path in fetch(release, chosen, cfg.cache, cfg.max_gb):
        print(path)


if __name__ == "__main__":
    main()

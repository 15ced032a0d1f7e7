"""The files of an activation cache: what its manifest must hold, checksums, one shard replaced.

Nothing here harvests.
"""

import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from sparse_coding.errors import UserError
from sparse_coding.storage import atomic_path, read_object, sha256

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Place(NamedTuple):
    """A place in the text that is harvested, from which a harvest can go on.

    It is behind `n_token_batches` whole token batches and `n_rows` kept rows after them; the other
    counts are those of the token batches. Without limits in it, they are still to be measured.
    """

    n_token_batches: int = 0
    n_rows: int = 0
    n_valid: int = 0
    n_dropped: int = 0
    max_norms: dict[str, float] | None = None


def read_manifest(folder: Path) -> dict[str, Any]:
    """manifest.json, every part of the kind and in the numbers that it was written with."""
    path = folder / "manifest.json"
    manifest = read_object(path, "settings", "hooks", "extra", "statistics")
    hooks = manifest["hooks"]
    shards = checked_shards(path, manifest.get("shards"), hooks)
    if manifest.get("dtype") not in list(DTYPES):
        raise damage(path, f"has the dtype {manifest.get('dtype')!r}")
    if sum(shard["rows"] for shard in shards) != manifest.get("n_tokens"):
        raise damage(path, f"has not the {manifest.get('n_tokens')!r} rows that it names")
    if not hooks or any(type(width) is not int or width < 1 for width in hooks.values()):
        raise damage(path, "has hooks without widths")
    statistics = manifest["statistics"]
    of_hooks = (statistics.get(hook) for hook in hooks)
    if len(statistics) != len(hooks) or not all(
        _lists_files(part) and type(part.get("mean_square_norm")) is float for part in of_hooks
    ):
        raise damage(path, "has not the statistics of its hooks")
    return manifest


def checked_shards(path: Path, shards: Any, hooks: Iterable[str]) -> list[dict[str, Any]]:
    """The same list; `UserError` unless each shard has its rows and its files.

    Where it ends only shards of newer caches say.
    """
    if not isinstance(shards, list) or not all(
        _lists_files(shard) and type(shard.get("rows")) is int and 0 < shard["rows"] < 2**40
        for shard in shards
    ):
        raise damage(path, "lists no shards")
    if not all(_is_place(shard["ends_at"], hooks) for shard in shards if "ends_at" in shard):
        raise damage(path, "has shards that end nowhere")
    return shards


def _is_place(part: Any, hooks: Iterable[str]) -> bool:
    if not isinstance(part, dict) or part.keys() != set(Place._fields):
        return False
    *counts, max_norms = (part[name] for name in Place._fields)
    if any(type(n) is not int or not 0 <= n < 2**40 for n in counts):
        return False
    is_measured = are_limits(max_norms, hooks)
    return is_measured or (max_norms is None and part["n_token_batches"] == 0)


def are_limits(found: Any, hooks: Iterable[str]) -> bool:
    """Whether it holds the norm limit of each hook."""
    return isinstance(found, dict) and all(
        type(found.get(hook)) is float and found[hook] >= 0 for hook in hooks
    )


def place_behind(shards: list[dict[str, Any]]) -> Place:
    """Where the rows behind these shards begin.

    Caches that were written before places were kept only say how many rows to leave out.
    """
    if shards and "ends_at" in shards[-1]:
        return Place(**shards[-1]["ends_at"])
    return Place(n_rows=sum(shard["rows"] for shard in shards))


def _lists_files(part: Any) -> bool:
    """Whether it has `files`, with the bytes and the checksum of each."""
    files = part.get("files") if isinstance(part, dict) else None
    return isinstance(files, dict) and all(
        isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys() for facts in files.values()
    )


def shard_path(folder: str, number: int) -> str:
    """Below a cache: where a hook's rows (or the "tokens") of one shard are."""
    return f"{folder}/shard_{number:05d}.safetensors"


def faults(
    folder: Path, files: dict[str, dict[str, Any]], verify: bool
) -> Iterator[tuple[Path, str]]:
    """Path and fault of every file that is not as written (with `verify`: by its checksum too)."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            yield path, "is missing"
        elif (size := path.stat().st_size) != expected["bytes"]:
            yield path, f"has {size} bytes, not the {expected['bytes']} written"
        elif verify and sha256(path) != expected["sha256"]:
            yield path, "does not have the checksum it was written with"


def check_files(folder: Path, files: dict[str, dict[str, Any]], verify: bool = False) -> None:
    """`UserError` about the first of `faults`."""
    for path, fault in faults(folder, files, verify):
        raise damage(path, fault)


def damage(path: Path, what: str) -> UserError:
    """The line about a broken file of a cache, and what to do."""
    folder = path.parent if path.suffix == ".json" else path.parent.parent
    return UserError(f"{path} {what}: delete the folder {folder} to harvest again")


@contextmanager
def open_shard(path: Path) -> Iterator[Any]:
    """The opened safetensors file; `UserError` if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise damage(path, f"cannot be read ({error})") from None


class DamagedShard(NamedTuple):
    """A shard whose files are not those that were written: where it begins, and what it held."""

    number: int
    place: Place
    n_rows: int
    files: dict[str, dict[str, Any]]


def damaged_shards(folder: Path) -> list[DamagedShard]:
    """The shards of a complete cache with a file that is missing or has another checksum.

    Reads the whole cache, at about the speed of the disk, and names every damage.
    """
    damaged, shards = [], read_manifest(folder)["shards"]
    for number, shard in enumerate(tqdm(shards, "verifying shards", leave=False)):
        if _has_faults(folder, shard["files"]):
            place = place_behind(shards[:number])
            damaged.append(DamagedShard(number, place, shard["rows"], shard["files"]))
    return damaged


def damaged_statistics(folder: Path) -> list[str]:
    """The hooks of a complete cache whose statistics are missing or have another checksum."""
    statistics = read_manifest(folder)["statistics"]
    return [hook for hook, part in statistics.items() if _has_faults(folder, part["files"])]


def _has_faults(folder: Path, files: dict[str, dict[str, Any]]) -> bool:
    found = [f"{path} {fault}" for path, fault in faults(folder, files, verify=True)]
    if found:
        print("\n".join(found), file=sys.stderr)
    return bool(found)


def replace_shard(folder: Path, damaged: DamagedShard, harvested: Path) -> None:
    """Put the one shard of the cache `harvested` in the place of a damaged one.

    `UserError` unless it is the same to the bit: the manifest and the statistics stay as they are.
    """
    for name, expected in damaged.files.items():
        again = harvested / shard_path(str(Path(name).parent), 0)
        if sha256(again) != expected["sha256"]:
            raise UserError(
                f"{folder / name} is damaged and came out differently when it was harvested "
                "again (another machine, device or version): delete the folder to harvest anew"
            )
        with atomic_path(folder / name) as temporary:
            shutil.copyfile(again, temporary)

"""Activations on disk: written once, checked, and handed out in a true global shuffle.

A cache is written by one `CacheWriter`, read through any number of `ActivationCache`s and never
changed. Nothing here knows how activations are made or what is trained on them.

    ROOT/FINGERPRINT/manifest.json                  written last: without it there is no cache
                     HOOK/shard_00000.safetensors   activations (rows, d), sum, sum_of_squares
                     HOOK/statistics.safetensors    mean (d) and mean_square_norm, float64
                     tokens/shard_00000.safetensors tokens, documents (rows), int32
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int, Int32, Int64
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sparse_coding.cache_files import (
    DTYPES,
    Place,
    check_files,
    checked_shards,
    damage,
    faults,
    open_shard,
    place_behind,
    read_manifest,
    shard_path,
)
from sparse_coding.errors import UserError
from sparse_coding.sources import ShuffledRows, ahead
from sparse_coding.storage import (
    atomic_path,
    disk_errors_in_one_line,
    fingerprint,
    make_folder,
    read_object,
    remove_abandoned,
    sha256,
    write_json,
)

SPARE_BYTES = 2**29
"""What a harvest leaves free on its disk."""


def cache_bytes(n_tokens: int, hooks: dict[str, int], dtype: torch.dtype) -> int:
    """Bytes of a cache of `n_tokens` rows, without file headers; `hooks` maps names to widths."""
    return n_tokens * (sum(hooks.values()) * dtype.itemsize + 2 * torch.int32.itemsize)


def check_space(folder: Path, n_bytes: int, margin: int = SPARE_BYTES) -> None:
    """Say what will be written; `UserError` unless the disk keeps `margin` bytes free after it."""
    print(f"writing {n_bytes / 1e9:.2f} GB of activations to {folder}", file=sys.stderr)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if n_bytes + margin > free:
        raise UserError(
            f"{n_bytes / 1e9:.2f} GB of activations (and {margin / 1e9:.2f} GB to spare) do not "
            f"fit into the {free / 1e9:.2f} GB free at {folder}: harvest fewer tokens or hooks, "
            "or choose another folder"
        )


class CacheWriter:
    """Writes a cache shard by shard; a writer that was killed is continued by the next one.

    `settings` is the JSON content that determines the bytes and names the folder; `hooks` maps
    each hook name to its width; at most `n_tokens` rows are taken. A shard is held in memory
    until it is full (75 MB per hook at width 576 in bfloat16), then written atomically with its
    own sums, so that statistics of a continued cache are those of an unbroken one to the bit.

    Usage: `append` the rows from `place` on, `finish`. Raises `UserError` when another process
    writes there, the cache exists already or the disk does not hold it.
    """

    def __init__(
        self,
        root: str | Path,
        settings: dict[str, Any],
        hooks: dict[str, int],
        n_tokens: int,
        dtype: torch.dtype,
        shard_tokens: int = 2**16,
    ) -> None:
        self.folder = cache_folder(root, settings)
        self.settings, self.hooks, self.dtype = settings, hooks, dtype
        self.n_tokens = n_tokens
        self._layout = {
            "hooks": hooks,
            "dtype": str(dtype).removeprefix("torch."),
            "shard_tokens": shard_tokens,
            "n_tokens": n_tokens,
        }
        assert shard_tokens > 0, "shards without rows"
        assert self._layout["dtype"] in DTYPES, f"{dtype} is not one of {list(DTYPES)}"
        with disk_errors_in_one_line(self.folder):
            make_folder(self.folder)
            self._lock = lock(self.folder)
        try:
            self._shards = self._complete_shards()
            n_missing = n_tokens - self.n_rows_written
            check_space(self.folder, cache_bytes(n_missing, hooks, dtype))
        except BaseException:
            self.close()
            raise
        self.place = place_behind(self._shards)
        """Where in the text the next row is."""
        rows = min(shard_tokens, n_missing)
        self._buffers = {hook: torch.empty(rows, d, dtype=dtype) for hook, d in hooks.items()}
        self._tokens = torch.empty(rows, dtype=torch.int32)
        self._documents = torch.empty(rows, dtype=torch.int32)
        self._n_buffered = 0

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write here. Complete shards stay; rows of a begun one are lost."""
        self._lock.close()

    @property
    def n_rows_written(self) -> int:
        """Rows in complete shards."""
        return sum(shard["rows"] for shard in self._shards)

    @property
    def n_tokens_done(self) -> int:
        """Rows taken so far, those of an earlier writer among them."""
        return self.n_rows_written + self._n_buffered

    def append(
        self,
        activations: dict[str, Float[Tensor, "rows _"]],
        tokens: Int[Tensor, " rows"],
        documents: Int[Tensor, " rows"],
        place: Place,
    ) -> None:
        """Take the next rows of every hook, with each row's token id and document index.

        `place` is where they begin; a shard keeps the place where it ends. Float32 rows are
        rounded to the cache's dtype. How rows are divided over calls does not matter to them.
        `UserError` if a full shard has activations that are not finite.
        """
        assert activations.keys() == self.hooks.keys(), f"{set(activations)} != {set(self.hooks)}"
        assert self.n_tokens_done + len(tokens) <= self.n_tokens, "more rows than n_tokens"
        pairs = [(buffer, activations[hook]) for hook, buffer in self._buffers.items()]
        pairs += [(self._tokens, tokens), (self._documents, documents)]
        assert len({len(values) for _, values in pairs}) == 1, "hooks differ in rows"
        n_taken = 0
        while n_taken < len(tokens):
            n_fitting = min(len(tokens) - n_taken, len(self._tokens) - self._n_buffered)
            for buffer, values in pairs:
                part = values[n_taken : n_taken + n_fitting].to(buffer.dtype)
                buffer[self._n_buffered : self._n_buffered + n_fitting] = part
            self._n_buffered += n_fitting
            n_taken += n_fitting
            self.place = place._replace(n_rows=place.n_rows + n_taken)
            if self._n_buffered == len(self._tokens):
                self._write_shard()

    def finish(self, extra: dict[str, Any]) -> Path:
        """Write what is buffered, the statistics and, last, the manifest; return the folder.

        Fewer rows than `n_tokens` are fine: the manifest states how many there are. `extra` is
        any JSON content about how the cache was made.
        """
        if self._n_buffered:
            self._write_shard()
        if not self._shards:
            raise UserError(
                f"no activations were harvested into {self.folder}: is the text empty?"
            )
        statistics = {h: _write_statistics(self.folder, h, self._shards) for h in self.hooks}
        manifest = {
            "fingerprint": fingerprint(self.settings),
            "settings": self.settings,
            **self._layout,
            "n_tokens": self.n_rows_written,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "extra": extra,
            "statistics": statistics,
            "shards": self._shards,
        }
        write_json(self.folder / "manifest.json", manifest)
        (self.folder / "progress.json").unlink(missing_ok=True)
        self.close()
        return self.folder

    def _complete_shards(self) -> list[dict[str, Any]]:
        """What an earlier writer left whole, from its progress.json, up to the first damage."""
        if (self.folder / "manifest.json").exists():
            raise UserError(f"{self.folder} is a complete cache: open it, or delete the folder")
        remove_abandoned(self.folder)
        if not (self.folder / "progress.json").exists():
            return []
        progress = read_object(self.folder / "progress.json")
        listed = progress.pop("shards", None)
        shards = checked_shards(self.folder / "progress.json", listed, self.hooks)
        _refuse_differences(self.folder, found=progress, asked=self._layout)
        for number, shard in enumerate(shards):
            for path, fault in faults(self.folder, shard["files"], verify=True):
                print(f"{path} {fault}: harvesting again from there", file=sys.stderr)
                return shards[:number]
        return shards

    def _write_shard(self) -> None:
        rows = slice(self._n_buffered)
        files = {}
        for hook, buffer in self._buffers.items():
            content = {"activations": buffer[rows], **_sums(buffer[rows])}
            if not content["sum_of_squares"].isfinite():
                first = self.n_rows_written
                raise UserError(
                    f"{hook} gave activations that are not finite in rows {first} to "
                    f"{first + self._n_buffered}: run the model in bfloat16 or float32"
                )
            files |= _write(self.folder, shard_path(hook, len(self._shards)), content)
        content = {"tokens": self._tokens[rows], "documents": self._documents[rows]}
        files |= _write(self.folder, shard_path("tokens", len(self._shards)), content)
        ends_at = self.place._asdict()
        self._shards.append({"rows": self._n_buffered, "files": files, "ends_at": ends_at})
        self._n_buffered = 0
        write_json(self.folder / "progress.json", {**self._layout, "shards": self._shards})


def _write_statistics(folder: Path, hook: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    total = {"sum": 0, "sum_of_squares": 0}
    for number in range(len(shards)):
        with open_shard(folder / shard_path(hook, number)) as file:
            total = {name: value + file.get_tensor(name) for name, value in total.items()}
    n_rows = sum(shard["rows"] for shard in shards)
    content = {"mean": total["sum"] / n_rows, "mean_square_norm": total["sum_of_squares"] / n_rows}
    files = _write(folder, f"{hook}/statistics.safetensors", content)
    return {"mean_square_norm": content["mean_square_norm"].item(), "files": files}


def _write(folder: Path, name: str, content: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    path = folder / name
    with atomic_path(path) as temporary:
        save_file(content, temporary)
    return {name: {"bytes": path.stat().st_size, "sha256": sha256(path)}}


def rebuild_statistics(folder: Path, hook: str) -> None:
    """Sum up a hook's whole shards again; `UserError` unless the same comes out to the bit."""
    manifest = read_manifest(folder)
    written = _write_statistics(folder, hook, manifest["shards"])
    if written != manifest["statistics"][hook]:
        path = folder / hook / "statistics.safetensors"
        raise damage(path, "was damaged and came out differently when it was made again")


class ActivationCache:
    """A complete cache. Shards are memory-mapped: opening costs nothing, reading takes pages.

    `UserError` if there is no cache, a file is missing or has another size (with `verify=True`:
    another checksum), or the cache was made for other `settings` than those given.
    """

    def __init__(
        self, folder: str | Path, settings: dict[str, Any] | None = None, verify: bool = False
    ) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if settings is not None:
            _refuse_differences(self.folder, found=manifest["settings"], asked=settings)
        self.settings: dict[str, Any] = manifest["settings"]
        self.hooks: dict[str, int] = manifest["hooks"]
        self.dtype = DTYPES[manifest["dtype"]]
        self.n_tokens: int = manifest["n_tokens"]
        self.extra: dict[str, Any] = manifest["extra"]
        self._statistics = manifest["statistics"]
        counted = [*manifest["shards"], *self._statistics.values()]
        for part in tqdm(counted, "verifying shards", disable=not verify, leave=False):
            check_files(self.folder, part["files"], verify)
        self._starts = np.cumsum([0] + [shard["rows"] for shard in manifest["shards"]])
        self._mapped: dict[tuple[str, str, int], np.ndarray] = {}

    def rows(self, hook_name: str, indices: Int64[np.ndarray, " n"]) -> Float[Tensor, "n d"]:
        """Those rows of a hook, in that order, in the cache's dtype."""
        self.check_hook(hook_name)
        return torch.from_numpy(self._gather(hook_name, "activations", indices)).view(self.dtype)

    def tokens(self, indices: Int64[np.ndarray, " n"]) -> Int32[Tensor, " n"]:
        """The token ids at which those rows were taken."""
        return torch.from_numpy(self._gather("tokens", "tokens", indices))

    def documents(self, indices: Int64[np.ndarray, " n"]) -> Int32[Tensor, " n"]:
        """The indices of the documents from which those rows come."""
        return torch.from_numpy(self._gather("tokens", "documents", indices))

    def mean(self, hook_name: str) -> Float64[Tensor, " d"]:
        """Mean activation over all rows."""
        self.check_hook(hook_name)
        with open_shard(self.folder / hook_name / "statistics.safetensors") as file:
            return file.get_tensor("mean")

    def mean_square_norm(self, hook_name: str) -> float:
        """Mean over all rows of ||x||^2 (about zero, not about the mean)."""
        self.check_hook(hook_name)
        return self._statistics[hook_name]["mean_square_norm"]

    def check_hook(self, hook_name: str) -> None:
        """`UserError` that names the hooks held if this one is not among them."""
        if hook_name not in self.hooks:
            held = ", ".join(self.hooks)
            raise UserError(f"{self.folder} does not hold {hook_name!r}; it holds {held}")

    def _gather(self, folder: str, tensor: str, indices: np.ndarray) -> np.ndarray:
        # NumPy, not torch: one row is a small copy, and a thread pool costs more than it gives
        # (and fights with the one that trains). Sorted, so that pages are read in disk order.
        order = np.argsort(indices)
        ordered = indices[order]
        if len(indices) and not 0 <= ordered[0] <= ordered[-1] < self.n_tokens:
            raise IndexError(f"rows are 0 to {self.n_tokens - 1}, not {ordered[[0, -1]]}")
        first_shard = self._map(folder, tensor, 0)
        gathered = np.empty((len(indices), *first_shard.shape[1:]), first_shard.dtype)
        bounds = np.searchsorted(ordered, self._starts)
        for shard in np.flatnonzero(np.diff(bounds)):
            here = slice(bounds[shard], bounds[shard + 1])
            local = ordered[here] - self._starts[shard]
            gathered[order[here]] = self._map(folder, tensor, int(shard))[local]
        return gathered

    def _map(self, folder: str, tensor: str, shard: int) -> np.ndarray:
        """The memory-mapped rows of one shard; bfloat16, which NumPy lacks, as int16."""
        key = (folder, tensor, shard)
        if key not in self._mapped:
            with open_shard(self.folder / shard_path(folder, shard)) as file:
                rows = file.get_tensor(tensor)
            self._check_shape(folder, shard, rows)
            is_bfloat16 = rows.dtype == torch.bfloat16
            self._mapped[key] = (rows.view(torch.int16) if is_bfloat16 else rows).numpy()
        return self._mapped[key]

    def _check_shape(self, folder: str, shard: int, rows: Tensor) -> None:
        dtype = self.dtype if folder in self.hooks else torch.int32
        n_rows = int(self._starts[shard + 1] - self._starts[shard])
        shape = (n_rows, self.hooks[folder]) if folder in self.hooks else (n_rows,)
        if tuple(rows.shape) != shape or rows.dtype != dtype:
            what = f"holds {tuple(rows.shape)} of {rows.dtype}, not {shape} of {dtype}"
            raise damage(self.folder / shard_path(folder, shard), what)


def cache_folder(root: str | Path, settings: dict[str, Any]) -> Path:
    """Where the cache for `settings` is or will be."""
    return Path(root) / fingerprint(settings)


def open_cache(
    root: str | Path, settings: dict[str, Any], verify: bool = False
) -> ActivationCache | None:
    """The complete cache for `settings` under `root`, or None if there is none yet."""
    folder = cache_folder(root, settings)
    if not (folder / "manifest.json").exists():
        return None
    return ActivationCache(folder, settings, verify)


class CachedActivations(ShuffledRows):
    """A source over one hook of a cache; a thread reads `prefetch` batches ahead."""

    def __init__(
        self,
        cache: ActivationCache,
        hook_name: str,
        batch_tokens: int,
        seed: int,
        n_epochs: int | None = None,
        device: torch.device | str = "cpu",
        prefetch: int = 2,
    ) -> None:
        cache.check_hook(hook_name)
        super().__init__(cache.n_tokens, cache.hooks[hook_name], batch_tokens, seed, n_epochs)
        self.cache, self.hook_name, self.prefetch = cache, hook_name, prefetch
        self.device = torch.device(device)
        self._is_pinned = self.device.type != "cpu" and torch.cuda.is_available()

    def load(self, numbers: Iterable[int]) -> Iterator[Float32[Tensor, "batch d_in"]]:
        yield from map(self._to_device, ahead(map(self._read, numbers), self.prefetch))

    def _read(self, number: int) -> Tensor:
        rows = self.cache.rows(self.hook_name, self.indices(number))
        return rows.pin_memory() if self._is_pinned else rows

    def _to_device(self, rows: Tensor) -> Tensor:
        # Converted after the copy: bfloat16 is half the bytes, and the copy need not be awaited.
        return rows.to(self.device, non_blocking=self._is_pinned).float()


def _sums(rows: Float[Tensor, "rows d"]) -> dict[str, Tensor]:
    """Sum (d) and sum of squared norms () in float64, a few rows at a time."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    squares = torch.zeros_like(total)
    for part in rows.split(512):  # stays in the CPU's cache: 4 times faster than 4096
        part = part.double()
        total += part.sum(dim=0)
        squares += part.square().sum(dim=0)
    return {"sum": total, "sum_of_squares": squares.sum()}


def lock(folder: Path) -> TextIO:
    """A file whose lock this process holds until it is closed or the process dies."""
    file = open(folder / "lock", "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read()
        file.close()
        raise UserError(
            f"process {holder} is harvesting into {folder}: wait until it is done, or stop it"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def _refuse_differences(folder: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    asked = json.loads(json.dumps(asked))  # as a file holds it: tuples are lists
    differing = [
        f"{key} is {found.get(key)!r}, not {asked.get(key)!r}"
        for key in sorted(found.keys() | asked.keys())
        if found.get(key) != asked.get(key)
    ]
    if differing:
        raise UserError(
            f"{folder} was made for other settings ({'; '.join(differing)}): ask for those, "
            "choose another folder, or delete this one to harvest again"
        )

"""Activations of a language model's hooks, as a cache on disk or streamed to the trainer.

The model runs up to the last hook that is asked for and never computes logits. One rule decides
which rows count, here and in every measurement: `kept_rows`.
"""

import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sparse_coding.cache import (
    DTYPES,
    ActivationCache,
    CacheWriter,
    cache_folder,
    lock,
    open_cache,
    rebuild_statistics,
)
from sparse_coding.cache_files import (
    DamagedShard,
    Place,
    are_limits,
    damage,
    damaged_shards,
    damaged_statistics,
    read_manifest,
    replace_shard,
)
from sparse_coding.config import hooks_of
from sparse_coding.errors import UserError
from sparse_coding.models import LanguageModel
from sparse_coding.processes import ALONE, Processes, refuse_unseen
from sparse_coding.shared_cache import NoWriter, written_by_first
from sparse_coding.sources import ahead
from sparse_coding.storage import remove_abandoned
from sparse_coding.text import TokenBatch

MAX_NORM_RATIO = 10.0
NORM_SAMPLE_TOKENS = 8192


class _AllFound(Exception):
    """Leaves the model's forward pass at the last hook."""


@torch.inference_mode()
def activations(
    lm: LanguageModel, tokens: Int[Tensor, "contexts position"], places: Sequence[str]
) -> dict[str, Float[Tensor, "contexts position _"]]:
    """The hooks' activations in the model's dtype, on its device; nothing after them runs.

    Those of several hooks that are joined to one place (`hooks_of`) lie side by side.
    """
    hook_names = {name for place in places for name in hooks_of(place)}
    found: dict[str, Tensor] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(x: Tensor, hook: Any) -> None:
            found[name] = x
            if len(found) == len(hook_names):
                raise _AllFound

        return record

    # The bridge's own stop_at_layer would run the unembedding for hooks of the last block.
    with contextlib.suppress(_AllFound):
        lm.model.run_with_hooks(
            tokens.to(lm.device),
            return_type=None,
            fwd_hooks=[(name, recorder(name)) for name in hook_names],
        )
    return {place: joined_columns([found[name] for name in hooks_of(place)]) for place in places}


def joined_columns(parts: Sequence[Float[Tensor, "*rows _"]]) -> Float[Tensor, "*rows _"]:
    """Rows of several hooks behind each other; those of one hook as they are."""
    return torch.cat(list(parts), dim=-1) if len(parts) > 1 else parts[0]


class NormLimit(NamedTuple):
    """The largest norm that counts at one of the hooks that are joined to a place."""

    width: int
    max_norm: float


def kept_rows(
    acts: Float[Tensor, "contexts position d"],
    valid: Bool[Tensor, "contexts position"],
    max_norm: float | Sequence[NormLimit],
) -> Bool[Tensor, "contexts position"]:
    """The rows that count: valid positions whose norm is at most `max_norm`, at every hook.

    `valid` leaves out first positions and special tokens (`text.valid_positions`); the norm leaves
    out the few other attention sinks, tokens with a norm a hundred times the median, one of which
    would outweigh a whole batch in the loss, the scale and the FVU. They are counted and reported.
    """
    limits = max_norm if isinstance(max_norm, Sequence) else [(acts.shape[-1], max_norm)]
    parts = acts.float().split([width for width, _ in limits], dim=-1)
    for part, (_, limit) in zip(parts, limits, strict=True):
        valid = valid & (part.norm(dim=-1) <= limit)
    return valid


def norm_limit(
    place: str, max_norms: Mapping[str, float], widths: Mapping[str, int]
) -> float | list[NormLimit]:
    """What `kept_rows` needs of a place, from what is known of each hook."""
    names = hooks_of(place)
    if len(names) == 1:
        return max_norms[place]
    return [NormLimit(widths[name], max_norms[name]) for name in names]


class Seen(NamedTuple):
    """One batch of contexts and what the hooks hold on it, all rows."""

    batch: TokenBatch
    acts: dict[str, Float[Tensor, "contexts position _"]]


def measure_max_norms(seen: Iterable[Seen]) -> dict[str, float]:
    """Per hook, 10 x the median norm of the first 8192 or more valid rows; reads no further."""
    norms: dict[str, list[Tensor]] = {}
    n, dtype = 0, None
    for batch, acts in seen:
        for name, x in acts.items():
            dtype, valid = x.dtype, batch.valid.to(x.device)
            norms.setdefault(name, []).append(x[valid].float().norm(dim=-1))
        n += int(batch.valid.sum())
        if n >= NORM_SAMPLE_TOKENS:
            break
    if n == 0:
        raise UserError("the text has no position to learn from: it is all special tokens")
    medians = {name: torch.cat(parts).median().item() for name, parts in norms.items()}
    for name, median in medians.items():
        if not math.isfinite(median):
            raise UserError(
                f"{name} gives activations that are not finite in {dtype}: run the model in "
                "bfloat16 or float32 (--dtype)"
            )
    return {name: MAX_NORM_RATIO * median for name, median in medians.items()}


def hook_width(lm: LanguageModel, hook_name: str) -> int:
    """Width d of a hook's activations, from a forward pass of one token."""
    token = torch.zeros(1, 1, dtype=torch.int64)
    return activations(lm, token, [hook_name])[hook_name].shape[-1]


class KeptRows(NamedTuple):
    """Aligned rows of several hooks with where they come from."""

    acts: dict[str, Float[Tensor, "rows _"]]
    tokens: Int[Tensor, " rows"]
    document: Int[Tensor, " rows"]

    def behind(self, n: int) -> "KeptRows":
        """All but the first n."""
        acts = {name: x[n:] for name, x in self.acts.items()}
        return KeptRows(acts, self.tokens[n:], self.document[n:])


class Rows:
    """Kept rows of several hooks, aligned: a row dropped at one hook is dropped at all.

    Several processes take turns in running the model, and all see all rows in the text's order.
    """

    processes: Processes = ALONE

    def __init__(
        self,
        lm: LanguageModel,
        make_batches: Callable[[], Iterable[TokenBatch]],
        hook_names: Sequence[str],
        processes: Processes = ALONE,
    ) -> None:
        self.lm, self.make_batches, self.hook_names = lm, make_batches, hook_names
        self.processes = processes
        self.n_valid = 0
        self.n_dropped = 0

    @cached_property
    def max_norms(self) -> dict[str, float]:
        """Norm limit per hook, measured at the first use unless a cache brought it along."""
        return measure_max_norms(self.seen(self.token_batches()))

    def token_batches(self) -> Iterator[TokenBatch]:
        """The text's contexts, once; a thread makes them while the model runs."""
        return ahead(self.make_batches())

    def __iter__(self) -> Iterator[KeptRows]:
        """One pass over the text."""
        return (kept for _, kept in self.behind(Place()))

    def behind(self, start: Place) -> Iterator[tuple[Place, KeptRows]]:
        """The pass from a place on, and where each of its parts begins.

        The model runs on none of the whole token batches before it.
        """
        self.n_valid, self.n_dropped = start.n_valid, start.n_dropped
        if start.max_norms is not None:
            vars(self).setdefault("max_norms", start.max_norms)
        batches = itertools.islice(self.token_batches(), start.n_token_batches, None)
        seen, n_skipped = self.seen(batches), start.n_rows
        if "max_norms" not in vars(self):
            seen, sample = itertools.tee(seen)  # the limits need no pass of their own
            self.max_norms = measure_max_norms(sample)
            del sample
        for number, one in enumerate(seen, start.n_token_batches):
            counts = self.n_valid, self.n_dropped
            kept = self.keep(one)
            n = min(n_skipped, len(kept.tokens))
            n_skipped -= n
            if not n_skipped:
                yield Place(number, n, *counts, self.max_norms), kept.behind(n)

    def alone(self) -> "Rows":
        """The same rows, without other processes."""
        if self.processes.is_alone:
            return self
        return Rows(self.lm, self.make_batches, self.hook_names)

    def see(self, batch: TokenBatch) -> Seen:
        """Run the model on one batch of contexts."""
        return Seen(batch, activations(self.lm, batch.tokens, self.hook_names))

    def seen(self, batches: Iterator[TokenBatch]) -> Iterator[Seen]:
        """What the hooks hold on each batch; of as many as there are processes each runs one."""
        while group := list(itertools.islice(batches, self.processes.size)):
            own = [self.see(batch) for batch in group[self.processes.rank :][:1]]
            for owner, batch in enumerate(group):
                is_own = owner == self.processes.rank
                acts = own[0].acts if is_own else self._empty(batch)
                yield Seen(batch, {k: self.processes.sent(x, owner) for k, x in acts.items()})

    def _empty(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Room for what another process sends."""
        kinds, shape = self._kinds, batch.tokens.shape
        return {name: x.new_empty(*shape, x.shape[-1]) for name, x in kinds.items()}

    @cached_property
    def _kinds(self) -> dict[str, Float[Tensor, "1 1 _"]]:
        """One activation of each hook: its width, dtype and device."""
        return activations(self.lm, torch.zeros(1, 1, dtype=torch.int64), self.hook_names)

    def kept(self, seen: Seen) -> Bool[Tensor, "contexts position"]:
        """Which rows count at every hook, on the CPU."""
        batch, acts = seen
        valid = batch.valid.to(self.lm.device)
        kept = valid
        for name in self.hook_names:
            kept = kept & kept_rows(acts[name], valid, self.max_norms[name])
        return kept.to(batch.tokens.device)

    def keep(self, seen: Seen) -> KeptRows:
        """The rows of a batch that count."""
        batch, acts = seen
        kept = self.kept(seen)
        n_valid = int(batch.valid.sum())
        self.n_valid += n_valid
        self.n_dropped += n_valid - int(kept.sum())
        rows = {name: acts[name][kept.to(self.lm.device)] for name in self.hook_names}
        return KeptRows(rows, batch.tokens[kept], batch.document[kept])


def harvest_to_cache(
    rows: Rows, root: Path, settings: dict[str, Any], n_tokens: int, dtype: str
) -> ActivationCache:
    """The activation cache for `settings`: an existing one, or harvested now.

    A harvest that was interrupted goes on behind its last complete shard; a shard that is damaged
    is harvested again, alone. If the text ends early the cache holds what there is, and a line
    says so.
    """
    folder, processes = cache_folder(root, settings), rows.processes
    if processes.of_first((folder / "manifest.json").exists()):
        return _checked_cache(rows, folder, settings)
    widths = {name: hook_width(rows.lm, name) for name in rows.hook_names}
    layout = root, settings, widths, n_tokens, getattr(torch, dtype)
    with written_by_first(processes, partial(CacheWriter, *layout), n_tokens) as writer:
        n_done = _fill(writer, rows, writer.place)
        writer.finish(
            {"max_norms": rows.max_norms, "n_valid": rows.n_valid, "n_dropped": rows.n_dropped}
        )
    if n_done < n_tokens:
        print(f"activations: the text ended after {n_done:,} of {n_tokens:,} tokens")
    processes.wait()
    refuse_unseen(folder, processes)
    return open_cache(root, settings)


def _fill(writer: CacheWriter | NoWriter, rows: Rows, start: Place) -> int:
    """Give the writer its rows, those from a place on; how many it then has."""
    with tqdm(total=writer.n_tokens, desc="harvest", unit="tok", unit_scale=True) as progress:
        progress.update(writer.n_tokens_done)
        for place, (acts, tokens, documents) in rows.behind(start):
            n = min(len(tokens), writer.n_tokens - writer.n_tokens_done)
            on_cpu = {name: x[:n].cpu() for name, x in acts.items()}
            writer.append(on_cpu, tokens[:n], documents[:n], place)
            progress.update(n)
            if writer.n_tokens_done == writer.n_tokens:
                break
    return writer.n_tokens_done


def _checked_cache(rows: Rows, folder: Path, settings: dict[str, Any]) -> ActivationCache:
    """The complete cache in a folder, every checksum verified and mended where it must be.

    Of several processes the first does it alone.
    """
    processes = rows.processes
    with processes.first_before_others():
        refuse_unseen(folder, processes)
        alone = rows.alone()
        alone.max_norms = rows.max_norms = _written_limits(folder, rows.hook_names)
        if processes.is_first:
            _mend(alone, folder, settings)
    cache = ActivationCache(folder, settings)
    print(f"activations: {cache.n_tokens:,} tokens are cached in {cache.folder}")
    return cache


def _written_limits(folder: Path, hook_names: Sequence[str]) -> dict[str, float]:
    max_norms = read_manifest(folder)["extra"].get("max_norms")
    if not are_limits(max_norms, hook_names):
        raise damage(folder / "manifest.json", "has not the norm limits of its hooks")
    return max_norms


def _mend(rows: Rows, folder: Path, settings: dict[str, Any]) -> None:
    shards, hook_names = damaged_shards(folder), damaged_statistics(folder)
    if not shards and not hook_names:
        return
    with lock(folder):
        remove_abandoned(folder)
        for damaged in shards:
            print(f"harvesting shard {damaged.number} of {folder} again")
            _harvest_again(rows, folder, settings, damaged)
        for hook_name in hook_names:
            rebuild_statistics(folder, hook_name)


def _harvest_again(
    rows: Rows, folder: Path, settings: dict[str, Any], damaged: DamagedShard
) -> None:
    manifest = read_manifest(folder)
    like = manifest["hooks"], damaged.n_rows, DTYPES[manifest["dtype"]]
    with (
        tempfile.TemporaryDirectory(prefix=".shard_", suffix=".tmp", dir=folder) as place,
        CacheWriter(place, settings, *like) as writer,
    ):
        _fill(writer, rows, damaged.place)
        replace_shard(folder, damaged, writer.finish({}))

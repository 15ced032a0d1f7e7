"""Other activations put into the running model: what the model loses with a reconstruction.

One mask for everything: only rows that the harvest keeps are replaced (`harvest.kept_rows`), and
only targets predicted from valid positions are counted, for the clean model and every variant.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_coding.config import hooks_of
from sparse_coding.harvest import NormLimit, activations, kept_rows
from sparse_coding.models import LanguageModel, block_of, moment_of
from sparse_coding.text import TokenBatch

Replacement = Callable[[Float[Tensor, "rows d"]], Float[Tensor, "rows d"]]
Hook = tuple[str, Callable[..., Tensor]]  # its name in the model, and what is done there
# In float32, 13 MB of a vocabulary of 49,152. Five times faster on a CPU than 1024 rows: memory is
# used again instead of being asked of the system anew.
ROWS_OF_LOGITS = 64


class Target(NamedTuple):
    """Where what a transcoder decodes belongs, after the hook whose rows it encodes."""

    hook_name: str
    max_norm: float
    """Rows of a larger norm at this hook do not count either (`harvest.kept_rows`)."""


class Alone(NamedTuple):
    """Of joined hooks, the replacement of one; the others stay as the model computes them."""

    replace: Replacement
    hook_name: str


class SplicedLosses(NamedTuple):
    """What the model loses by replacements, by name; 0 at targets that are not counted."""

    cross_entropy: dict[str, Float[Tensor, "contexts targets"]]
    """Nats of the next token."""
    kl: dict[str, Float[Tensor, "contexts targets"]]
    """KL(clean || replaced) of the next token's distribution, nats; without a clean pass, none."""
    counted: Bool[Tensor, "contexts targets"]
    """Which targets count."""


@torch.inference_mode()
def cross_entropies(
    lm: LanguageModel,
    batch: TokenBatch,
    hook_name: str,
    replacements: Mapping[str, Replacement | Alone | None],
    *,
    max_norm: float | Sequence[NormLimit] = float("inf"),
    target: Target | None = None,
) -> SplicedLosses:
    """Cross-entropy of the next token, and divergence from the clean model, under replacements.

    `replacements` maps a name to a function of the kept rows (n, d) in float32, or to None for the
    clean model, which is first where divergences are wanted. Target t + 1 is predicted from
    position t; it is counted where t is a valid position and t + 1 no special token. One forward
    pass each, of which only the first runs the blocks before the hook's. With a `target` they are
    functions of the hook's rows that go into the target's, in the same pass.

    Joined hooks (a crosscoder's) are replaced together, by functions of the clean model's rows.
    """
    tokens, valid = batch.tokens.to(lm.device), batch.valid.to(lm.device)
    counted = valid[:, :-1] & valid[:, 1:]
    targets = tokens[:, 1:][counted]
    earlier = _EarlierBlocks(lm, layer=min(map(block_of, hooks_of(hook_name))))
    make_hooks = _maker_of_hooks(lm, tokens, hook_name, target)
    result, clean = SplicedLosses({}, {}, counted), None
    for name, replace in replacements.items():
        hooks = [] if replace is None else make_hooks(replace, valid, max_norm)
        with earlier.run_once() as start:
            logits = lm.model.run_with_hooks(
                tokens, return_type="logits", fwd_hooks=[start, *hooks], use_cache=False
            )[:, :-1][counted]
        if replace is None:
            clean = logits
        loss, kl = _loss_and_kl(logits, targets, clean)
        result.cross_entropy[name] = _spread(loss, counted)
        if kl is not None:
            result.kl[name] = _spread(kl, counted)
    return result


class _EarlierBlocks:
    """The blocks before `layer`: they give the same in every pass over the same tokens.

    In the first pass they run and the stream that leaves them is recorded. In every other pass
    they return their input, which costs nothing, and the recorded stream takes its place.
    """

    def __init__(self, lm: LanguageModel, layer: int) -> None:
        # The bridge's own blocks hand every attribute that is set on them to what they wrap.
        self.modules = [block.original_component for block in list(lm.model.blocks)[:layer]]
        self.end = f"blocks.{layer}.hook_resid_pre"
        self.stream: Tensor | None = None

    @contextmanager
    def run_once(self) -> Iterator[Hook]:
        """The hook for one pass; comes before others at the same place."""
        skipped = [] if self.stream is None else self.modules
        try:
            for module in skipped:
                module.forward = _return_input
            yield self.end, self._record_or_restore
        finally:
            for module in skipped:
                vars(module).pop("forward", None)  # uncovers the method of its class

    def _record_or_restore(self, x: Tensor, hook: Any) -> Tensor:
        if self.stream is None:
            self.stream = x
        return self.stream


def _return_input(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def _maker_of_hooks(
    lm: LanguageModel,
    tokens: Int[Tensor, "contexts position"],
    place: str,
    target: Target | None,
) -> Callable[..., list[Hook]]:
    """Makes, of a replacement, which positions are valid and the norm limit, what to hang in."""
    names = hooks_of(place)
    if len(names) == 1:
        return partial(_hooks, place, target=target)
    return partial(_joined_hooks, activations(lm, tokens, names))


def _hooks(
    hook_name: str,
    replace: Replacement,
    valid: Bool[Tensor, "contexts position"],
    max_norm: float | Sequence[NormLimit],
    target: Target | None,
) -> list[Hook]:
    """What to hang into the model: names of hooks and functions."""
    encoded: list[Tensor] = []

    def replaced(x: Tensor, hook: Any) -> Tensor:
        read = x if target is None else encoded.pop()
        keep = kept_rows(read, valid, max_norm)
        if target is not None:
            keep = keep & kept_rows(x, valid, target.max_norm)
        x = x.clone()
        x[keep] = replace(read[keep].float()).to(x.dtype)
        return x

    if target is None:
        return _put(hook_name, replaced)
    return [(hook_name, lambda x, hook: encoded.append(x)), *_put(target.hook_name, replaced)]


def _joined_hooks(
    read: Mapping[str, Float[Tensor, "contexts position _"]],
    replace: Replacement | Alone,
    valid: Bool[Tensor, "contexts position"],
    max_norm: float | Sequence[NormLimit],
) -> list[Hook]:
    """The same for joined hooks, whose rows were `read` in a pass of the clean model.

    Not in the replaced pass: all must be read before the first is replaced, so that none is read
    as an earlier replacement changed it. Where all are of the residual stream, the last
    replacement covers the others, but for rows that are left out; `Alone` shows each.
    """
    chosen = [replace.hook_name] if isinstance(replace, Alone) else sorted(read, key=moment_of)
    replace = replace.replace if isinstance(replace, Alone) else replace
    rows = torch.cat(list(read.values()), dim=-1)
    keep = kept_rows(rows, valid, max_norm)
    widths = [x.shape[-1] for x in read.values()]
    parts = dict(zip(read, replace(rows[keep].float()).split(widths, dim=1), strict=True))

    def replaced(x: Tensor, hook: Any, name: str) -> Tensor:
        x = x.clone()
        x[keep] = parts[name].to(x.dtype)
        return x

    return [hook for name in chosen for hook in _put(name, partial(replaced, name=name))]


def _put(hook_name: str, replaced: Callable[..., Tensor]) -> list[Hook]:
    """Hooks by which the model goes on with `replaced` activations."""
    block, _, kind = hook_name.rpartition(".")
    if kind != "hook_resid_mid":
        return [(hook_name, replaced)]

    # The bridge puts this hook on the input of the second norm, and the stream itself goes past
    # it: to replace the stream, its change must also be added at the end of the block.
    changes = []

    def changed(x: Tensor, hook: Any) -> Tensor:
        x_hat = replaced(x, hook)
        changes.append(x_hat - x)
        return x_hat

    return [
        (hook_name, changed),
        (f"{block}.hook_resid_post", lambda x, hook: x + changes.pop()),
    ]


def _loss_and_kl(
    logits: Float[Tensor, "n vocabulary"],
    targets: Int[Tensor, " n"],
    clean: Float[Tensor, "n vocabulary"] | None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
    """Of each counted target; without clean logits there is no divergence."""
    loss = torch.zeros(len(targets), device=logits.device)
    kl = None if clean is None else torch.zeros_like(loss)
    for start in range(0, len(targets), ROWS_OF_LOGITS):
        part = slice(start, start + ROWS_OF_LOGITS)
        log_p = logits[part].float().log_softmax(dim=-1)
        loss[part] = -log_p.gather(1, targets[part, None])[:, 0]
        if kl is not None and clean is not logits:
            log_clean = clean[part].float().log_softmax(dim=-1)
            kl[part] = (log_clean.exp() * (log_clean - log_p)).sum(dim=-1)
    return loss, kl


def _spread(
    values: Float[Tensor, " n"], counted: Bool[Tensor, "contexts targets"]
) -> Float[Tensor, "contexts targets"]:
    spread = torch.zeros(counted.shape, device=values.device)
    spread[counted] = values
    return spread

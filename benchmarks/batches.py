"""The activations that benchmarks train on, scaled to a root-mean-square norm of sqrt(d_in)."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.methods import Task
from sparse_coding.cache import ActivationCache, CachedActivations
from sparse_coding.errors import UserError
from sparse_coding.sae import ARCHITECTURES, SAE

PLANTED_RATIO, PLANTED_L0 = 4, 20


class Case(NamedTuple):
    """One size of problem. `activations`: random (Gaussian), planted, or a cache's folder."""

    architecture: str
    activations: str
    d_in: int
    ratio: int
    batch_tokens: int
    l0: float


def cached_width(activations: str, n_tokens: int) -> int | None:
    """Width of a cache's first hook; None if activations are made up.

    `UserError` if there is no such cache or it has fewer than `n_tokens` rows.
    """
    if activations in ("random", "planted"):
        return None
    if not (Path(activations) / "manifest.json").is_file():
        raise UserError(
            f"--activations {activations} is not possible; it must be random, planted or the "
            "folder of an activation cache (outputs/cache/FINGERPRINT)"
        )
    cache = ActivationCache(activations)
    if cache.n_tokens < n_tokens:
        raise UserError(
            f"{activations} holds {cache.n_tokens:,} activations, {n_tokens:,} are needed: take "
            "fewer steps or a smaller batch"
        )
    return next(iter(cache.hooks.values()))


def batches(case: Case) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Scaled batches, endless or as many as the cache's rows fill; every call begins anew."""
    generator = torch.Generator().manual_seed(0)
    if case.activations == "random":
        while True:
            yield torch.randn(case.batch_tokens, case.d_in, generator=generator)
    elif case.activations == "planted":
        yield from _planted(case, generator)
    else:
        cache = ActivationCache(case.activations)
        hook_name, d_in = next(iter(cache.hooks.items()))
        scale = (d_in / cache.mean_square_norm(hook_name)) ** 0.5
        for x in CachedActivations(cache, hook_name, case.batch_tokens, seed=0, n_epochs=1):
            yield scale * x


def _planted(case: Case, generator: torch.Generator) -> Iterator[Tensor]:
    """Sums of about PLANTED_L0 of PLANTED_RATIO * d_in directions with weights in [0, 1)."""
    n = PLANTED_RATIO * case.d_in
    directions = torch.randn(n, case.d_in, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    scale = (3 * case.d_in / PLANTED_L0) ** 0.5  # E[weight^2] = 1/3
    while True:
        fires = torch.rand(case.batch_tokens, n, generator=generator) < PLANTED_L0 / n
        weights = torch.rand(case.batch_tokens, n, generator=generator) * fires
        yield scale * weights @ directions


def still_task(case: Case) -> tuple[Task, Float[Tensor, "batch d_in"]]:
    """A task whose update leaves the parameters, and the one batch that it steps on."""
    x = next(batches(case))
    x = x * (case.d_in / x.square().sum(dim=1).mean()) ** 0.5  # exactly, for this batch
    d_sae = case.ratio * case.d_in
    task = Task(case.architecture, case.d_in, d_sae, case.batch_tokens, x, k=round(case.l0))
    return task, x


@torch.no_grad()
def sparse_sae(task: Task, x: Float[Tensor, "batch d_in"], l0: float) -> SAE:
    """A random SAE with about `l0` active features per token on x."""
    k = {"k": task.k} if task.is_topk else {}
    generator = torch.Generator().manual_seed(task.seed)
    sae = ARCHITECTURES[task.architecture](task.d_in, task.d_sae, generator, **k)
    sae.initialise_centre(x.mean(dim=0))
    sae.initialise_sparsity(x, l0)
    return sae

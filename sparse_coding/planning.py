"""What a run takes, from dimensions alone: work, memory, disk and traffic, before anything loads.

Operations count a multiply and an add as two. The constants are measured by `benchmarks.scaling`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from sparse_coding.cache import cache_bytes
from sparse_coding.config import Parallel, RunConfig
from sparse_coding.errors import UserError
from sparse_coding.kernels import FAST_CLASSES
from sparse_coding.ladder import SAESpec, shares
from sparse_coding.models import LMSize, layer_of, size_of
from sparse_coding.sae import CROSSCODERS, TRAINABLE
from sparse_coding.text import BATCH_CONTEXTS

ADAM_BYTES = 28
"""Per parameter and step: weight, gradient and two moments read, all but the gradient written."""
ARRAY_BYTES = 40
"""Per token and feature of a step by autograd: some ten passes over float32 (batch, d_sae)."""
ACTIVE_BYTES = 20
"""Per token, active feature and dimension of the fast step: rows of the decoder and gradients."""
EVALUATION_CHUNKS = 2**29
ASSUMED_L0 = 60.0
"""Where --l1-coeffs leaves it open."""


class Rates(NamedTuple):
    """What a device does at best, per second."""

    operations: float
    """Of large matrix products in the model's dtype."""
    bytes: float
    """Read and written in a long copy."""


class Efficiency(NamedTuple):
    """The share of a device's rates that the work reaches."""

    harvest: float
    training: float
    memory: float


FAST_CPU = Efficiency(0.41, 0.5, 1.07)
AUTOGRAD_CPU = Efficiency(0.41, 0.96, 0.12)
GPU = Efficiency(0.4, 0.4, 0.7)
"""Assumed: no GPU was measured."""


@dataclass(frozen=True)
class Job:
    """A run in numbers."""

    lm: LMSize
    n_hooks: int
    """At each of which all of `specs` are trained."""
    last_layer: int
    specs: Sequence[SAESpec]
    n_tokens: int
    n_epochs: int
    batch_tokens: int
    context_length: int
    cache_dtype: torch.dtype | None
    """None: the activations are streamed."""
    is_fast: bool
    """Whether steps run on the sparse kernels."""
    keep_checkpoints: int = 2
    buffer_tokens: int = 0
    """Held in memory, where activations are streamed."""
    n_processes: int = 1
    parallel: Parallel = "ladder"
    n_targets: int = 0
    """Hooks harvested for what transcoders decode alone."""
    n_joined: int = 1
    """Hooks that each of the `n_hooks` stands for: more than 1 of crosscoders."""

    @property
    def n_harvested(self) -> int:
        return self.n_hooks * self.n_joined + self.n_targets

    @property
    def d_in(self) -> int:
        return self.lm.d_model * self.n_joined

    @property
    def n_steps(self) -> int:
        return self.n_tokens * self.n_epochs // self.batch_tokens

    @property
    def n_parameters(self) -> int:
        """Of all SAEs: encoders and decoders; the biases are a thousandth of them."""
        return self.n_hooks * sum(2 * spec.ratio * self.d_in**2 for spec in self.specs)

    @property
    def lm_bytes(self) -> int:
        """The language model's weights, held by every process.

        Where it joins queries, keys and values (GPT-2, Pythia) the bridge holds those a second
        time: a quarter of a block more, not counted.
        """
        return self.lm.n_parameters * self.lm.dtype.itemsize

    @property
    def evaluation_bytes(self) -> int:
        """At the end, beside what training holds: the finished SAEs, the logits of one batch of
        contexts with their logarithms (float32), and chunks of held-out activations."""
        logits = 2 * BATCH_CONTEXTS * self.context_length * self.lm.vocabulary
        return self.sae_bytes + 4 * logits + EVALUATION_CHUNKS

    @property
    def buffer_bytes(self) -> int:
        """Streamed activations in memory."""
        return self.buffer_tokens * self.n_harvested * self.lm.d_model * self.lm.dtype.itemsize

    @property
    def memory_bytes(self) -> int:
        """All that a process holds, about; of an idle Python the imports are not counted."""
        return self.lm_bytes + self.training_bytes + self.buffer_bytes + self.evaluation_bytes

    @property
    def training_bytes(self) -> int:
        """What training takes in the fullest process."""
        specs, d_in, batch = self.specs, self.d_in, self.batch_tokens
        share = 1
        if self.parallel == "ladder":
            parts = shares(specs, self.n_processes)
            specs = max(parts, key=lambda part: sum(spec.ratio for spec in part))
        elif self.parallel == "data":
            batch = -(-batch // self.n_processes)
        else:
            share = self.n_processes
        step = (
            "autograd" if not self.is_fast else "cpu" if self.lm.device.type == "cpu" else "cuda"
        )
        return self.n_hooks * training_bytes(specs, d_in, batch, step) // share

    @property
    def cache_bytes(self) -> int:
        if self.cache_dtype is None:
            return 0
        hooks = {str(i): self.lm.d_model for i in range(self.n_harvested)}
        return cache_bytes(self.n_tokens, hooks, self.cache_dtype)

    @property
    def checkpoint_bytes(self) -> int:
        """Of the checkpoints: weights and two moments, one more than are kept while one is new."""
        return (self.keep_checkpoints + 1) * 12 * self.n_parameters

    @property
    def sae_bytes(self) -> int:
        return 4 * self.n_parameters

    @property
    def disk_bytes(self) -> int:
        return self.cache_bytes + self.checkpoint_bytes + self.sae_bytes

    @property
    def harvest_operations(self) -> float:
        """A forward pass up to the last hook: Kaplan et al. (2020), 2001.08361, table 1."""
        n_layers = self.last_layer + 1
        attention = 2 * n_layers * self.context_length * self.lm.d_model
        per_token = 2 * n_layers * self.lm.n_parameters_per_block + attention
        return float(self.n_tokens) * per_token * (1 if self.cache_dtype else self.n_epochs)

    @property
    def training_operations(self) -> float:
        """Dense products: encode, decode and four of the gradient (one for b_dec alone). The fast
        step multiplies active features alone and is left with the first."""
        n_products = 1 if self.is_fast else 6
        return float(self.n_steps) * self.batch_tokens * n_products * self.n_parameters

    @property
    def touched_bytes(self) -> float:
        """Read and written in memory by training, beside the products."""
        d_in, n_rows = self.d_in, float(self.n_steps) * self.batch_tokens
        if self.is_fast:
            l0 = sum(spec.target_l0 or ASSUMED_L0 for spec in self.specs)
            arrays = n_rows * ACTIVE_BYTES * self.n_hooks * l0 * d_in
        else:
            arrays = n_rows * ARRAY_BYTES * self.n_parameters / (2 * d_in)
        return arrays + float(self.n_steps) * ADAM_BYTES * self.n_parameters

    @property
    def read_bytes(self) -> float:
        """Read from the cache while training."""
        return float(self.cache_bytes) * self.n_epochs

    @property
    def exchanged_bytes(self) -> float:
        """Sent by each process over the whole training, by ring all-reduce.

        `data`: the gradients, float32. `features`: the reconstruction of the batch for each SAE.
        """
        ring = 2 * (self.n_processes - 1) / self.n_processes
        per_step = {
            "ladder": 0,
            "data": 4 * self.n_parameters,
            "features": 4 * self.batch_tokens * self.n_hooks * len(self.specs) * self.d_in,
        }
        return ring * self.n_steps * per_step[self.parallel]

    def seconds(self, rates: Rates) -> tuple[float, float]:
        """Of harvesting and of training, on `n_processes` devices with such rates."""
        share = self.efficiency
        harvest = self.harvest_operations / (rates.operations * share.harvest)
        train = self.training_operations / (rates.operations * share.training)
        train += self.touched_bytes / (rates.bytes * share.memory)
        return harvest / self.n_processes, train / self.n_processes

    @property
    def efficiency(self) -> Efficiency:
        if self.lm.device.type == "cpu":
            return FAST_CPU if self.is_fast else AUTOGRAD_CPU
        return GPU


def training_bytes(
    specs: Sequence[SAESpec],
    d_in: int,
    batch_tokens: int,
    step: Literal["cpu", "cuda", "autograd"],
) -> int:
    """About what training a ladder takes at its peak: weights, Adam, gradients, one step's arrays.

    An upper estimate. The fast steps hold one SAE's two gradients and a rounded encoder at a time,
    and chunks of fixed size beside them (on a GPU not measured); autograd every SAE's gradients
    and some six (batch, d_sae) arrays.
    """
    n_parameters = [2 * spec.ratio * d_in * d_in for spec in specs]
    largest = max(spec.ratio * d_in for spec in specs)
    if step == "autograd":
        return 16 * sum(n_parameters) + 24 * batch_tokens * largest
    return 12 * sum(n_parameters) + 6 * max(n_parameters) + {"cpu": 2**28, "cuda": 2**31}[step]


def check_division(job: Job) -> None:
    """`UserError` if the run cannot be divided among so many processes in that way."""
    n, way = job.n_processes, f"--parallel {job.parallel}"
    if job.parallel == "ladder" and n > len(job.specs):
        raise UserError(
            f"{way} gives each process SAEs of its own, and {len(job.specs)} cannot be given to "
            f"{n} processes; start fewer, train more, or choose --parallel data or features"
        )
    if job.parallel == "data" and job.batch_tokens % n:
        raise UserError(
            f"{way} gives each process an equal share of a batch, and --batch-tokens "
            f"{job.batch_tokens} is not divisible by {n} processes; change either"
        )
    for spec in job.specs:
        if job.parallel == "features" and spec.ratio * job.d_in % n:
            raise UserError(
                f"{way} gives each process an equal share of the features, and the "
                f"{spec.ratio * job.d_in} of --ratios {spec.ratio} are not divisible by {n} "
                "processes; change either"
            )


def job_of(cfg: RunConfig, specs: Sequence[SAESpec], n_processes: int = 1) -> Job:
    """The run of a configuration; `UserError` if its model or a hook does not exist."""
    lm = size_of(cfg.lm, device=cfg.device, dtype=cfg.dtype)
    has_kernels = all(TRAINABLE[spec.architecture] in FAST_CLASSES for spec in specs)
    has_kernels = has_kernels and (n_processes == 1 or cfg.parallel == "ladder")
    n_joined = len(cfg.hook_name) if specs[0].architecture in CROSSCODERS else 1
    return Job(
        lm,
        len(cfg.hook_name) // n_joined,
        max(layer_of(hook_name, lm) for hook_name in cfg.harvested_hooks),
        specs,
        cfg.n_tokens,
        cfg.n_epochs,
        cfg.batch_tokens,
        cfg.context_length,
        getattr(torch, cfg.cache_dtype) if cfg.cache else None,
        has_kernels and cfg.step == "auto" and lm.device.type in ("cpu", "cuda"),
        cfg.keep_checkpoints,
        0 if cfg.cache else cfg.buffer_tokens,
        n_processes,
        cfg.parallel,
        n_targets=len(cfg.harvested_hooks) - len(cfg.hook_name),
        n_joined=n_joined,
    )


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """A second of large products and copies; the best of a few."""
    x = torch.randn(2048, 2048, device=device).to(dtype)
    y = torch.empty(2**25, device=device)
    z = torch.empty_like(y)
    operations = 2 * 2048**3 / _best_seconds(lambda: torch.mm(x, x), device)
    return Rates(operations, 2 * y.nbytes / _best_seconds(lambda: z.copy_(y), device))


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])

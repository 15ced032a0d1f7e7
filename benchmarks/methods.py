"""One training step of one SAE: what every method is asked, this project's, plain PyTorch's.

Behind every `Method` its library's own update function runs. Nothing here measures anything but
one step; see `peers` for the methods of other libraries and the table of all.
"""

import time
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_coding.ladder import SAESpec
from sparse_coding.sae import ARCHITECTURES, SAE
from sparse_coding.training import Trainer, TrainingConfig

TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")


class Task(NamedTuple):
    """What every method trains. All minimise ||x - x_hat||^2 summed over d_in, L1 added."""

    architecture: str
    d_in: int
    d_sae: int
    batch_tokens: int
    sample: Float[Tensor, "n d_in"]
    """Activations whose root-mean-square norm is sqrt(d_in), as that of all batches."""
    n_steps: int = 1_000_000
    lr: float = 0.0
    """With 0 the whole update is computed and the parameters stay as they are."""
    l1_coeff: float = 0.3
    k: int = 32
    seed: int = 0

    @property
    def is_topk(self) -> bool:
        return self.architecture == "topk"

    def config(self, step: str = "auto") -> TrainingConfig:
        """This project's settings; the shape of everybody's schedules is theirs."""
        cfg = TrainingConfig(self.n_steps, self.batch_tokens, self.lr, step=step)
        if self.lr:
            return cfg
        # a timed step repeats one batch: what is silent there must not become dead
        still = {"n_resamples": 0, "dead_after_tokens": 2**62}
        return TrainingConfig(self.n_steps, self.batch_tokens, self.lr, step=step, **still)

    @property
    def warmup_steps(self) -> int:
        return round(self.config().lr_warmup_fraction * self.n_steps)

    @property
    def decay_steps(self) -> int:
        return round(self.config().lr_decay_fraction * self.n_steps)


class Method(ABC):
    """One SAE in training. `dtype` is what its encoder's product is computed in."""

    task: Task
    dtype = torch.float32

    @abstractmethod
    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        """One update, by the library's own function."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_in) and b_dec: views of the parameters."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Feature activations, by the library's own function."""

    def timed_step(self, x: Float[Tensor, "batch d_in"]) -> float:
        """One update; returns the seconds it took."""
        start = time.perf_counter()
        self.step(x)
        return time.perf_counter() - start

    @torch.no_grad()
    def load(self, sae: SAE) -> None:
        """Take over another SAE's parameters, into the library's own memory layout."""
        for name, tensor in self.tensors().items():
            tensor.copy_(getattr(sae, name))

    @torch.no_grad()
    def to_sae(self) -> SAE:
        """What has been learnt, as this project's class."""
        return sae_from(self.tensors(), self.task.architecture, self.task.k)

    @torch.no_grad()
    def l0(self, x: Float[Tensor, "batch d_in"]) -> float:
        """Mean active features per token."""
        n_active = [torch.count_nonzero(self.encode(part)).item() for part in x.split(512)]
        return sum(n_active) / len(x)


@torch.no_grad()
def sae_from(tensors: dict[str, Tensor], architecture: str = "l1", k: int = 32) -> SAE:
    """This project's SAE with those W_enc (d_in, d_sae), b_enc, W_dec (d_sae, d_in) and b_dec."""
    size = tuple(tensors["W_enc"].shape)
    sae = ARCHITECTURES[architecture](*size, **({"k": k} if architecture == "topk" else {}))
    for name, tensor in tensors.items():
        getattr(sae, name).copy_(tensor)
    return sae


class Ours(Method):
    """`Trainer.step` of a ladder of one; `screen_dtype` as in `CPUStep` (None: as chosen)."""

    def __init__(self, task: Task, step: str, screen_dtype: torch.dtype | None = None) -> None:
        self.task = task
        l1_coeff, k = (None, float(task.k)) if task.is_topk else (task.l1_coeff, None)
        spec = SAESpec(task.architecture, task.d_sae // task.d_in, l1_coeff, k, task.seed)
        self.trainer = Trainer([spec], task.config(step), task.sample)
        self.lane = self.trainer.lanes[0]
        if screen_dtype is not None:
            from sparse_coding.kernels.cpu import CPUStep

            self.lane.run_step = CPUStep(self.lane.sae, self.lane.optimizer, screen_dtype)
        self.dtype = getattr(self.lane.run_step, "screen_dtype", torch.float32)

    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        self.trainer.step(x)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.lane.sae.named_parameters())

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        return self.lane.sae.encode(x * self.trainer.scales[0])

    def l0(self, x: Float[Tensor, "batch d_in"]) -> float:
        """As counted inside the steps since the last call."""
        return self.trainer.metrics()[0]["l0"]

    def to_sae(self) -> SAE:
        return self.trainer.finished_saes()[self.lane.name]


class PlainTorch(Method):
    """What one writes in an afternoon: parameters, bfloat16 autocast, fused Adam, projection."""

    dtype = torch.bfloat16

    def __init__(self, task: Task) -> None:
        self.task, self.schedule, self.n_steps_done = task, task.config(), 0
        rows = torch.randn(task.d_sae, task.d_in, generator=torch.Generator().manual_seed(0))
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(task.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(task.d_in))
        self.optimizer = torch.optim.Adam(self.tensors().values(), lr=task.lr, fused=True)

    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        lr, sparsity = (at(self.n_steps_done) for at in (self.schedule.lr_at, self.sparsity_at))
        self.optimizer.param_groups[0]["lr"] = lr
        with torch.autocast("cpu", torch.bfloat16):
            f = self.encode(x)
            error = f @ self.W_dec + self.b_dec - x
            loss = error.square().sum(dim=1).mean() + sparsity * f.sum(dim=1).mean()
        self.optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            gradient = self.W_dec.grad
            gradient -= (gradient * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec
            self.optimizer.step()
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        self.n_steps_done += 1

    def sparsity_at(self, step: int) -> float:
        return 0.0 if self.task.is_topk else self.task.l1_coeff * self.schedule.sparsity_at(step)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        with torch.autocast("cpu", torch.bfloat16):
            pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        if not self.task.is_topk:
            return torch.relu(pre)
        top = pre.topk(self.task.k, dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, top.indices, torch.relu(top.values))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS}

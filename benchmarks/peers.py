"""The training steps of other SAE libraries, and the table of all methods.

The library's own update function runs, with the optimizer, the schedules and the bookkeeping that
come with it, in its defaults, without logging. A library is imported when one of its methods is
made.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.methods import TENSORS, Method, Ours, PlainTorch, Task
from sparse_coding.errors import UserError
from sparse_coding.sae import SAE

REQUIREMENTS = "benchmarks/requirements-peers.txt"
# What a package is called where it is installed from
DISTRIBUTIONS = {
    "sae_lens": "sae-lens",
    "dictionary_learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
    "sae_bench": "sae-bench",
}


class SAELens(Method):
    """`SAETrainer.step` of SAELens with its `standard` or `topk` SAE.

    It clips the norm of all gradients and counts firings in every step. `autocast`, `compiled`
    and `use_sparse_activations` are its own options. Its decoder rows are free: the L1 is weighted
    by their norms.
    """

    def __init__(
        self, task: Task, autocast: bool = False, sparse: bool = False, compiled: bool = False
    ) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.task = task
        self.dtype = torch.bfloat16 if autocast else torch.float32
        torch.manual_seed(task.seed)  # its initialisers draw from the global generator
        self.sae = self._sae(sparse)
        if compiled:
            from torch._inductor import config as inductor

            inductor.compile_threads = 1  # no pool of compilers that would stay and take the cores
            torch._dynamo.reset()  # as in a fresh process; else the second shape is compiled anew
            self.sae.training_forward_pass = torch.compile(self.sae.training_forward_pass)
        cfg = SAETrainerConfig(
            total_training_samples=task.n_steps * task.batch_tokens,
            train_batch_size_samples=task.batch_tokens,
            lr=task.lr,
            lr_end=task.lr,
            lr_warm_up_steps=task.warmup_steps,
            lr_decay_steps=task.decay_steps if task.lr else 0,
            autocast=autocast,
        )
        self.trainer = SAETrainer(cfg, self.sae, iter(()))

    def _sae(self, sparse: bool) -> Any:
        from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        task = self.task
        size = {"d_in": task.d_in, "d_sae": task.d_sae}
        if task.is_topk:
            # a sparse tensor times a broadcast row of norms has no gradient on a CPU
            cfg = TopKTrainingSAEConfig(
                **size,
                k=task.k,
                use_sparse_activations=sparse,
                rescale_acts_by_decoder_norm=not sparse,
            )
            return TopKTrainingSAE(cfg)
        warmup = task.warmup_steps if task.lr else 0
        return StandardTrainingSAE(
            StandardTrainingSAEConfig(
                **size, l1_coefficient=task.l1_coeff, l1_warm_up_steps=warmup
            )
        )

    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1  # its fit() does

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self.sae, name) for name in TENSORS}

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        with self.trainer.autocast_if_enabled:
            f = self.sae.encode(x)
        return f.to_dense() if f.is_sparse else f

    @torch.no_grad()
    def to_sae(self) -> SAE:
        sae = super().to_sae()
        if getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False):
            # it ranks by activation times row norm; with unit rows that is the activation
            norm = sae.W_dec.norm(dim=1)
            sae.W_enc *= norm
            sae.b_enc *= norm
            sae.W_dec /= norm[:, None]
        return sae


class DictionaryLearning(Method):
    """`update` of dictionary_learning's StandardTrainer or TopKTrainer.

    Its own training loop has no autocast on a CPU; `autocast` puts one around its update.
    """

    def __init__(self, task: Task, autocast: bool = False) -> None:
        from dictionary_learning.trainers import StandardTrainer, TopKTrainer

        without_patches()
        self.task, self.autocast = task, autocast
        self.dtype = torch.bfloat16 if autocast else torch.float32
        settings = dictionary_learning_settings(task)
        self.trainer = (TopKTrainer if task.is_topk else StandardTrainer)(**settings)
        self.n_steps_done = 0

    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            self.trainer.update(self.n_steps_done, x)
        self.n_steps_done += 1

    def load(self, sae: SAE) -> None:
        super().load(sae)
        self.n_steps_done = 1  # at step 0 TopKTrainer would set b_dec

    def tensors(self) -> dict[str, Tensor]:
        return dictionary_learning_tensors(self.trainer.ae)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.trainer.ae.encode(x)


def dictionary_learning_settings(task: Task) -> dict[str, Any]:
    """Arguments of the trainers' constructors."""
    own = {"l1_penalty": task.l1_coeff, "sparsity_warmup_steps": task.warmup_steps}
    return {
        "steps": task.n_steps,
        "activation_dim": task.d_in,
        "dict_size": task.d_sae,
        "layer": 0,
        "lm_name": "none",
        "lr": task.lr,
        "warmup_steps": task.warmup_steps,
        "decay_start": task.n_steps - task.decay_steps,
        "seed": task.seed,
        "device": "cpu",
    } | ({"k": task.k} if task.is_topk else own)


def dictionary_learning_tensors(ae: nn.Module) -> dict[str, Tensor]:
    """The parameters of its AutoEncoder or AutoEncoderTopK under this project's names."""
    return {
        "W_enc": ae.encoder.weight.T,
        "b_enc": ae.encoder.bias,
        "W_dec": ae.decoder.weight.T,
        "b_dec": ae.b_dec if hasattr(ae, "b_dec") else ae.bias,
    }


def without_patches() -> None:
    """Undo what importing nnsight, which dictionary_learning does, does to the whole process.

    It replaces functions of math, einops and torch for its tracing; torch.compile fails with them.
    """
    import nnsight

    nnsight.DEFAULT_PATCHER.__exit__(None, None, None)


class _StepDone(Exception):
    """Leaves sparsify's training loop."""


class _GivesActivations(nn.Module):
    """Stands where sparsify wants a language model: its one layer's output is the batch."""

    device = torch.device("cpu")
    config = SimpleNamespace(num_hidden_layers=1)

    def __init__(self, sample: Float[Tensor, "n d_in"]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.x = sample[:1]
        self.calls: list[float] = []
        self.stops_at_call = 0

    @property
    def base_model(self) -> nn.Module:
        return self

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    def forward(self, input_ids: Tensor) -> Tensor:
        self.calls.append(time.perf_counter())
        if len(self.calls) == self.stops_at_call:
            raise _StepDone
        return self.layer(self.x[None])


class Sparsify(Method):
    """`Trainer.fit` of EleutherAI's sparsify (TopK alone), left after one step.

    A step lasts from one call of its language model, here a stand-in, to the next. Its autocast
    is for CUDA; `autocast` puts a CPU's around the step. Its optimizer is schedule-free signum.
    """

    def __init__(self, task: Task, autocast: bool = False) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            from sparsify import SaeConfig, TrainConfig
            from sparsify import Trainer as SparsifyTrainer

            self.task, self.autocast = task, autocast
            self.dtype = torch.bfloat16 if autocast else torch.float32
            self.model = _GivesActivations(task.sample)
            # an lr of 0 is taken for none given
            cfg = TrainConfig(
                SaeConfig(num_latents=task.d_sae, k=task.k),
                batch_size=1,
                lr=task.lr or 1e-30,
                hookpoints=["layer"],
                init_seeds=[task.seed],
                log_to_wandb=False,
            )
            row = {"input_ids": torch.zeros(task.batch_tokens, dtype=torch.int64)}
            self.trainer = SparsifyTrainer(cfg, [row, row], self.model)
        self.sae = self.trainer.saes["layer"]

    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        self.timed_step(x)

    def timed_step(self, x: Float[Tensor, "batch d_in"]) -> float:
        self.model.x, self.model.stops_at_call = x, 2
        self.model.calls.clear()
        self.trainer.global_step = 0  # it would skip the rows of the steps done
        with (
            _precision_kept(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            torch.autocast("cpu", torch.bfloat16, enabled=self.autocast),
            contextlib.suppress(_StepDone),
        ):
            self.trainer.fit()
        self.trainer.cfg.finetune = "begun"  # only the first step sets b_dec to the mean
        first, second = self.model.calls
        return second - first

    def load(self, sae: SAE) -> None:
        super().load(sae)
        self.trainer.cfg.finetune = "begun"

    def tensors(self) -> dict[str, Tensor]:
        sae = self.sae
        encoder = {"W_enc": sae.encoder.weight.T, "b_enc": sae.encoder.bias}
        return encoder | {"W_dec": sae.W_dec, "b_dec": sae.b_dec}

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            top = self.sae.encode(x)
        return torch.zeros_like(top.pre_acts).scatter(1, top.top_indices, top.top_acts)

    def to_sae(self) -> SAE:
        self.trainer.optimizers[0].eval()  # the averaged weights, which it saves
        sae = super().to_sae()
        self.trainer.optimizers[0].train()
        return sae


@contextlib.contextmanager
def _precision_kept() -> Iterator[None]:
    """What sparsify sets for the whole process is put back."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class MethodInfo(NamedTuple):
    """How to make a method, and what it is."""

    make: Callable[[Task], Method]
    package: str | None = None
    """The peer's module; None: part of this project."""
    exact: bool = True
    """Whether active sets and gradients are float32's, up to the rounding of sums."""
    architectures: tuple[str, ...] = ("l1", "topk")


METHODS: dict[str, MethodInfo] = {
    "auto": MethodInfo(partial(Ours, step="auto")),
    "auto-float32": MethodInfo(partial(Ours, step="auto", screen_dtype=torch.float32)),
    "reference": MethodInfo(partial(Ours, step="reference")),
    "plain-bfloat16": MethodInfo(PlainTorch, exact=False),
    "sae_lens": MethodInfo(SAELens, "sae_lens"),
    "sae_lens-sparse": MethodInfo(partial(SAELens, sparse=True), "sae_lens", True, ("topk",)),
    "sae_lens-compiled": MethodInfo(partial(SAELens, compiled=True), "sae_lens"),
    "sae_lens-bfloat16": MethodInfo(partial(SAELens, autocast=True), "sae_lens", False),
    "sae_lens-bfloat16-compiled": MethodInfo(
        partial(SAELens, autocast=True, compiled=True), "sae_lens", False
    ),
    "dictionary_learning": MethodInfo(DictionaryLearning, "dictionary_learning"),
    "dictionary_learning-bfloat16": MethodInfo(
        partial(DictionaryLearning, autocast=True), "dictionary_learning", False
    ),
    "sparsify": MethodInfo(Sparsify, "sparsify", True, ("topk",)),
    "sparsify-bfloat16": MethodInfo(
        partial(Sparsify, autocast=True), "sparsify", False, ("topk",)
    ),
}


def is_installed(package: str) -> bool:
    """Whether a peer can be imported; if not, one printed line says how to get it."""
    if importlib.util.find_spec(package) is not None:
        return True
    print(f"{package} is not installed: pip install -r {REQUIREMENTS}")
    return False


def peer_versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    return {
        package: importlib.metadata.version(distribution)
        for package, distribution in DISTRIBUTIONS.items()
        if importlib.util.find_spec(package)
    }


def choose_methods(names: Sequence[str], architecture: str) -> dict[str, MethodInfo]:
    """The methods asked for (all if none are) that can train this class; peers if installed."""
    able = {name: info for name, info in METHODS.items() if architecture in info.architectures}
    for name in names:
        if name not in able:
            raise UserError(
                f"--methods {name} does not train --architecture {architecture}; "
                f"it must be of: {', '.join(able)}"
            )
    chosen = {name: info for name, info in able.items() if not names or name in names}
    packages = dict.fromkeys(info.package for info in chosen.values() if info.package)
    missing = {package for package in packages if not is_installed(package)}
    left = {name: info for name, info in chosen.items() if info.package not in missing}
    if not left:
        raise UserError("none of --methods is installed")
    return left

"""Training one SAE of any architecture, here and in other libraries, to be compared in quality.

A peer's own trainer, initialisation, schedules and dead-feature treatment run; warmups and decays
take the same shares of the run as ours, because their defaults are longer than a short run.
"""

import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.peers import without_patches
from sparse_coding.dictionary import Dictionary
from sparse_coding.ladder import SAESpec
from sparse_coding.training import Trainer, TrainingConfig


class Job(NamedTuple):
    """One SAE to be trained."""

    architecture: str
    ratio: int
    sparsity: float
    """L0 where a library can be told one, else the coefficient of its penalty."""
    lr: float
    seed: int
    n_steps: int
    batch_tokens: int

    @property
    def warmup_steps(self) -> int:
        return max(1, self.n_steps // 20)


class Learner(NamedTuple):
    """`step` takes a raw batch; `finish` returns what a user of the library would load."""

    step: Callable[[Float[Tensor, "batch d_in"]], None]
    finish: Callable[[], Dictionary]


class Foreign(Dictionary):
    """Another library's dictionary on activations times `scale`, as one of raw activations."""

    def __init__(self, theirs: Any, d_in: int, d_sae: int, scale: float) -> None:
        super().__init__()
        self.theirs, self.d_in, self.d_sae, self.scale = theirs, d_in, d_sae, scale

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.decode(torch.eye(self.d_sae)) - self.decode(torch.zeros(self.d_sae))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self.theirs.encode(x * self.scale)

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return self.theirs.decode(f) / self.scale


def ours(job: Job, sample: Float[Tensor, "n d_in"]) -> Learner:
    """This project's trainer, steered to the L0."""
    spec = SAESpec(job.architecture, job.ratio, None, job.sparsity, job.seed)
    trainer = Trainer([spec], TrainingConfig(job.n_steps, job.batch_tokens, job.lr), sample)
    return Learner(trainer.step, lambda: next(iter(trainer.finished_saes().values())))


def _dictionary_learning_trainer(job: Job) -> tuple[Any, dict[str, Any]]:
    """Its class of trainer and what that one alone is told."""
    from dictionary_learning import trainers
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainerAprilUpdate

    k = {"k": round(job.sparsity)}
    # Its thresholds and anneals begin at fixed steps that a short run does not reach.
    late = {"threshold_start_step": job.n_steps // 2}
    l1 = {"l1_penalty": job.sparsity, "sparsity_warmup_steps": job.warmup_steps}
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "l1": (trainers.StandardTrainer, l1),
        "norm_weighted_l1": (StandardTrainerAprilUpdate, l1),
        "gated": (trainers.GatedSAETrainer, l1),
        "topk": (trainers.TopKTrainer, k | late),
        "batch_topk": (trainers.BatchTopKTrainer, k | late),
        "matryoshka": (
            MatryoshkaBatchTopKTrainer,
            k | late | {"group_fractions": [1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32]},
        ),
        "jumprelu": (
            trainers.JumpReluTrainer,
            {"target_l0": job.sparsity, "sparsity_warmup_steps": job.warmup_steps},
        ),
    }
    return made[job.architecture]


def dictionary_learning(job: Job, sample: Float[Tensor, "n d_in"]) -> Learner:
    """Its trainer of the same architecture, on activations of root-mean-square norm 1."""
    cls, options = _dictionary_learning_trainer(job)
    without_patches()
    d_in = sample.shape[1]
    trainer = cls(
        steps=job.n_steps,
        activation_dim=d_in,
        dict_size=job.ratio * d_in,
        layer=0,
        lm_name="none",
        lr=job.lr,
        warmup_steps=job.warmup_steps,
        decay_start=job.n_steps * 4 // 5,
        seed=job.seed,
        device="cpu",
        **options,
    )
    scale = sample.square().sum(dim=1).mean().item() ** -0.5
    n_done = iter(range(job.n_steps))
    return Learner(
        lambda x: trainer.update(next(n_done), x * scale),
        lambda: Foreign(trainer.ae, d_in, job.ratio * d_in, scale),
    )


def _sae_lens_sae(job: Job, d_in: int, d_sae: int) -> Any:
    """Its SAE in training."""
    import sae_lens as library

    k = {"k": round(job.sparsity)}
    l1 = {"l1_coefficient": job.sparsity, "l1_warm_up_steps": job.warmup_steps}
    widths = [max(1, d_sae * share // 32) for share in (1, 3, 7, 15)]
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "norm_weighted_l1": ("Standard", l1),
        "gated": ("Gated", l1),
        "topk": ("TopK", k),
        "batch_topk": ("BatchTopK", k),
        "matryoshka": ("MatryoshkaBatchTopK", k | {"matryoshka_widths": [*widths, d_sae]}),
        "jumprelu": (
            "JumpReLU",
            {"l0_coefficient": job.sparsity, "l0_warm_up_steps": job.warmup_steps},
        ),
    }
    name, options = made[job.architecture]
    torch.manual_seed(job.seed)  # its initialisers draw from the global generator
    config = getattr(library, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=d_sae, **options)
    return getattr(library, f"{name}TrainingSAE")(config)


def sae_lens(job: Job, sample: Float[Tensor, "n d_in"]) -> Learner:
    """Its trainer of the same architecture, on root-mean-square norm sqrt(d_in), then saved."""
    import sae_lens as library
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    d_in, d_sae = sample.shape[1], job.ratio * sample.shape[1]
    sae = _sae_lens_sae(job, d_in, d_sae)
    cfg = SAETrainerConfig(
        total_training_samples=job.n_steps * job.batch_tokens,
        train_batch_size_samples=job.batch_tokens,
        lr=job.lr,
        lr_end=job.lr,
        lr_warm_up_steps=job.warmup_steps,
        lr_decay_steps=job.n_steps // 5,
    )
    trainer = SAETrainer(cfg, sae, iter(()))
    scale = (d_in / sample.square().sum(dim=1).mean().item()) ** 0.5

    def step(x: Tensor) -> None:
        trainer.step(x * scale)
        trainer.n_training_steps += 1  # its fit() does

    def finish() -> Dictionary:
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            return Foreign(library.SAE.load_from_disk(folder), d_in, d_sae, scale)

    return Learner(step, finish)


LEARNERS: dict[str, Callable[[Job, Tensor], Learner]] = {
    "ours": ours,
    "dictionary_learning": dictionary_learning,
    "sae_lens": sae_lens,
}
ARCHITECTURES = ("l1", "norm_weighted_l1", "gated", "topk", "batch_topk", "matryoshka", "jumprelu")
# What a peer cannot train.
LACKS = {"sae_lens": ("l1",), "dictionary_learning": (), "ours": ()}
# Where a peer is given a coefficient instead of an L0: what the search for it starts from.
FIRST_COEFFICIENTS = {
    ("dictionary_learning", "l1"): 0.1,
    ("dictionary_learning", "norm_weighted_l1"): 0.1,
    ("dictionary_learning", "gated"): 0.15,
    ("sae_lens", "norm_weighted_l1"): 2.0,
    ("sae_lens", "gated"): 3.0,
    ("sae_lens", "jumprelu"): 20.0,
}

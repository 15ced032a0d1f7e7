"""Dictionaries that keep a chosen number of activations."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from sparse_coding.processes import ALONE, Processes
from sparse_coding.saes.base import Loss, UntiedSAE


class TopKSAE(UntiedSAE):
    """Gao et al. (2024), arXiv 2406.04093, section 2.3 and appendices A.1 and A.2.

    encode: f = relu(top_k((x - b_dec) W_enc + b_enc))
    decode: x_hat = f W_dec + b_dec,   ||W_dec[i]|| = 1
    loss:   ||x - x_hat||^2 + aux_coeff * ||e - e_hat||^2   (AuxK; 0 while no feature is dead)

    e = x - x_hat without gradient; e_hat decodes the d_in / 2 largest pre-activations among the
    dead features. Differences: b_dec starts at the mean, not the geometric median; the paper
    calls a feature dead after 10M silent tokens (here `dead_after_tokens`).
    """

    name = "topk"
    sparsity_is_chosen = True
    revives_dead = True
    can_transcode = False  # SAELens, in whose layout runs are saved, has none such
    aux_coeff = 1 / 32

    def __init__(
        self, d_in: int, d_sae: int, generator: torch.Generator | None = None, k: int = 32
    ) -> None:
        super().__init__(d_in, d_sae, generator)
        self.k = min(k, d_sae)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return keep_largest(self.pre_activations(x), self.k, self.features)

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Which activations a training step keeps."""
        return keep_largest(pre, self.k, self.features)

    def loss(
        self,
        rows: Float[Tensor, "batch columns"],
        l1_coeff: Float[Tensor, ""] | float = 0.0,
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> Loss:
        """As in `SAE`, but for the penalty, which is AuxK's error; `l1_coeff` is not used."""
        x, target = self.split(rows)
        pre = self.pre_activations(x)
        f = self.select(pre)
        errors = self.errors(target, f)
        squares = [error.square().sum(dim=1).mean() for error in errors]
        aux = self.auxiliary(pre, errors[-1], dead)
        return Loss(torch.stack(squares).mean() + self.aux_coeff * aux, squares[-1], aux, f)

    def errors(
        self, target: Float[Tensor, "batch d_out"], f: Float[Tensor, "batch d_sae"]
    ) -> list[Float[Tensor, "batch d_out"]]:
        """What reconstructions leave: those that are trained, that of all features last."""
        return [target - self.decode(f)]

    def auxiliary(
        self,
        pre: Float[Tensor, "batch d_sae"],
        error: Float[Tensor, "batch d_out"],
        dead: Int[Tensor, " n_dead"] | None,
    ) -> Float[Tensor, ""]:
        """AuxK: what the dead features leave of the error, squared, mean over the batch."""
        n_dead = 0 if dead is None else self.features.count(len(dead))
        if n_dead == 0:
            return torch.zeros_like(error[0, 0])
        f_dead = keep_largest(pre[:, dead], min(self.n_aux, n_dead), self.features)
        revived = self.features.total(f_dead @ self.W_dec[dead])
        return (error.detach() - revived).square().sum(dim=1).mean()

    @property
    def settings(self) -> dict[str, Any]:
        return {"k": self.k}

    @property
    def n_aux(self) -> int:
        """How many dead features AuxK may use per token: d_in / 2 (appendix A.2)."""
        return min(max(1, self.d_in // 2), self.d_sae * self.features.size)

    def initialise_sparsity(
        self,
        rows: Float[Tensor, "batch columns"],
        l0: float,
        features: Int[Tensor, " chosen"] | None = None,
    ) -> None:
        """Nothing: it has `k` active features from the start."""


class BatchTopKSAE(TopKSAE):
    """Bussmann, Leask, Nanda (2024), arXiv 2412.06410, section 3.

    training: f keeps the k * batch largest of relu((x - b_dec) W_enc + b_enc) in the whole batch
    encode:   f = pre * (pre > threshold),   threshold = running mean of a batch's smallest f > 0
    loss:     TopK's, with AuxK

    The running mean gives a batch the weight 0.1 (SAELens: 0.01, dictionary_learning: 0.001): the
    smallest of so many hardly varies, and a short run moves on.
    """

    name = "batch_topk"
    can_transcode = True

    def __init__(
        self, d_in: int, d_sae: int, generator: torch.Generator | None = None, k: int = 32
    ) -> None:
        super().__init__(d_in, d_sae, generator, k)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = self.pre_activations(x)
        return pre * (pre > self.threshold)

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Which activations a training step keeps."""
        others = self.rows if self.features.is_alone else self.features
        n_kept = self.k * len(pre) * self.rows.size
        return keep_largest(pre.flatten(), n_kept, others).view_as(pre)

    @torch.no_grad()
    def observe(self, f: Float[Tensor, "..."]) -> None:
        others = self.rows if self.features.is_alone else self.features
        if f.numel() == 0 and others.is_alone:
            return
        smallest = others.reduced(torch.where(f > 0, f, torch.inf).min(), "min")
        later = torch.where(self.threshold > 0, self.threshold.lerp(smallest, 0.1), smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), later, self.threshold))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.threshold /= scale


def keep_largest(
    pre: Float[Tensor, "*batch n"], k: int, others: Processes = ALONE
) -> Float[Tensor, "*batch n"]:
    """relu(pre) at the k largest entries of each row, 0 elsewhere.

    Of a row that lies over several processes each keeps what is at or above the k-th largest of
    all: one more where that one is tied.
    """
    if not others.is_alone:
        n = min(k, pre.shape[-1])
        largest = functional.pad(pre.topk(n, dim=-1).values, (0, k - n), value=-torch.inf)
        level = others.joined(largest, dim=-1).topk(k, dim=-1).values[..., -1:]
        return torch.relu(pre) * (pre >= level)
    largest = pre.topk(k, dim=-1)
    kept = torch.zeros_like(pre)
    return kept.scatter(-1, largest.indices, torch.relu(largest.values))

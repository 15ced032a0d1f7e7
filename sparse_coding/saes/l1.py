"""ReLU dictionaries under an L1 penalty."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.saes.base import SAE, UntiedSAE


class TiedL1SAE(SAE):
    """Cunningham, Ewart, Riggs, Huben, Sharkey (2023), arXiv 2309.08600, section 2.

    encode: f = relu(M (x - b_dec) + b_enc),   M = W_dec with unit-norm rows
    decode: x_hat = M^T f + b_dec
    loss:   ||x - x_hat||^2 + l1_coeff * ||f||_1

    Differences from the paper: it has no centre b_dec (its code offers a fixed one), which half
    of a residual stream's energy needs; the rows are kept at unit norm by projection instead of
    being normalised in every forward pass; its code's squared error is a mean over d_in.
    """

    name = "tied_l1"
    can_transcode = False  # it has no encoder of its own

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.W_dec.T


class L1SAE(UntiedSAE):
    """Bricken et al. (2023), Towards Monosemanticity, transformer-circuits.pub, appendix.

    encode: f = relu((x - b_dec) W_enc + b_enc)
    decode: x_hat = f W_dec + b_dec,   ||W_dec[i]|| = 1
    loss:   ||x - x_hat||^2 + l1_coeff * ||f||_1

    Dead features are resampled towards badly reconstructed inputs (`training.resample_dead`).
    Differences: b_dec starts at the mean, not the geometric median; W_enc = W_dec^T at the start.
    """

    name = "l1"
    resamples_dead = True


class PAnnealSAE(L1SAE):
    """Karvonen, Wright, Rager et al. (2024), arXiv 2408.00113, section 4.

    encode, decode, resampling: as `L1SAE`
    loss:   ||x - x_hat||^2 + l1_coeff * scale * sum_i f_i^p

    p goes from 1 to `p_end` in `n_stages` equal stages over the last part of training, so that the
    penalty comes closer to counting. At each, `scale` changes as sum f^p of the batch does, so
    that the penalty's size does not jump (the paper averages over ten batches). Difference: it
    begins at a share of the run, `begins_at`, where the paper names a step.
    """

    name = "p_anneal"
    p_end, n_stages, begins_at = 0.2, 10, 0.3

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator | None = None) -> None:
        super().__init__(d_in, d_sae, generator)
        self.p = self._next_p = 1.0
        self.register_buffer("scale", torch.ones(()), persistent=False)  # of the training alone

    def anneal(self, n_steps_done: int, n_steps: int) -> None:
        self.p, self._next_p = (self._p_at(n / n_steps) for n in (n_steps_done, n_steps_done + 1))

    def _p_at(self, progress: float) -> float:
        share = (progress - self.begins_at) / (1 - self.begins_at)
        stage = math.ceil(share * self.n_stages - 1e-9)
        return 1 - (1 - self.p_end) * max(0, min(stage, self.n_stages)) / self.n_stages

    def sparsity(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " batch"]:
        """The scaled sum of f^p per row; silent entries, where its slope is infinite, get none."""
        is_active = f > 0
        powers = f.where(is_active, 1.0).pow(self.p) * is_active
        return self.scale * self.features.total(powers.sum(dim=1))

    @torch.no_grad()
    def observe(self, f: Float[Tensor, "batch d_sae"]) -> None:
        if self._next_p != self.p:
            before, self.p = self.rows.reduced(self.sparsity(f).sum()), self._next_p
            after = self.rows.reduced(self.sparsity(f).sum())
            self.scale.copy_(torch.where(after > 0, self.scale * before / after, self.scale))


class NormWeightedL1SAE(UntiedSAE):
    """Conerly, Templeton, Bricken, Marcus, Henighan (April 2024), transformer-circuits.pub.

    encode: f = relu(x W_enc + b_enc)
    decode: x_hat = f W_dec + b_dec
    loss:   ||x - x_hat||^2 + l1_coeff * sum_i f_i * ||W_dec[i]||

    Rows are free: the penalty cannot be dodged by growing the decoder. No resampling. Differences:
    the update starts with zero biases; here b_dec starts at the mean and b_enc at -mean W_enc,
    which encodes x - mean at the start as the other classes do. Rows start at norm 1, not 0.1: at
    0.1 the first reconstruction is a hundredth of x, and of 290 steps on SmolLM2's layer 12 at
    ratio 4 too many went by in growing (FVU 0.25 and 13 % silent features, against 0.22 and none).
    """

    name = "norm_weighted_l1"
    subtracts_b_dec = False
    has_unit_norm_rows = False

    def sparsity(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " batch"]:
        return self.features.total(f @ self.W_dec.norm(dim=1))

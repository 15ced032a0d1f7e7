"""Dictionaries with a learnt threshold."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_coding.saes.base import Loss, UntiedSAE


class JumpReLUSAE(UntiedSAE):
    """Rajamanoharan et al. (2024), arXiv 2407.14435, sections 3 and 4.

    encode: f = pre * (pre > threshold),   pre = x W_enc + b_enc
    decode: x_hat = f W_dec + b_dec,   ||W_dec[i]|| = 1
    loss:   ||x - x_hat||^2 + l1_coeff * ||f||_0

    Straight-through gradients (equations 11 and 12) let the threshold learn from entries within
    bandwidth / 2 of it. Differences: it is learnt itself, not its logarithm, and kept at 0 or
    above. The others are for runs of hundreds of steps instead of the paper's hundred thousands:
    a threshold starts where its feature fires on its share of a sample (`initialise_sparsity`; the
    paper's 0.001 lets half of all features fire), learns twenty times faster than the weights, and
    from a bandwidth of 1 (the paper's 0.001 is 0.05 in these units at d_in 2304). With the paper's
    bandwidth and one learning rate, 280 steps towards an L0 of 30 on SmolLM2's layer 12 ended at
    12 and an FVU of 0.27 at ratio 8; with these at 29 and 0.21.
    """

    name = "jumprelu"
    subtracts_b_dec = False
    bandwidth = 1.0
    lr_factors = {"threshold": 20.0}  # noqa: RUF012 - annotated in SAE

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator | None = None) -> None:
        super().__init__(d_in, d_sae, generator)
        # The paper's start, in units in which activations have norm sqrt(d_in).
        self.threshold = nn.Parameter(torch.full((d_sae,), 0.001 * d_in**0.5))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return JumpReLU.apply(self.pre_activations(x), self.threshold, self.bandwidth)[0]

    def loss(
        self,
        rows: Float[Tensor, "batch columns"],
        l1_coeff: Float[Tensor, ""] | float,
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> Loss:
        """As in `SAE`, with the mean L0 as penalty."""
        x, target = self.split(rows)
        f, is_active = JumpReLU.apply(self.pre_activations(x), self.threshold, self.bandwidth)
        mse = (target - self.decode(f)).square().sum(dim=1).mean()
        l0 = self.rows.mean(self.features.total(is_active.sum(dim=1)).mean())
        return Loss(mse + l1_coeff * l0, mse, l0, f)

    def _silence(self, features: Int[Tensor, " chosen"], pre: Float[Tensor, " chosen"]) -> None:
        self.threshold[features] = torch.maximum(pre, self.threshold[features])

    @torch.no_grad()
    def normalise(self) -> None:
        super().normalise()
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.threshold /= scale


class TargetJumpReLUSAE(JumpReLUSAE):
    """JumpReLU of 2407.14435 with the quadratic penalty, which aims at an L0 by itself.

    encode, decode, gradients, start: as `JumpReLUSAE`
    loss:   ||x - x_hat||^2 + target_coeff * (l0 / k - 1)^2,   l0 = mean_batch ||f||_0

    `target_coeff` is 4 d_out, the variance of a batch being about d_out: the squared error that
    one more feature saves at an FVU of 0.2 then holds l0 within some 3 % of k.
    """

    name = "jumprelu_target"
    sparsity_is_chosen = True

    def __init__(
        self, d_in: int, d_sae: int, generator: torch.Generator | None = None, k: int = 32
    ) -> None:
        super().__init__(d_in, d_sae, generator)
        self.k = min(k, d_sae)

    @property
    def settings(self) -> dict[str, Any]:
        return {"k": self.k}

    @property
    def target_coeff(self) -> float:
        return 4.0 * self.d_out

    def loss(
        self,
        rows: Float[Tensor, "batch columns"],
        l1_coeff: Float[Tensor, ""] | float = 0.0,
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> Loss:
        """As in `SAE`, with (l0 / k - 1)^2 as penalty; `l1_coeff` is not used."""
        _, mse, l0, f = super().loss(rows, 0.0)
        penalty = (l0 / self.k - 1).square()
        return Loss(mse + self.target_coeff * penalty, mse, penalty, f)


class JumpReLU(torch.autograd.Function):
    """f = pre * (pre > threshold) and the step (pre > threshold), with 2407.14435's gradients.

    With the rectangle K(u) = (|u| < 1/2), u = (pre - threshold) / bandwidth, and for incoming
    gradients g_f and g_step,

        d / d pre       = g_f * (pre > threshold)
        d / d threshold = -(threshold * g_f + g_step) * K(u) / bandwidth
    """

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        is_active = (pre > threshold).to(pre.dtype)
        return pre * is_active, is_active

    @staticmethod
    def backward(ctx, f_gradient: Tensor, step_gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        is_near = (pre - threshold).abs() < ctx.bandwidth / 2
        slope = -(threshold * f_gradient + step_gradient) / ctx.bandwidth * is_near
        return f_gradient * (pre > threshold), slope.flatten(end_dim=-2).sum(dim=0), None

"""Dictionaries that decide whether a feature is active apart from how much."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_coding.saes.base import Loss, UntiedSAE


class GatedSAE(UntiedSAE):
    """Rajamanoharan et al. (2024), arXiv 2404.16014, section 3.

    encode: f = (gate > 0) * relu(exp(r_mag) * g + b_mag),   g = (x - b_dec) W_enc
            gate = g + b_enc
    decode: x_hat = f W_dec + b_dec,   ||W_dec[i]|| = 1
    loss:   ||x - x_hat||^2 + l1_coeff * ||relu(gate)||_1 + ||x - x_hat_frozen(relu(gate))||^2

    The frozen decoder learns nothing from the last term; the gate learns from the last two alone,
    so that the L1 cannot shrink activations. The gate's bias (the paper's b_gate) is called b_enc,
    as what decides in the other classes. Differences: b_dec starts at the mean; Adam's first beta
    is that of the other classes (paper: 0). Dead features are not revived.
    """

    name = "gated"
    can_transcode = False  # SAELens, in whose layout runs are saved, has none such

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator | None = None) -> None:
        super().__init__(d_in, d_sae, generator)
        self.r_mag = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return self._gated(self.pre_activations(x))

    def _gated(self, gate: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        magnitude = torch.relu(self.r_mag.exp() * (gate - self.b_enc) + self.b_mag)
        return (gate > 0) * magnitude

    def loss(
        self,
        rows: Float[Tensor, "batch columns"],
        l1_coeff: Float[Tensor, ""] | float,
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> Loss:
        """As in `SAE`, with the gate's L1 as penalty and its reconstruction error in the total."""
        x, target = self.split(rows)
        gate = self.pre_activations(x)
        f, opening = self._gated(gate), torch.relu(gate)
        mse = (target - self.decode(f)).square().sum(dim=1).mean()
        frozen = self.features.total(opening @ self.W_dec.detach()) + self.b_dec.detach()
        gate_mse = (target - frozen).square().sum(dim=1).mean()
        penalty = self.features.total(opening.sum(dim=1)).mean()
        return Loss(mse + gate_mse + l1_coeff * penalty, mse, penalty, f)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.b_mag /= scale

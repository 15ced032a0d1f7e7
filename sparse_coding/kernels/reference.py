"""The reference step: the SAE's own loss, autograd, torch's fused Adam. What others must equal."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.kernels import StepStatistics
from sparse_coding.sae import SAE


class ReferenceStep:
    """Loss, backward, project the decoder's gradient, Adam, renormalise: in that order."""

    def __init__(self, sae: SAE, optimizer: torch.optim.Adam) -> None:
        self.sae, self.optimizer = sae, optimizer

    def __call__(
        self,
        x: Float[Tensor, "batch d_in"],
        l1_coeff: Float[Tensor, ""],
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> StepStatistics:
        loss = self.sae.loss(x, l1_coeff, dead)
        self.optimizer.zero_grad()
        loss.total.backward()
        self.sae.project_gradient()
        self.optimizer.step()
        self.sae.normalise()
        with torch.no_grad():
            self.sae.observe(loss.f)
            n_active = torch.count_nonzero(loss.f, dim=0)
        return StepStatistics(loss.mse.detach(), loss.penalty.detach(), n_active)

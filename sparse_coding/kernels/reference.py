"""The reference step: the SAE's own loss, autograd, torch's fused Adam. What others must equal."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.kernels import StepStatistics
from sparse_coding.sae import SAE


class ReferenceStep:
    """Loss, backward, project the decoder's gradient, Adam, renormalise: in that order.

    Where several processes have rows of one batch, all update their own copy of the SAE by the
    joined batch's gradient, and the statistics are those of the joined batch.
    """

    def __init__(self, sae: SAE, optimizer: torch.optim.Adam) -> None:
        self.sae, self.optimizer = sae, optimizer

    def __call__(
        self,
        x: Float[Tensor, "batch d_in"],
        l1_coeff: Float[Tensor, ""],
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> StepStatistics:
        rows = self.sae.rows
        loss = self.sae.loss(x, l1_coeff, dead)
        self.optimizer.zero_grad()
        loss.total.backward()
        self._average_gradients()
        self.sae.project_gradient()
        self.optimizer.step()
        self.sae.normalise()
        with torch.no_grad():
            self.sae.observe(loss.f)
            n_active = rows.reduced(torch.count_nonzero(loss.f, dim=0))
        mse, penalty = rows.mean(torch.stack([loss.mse.detach(), loss.penalty.detach()]))
        return StepStatistics(mse, penalty, n_active)

    def _average_gradients(self) -> None:
        """Over the processes that have the other rows: the gradient of the joined batch."""
        rows, gradients = self.sae.rows, [p.grad for p in self.sae.parameters()]
        if rows.is_alone:
            return
        joined = rows.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = joined.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

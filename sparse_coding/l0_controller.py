"""Steering a sparsity coefficient towards a target L0 while training goes on."""

import torch
from jaxtyping import Float
from torch import Tensor


class L0Controller:
    """Moves l1_coeff until the mean L0 equals a target, on the device, without a sync.

    log l1_coeff = gain * error + integral + integral of a slope, where the error is the logarithm
    of the last few batches' L0 minus that of a reference, clipped to one e-fold. Why each:

    - At a given stage of training L0 falls roughly as l1_coeff^-1.5 and takes some twenty steps to
      settle. The gains are in steps, made for that answer, and the same for a run of any length.
    - The reference goes in `approach_steps` from the first batch's L0 to the target. Aimed at the
      target at once, the integral winds up, L0 falls to half of it, and swings.
    - The coefficient that keeps an L0 falls while an SAE improves, by an e-fold over a run, and by
      several where the penalty itself moves (`p_anneal`). An integral alone trails such a ramp;
      the slope learns it. It begins when the reference has been at the target for a while: the
      coefficient's first climb is no trend to be continued.
    """

    smoothing_steps = 4
    gain = 2.0
    integral_steps = 20.0
    slope_steps = 80.0
    approach_share, longest_approach = 0.15, 300.0
    slope_begins_at = 0.25

    def __init__(self, target_l0: float, n_steps: int, device: torch.device) -> None:
        self.approach_steps = max(1.0, min(self.approach_share * n_steps, self.longest_approach))
        self.n_steps_without_slope = self.slope_begins_at * n_steps
        self.log_target = torch.tensor(target_l0, device=device).log()
        self.log_l0 = torch.tensor(float("nan"), device=device)  # smoothed; nan: nothing seen yet
        self.first_gap = torch.zeros((), device=device)  # of the first batch to the target
        self.n_steps = torch.zeros((), device=device)
        self.error = torch.zeros((), device=device)
        self.slope = torch.zeros((), device=device)
        self.integral = torch.zeros((), device=device)

    def update(self, l0: Float[Tensor, ""]) -> None:
        """Take in the L0 of one batch."""
        log_l0 = l0.clamp(min=1e-3).log()
        is_first = self.log_l0.isnan()
        self.first_gap.copy_(torch.where(is_first, log_l0 - self.log_target, self.first_gap))
        smoothed = self.log_l0.lerp(log_l0, 1 / self.smoothing_steps)
        self.log_l0.copy_(torch.where(is_first, log_l0, smoothed))
        self.n_steps += 1
        left = (1 - self.n_steps / self.approach_steps).clamp(min=0)
        reference = self.log_target + left * self.first_gap
        self.error.copy_((self.log_l0 - reference).clamp(-1.0, 1.0))
        change = self.gain / self.integral_steps * self.error
        self.slope += (self.n_steps > self.n_steps_without_slope) * change / self.slope_steps
        self.integral += change + self.slope

    def l1_coeff(self) -> Float[Tensor, ""]:
        """The coefficient for the next step."""
        return (self.integral + self.gain * self.error).exp()

    def tensors(self) -> dict[str, Tensor]:
        names = ("log_l0", "first_gap", "n_steps", "error", "slope", "integral")
        return {f"controller.{name}": getattr(self, name) for name in names}

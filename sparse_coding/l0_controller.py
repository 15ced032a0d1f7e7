"""Steering a sparsity coefficient towards a target L0 while training goes on."""

import torch
from jaxtyping import Float
from torch import Tensor


class L0Controller:
    """Moves l1_coeff until the mean L0 equals a target, on the device, without a sync.

    log l1_coeff = proportional_gain * error + integral + integral of a slope, where the error is
    log(L0 / target) of a smoothed L0, clipped to one e-fold. Why each:

    - At a given stage of training L0 falls roughly as l1_coeff^-1.5 and takes tens of steps to
      settle. The proportional part answers at once and damps the swing of the integral alone.
    - The coefficient that keeps an L0 falls by about an e-fold over a run while an SAE improves,
      and by several where the penalty itself moves (`p_anneal`). The integral trails such a ramp
      by (e-folds / `integral_range`); the slope learns the ramp and takes the rest away. It begins
      when a quarter of the run is over: the coefficient's first climb is no trend to be continued.

    L0 goes from the first batch's to the target as fast as this lets it, a little below it, and
    back. To lead it there slowly instead, along a line over 15 % of the run, makes worse SAEs: 292
    steps of `l1` on SmolLM2's layer 12 at ratio 4 then end at an FVU of 0.253, not 0.232. But it
    must not begin with a coefficient that only trained features can pay, or they die in the first
    twenty steps. It begins at 1 (below, where the first L0 is more than e times the target): the
    integral begins at minus the first error, if that is positive. 300 steps at ratio 2, first L0
    60, on rows not trained on, so and with an integral that begins at 0: towards 15 FVU 0.261 and
    0.290 with 3 and 42 % silent features (`norm_weighted_l1`); towards 30 0.198 and 0.204 with 4
    and 23 % (`jumprelu`). To begin lower still costs where the learning rate is low: `l1`
    towards 30 at 0.002 ends at 0.257 from 0, at 0.262 so, and at 0.266 from -1.
    """

    smoothing_steps = 8
    integral_range = 40.0
    largest_integral_gain = 0.06
    proportional_gain = 1.0
    slope_begins_at = 0.25
    slope_share = 0.3
    """Of the run: the time in which the slope takes over what error there is."""

    def __init__(self, target_l0: float, n_steps: int, device: torch.device) -> None:
        self.integral_gain = min(self.integral_range / n_steps, self.largest_integral_gain)
        self.slope_gain = self.integral_gain / (self.slope_share * n_steps)
        self.n_steps_without_slope = self.slope_begins_at * n_steps
        self.log_target = torch.tensor(target_l0, device=device).log()
        self.log_integral = torch.zeros((), device=device)
        self.slope = torch.zeros((), device=device)
        self.error = torch.zeros((), device=device)
        self.l0 = torch.tensor(float("nan"), device=device)  # nothing seen yet
        self.n_steps = torch.zeros((), device=device)

    def update(self, l0: Float[Tensor, ""]) -> None:
        """Take in the L0 of one batch."""
        is_first = self.l0.isnan()
        self.l0.copy_(torch.where(is_first, l0, self.l0.lerp(l0, 1 / self.smoothing_steps)))
        log_ratio = self.l0.clamp(min=1e-3).log() - self.log_target
        self.error.copy_(log_ratio.clamp(-1.0, 1.0))
        self.log_integral -= is_first * log_ratio.clamp(min=0)
        self.n_steps += 1
        self.slope += (self.n_steps > self.n_steps_without_slope) * self.slope_gain * self.error
        self.log_integral += self.integral_gain * self.error + self.slope

    def l1_coeff(self) -> Float[Tensor, ""]:
        """The coefficient for the next step."""
        return (self.log_integral + self.proportional_gain * self.error).exp()

    def tensors(self) -> dict[str, Tensor]:
        names = ("log_integral", "slope", "error", "l0", "n_steps")
        return {f"controller.{name}": getattr(self, name) for name in names}

"""Training steps for one SAE: the reference (autograd) and the fast ones, interchangeable.

Every step takes a batch, updates the SAE's parameters in place through one Adam state, and returns
the same statistics; which one ran changes nothing but the time it took.
"""

import importlib.util
import warnings
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.sae import (
    L1SAE,
    SAE,
    BatchTopKSAE,
    JumpReLUSAE,
    NormWeightedL1SAE,
    TiedL1SAE,
    TopKSAE,
)

FAST_CLASSES = (TiedL1SAE, L1SAE, NormWeightedL1SAE, TopKSAE, BatchTopKSAE, JumpReLUSAE)
"""What has a fast step; all others train by autograd."""


class StepStatistics(NamedTuple):
    """What one step measured before its update, on the SAE's device (nothing is synchronised)."""

    mse: Float[Tensor, ""]
    """Squared error in scaled units, summed over d_in, mean over the batch."""
    penalty: Float[Tensor, ""]
    """The loss's penalty before its coefficient (`sae.Loss.penalty`), mean over the batch."""
    n_active: Int[Tensor, " d_sae"]
    """How many rows of the batch each feature fired on."""


@runtime_checkable
class Step(Protocol):
    """One optimizer step of one SAE."""

    sae: SAE
    optimizer: torch.optim.Adam

    def __call__(
        self,
        x: Float[Tensor, "batch d_in"],
        l1_coeff: Float[Tensor, ""],
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> StepStatistics:
        """Update the SAE on scaled activations x; the learning rate is in `optimizer`.

        Adam is dense in every step: a feature that was inactive has the gradient 0, so its moments
        decay and it moves by its momentum, exactly as in torch's. `dead` goes to the loss.
        """


def make_adam(sae: SAE, lr: float, betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.Adam:
    """Fused Adam with its state already allocated, so that every step finds the same tensors.

    One group per parameter that learns at another rate (`SAE.lr_factors`), after all others.
    """
    named = dict(sae.named_parameters())
    common = [parameter for name, parameter in named.items() if name not in sae.lr_factors]
    groups = [{"params": common, "lr_factor": 1.0}]
    for name, factor in sae.lr_factors.items():
        groups.append({"params": [named[name]], "lr_factor": factor})
    optimizer = torch.optim.Adam(groups, lr=lr, betas=betas, eps=1e-8, fused=True)
    set_lr(optimizer, lr)
    for parameter in sae.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def set_lr(optimizer: torch.optim.Adam, lr: float) -> None:
    """Give every group of `make_adam` its multiple of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def make_step(sae: SAE, optimizer: torch.optim.Adam, kind: str = "auto") -> Step:
    """The fastest step there is for this SAE ("auto"), or autograd's ("reference").

    Imports what it chooses, so that importing this package is cheap. Warns and takes the reference
    where numba (CPU) or Triton (CUDA) is missing, or a small trial of the GPU's kernels fails;
    `UserError` for another kind.
    """
    from sparse_coding.kernels.reference import ReferenceStep

    if kind not in ("auto", "reference"):
        raise UserError(f"--step {kind} is unknown; it must be auto or reference")
    device = sae.W_dec.device
    is_shared = not (sae.rows.is_alone and sae.features.is_alone)
    if kind == "reference" or is_shared or device.type not in ("cpu", "cuda"):
        return ReferenceStep(sae, optimizer)
    package = {"cpu": "numba", "cuda": "triton"}[device.type]
    if importlib.util.find_spec(package) is None:
        warnings.warn(f"{package} is not installed: training is slower without it", stacklevel=2)
        return ReferenceStep(sae, optimizer)
    if device.type == "cuda":
        from sparse_coding.kernels import gpu

        is_fast = gpu.supports_gpu(sae) and gpu.agrees_with_reference(device)
        return (gpu.GPUStep if is_fast else ReferenceStep)(sae, optimizer)
    from sparse_coding.kernels import cpu

    return (cpu.CPUStep if cpu.supports(sae) else ReferenceStep)(sae, optimizer)

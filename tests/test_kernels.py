"""The fast CPU step against autograd, its screen against brute force, and what must not matter."""

import copy

import numba
import numpy as np
import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.kernels import Step, make_adam, make_step
from sparse_coding.kernels import cpu_loops as loops
from sparse_coding.kernels.cpu import CPUStep
from sparse_coding.kernels.reference import ReferenceStep
from sparse_coding.sae import ARCHITECTURES, SAE

ARCHITECTURE = pytest.mark.parametrize("architecture", list(ARCHITECTURES))
DEAD = 7
"""Every seventh feature of the test SAEs never fires."""


def make_sae(
    architecture: str, d_in: int, d_sae: int, density: float, dtype: torch.dtype
) -> tuple[SAE, torch.Tensor]:
    """An SAE away from its symmetric start, firing about `density` of the time, and a batch."""
    generator = torch.Generator().manual_seed(d_in + d_sae)
    sae = ARCHITECTURES[architecture](d_in, d_sae, generator)
    x = 1.0 + torch.randn(77, d_in, generator=generator)
    with torch.no_grad():
        if architecture != "tied_l1":
            sae.W_enc += 0.3 * sae.W_enc.std() * torch.randn(sae.W_enc.shape, generator=generator)
        sae.b_dec.copy_(0.5 + torch.rand(d_in, generator=generator))
        sae.b_enc -= sae.pre_activations(x).quantile(1 - density, dim=0)
        # The quantile is a row's own pre-activation: away from it, or rounding decides the sign.
        sae.b_enc += 0.01 * sae.b_enc.std() * torch.randn(d_sae, generator=generator)
        sae.b_enc[::DEAD] = -1e3
    return sae.to(dtype), x.to(dtype)


def twin_steps(sae: SAE, *kinds: type, lr: float = 1e-2) -> list[Step]:
    copies = [copy.deepcopy(sae) for _ in kinds]
    return [kind(twin, make_adam(twin, lr)) for kind, twin in zip(kinds, copies, strict=True)]


def difference(a: Step, b: Step) -> float:
    """The largest relative difference between two steps' parameters and Adam moments."""
    pairs = []
    for p, q in zip(a.sae.parameters(), b.sae.parameters(), strict=True):
        pairs.append((p, q))
        state_a, state_b = a.optimizer.state[p], b.optimizer.state[q]
        pairs += [(state_a[key], state_b[key]) for key in ("exp_avg", "exp_avg_sq")]
        assert state_a["step"] == state_b["step"]
    return max(((p - q).norm() / p.norm().clamp(min=1e-300)).item() for p, q in pairs)


@ARCHITECTURE
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize(("d_in", "d_sae"), [(48, 200), (513, 131)])
def test_a_float64_step_has_autograds_gradients(architecture, density, d_in, d_sae):
    sae, x = make_sae(architecture, d_in, d_sae, density, torch.float64)
    expected, fast = twin_steps(sae, ReferenceStep, CPUStep)
    l1_coeff = torch.tensor(0.7, dtype=torch.float64)
    statistics = expected(x, l1_coeff), fast(x, l1_coeff)
    # After one step from zero, Adam's first moment is the (projected) gradient times 0.1.
    assert difference(expected, fast) < 1e-10
    torch.testing.assert_close(statistics[1].mse, statistics[0].mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(statistics[1].l1, statistics[0].l1, rtol=1e-12, atol=1e-12)
    assert torch.equal(statistics[1].n_active, statistics[0].n_active)
    assert statistics[1].n_active[::DEAD].sum() == 0


@ARCHITECTURE
@pytest.mark.parametrize("density", [0.5, 0.03])
def test_ragged_batches_and_alternating_steps_end_like_the_reference(architecture, density):
    sae, x = make_sae(architecture, 48, 200, density, torch.float64)
    expected, fast, mixed = twin_steps(sae, ReferenceStep, CPUStep, CPUStep)
    other = ReferenceStep(mixed.sae, mixed.optimizer)
    for n, n_rows in enumerate([77, 1, 33, 77, 64, 5]):
        l1_coeff = torch.tensor(0.1 * n, dtype=torch.float64)
        for step in (expected, fast, other if n % 2 else mixed):
            step.optimizer.param_groups[0]["lr"] = 1e-3 * (n + 1)
            step(x[:n_rows], l1_coeff)
    assert difference(expected, fast) < 1e-10
    assert difference(expected, mixed) < 1e-10

"""The fast CPU step against autograd, its screen against brute force, and what must not matter."""

import copy
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch
from build_notebook import ROOT

from sparse_coding.errors import UserError
from sparse_coding.kernels import FAST_CLASSES, Step, cpu, cpu_screen, make_adam, make_step
from sparse_coding.kernels.cpu import CPUStep
from sparse_coding.kernels.reference import ReferenceStep
from sparse_coding.sae import ARCHITECTURES, SAE

ARCHITECTURE = pytest.mark.parametrize("architecture", [cls.name for cls in FAST_CLASSES])
DEAD = 7
"""Every seventh feature of the test SAEs never fires."""


def make_sae(
    architecture: str, d_in: int, d_sae: int, density: float, dtype: torch.dtype
) -> tuple[SAE, torch.Tensor]:
    """An SAE away from its symmetric start, firing about `density` of the time, and a batch."""
    generator = torch.Generator().manual_seed(d_in + d_sae)
    cls = ARCHITECTURES[architecture]
    k = {"k": max(1, round(density * d_sae))} if cls.sparsity_is_chosen else {}
    sae = cls(d_in, d_sae, generator, **k)
    x = 1.0 + torch.randn(77, d_in, generator=generator)
    with torch.no_grad():
        if architecture != "tied_l1":
            sae.W_enc += 0.3 * sae.W_enc.std() * torch.randn(sae.W_enc.shape, generator=generator)
        if architecture == "jumprelu":
            sae.bandwidth = 0.3  # wide enough that some entries teach their threshold
            sae.threshold += 0.5 * torch.rand(d_sae, generator=generator)
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
def test_a_float64_step_has_autograds_gradients(monkeypatch, architecture, density, d_in, d_sae):
    monkeypatch.setattr(cpu_screen, "CHUNK_BYTES", 0)  # the smallest chunks: 64 of 77 tokens
    sae, x = make_sae(architecture, d_in, d_sae, density, torch.float64)
    expected, fast = twin_steps(sae, ReferenceStep, CPUStep)
    l1_coeff = torch.tensor(0.7, dtype=torch.float64)
    statistics = expected(x, l1_coeff), fast(x, l1_coeff)
    # After one step from zero, Adam's first moment is the (projected) gradient times 0.1.
    assert difference(expected, fast) < 1e-10
    torch.testing.assert_close(statistics[1].mse, statistics[0].mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        statistics[1].penalty, statistics[0].penalty, rtol=1e-12, atol=1e-12
    )
    assert torch.equal(statistics[1].n_active, statistics[0].n_active)
    assert statistics[1].n_active[::DEAD].sum() == 0


def without_dense_steps(monkeypatch):
    """Let every step that is not sparse fail."""

    def fail(*arguments):
        raise AssertionError("the step is dense")

    monkeypatch.setattr(CPUStep, "_dense_step", fail)
    monkeypatch.setattr(cpu, "ReferenceStep", lambda *arguments: fail)


@ARCHITECTURE
def test_a_sparse_batch_takes_a_sparse_step(monkeypatch, architecture):
    without_dense_steps(monkeypatch)
    sae, x = make_sae(architecture, 48, 200, 0.04, torch.float32)
    (step,) = twin_steps(sae, CPUStep)
    assert step(x, torch.tensor(0.7)).n_active.sum() > 0
    with torch.no_grad():
        step.sae.b_enc -= 1e3
    assert step(x, torch.tensor(0.7)).n_active.sum() == 0  # silence is sparse too


@pytest.mark.parametrize("architecture", ["topk", "batch_topk"])
@pytest.mark.parametrize("n_dead", [3, 60])  # fewer and more than AuxK lets speak at once
def test_auxks_gradients_are_autograds(monkeypatch, architecture, n_dead):
    without_dense_steps(monkeypatch)
    monkeypatch.setattr(cpu_screen, "CHUNK_BYTES", 0)
    sae, x = make_sae(architecture, 48, 200, 0.05, torch.float64)
    sae.b_enc.data[::DEAD] = 0.0
    dead = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:n_dead]
    expected, fast = twin_steps(sae, ReferenceStep, CPUStep)
    statistics = [step(x, torch.tensor(0.0), dead) for step in (expected, fast)]
    assert difference(expected, fast) < 1e-10
    assert (expected.sae.W_dec - sae.W_dec)[dead].norm(dim=1).min() > 0
    torch.testing.assert_close(statistics[1].penalty, statistics[0].penalty, rtol=1e-12, atol=0)
    assert statistics[0].penalty > 0


def test_batch_topk_learns_the_references_threshold():
    sae, x = make_sae("batch_topk", 48, 200, 0.05, torch.float64)
    expected, fast = twin_steps(sae, ReferenceStep, CPUStep)
    for step in (expected, fast):
        for n_rows in (77, 30, 1):
            step(x[:n_rows], torch.tensor(0.0))
    assert expected.sae.threshold > 0
    torch.testing.assert_close(fast.sae.threshold, expected.sae.threshold, rtol=1e-12, atol=0)


def test_batch_topk_is_exact_when_the_sampled_tokens_mislead_it():
    sae, x = make_sae("batch_topk", 48, 200, 0.05, torch.float64)
    x[:: -(-len(x) // 16)] *= 30  # the tokens that the first guess of its threshold looks at
    expected, fast = twin_steps(sae, ReferenceStep, CPUStep)
    statistics = [step(x, torch.tensor(0.0)) for step in (expected, fast)]
    assert torch.equal(statistics[0].n_active, statistics[1].n_active)
    assert difference(expected, fast) < 1e-10


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


@ARCHITECTURE
@pytest.mark.parametrize("density", [0.5, 0.03])
def test_float32_errs_no_more_than_the_reference_in_float32(architecture, density):
    sae, x = make_sae(architecture, 48, 200, density, torch.float64)
    (exact,) = twin_steps(sae, ReferenceStep)
    expected, fast = twin_steps(sae.float(), ReferenceStep, CPUStep)
    for _ in range(5):
        exact(x, torch.tensor(0.7, dtype=torch.float64))
        for step in (expected, fast):
            step(x.float(), torch.tensor(0.7))
    # Both round sums of the same terms in another order; a factor of 4 leaves room for luck.
    assert difference(exact, fast) < 4 * difference(exact, expected)


def adversarial_sae(d_in: int, d_sae: int, n_tokens: int) -> tuple[SAE, torch.Tensor]:
    """Each feature has one token at the edge of firing, half of them by a hair above.

    Activations have a few huge coordinates, as residual streams do, and rows of all norms.
    """
    generator = torch.Generator().manual_seed(3)
    sae = ARCHITECTURES["norm_weighted_l1"](d_in, d_sae, generator)
    x = torch.randn(n_tokens, d_in, generator=generator)
    x[:, :3] *= 30
    with torch.no_grad():
        sae.W_enc *= torch.logspace(-3, 2, d_sae)[torch.randperm(d_sae, generator=generator)]
        pre = (x.double() @ sae.W_enc.double()).sort(dim=0, descending=True).values
        edge = pre[torch.arange(d_sae) % 5, torch.arange(d_sae)]
        hair = 1e-5 * x.norm(dim=1).mean() * sae.W_enc.norm(dim=0)
        sae.b_enc.copy_(-edge + hair * (-1.0) ** torch.arange(d_sae))
    return sae, x


@pytest.mark.parametrize("screen_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_adversarial", [False, True])
def test_the_screen_misses_nothing(monkeypatch, screen_dtype, is_adversarial):
    sae, x = (
        adversarial_sae(48, 500, 77)
        if is_adversarial
        else make_sae("l1", 513, 200, 0.05, torch.float32)
    )
    with torch.no_grad():
        pre = copy.deepcopy(sae).double().pre_activations(x.double())
    screened, brute_force = (
        CPUStep(twin, make_adam(twin, 1e-2), screen_dtype) for twin in (sae, copy.deepcopy(sae))
    )
    statistics = screened(x, torch.tensor(0.7))
    monkeypatch.setattr(cpu, "MAX_SCREENED_DENSITY", 1.0)
    bounds, everything = cpu_screen._bounds, np.full(len(x), np.inf, np.float32)
    monkeypatch.setattr(cpu_screen, "_bounds", lambda *a: bounds(*a)._replace(margin=everything))
    assert torch.equal(brute_force(x, torch.tensor(0.7)).n_active, statistics.n_active)
    assert torch.equal(statistics.n_active, (pre > 0).sum(dim=0))
    assert difference(screened, brute_force) == 0


# TopK's 70 of 500 are so many that each feature is a block of its own, and no block's slack helps.
@pytest.mark.parametrize(
    ("architecture", "density"), [("topk", 0.14), ("batch_topk", 0.05), ("jumprelu", 0.05)]
)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_rounding_in_the_screen_chooses_no_other_entries(
    monkeypatch, architecture, density, scale
):
    without_dense_steps(monkeypatch)
    sae, x = make_sae(architecture, 48, 500, density, torch.float32)
    x[:, :3] *= scale
    with torch.no_grad():
        sae.W_enc *= torch.logspace(-1, 1, 500)
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(2))
        if architecture == "jumprelu":
            sae.threshold.copy_(sae.pre_activations(x).quantile(0.9, dim=0).clamp(min=0.1))
        exact = copy.deepcopy(sae).double()
        f = exact.encode(x.double())
        if architecture == "batch_topk":
            f = exact.select(exact.pre_activations(x.double()))
    (step,) = twin_steps(sae, lambda *a: CPUStep(*a, screen_dtype=torch.bfloat16))
    assert torch.equal(step(x, torch.tensor(0.7)).n_active, f.count_nonzero(dim=0))


LOSES, GAINS = 1 + 2**-8 - 2**-12, 1 + 2**-8 + 2**-12
"""Rounding to bfloat16 changes them by nearly the most it can: to 1 and to 1 + 2^-7."""


@pytest.mark.parametrize(
    ("x", "w"),
    [
        ([LOSES, GAINS] * 6, [1.0, -1.0] * 6),
        ([1.0, -1.0] * 6, [LOSES, GAINS] * 6),
        ([1.0, 2**-8] + [0.0] * 10, [1.0] * 12),
    ],
    ids=["of the input", "of the weights", "of the product"],
)
def test_the_screen_survives_the_worst_rounding(x, w):
    sae = ARCHITECTURES["norm_weighted_l1"](12, 20)
    x, w = torch.tensor([x]), torch.tensor(w)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
        sae.W_enc[:] = w[:, None]  # in all features: the bounds take the worst of them
        sae.b_enc[7] = -(x[0] @ w) + 1e-5
    step = CPUStep(sae, make_adam(sae, 1e-2), torch.bfloat16)
    assert step(x, torch.tensor(0.7)).n_active.nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("density", [0.5, 0.03])
def test_the_number_of_threads_changes_no_bit(density):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one processor: there is only one number of threads")
    sae, x = make_sae("l1", 48, 200, density, torch.float32)
    one, two = twin_steps(sae, CPUStep, CPUStep)
    for n_threads, step in ((1, one), (2, two)):
        numba.set_num_threads(n_threads)
        for _ in range(3):
            step(x, torch.tensor(0.7))
    assert difference(one, two) == 0


def test_a_fresh_step_continues_a_run_bit_for_bit():
    sae, x = make_sae("tied_l1", 48, 200, 0.5, torch.float32)
    unbroken, resumed = twin_steps(sae, CPUStep, CPUStep)
    for n in range(6):
        resumed = CPUStep(resumed.sae, resumed.optimizer)
        for step in (unbroken, resumed):
            step(x[: 77 - 9 * n], torch.tensor(3.0))
            step.sae.b_enc.data -= 0.3  # from dense products to sparse ones
    assert difference(unbroken, resumed) == 0


def test_a_feature_that_stays_silent_still_moves_by_its_momentum():
    sae, x = make_sae("l1", 48, 200, 0.05, torch.float64)
    expected, fast = twin_steps(sae, ReferenceStep, CPUStep)
    for step in (expected, fast):
        step(x, torch.tensor(0.7, dtype=torch.float64))
        step.sae.b_enc.data.fill_(-1e3)
    before = fast.sae.W_enc.detach().clone()
    for step in (expected, fast):
        assert step(x, torch.tensor(0.7, dtype=torch.float64)).n_active.sum() == 0
    assert (fast.sae.W_enc - before).abs().max() > 1e-3
    assert difference(expected, fast) < 1e-10


def test_auto_picks_the_fast_step_only_for_the_classes_it_knows():
    class Changed(ARCHITECTURES["l1"]):
        pass

    for kind, sae, expected in [
        ("auto", ARCHITECTURES["l1"](12, 20), CPUStep),
        ("reference", ARCHITECTURES["l1"](12, 20), ReferenceStep),
        ("auto", Changed(12, 20), ReferenceStep),
        ("auto", ARCHITECTURES["l1"](12, 20).bfloat16(), ReferenceStep),
    ]:
        assert type(make_step(sae, make_adam(sae, 1e-3), kind)) is expected
    with pytest.raises(UserError, match="auto or reference"):
        make_step(sae, make_adam(sae, 1e-3), "fast")


def test_without_numba_auto_warns_and_takes_the_reference(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    sae = ARCHITECTURES["l1"](12, 20)
    with pytest.warns(UserWarning, match="numba"):
        assert isinstance(make_step(sae, make_adam(sae, 1e-3)), ReferenceStep)


@pytest.mark.parametrize("package", ["sparse_coding", "analysis", "benchmarks", "pretrained"])
def test_threads_are_told_not_to_spin_before_torch_reads_that(package):
    """But for who says otherwise."""
    told = "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    command = [sys.executable, "-c", f"import {package}, os, sys; {told}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment.pop("OMP_WAIT_POLICY", None)
        environment |= {"OMP_WAIT_POLICY": given} if given else {}
        said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert said.stdout.split() == ["False", expected]


def test_the_entry_imports_us_before_torch():
    source = (ROOT / "easy_training_base.py").read_text(encoding="utf-8")
    assert (
        source.index("from sparse_coding") == min(map(source.index, ("\nfrom ", "\nimport "))) + 1
    )

"""The GPU step against autograd, on a GPU or in Triton's interpreter, and that it compiles.

The interpreter runs kernels on CPU tensors, for a whole process or not at all: without a GPU, one
test here starts the others in a process of their own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from test_kernels import (
    DEAD,
    LOSES,
    adversarial_sae,
    difference,
    make_sae,
    twin_steps,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_coding.errors import UserError
from sparse_coding.kernels import gpu, gpu_screen, make_adam, set_lr
from sparse_coding.kernels.gpu import GPUStep, PastDensity, supports_gpu
from sparse_coding.kernels.reference import ReferenceStep
from sparse_coding.sae import ARCHITECTURES, SAE

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
runs_kernels = pytest.mark.skipif(
    not (IS_INTERPRETED or (torch.cuda.is_available() and find_spec("triton"))),
    reason="no GPU: runs in the process that test_the_step_in_tritons_interpreter starts",
)
needs_triton = pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed")
ARCHITECTURE = pytest.mark.parametrize(
    "architecture", ["tied_l1", "l1", "norm_weighted_l1", "topk", "batch_topk", "jumprelu"]
)
IS_SPARSE = pytest.mark.parametrize("is_sparse", [False, True])
COEFFICIENT = torch.tensor(0.7, dtype=torch.float64, device=DEVICE if IS_INTERPRETED else None)


@needs_triton
@pytest.mark.skipif(IS_INTERPRETED, reason="is itself in that process")
def test_the_step_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles per matrix; the interpreter takes a millisecond per operation of a tile."""
    sizes = {"TILE_TOKENS": 32, "TILE_FEATURES": 32, "TILE_DEPTH": 16, "LIST_WORDS": 2}
    for name, size in sizes.items():
        monkeypatch.setattr(gpu_screen, name, size)
    monkeypatch.setattr(gpu, "ROWS_SIZE", 256)


def choose(monkeypatch, is_sparse: bool) -> None:
    monkeypatch.setattr(PastDensity, "is_low", lambda self: is_sparse)


def sae_and_batch(*args, n_tokens: int = 13) -> tuple[SAE, torch.Tensor]:
    sae, x = make_sae(*args)
    return sae.to(DEVICE), x[:n_tokens].to(DEVICE)


@runs_kernels
@ARCHITECTURE
@IS_SPARSE
@pytest.mark.parametrize(("density", "d_in", "d_sae"), [(1.0, 12, 20), (0.1, 49, 70)])
def test_a_float64_step_has_autograds_gradients(
    monkeypatch, architecture, is_sparse, density, d_in, d_sae
):
    choose(monkeypatch, is_sparse)
    sae, x = sae_and_batch(architecture, d_in, d_sae, density, torch.float64)
    expected, fast = twin_steps(sae, ReferenceStep, GPUStep)
    statistics = expected(x, COEFFICIENT), fast(x, COEFFICIENT)
    # After one step from zero, Adam's first moment is the (projected) gradient times 0.1.
    assert difference(expected, fast) < 1e-10
    torch.testing.assert_close(statistics[1].mse, statistics[0].mse, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        statistics[1].penalty, statistics[0].penalty, rtol=1e-12, atol=1e-12
    )
    assert torch.equal(statistics[1].n_active, statistics[0].n_active)
    assert statistics[1].n_active[::DEAD].sum() == 0


@runs_kernels
@ARCHITECTURE
def test_ragged_batches_dense_and_sparse_in_turn_end_like_the_reference(monkeypatch, architecture):
    sae, x = sae_and_batch(architecture, 12, 20, 0.2, torch.float64)
    expected, fast = twin_steps(sae, ReferenceStep, GPUStep)
    for n, n_rows in enumerate([13, 1, 5, 13, 7, 2]):
        choose(monkeypatch, n % 2 == 1)
        l1_coeff = 0.1 * n * COEFFICIENT
        for step in (expected, fast):
            set_lr(step.optimizer, 1e-3 * (n + 1))
            step(x[:n_rows], l1_coeff)
    assert difference(expected, fast) < 1e-10


@runs_kernels
@IS_SPARSE
@pytest.mark.parametrize("architecture", ["norm_weighted_l1", "jumprelu"])
def test_float32_errs_no_more_than_the_reference_in_float32(monkeypatch, architecture, is_sparse):
    choose(monkeypatch, is_sparse)
    sae, x = sae_and_batch(architecture, 48, 36, 0.1, torch.float64)
    (exact,) = twin_steps(sae, ReferenceStep)
    expected, fast = twin_steps(sae.float(), ReferenceStep, GPUStep)
    for _ in range(2):
        exact(x, COEFFICIENT)
        for step in (expected, fast):
            step(x.float(), COEFFICIENT.float())
    # Both round sums of the same terms in another order; a factor of 4 leaves room for luck.
    assert difference(exact, fast) < 4 * difference(exact, expected)


@runs_kernels
def test_a_batch_in_several_parts_gives_the_same(monkeypatch):
    choose(monkeypatch, True)
    sae, x = sae_and_batch("jumprelu", 12, 20, 0.2, torch.float64, n_tokens=44)
    whole, parts = twin_steps(sae, GPUStep, GPUStep)
    statistics = whole(x, COEFFICIENT)
    monkeypatch.setattr(gpu, "ENTRY_BYTES", 1)
    assert len(list(parts._sub_batches(len(x)))) == 2
    assert torch.equal(parts(x, COEFFICIENT).n_active, statistics.n_active)
    assert difference(whole, parts) < 1e-12


# ---- TopK and BatchTopK --------------------------------------------------------------------

CHOSEN = pytest.mark.parametrize("architecture", ["topk", "batch_topk"])


@runs_kernels
@IS_SPARSE
# Fewer and more dead features than AuxK lets speak at once.
@pytest.mark.parametrize(("architecture", "n_dead"), [("topk", 3), ("batch_topk", 30)])
def test_auxks_gradients_are_autograds_in_one_part_and_in_two(
    monkeypatch, architecture, is_sparse, n_dead
):
    choose(monkeypatch, is_sparse)
    sae, x = sae_and_batch(architecture, 12, 70, 0.1, torch.float64, n_tokens=35)
    sae.b_enc.data[::DEAD] = 0.0
    dead = torch.randperm(70, generator=torch.Generator().manual_seed(1))[:n_dead].to(DEVICE)
    expected, whole, parts = twin_steps(sae, ReferenceStep, GPUStep, GPUStep)
    statistics = [step(x, COEFFICIENT, dead) for step in (expected, whole)]
    monkeypatch.setattr(gpu, "ENTRY_BYTES", 1)
    statistics.append(parts(x, COEFFICIENT, dead))
    assert difference(expected, whole) < 1e-10
    assert difference(expected, parts) < 1e-10
    for fast in statistics[1:]:
        torch.testing.assert_close(fast.penalty, statistics[0].penalty, rtol=1e-12, atol=0)
        assert torch.equal(fast.n_active, statistics[0].n_active)
    assert statistics[0].penalty > 0


@runs_kernels
@pytest.mark.parametrize("block", [2, 256])
def test_equal_activations_do_not_make_a_token_keep_more_than_k(monkeypatch, block):
    choose(monkeypatch, True)
    monkeypatch.setattr(gpu, "KEYS_SIZE", block)
    sae, x = sae_and_batch("topk", 12, 40, 0.1, torch.float32)
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.W_enc[:, 20:] = sae.W_enc[:, :20]  # every feature twice: ties wherever k is odd
        sae.k = 5
        pre = sae.pre_activations(x)
    n_active = GPUStep(sae, make_adam(sae, 1e-2))(x, COEFFICIENT.float()).n_active
    assert n_active.sum() == (pre > 0).sum(dim=1).clamp(max=5).sum()
    assert (n_active[:20] - n_active[20:]).sum() > 0  # of two equals, the first is kept


@runs_kernels
@IS_SPARSE
def test_batch_topk_learns_the_references_threshold(monkeypatch, is_sparse):
    choose(monkeypatch, is_sparse)
    sae, x = sae_and_batch("batch_topk", 12, 40, 0.1, torch.float64)
    expected, fast = twin_steps(sae, ReferenceStep, GPUStep)
    for step in (expected, fast):
        for n_rows in (13, 5, 1):
            step(x[:n_rows], COEFFICIENT)
    assert expected.sae.threshold > 0
    torch.testing.assert_close(fast.sae.threshold, expected.sae.threshold, rtol=1e-12, atol=0)


@runs_kernels
@CHOSEN
def test_hardly_more_than_k_entries_pass_the_raised_floors(architecture):
    sae, x = sae_and_batch(architecture, 48, 256, 0.02, torch.float32, n_tokens=20)
    sae.b_enc.data.zero_()  # half of all entries are positive
    step = GPUStep(sae, make_adam(sae, 1e-2))
    with torch.no_grad():
        n_listed = step._screen(step._batch(x, COEFFICIENT.float())).entries(slice(0, 20))
    per_token = n_listed.by_token.n.float()
    if architecture == "topk":
        assert (per_token >= sae.k).all()
    assert sae.k <= per_token.mean() < 1.5 * sae.k + 1


# ---- the screen ----------------------------------------------------------------------------


@runs_kernels
def test_the_screen_misses_nothing_and_its_excess_changes_no_bit(monkeypatch):
    choose(monkeypatch, True)
    sae, x = adversarial_sae(17, 36, 13)
    sae, x = sae.to(DEVICE), x.to(DEVICE)
    screened, brute_force = twin_steps(sae, GPUStep, GPUStep)
    with torch.no_grad():
        pre = sae.double().pre_activations(x.double())
    statistics = screened(x, COEFFICIENT.float())
    make = gpu_screen.Screen.__init__

    def pass_everything(screen, *args):
        make(screen, *args)
        screen._margin.fill_(1e30)

    monkeypatch.setattr(gpu_screen.Screen, "__init__", pass_everything)
    assert torch.equal(brute_force(x, COEFFICIENT.float()).n_active, statistics.n_active)
    assert torch.equal(statistics.n_active, (pre > 0).sum(dim=0))
    assert difference(screened, brute_force) < 1e-6


@runs_kernels
@pytest.mark.parametrize(
    ("x", "w"),
    [([LOSES, 1.0] * 6, [1.0, -1.0] * 6), ([1.0, -1.0] * 6, [LOSES, 1.0] * 6)],
    ids=["of the input", "of the weights"],
)
def test_the_screen_survives_one_sided_rounding(monkeypatch, x, w):
    # Rounded to nearest, as by a GPU, or towards zero, as by the interpreter: always down.
    choose(monkeypatch, True)
    sae = ARCHITECTURES["norm_weighted_l1"](12, 20)
    x, w = torch.tensor([x]), torch.tensor(w)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
        sae.W_enc[:] = w[:, None]  # in all features: the bounds take the worst of them
        sae.b_enc[7] = -(x[0] @ w) + 1e-5
    sae = sae.to(DEVICE)
    n_active = GPUStep(sae, make_adam(sae, 1e-2))(x.to(DEVICE), COEFFICIENT.float()).n_active
    assert n_active.nonzero().flatten().tolist() == [7]


@runs_kernels
@pytest.mark.parametrize("is_full_size", [False, True])
def test_entries_are_listed_in_order_and_few_of_them_are_idle(monkeypatch, is_full_size):
    if is_full_size:
        monkeypatch.undo()
    sae, x = sae_and_batch("l1", 48, 36, 0.1, torch.float32, n_tokens=44)
    step = GPUStep(sae, make_adam(sae, 1e-2))
    with torch.no_grad():
        batch = step._batch(x, COEFFICIENT.float())
        entries = step._screen(batch).entries(slice(0, 44))
        is_active = sae.encode(x) > 0
    listed = torch.zeros_like(is_active)
    for token, (features, n) in enumerate(zip(*entries.by_token, strict=True)):
        assert (features[:n].diff() > 0).all()
        listed[token, features[:n].long()] = True
    assert (listed >= is_active).all()
    # A margin of 0.05 or so beside pre-activations with a standard deviation of 1.
    assert (listed & ~is_active).sum() < 0.03 * listed.numel()
    for feature, (tokens, n) in enumerate(zip(*entries.by_feature, strict=True)):
        assert tokens[:n].tolist() == listed[:, feature].nonzero().flatten().tolist()


# ---- dense or sparse, without waiting ------------------------------------------------------


def test_the_choice_lags_and_has_a_hysteresis():
    low, middle, high = 2, 7, 9  # entries of 200: 0.01, 0.035, 0.045
    counts = [low] * 8 + [middle] * 2 + [high] * 2 + [middle] * 2 + [low] * 2
    density, choices = PastDensity(torch.device("cpu")), []
    for count in [*counts, *[0] * 8]:
        choices.append(density.is_low())
        density.record(torch.tensor(count), 200)
    after = [True] * 8 + [True] * 2 + [False] * 2 + [False] * 2 + [True] * 2
    assert choices == [False] * 8 + after


class Waits(TorchDispatchMode):
    """Refuses operations that read a result back, or whose result's shape depends on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal")
        assert not (
            name == "index" and any(i.dtype == torch.bool for i in args[1] if i is not None)
        )
        return function(*args, **(kwargs or {}))


@pytest.fixture
def refused_waits() -> Iterator[None]:
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    with Waits():
        yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@runs_kernels
@IS_SPARSE
@pytest.mark.parametrize("architecture", ["jumprelu", "topk", "batch_topk"])
def test_a_step_never_waits_for_the_device(monkeypatch, architecture, is_sparse, request):
    density = PastDensity.is_low
    monkeypatch.setattr(PastDensity, "is_low", lambda self: density(self) or is_sparse)
    sae, x = sae_and_batch(architecture, 12, 20, 0.2, torch.float32)
    step = GPUStep(sae, make_adam(sae, 1e-2))
    dead = torch.arange(3, device=DEVICE)
    coefficient = COEFFICIENT.float().to(DEVICE)
    request.getfixturevalue("refused_waits")
    for _ in range(2 if is_sparse else gpu.LAG + 2):
        step(x, coefficient, dead)


@runs_kernels
@IS_SPARSE
def test_a_step_repeats_itself_bit_for_bit(monkeypatch, is_sparse):
    choose(monkeypatch, is_sparse)
    sae, x = sae_and_batch("l1", 12, 20, 0.2, torch.float32)
    first, second = twin_steps(sae, GPUStep, GPUStep)
    for step in (first, second):
        step(x, COEFFICIENT.float())
    assert difference(first, second) == 0


@runs_kernels
def test_a_diverged_sae_shows_in_the_loss_of_either_step(monkeypatch):
    for is_sparse in (False, True):
        choose(monkeypatch, is_sparse)
        sae, x = sae_and_batch("l1", 12, 20, 0.2, torch.float32)
        sae.W_enc.data[3, 5] = torch.nan
        assert GPUStep(sae, make_adam(sae, 1e-2))(x, COEFFICIENT.float()).mse.isnan()


@runs_kernels
def test_the_kernels_are_trusted_where_a_trial_succeeds(recwarn):
    gpu.agrees_with_reference.cache_clear()
    assert gpu.agrees_with_reference(torch.device(DEVICE))
    assert not recwarn


def fails(*arguments):
    raise RuntimeError("no such instruction\nand 40 lines more")


@runs_kernels
@pytest.mark.parametrize(
    ("attribute", "broken", "line"),
    [
        ("_update", fails, r"RuntimeError: no such instruction\)"),
        ("_add_sparsely", lambda *arguments: None, "gradients differ by"),
        ("_add_densely", lambda *arguments: None, "gradients differ by"),
    ],
)
def test_kernels_that_fail_or_err_are_not_trusted(monkeypatch, attribute, broken, line):
    monkeypatch.setattr(GPUStep, attribute, broken)
    gpu.agrees_with_reference.cache_clear()
    with pytest.warns(UserWarning, match=line):
        assert not gpu.agrees_with_reference(torch.device(DEVICE))
    gpu.agrees_with_reference.cache_clear()


def test_only_known_classes_on_a_gpu_are_supported():
    assert not supports_gpu(ARCHITECTURES["l1"](12, 20))
    half = ARCHITECTURES["l1"](12, 20).half()
    with pytest.raises(AssertionError, match="no GPU step"):
        GPUStep(half, make_adam(half, 1e-3))


@runs_kernels
def test_a_batch_of_another_width_is_refused():
    sae, x = sae_and_batch("l1", 12, 20, 0.2, torch.float32)
    with pytest.raises(UserError, match=r"\(13, 11\).*\(batch, 12\)"):
        GPUStep(sae, make_adam(sae, 1e-2))(x[:, :11], COEFFICIENT.float())

"""Transcoders: formulas in NumPy, the fast step, planted pairs of features, SAELens itself."""

import copy

import numpy as np
import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.formats import load_dictionary
from sparse_coding.formats.dictionary_learning import save_dictionary_learning
from sparse_coding.formats.saelens import load_saelens, save_saelens
from sparse_coding.kernels import FAST_CLASSES, cpu, make_adam, make_step
from sparse_coding.kernels.reference import ReferenceStep
from sparse_coding.ladder import SAESpec, ladder
from sparse_coding.sae import ARCHITECTURES, SAE
from sparse_coding.training import Trainer, TrainingConfig

BATCH, D_IN, D_OUT, D_SAE, K = 11, 12, 9, 20, 4
NAMES = [name for name, cls in ARCHITECTURES.items() if cls.can_transcode]
FAST = [cls.name for cls in FAST_CLASSES if cls.can_transcode]


def make(name: str, d_out: int = D_OUT) -> SAE:
    """A transcoder away from its start."""
    generator = torch.Generator().manual_seed(1)
    cls = ARCHITECTURES[name]
    sae = cls(D_IN, D_SAE, generator, **({"k": K} if cls.sparsity_is_chosen else {}))
    sae.retarget(d_out, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for threshold in sae.buffers():
            threshold.fill_(0.7)
    sae.normalise()
    return sae


def batch(d_out: int = D_OUT) -> torch.Tensor:
    return 0.5 + 2 * torch.randn(BATCH, D_IN + d_out, generator=torch.Generator().manual_seed(2))


def in_numpy(sae: SAE, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features of a training step and what they decode to."""
    w_enc, w_dec, b_enc, b_dec = (
        getattr(sae, name).detach().numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    pre = x @ w_enc + b_enc
    f = np.maximum(pre, 0)
    if "jumprelu" in sae.name:
        f = pre * (pre > sae.threshold.detach().numpy())
    if "topk" in sae.name or sae.name == "matryoshka":
        f = f * (pre >= np.sort(pre.ravel())[-K * len(x)])
    return f, f @ w_dec + b_dec


# What it computes.


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_that_of_the_target_from_an_input_that_nothing_is_subtracted_from(name):
    sae, rows = make(name).double(), batch().double()
    f, y_hat = in_numpy(sae, rows[:, :D_IN].numpy())
    loss = sae.loss(rows, 0.3)
    np.testing.assert_allclose(loss.f.detach().numpy(), f, rtol=1e-10, atol=1e-10)
    error = ((rows[:, D_IN:].numpy() - y_hat) ** 2).sum(axis=1).mean()
    assert loss.mse.item() == pytest.approx(error, rel=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_teaches_every_parameter(name):
    sae = make(name)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    ReferenceStep(sae, make_adam(sae, lr=1e-2))(batch(), torch.tensor(0.3), torch.arange(9))
    assert all(not torch.equal(value, before[key]) for key, value in sae.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_folded_scales_give_the_target_in_its_raw_units(name):
    sae, x = make(name).double(), batch()[:, :D_IN].double()
    folded = copy.deepcopy(sae)
    folded.fold_scales(0.03, 17.0)
    torch.testing.assert_close(folded.encode(x / 0.03), sae.encode(x) / 17, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded(x / 0.03), sae(x) / 17, rtol=1e-10, atol=1e-10)
    assert torch.equal(folded.W_dec, sae.W_dec)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("is_sparse", [True, False])
def test_the_fast_step_is_the_reference_also_between_two_places(name, is_sparse, monkeypatch):
    if not is_sparse:
        monkeypatch.setattr(cpu, "MAX_SCREENED_DENSITY", 0.0)
    twins = [make(name, D_IN).double() for _ in range(2)]
    reference, fast = (
        kind(sae, make_adam(sae, lr=1e-2))
        for kind, sae in zip((ReferenceStep, cpu.CPUStep), twins, strict=True)
    )
    dead = torch.arange(0, D_SAE, 3) if twins[0].revives_dead else None
    for _ in range(3):
        expected, found = (
            step(batch(D_IN).double(), torch.tensor(0.7).double(), dead)
            for step in (reference, fast)
        )
        assert torch.equal(found.n_active, expected.n_active)
        torch.testing.assert_close(found.mse, expected.mse, rtol=1e-10, atol=0)
    for p, q in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-8, atol=1e-10)


def test_widths_that_differ_take_the_reference_step():
    narrow, same = make("l1"), make("l1", D_IN)
    assert isinstance(make_step(narrow, make_adam(narrow, 1e-3)), ReferenceStep)
    assert isinstance(make_step(same, make_adam(same, 1e-3)), cpu.CPUStep)


# Training.

N_STEPS, N_ROWS, PLANTED, L0 = 1000, 512, 40, 3.0
WIDTHS = (32, 32)


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """What each true feature writes, and rows: what it is read from, then what it writes.

    Both off centre, in units 40 times apart; each is on for 1 row in 13.
    """
    generator = torch.Generator().manual_seed(123)
    read, written = (torch.randn(PLANTED, width, generator=generator) for width in WIDTHS)
    read, written = (v / v.norm(dim=1, keepdim=True) for v in (read, written))
    size = (N_STEPS * N_ROWS, PLANTED)
    a = torch.rand(size, generator=generator) < L0 / PLANTED
    a = a * (0.5 + torch.rand(size, generator=generator))
    x, target = 8 * (a @ read) + torch.linspace(-3, 3, WIDTHS[0]), 0.2 * (a @ written) - 0.1
    return written, torch.cat([x, target], dim=1)


def spec(name: str, ratio: int = 3, target: float | None = L0) -> SAESpec:
    return SAESpec(name, ratio, None, target, 0)


def config(**changes) -> TrainingConfig:
    settings = {"lr": 3e-3, "initial_l0": 2 * L0, "dead_after_tokens": 20_000}
    return TrainingConfig(**{"n_steps": N_STEPS, "batch_tokens": N_ROWS} | settings | changes)


def train(
    trainer: Trainer, rows: torch.Tensor, first: int = 0, last: int | None = None
) -> Trainer:
    for x in rows.split(trainer.cfg.batch_tokens)[first : last or trainer.cfg.n_steps]:
        trainer.step(x)
    return trainer


@pytest.mark.parametrize("name", NAMES)
def test_training_finds_what_planted_features_write_at_the_l0_asked_for(name, planted):
    written, rows = planted
    trainer = Trainer([spec(name)], config(), rows[:8192], "", WIDTHS[1])
    train(trainer, rows)
    (sae,) = trainer.finished_saes().values()
    (log,) = trainer.metrics()
    cosine = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1) @ written.T
    assert cosine.max(dim=0).values.mean() > 0.9
    x, target = rows[-20_000:].split(WIDTHS, dim=1)
    with torch.no_grad():
        f = sae.encode(x)
        fvu = (target - sae.decode(f)).square().sum() / (target - target.mean(0)).square().sum()
    l0 = (f > 0).sum(dim=1).double().mean().item()
    # p-annealing ends under its target also as an SAE.
    assert l0 == pytest.approx(L0, rel=0.1 if name == "p_anneal" else 0.05)
    assert fvu < 0.5  # an L1 shrinks
    assert log["dead_fraction"] < 0.5


def test_a_resumed_transcoder_ends_bitwise_equal(planted):
    _, rows = planted
    specs = [spec("l1", 8), spec("batch_topk", 8), spec("jumprelu", 2)]
    cfg = config(n_steps=60, batch_tokens=128, n_resamples=1, dead_after_tokens=300)
    unbroken = train(Trainer(specs, cfg, rows[:2000], "", WIDTHS[1]), rows)
    first = train(Trainer(specs, cfg, rows[:2000], "", WIDTHS[1]), rows, last=29)
    second = Trainer(specs, cfg, rows[500:2500], "", WIDTHS[1])
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    train(second, rows, first=29)
    for key, value in unbroken.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    one, other = (trainer.finished_saes() for trainer in (unbroken, second))
    for name, sae in one.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(value, other[name].state_dict()[key]), (name, key)


def test_a_dead_feature_is_pointed_from_the_worst_input_to_its_target(planted):
    _, rows = planted
    trainer = Trainer([spec("l1")], config(n_resamples=1), rows[:2000], "", WIDTHS[1])
    lane = train(trainer, rows, last=5).lanes[0]
    lane.tokens_since_fired[:] = 0
    lane.tokens_since_fired[4] = 10**9
    pool = rows[:300] * trainer.column_scales
    pool[13, WIDTHS[0] :] += 40.0  # so badly decoded that loss^2 makes it certain
    lane.resample_dead(pool, step=5)
    x, target = pool.split(WIDTHS, dim=1)
    sae = lane.sae
    pairs = (
        (sae.W_dec[4], target[13] - sae.b_dec),
        (sae.W_enc[:, 4], x[13] - x.mean(dim=0)),
    )
    for found, expected in pairs:
        assert torch.cosine_similarity(found, expected, dim=0).item() == pytest.approx(1, abs=1e-5)
    share = (sae.encode(x)[:, 4] > 0).double().mean().item()
    assert share == pytest.approx(2 * L0 / sae.d_sae, abs=0.01)


def test_a_decoder_row_starts_where_the_target_goes_with_its_feature():
    sae, rows = make("l1").requires_grad_(False), batch().double()
    before = sae.double().W_dec.clone()
    sae.initialise_decoder(rows)
    x, target = (part - part.mean(axis=0) for part in np.split(rows.numpy(), [D_IN], axis=1))
    for i in range(D_SAE):
        row = target.T @ (x @ sae.W_enc[:, i].numpy())
        np.testing.assert_allclose(sae.W_dec[i].numpy(), row / np.linalg.norm(row), rtol=1e-9)
    sae.W_dec.copy_(before)
    rows[:, D_IN:] = 0.0  # as behind a layer that writes nothing
    sae.initialise_decoder(rows)
    assert torch.equal(sae.W_dec, before)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in NAMES])
def test_a_class_without_transcoders_is_refused_by_name(name):
    with pytest.raises(UserError, match=f"--architecture {name} cannot be a transcoder"):
        ladder(["l1", name], [1], [], [3.0], [0], True)


# Files.

METADATA = {"model_name": "gpt2", "hook_name": "blocks.2.mlp.hook_in",
            "hook_name_out": "blocks.2.hook_mlp_out"}  # fmt: skip
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def sae_lens():
    reason = "sae-lens is not installed: pip install -r tests/requirements.txt"
    return pytest.importorskip("sae_lens", reason=reason)


@pytest.mark.parametrize("name", NAMES)
def test_saelens_transcodes_with_our_files_as_we_do(name, tmp_path, sae_lens):
    sae, x = make(name), batch()[:, :D_IN]
    folder = save_saelens(sae, tmp_path / "a", metadata=METADATA)
    theirs = sae_lens.SAE.load_from_disk(folder)
    is_relu = name in ("l1", "norm_weighted_l1", "p_anneal")
    assert type(theirs).__name__ == ("Transcoder" if is_relu else "JumpReLUTranscoder")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x), **ROUNDING)
        torch.testing.assert_close(theirs(x), sae(x), **ROUNDING)
    assert theirs.cfg.metadata.hook_name_out == METADATA["hook_name_out"]
    assert (theirs.cfg.d_out, theirs.cfg.metadata.model_name) == (D_OUT, "gpt2")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_handed_on", [False, True])
def test_ours_comes_back_bit_by_bit_also_from_saelens(name, is_handed_on, tmp_path, sae_lens):
    sae, folder = make(name), tmp_path / "a"
    save_saelens(sae, folder, metadata=METADATA)
    if is_handed_on:
        theirs, folder = sae_lens.SAE.load_from_disk(folder), tmp_path / "b"
        theirs.save_model(folder)
    loaded = load_dictionary(folder)
    assert type(loaded) is type(sae) and loaded.is_transcoder and loaded.settings == sae.settings
    assert loaded.W_enc.T.is_contiguous()
    for key, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_transcoder"])
def test_we_transcode_with_saelens_files_as_saelens_does(architecture, tmp_path, sae_lens):
    cls, cfg = sae_lens.registry.get_sae_class(architecture)
    options = {"apply_b_dec_to_input": False, "dtype": "float64"}
    theirs = cls(cfg(d_in=D_IN, d_sae=D_SAE, d_out=D_OUT, **options))
    x, generator = batch()[:, :D_IN].double(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        theirs.save_model(tmp_path)
        ours = load_dictionary(tmp_path)
        assert ours.is_transcoder and (ours.encode(x) > 0).any()
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("architecture", ["skip_transcoder", "jumprelu_skip_transcoder"])
def test_a_skip_connection_is_refused_by_name(architecture, tmp_path, sae_lens):
    cls, cfg = sae_lens.registry.get_sae_class(architecture)
    cls(cfg(d_in=5, d_sae=7, d_out=6, apply_b_dec_to_input=False)).save_model(tmp_path)
    with pytest.raises(UserError, match=f"architecture is '{architecture}'; supported is"):
        load_saelens(tmp_path)


def test_a_layout_without_transcoders_writes_none(tmp_path):
    with pytest.raises(UserError, match="dictionary_learning has no transcoders"):
        save_dictionary_learning(make("l1"), tmp_path / "a", metadata={})
    assert not list(tmp_path.iterdir())

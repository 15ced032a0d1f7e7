"""Crosscoders: formulas in NumPy, planted features of one hook and of two, files, refusals."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import D_MODEL, TEXT, save_tiny_lm

from sparse_coding.errors import UserError
from sparse_coding.evaluation import Evaluation, RandomError, evaluate
from sparse_coding.formats import format_of, load_dictionary
from sparse_coding.formats.crosscoder import CONFIG, WEIGHTS, save_crosscoder
from sparse_coding.formats.dictionary_learning import save_dictionary_learning
from sparse_coding.formats.gemma_scope import save_gemma_scope
from sparse_coding.formats.openai import save_openai
from sparse_coding.formats.saelens import save_saelens
from sparse_coding.formats.sparsify import save_sparsify
from sparse_coding.harvest import NormLimit, activations, kept_rows
from sparse_coding.kernels import make_adam
from sparse_coding.kernels.reference import ReferenceStep
from sparse_coding.ladder import SAESpec, ladder, places
from sparse_coding.models import load_lm
from sparse_coding.sae import CROSSCODERS, L1SAE, SAE, CrosscoderSAE, NormWeightedL1SAE
from sparse_coding.splice import Alone, cross_entropies
from sparse_coding.text import TokenBatch
from sparse_coding.training import Trainer, TrainingConfig

BATCH, WIDTHS, D_SAE, K = 11, (5, 7, 4), 20, 4
D_IN, NAMES = sum(WIDTHS), list(CROSSCODERS)
SCALES = (1 / 32, 17.0, 2.0)


def make(name: str, widths: tuple[int, ...] = WIDTHS) -> SAE:
    """A crosscoder away from its start."""
    generator = torch.Generator().manual_seed(1)
    cls = CROSSCODERS[name]
    own = {"k": K} if cls.sparsity_is_chosen else {}
    sae = cls(sum(widths), D_SAE, generator, widths=widths, **own)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        sae.W_dec *= 1 + torch.arange(D_SAE)[:, None] / 5  # norms that matter
        if name == "batch_topk_crosscoder":
            sae.threshold.fill_(2.5)
    return sae


def batch() -> torch.Tensor:
    return 0.5 + 2 * torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(2))


def norms_in_numpy(sae: SAE) -> np.ndarray:
    """Of each hook's part of each row, hook by hook."""
    w_dec, edges = sae.W_dec.detach().numpy(), np.cumsum((0, *WIDTHS))
    parts = [w_dec[:, a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return np.stack([np.sqrt((part**2).sum(axis=1)) for part in parts])


# What it computes.


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_every_hooks_error_and_the_sum_of_its_rows_norms(name):
    sae, x = make(name).double(), batch().double()
    arrays = {key: value.detach().numpy() for key, value in sae.state_dict().items()}
    pre = x.numpy() @ arrays["W_enc"] + arrays["b_enc"]
    f, norms = np.maximum(pre, 0), norms_in_numpy(sae).sum(axis=0)
    if name == "batch_topk_crosscoder":
        v = f * norms
        f = f * (v >= np.sort(v.ravel())[-K * BATCH])
        expected = pre * (pre * norms > 2.5)
        np.testing.assert_allclose(sae.encode(x).detach().numpy(), expected, rtol=1e-10)
    loss = sae.loss(x, 0.3)
    np.testing.assert_allclose(loss.f.detach().numpy(), f, rtol=1e-10, atol=1e-12)
    error = ((x.numpy() - f @ arrays["W_dec"] - arrays["b_dec"]) ** 2).sum(axis=1).mean()
    assert loss.mse.item() == pytest.approx(error, rel=1e-10)
    if name == "crosscoder":
        assert loss.penalty.item() == pytest.approx((f @ norms).mean(), rel=1e-10)
        assert loss.total.item() == pytest.approx(error + 0.3 * (f @ norms).mean(), rel=1e-10)


def test_with_one_hook_it_is_the_norm_weighted_l1():
    generators = (torch.Generator().manual_seed(3) for _ in range(2))
    pair = [
        cls(D_IN, D_SAE, generator)
        for cls, generator in zip((CrosscoderSAE, NormWeightedL1SAE), generators, strict=True)
    ]
    for _ in range(3):
        one, other = (ReferenceStep(sae, make_adam(sae, 1e-2))(batch(), torch.tensor(0.3))
                      for sae in pair)  # fmt: skip
        assert torch.equal(one.penalty, other.penalty)
    for a, b in zip(*(sae.parameters() for sae in pair), strict=True):
        assert torch.equal(a, b)


def test_which_activations_are_kept_depends_on_what_they_write_not_on_how_they_are_counted():
    sae, x = make("batch_topk_crosscoder").double(), batch().double()
    other, factor = copy.deepcopy(sae), torch.linspace(0.1, 9, D_SAE).double()
    with torch.no_grad():
        other.W_enc *= factor
        other.b_enc *= factor
        other.W_dec /= factor[:, None]
    pairs = ((sae.encode(x), other.encode(x)), (sae.loss(x).f, other.loss(x).f))
    for f, rescaled in pairs:
        assert 0 < f.count_nonzero() < f.numel()
        torch.testing.assert_close(rescaled, f * factor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_folded_scales_give_every_hook_in_its_raw_units(name):
    sae, x = make(name).double(), batch().double()
    folded = copy.deepcopy(sae)
    folded.fold_scale(*SCALES)
    columns = torch.tensor(SCALES).double().repeat_interleave(torch.tensor(WIDTHS))
    torch.testing.assert_close(folded.encode(x / columns), sae.encode(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded(x / columns), sae(x) / columns, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded.norms(), sae.norms(), rtol=1e-10, atol=0)
    np.testing.assert_allclose(sae.norms().detach().numpy(), norms_in_numpy(sae), rtol=1e-10)


# Training.

N_STEPS, N_ROWS, L0 = 600, 512, 3.0
HOOKS, N_SHARED, N_OWN = (28, 20), 24, 12
SHARED = slice(0, N_SHARED)
OWN = slice(N_SHARED, N_SHARED + N_OWN), slice(N_SHARED + N_OWN, None)  # of each hook


@pytest.fixture(scope="module")
def planted() -> tuple[list[torch.Tensor], torch.Tensor]:
    """What each true feature writes at each of two hooks, and rows of both.

    Units are 40 times apart, both off centre; each feature is on for 1 row in 16.
    """
    generator = torch.Generator().manual_seed(123)
    n = N_SHARED + 2 * N_OWN
    written = []
    for width, size, others in zip(HOOKS, (8.0, 0.2), reversed(OWN), strict=True):
        rows = torch.randn(n, width, generator=generator)
        rows[others] = 0
        written.append(size * torch.nn.functional.normalize(rows, dim=1))
    size = (N_STEPS * N_ROWS, n)
    a = torch.rand(size, generator=generator) < L0 / n
    a = a * (0.5 + torch.rand(size, generator=generator))
    parts = [a @ written[0] + torch.linspace(-1, 1, HOOKS[0]), a @ written[1] - 0.02]
    return written, torch.cat(parts, dim=1)


def trainer(rows: torch.Tensor, names: list[str] = NAMES, **changes) -> Trainer:
    settings = {"lr": 3e-3, "initial_l0": 2 * L0, "dead_after_tokens": 20_000}
    cfg = TrainingConfig(**{"n_steps": N_STEPS, "batch_tokens": N_ROWS} | settings | changes)
    specs = [SAESpec(name, 3, None, L0, 0) for name in names]
    return Trainer(specs, cfg, rows[:8192], hook_widths=HOOKS)


@pytest.fixture(scope="module")
def trained(planted) -> Trainer:
    made = trainer(planted[1])
    for x in planted[1].split(N_ROWS):
        made.step(x)
    return made


def test_every_hook_has_a_scale_of_its_own(planted):
    x = planted[1][:8192] * trainer(planted[1]).column_scales
    for part, width in zip(x.split(HOOKS, dim=1), HOOKS, strict=True):
        assert part.square().sum(dim=1).mean().item() == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_planted_features_are_found_and_the_norms_say_at_which_hooks_they_live(
    name, planted, trained
):
    written, rows = planted
    sae = trained.finished_saes()[f"{name}_x03_l0-3_s0"].requires_grad_(False)
    found, truth = (
        [part * scale for part, scale in zip(parts, trained.scales, strict=True)]
        for parts in (sae.W_dec.split(HOOKS, dim=1), written)
    )
    units = [torch.nn.functional.normalize(torch.cat(parts, 1), dim=1) for parts in (truth, found)]
    cosine, match = (units[0] @ units[1].T).max(dim=1)
    assert cosine.mean() > 0.9

    # the share of a feature's norms that the first hook has: 0.54 of the shared ones
    size = torch.stack([part.norm(dim=1) for part in truth])
    true_share = (size[0] / size.sum(dim=0))[SHARED]
    share = (sae.norms()[0] / sae.norms().sum(dim=0))[match]
    is_found = cosine > 0.9
    assert is_found.float().mean() > 0.8
    of_first, of_second = (share[own][is_found[own]] for own in OWN)
    assert (of_first > 0.95).all() and (of_second < 0.05).all()
    # An L1 shrinks a shared feature's rows unevenly (2504.02922, "complete shrinkage").
    error = (share[SHARED] - true_share)[is_found[SHARED]].abs().max()
    assert error < (0.3 if name == "crosscoder" else 0.02)

    f = sae.encode(rows[-20_000:])
    assert (f > 0).sum(dim=1).double().mean().item() == pytest.approx(L0, rel=0.05)


def test_a_resumed_crosscoder_ends_bitwise_equal(planted):
    cfg = {"n_steps": 40, "batch_tokens": 128, "dead_after_tokens": 300}
    batches = planted[1].split(128)[:40]
    unbroken, first, second = (trainer(rows, **cfg)
                               for rows in (planted[1], planted[1], planted[1][500:]))  # fmt: skip
    for x in batches:
        unbroken.step(x)
    for x in batches[:19]:
        first.step(x)
    second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
    for x in batches[19:]:
        second.step(x)
    one, other = (made.finished_saes() for made in (unbroken, second))
    for name, sae in one.items():
        for key, value in sae.state_dict().items():
            assert torch.equal(value, other[name].state_dict()[key]), (name, key)


# What goes together.


@pytest.mark.parametrize(
    ("architectures", "settings", "message"),
    [
        (["crosscoder"], {}, "joins the activations of several hooks; give two or more"),
        (["l1", "crosscoder"], {"n_hooks": 2}, "l1 learns each by itself; train them in two runs"),
        (["crosscoder"], {"n_hooks": 2, "are_transcoders": True}, "cannot be a transcoder"),
        (["crosscode"], {"n_hooks": 2}, "it must be one of: .*crosscoder, batch_topk_crosscoder"),
    ],
)
def test_what_does_not_go_together_is_refused(architectures, settings, message):
    with pytest.raises(UserError, match=message):
        ladder(architectures, [1], [], [3.0], [0], **settings)


def test_a_ladder_of_crosscoders_has_one_place_and_any_other_one_a_hook():
    hooks = ("a", "b")
    specs = ladder(NAMES, [1], [], [3.0], [0], n_hooks=2)
    assert places(specs, hooks) == ("a+b",)
    assert places(ladder(["l1"], [1], [], [3.0], [0], n_hooks=2), hooks) == hooks


def test_a_row_counts_where_it_counts_at_every_hook():
    x = torch.tensor([[[3.0, 4.0, 1.0], [3.0, 4.0, 2.0], [6.0, 8.0, 1.0], [0.0, 0.0, 0.0]]])
    valid = torch.tensor([[True, True, True, False]])
    limits = [NormLimit(2, 5.0), NormLimit(1, 1.5)]
    assert kept_rows(x, valid, limits).tolist() == [[True, False, False, False]]


# Held-out numbers.

PLACES = ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_tiny_lm("gpt2", folder, TEXT)
    return load_lm(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def heldout() -> TokenBatch:
    generator = torch.Generator().manual_seed(8)
    tokens = torch.randint(1, 250, (6, 13), generator=generator)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[:, 0] = False
    return TokenBatch(tokens, torch.where(valid, torch.arange(6)[:, None], -1), valid)


def test_each_hook_has_numbers_of_its_own_and_all_have_them_in_the_units_of_training(lm, heldout):
    place, scales = "+".join(PLACES), (0.2, 3.0)
    sae = make("crosscoder", (D_MODEL, D_MODEL)).requires_grad_(False)
    sae.fold_scale(*scales)
    acts = activations(lm, heldout.tokens, [place, *PLACES])
    assert torch.equal(acts[place], torch.cat([acts[name] for name in PLACES], dim=-1))
    norms = [acts[name].norm(dim=-1)[heldout.valid] for name in PLACES]
    limits = [NormLimit(D_MODEL, norm.quantile(0.8).item()) for norm in norms]
    x = acts[place][kept_rows(acts[place], heldout.valid, limits)]
    assert 0 < len(x) < heldout.valid.sum()

    evaluation = Evaluation(lm, place, [heldout], limits)
    (measured,) = evaluate(evaluation, {"a": sae}, x.mean(dim=0), 10**6, True).values()
    error, spread = ((x - sae(x)) ** 2).double(), ((x - x.mean(dim=0)) ** 2).double()
    parts = zip(error.chunk(2, dim=1), spread.chunk(2, dim=1), strict=True)
    halves = [(e.sum(), s.sum()) for e, s in parts]
    for name, (e, s) in zip(PLACES, halves, strict=True):
        assert measured.row[f"fvu_{name}"] == pytest.approx((e / s).item(), rel=1e-5)
    scaled = [sum(k**2 * half[i] for k, half in zip(scales, halves, strict=True)) for i in (0, 1)]
    assert measured.row["fvu"] == pytest.approx((scaled[0] / scaled[1]).item(), rel=1e-5)
    assert measured.row["mse"] == pytest.approx(scaled[0].item() / len(x), rel=1e-5)
    assert measured.row["n_tokens_eval"] == len(x)

    replacements = {"clean": None, "all": sae, **{name: Alone(sae, name) for name in PLACES}}
    losses, _, counted = cross_entropies(lm, heldout, place, replacements, max_norm=limits)
    mean = {name: loss[counted].double().mean().item() for name, loss in losses.items()}
    keys = {"nats_lost": "all"} | {f"nats_lost_{name}": name for name in PLACES}
    lost = [mean[name] - mean["clean"] for name in keys.values()]
    assert [measured.row[key] for key in keys] == pytest.approx(lost, abs=1e-6)
    assert len({round(abs(one), 4) for one in lost}) == 3  # they differ
    assert "nats_lost_random_error" in measured.row


def test_the_random_error_is_as_large_as_the_crosscoders_at_every_hook():
    sae, x = make("crosscoder").requires_grad_(False), batch()
    errors = [(y - x).split(WIDTHS, dim=1) for y in (sae(x), RandomError(sae)(x))]
    for own, random in zip(*errors, strict=True):
        torch.testing.assert_close(random.norm(dim=1), own.norm(dim=1), rtol=1e-4, atol=1e-5)
        assert torch.cosine_similarity(own, random, dim=1).mean().abs() < 0.7


# Files.

METADATA = {"model_name": "gpt2", "hook_name": "blocks.2.a+blocks.3.b+blocks.4.c"}


@pytest.mark.parametrize("name", NAMES)
def test_ours_comes_back_bit_by_bit(name, tmp_path):
    sae = make(name)
    sae.fold_scale(*SCALES)
    folder = save_crosscoder(sae, tmp_path / "a", metadata=METADATA)
    assert format_of(folder) == "crosscoder"
    random_state = torch.get_rng_state()
    loaded = load_dictionary(folder)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(loaded) is type(sae) and loaded.settings == sae.settings
    assert loaded.W_enc.T.is_contiguous()
    for key, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(loaded.encode(batch()), sae.encode(batch()))
    assert json.loads((folder / CONFIG).read_text())["metadata"] == METADATA
    with pytest.raises(UserError, match="exists"):
        save_crosscoder(sae, folder, metadata=METADATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "standard"}, "architecture is 'standard'; it must be crosscoder or"),
        ({"architecture": ["crosscoder"]}, "architecture is \\['crosscoder'\\]; it must be"),
        ({"architecture": "crosscoder"}, "holds .*threshold.*; a crosscoder holds W_enc"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be float32"),
        ({"d_sae": 21}, "W_enc is \\(16, 20\\); it must be \\(16, 21\\)"),
        ({"d_sae": True}, "d_sae is True; it must be a positive integer"),
        ({"k": 0}, "k is 0; it must be a positive integer"),
        ({"k": None}, "k is None; it must be a positive integer"),
        ({"k": 21}, "k is 21; it must be at most d_sae 20"),
        ({"widths": [5, 7]}, "widths are \\[5, 7\\]; they must be positive integers that add up"),
        ({"widths": [8, 8]}, "hook_name is .* it must name 2 hooks"),
        ({"widths": [17, -1, 0]}, "they must be positive integers"),
        ({"widths": "577"}, "they must be positive integers"),
        ({"metadata": {}}, "hook_name is None; it must name 3 hooks"),
        ({"metadata": []}, "has no object 'metadata'"),
    ],
)
def test_a_mislabelled_file_is_one_line(change, message, tmp_path):
    folder = save_crosscoder(make("batch_topk_crosscoder"), tmp_path / "a", metadata=METADATA)
    config = json.loads((folder / CONFIG).read_text()) | change
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as refusal:
        load_dictionary(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"scales": torch.zeros(3)}, "scales must be positive"),
        ({"scales": torch.ones(2)}, "scales is \\(2,\\); it must be \\(3,\\)"),
        ({"b_dec": torch.full((D_IN,), torch.nan)}, "b_dec must hold finite"),
        ({"W_enc": torch.ones(D_SAE, D_IN)}, "W_enc is \\(20, 16\\); it must be"),
        ({"k": torch.ones(1)}, "a crosscoder holds"),
    ],
)
def test_damaged_weights_are_one_line(damage, message, tmp_path):
    folder = save_crosscoder(make("crosscoder"), tmp_path / "a", metadata=METADATA)
    save_file(load_file(folder / WEIGHTS) | damage, folder / WEIGHTS)
    with pytest.raises(UserError, match=message):
        load_dictionary(folder)


def test_a_cut_file_is_one_line(tmp_path):
    folder = save_crosscoder(make("crosscoder"), tmp_path / "a", metadata=METADATA)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(UserError, match="crosscoder.safetensors is damaged"):
        load_dictionary(folder)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(UserError, match="L1SAE is no crosscoder; save it with formats.saelens"):
        save_crosscoder(L1SAE(3, 5), tmp_path / "a", metadata=METADATA)
    with pytest.raises(UserError, match="it must name 3 hooks"):
        save_crosscoder(make("crosscoder"), tmp_path / "a", metadata={"hook_name": "blocks.2.a"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "save",
    [
        lambda sae, path: save_saelens(sae, path, metadata={}),
        lambda sae, path: save_dictionary_learning(sae, path, metadata={}),
        lambda sae, path: save_sparsify(sae, path, metadata={}),
        save_gemma_scope,
        save_openai,
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_no_other_layout_takes_a_crosscoder_for_an_sae(name, save, tmp_path):
    with pytest.raises(UserError, match="has no (crosscoders|BatchTopKCrosscoderSAE)"):
        save(make(name), tmp_path / "a")
    assert not list(tmp_path.iterdir())

"""Held-out numbers of planted dictionaries, recomputed row by row from the activations."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import D_MODEL, TEXT, load_plain, save_tiny_lm
from torch.nn.functional import pad

from sparse_coding.errors import UserError
from sparse_coding.evaluation import (
    Evaluation,
    RandomError,
    evaluate,
    take_tokens,
)
from sparse_coding.harvest import activations
from sparse_coding.models import load_lm
from sparse_coding.sae import L1SAE
from sparse_coding.text import TokenBatch

HOOK = "blocks.1.hook_resid_post"
N_BATCHES, N_CONTEXTS, N_POSITIONS = 4, 3, 13
TOKENS_OF_A_DOCUMENT = 11
MAX_NORM_QUANTILE = 0.9
VARIANCE = np.linspace(0.5, 3, D_MODEL)[np.random.default_rng(5).permutation(D_MODEL)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_tiny_lm("gpt_neox", folder, TEXT, n_layers=3)
    return folder


@pytest.fixture(scope="module")
def lm(folder):
    return load_lm(str(folder), device="cpu", dtype="float32")


def token_batches():
    generator = torch.Generator().manual_seed(8)
    for i in range(N_BATCHES):
        tokens = torch.randint(1, 250, (N_CONTEXTS, N_POSITIONS), generator=generator)
        tokens[torch.rand(tokens.shape, generator=generator) < 1 / 8] = 0
        valid = tokens != 0
        valid[:, 0] = False
        places = torch.arange(tokens.numel()).view(tokens.shape) + i * tokens.numel()
        yield TokenBatch(tokens, torch.where(valid, places // TOKENS_OF_A_DOCUMENT, -1), valid)


BATCHES = list(token_batches())


@pytest.fixture(scope="module")
def max_norm(lm):
    acts = [activations(lm, b.tokens, [HOOK])[HOOK][b.valid] for b in BATCHES]
    return torch.cat(acts).norm(dim=1).quantile(MAX_NORM_QUANTILE).item()


@pytest.fixture(scope="module")
def rows(lm, max_norm):
    """The rows that count, one by one, and the document of each."""
    x, documents = [], []
    for b in BATCHES:
        acts = activations(lm, b.tokens, [HOOK])[HOOK]
        for place in b.valid.nonzero().tolist():
            row = acts[*place].double().numpy()
            if np.linalg.norm(row) <= max_norm:
                x.append(row)
                documents.append(int(b.document[*place]))
    return np.array(x), np.array(documents)


@pytest.fixture(scope="module")
def mean(rows):
    return torch.from_numpy(rows[0].mean(axis=0)).float() + 0.1


@torch.no_grad()
def planted(seed=0, d_sae=20):
    """A random SAE that reconstructs badly, with biases and a feature that never fires."""
    generator = torch.Generator().manual_seed(seed)
    sae = L1SAE(D_MODEL, d_sae, generator)
    sae.b_enc += 0.3 * torch.randn(d_sae, generator=generator)
    sae.b_enc[0] = -1e3
    sae.b_dec += torch.randn(D_MODEL, generator=generator)
    return sae.requires_grad_(False)


@torch.no_grad()
def perfect():
    """x = relu(x) - relu(-x): features for both signs of every dimension."""
    sae = L1SAE(D_MODEL, 2 * D_MODEL)
    identity = torch.eye(D_MODEL)
    sae.W_dec.copy_(torch.cat([identity, -identity]))
    sae.W_enc.copy_(sae.W_dec.T)
    return sae.requires_grad_(False)


@torch.no_grad()
def constant(x):
    """Reconstructs every row as x."""
    sae = L1SAE(D_MODEL, 5)
    sae.b_enc.fill_(-1e3)
    sae.b_dec.copy_(x)
    return sae.requires_grad_(False)


@pytest.fixture(scope="module")
def measured(lm, rows, mean, max_norm):
    saes = {
        "planted": planted(),
        "other": planted(1),
        "perfect": perfect(),
        "mean": constant(torch.from_numpy(rows[0].mean(axis=0)).float()),
        "training mean": constant(mean),
        "zero": constant(torch.zeros(D_MODEL)),
    }
    evaluation = Evaluation(lm, HOOK, BATCHES, max_norm, torch.from_numpy(VARIANCE).float())
    return evaluate(evaluation, saes, mean, 10_000, random_error=True)


def in_numpy(sae, x):
    """Features and reconstructions of rows in float64."""
    W_enc, W_dec, b_enc, b_dec = (
        getattr(sae, name).double().numpy() for name in ("W_enc", "W_dec", "b_enc", "b_dec")
    )
    f = np.maximum((x - b_dec) @ W_enc + b_enc, 0)
    return f, f @ W_dec + b_dec


@torch.no_grad()
def reference_losses(folder, max_norm, change):
    """Per document: the losses of its targets, with kept rows changed by a torch hook."""
    plain = load_plain(folder)
    losses: dict[int, list[float]] = {}
    for b in BATCHES:

        def write(module, inputs, output, b=b):
            x = output[0] if isinstance(output, tuple) else output
            y = x.clone()
            for place in b.valid.nonzero().tolist():
                if x[*place].norm() <= max_norm:
                    y[*place] = change(x[*place])
            return (y, *output[1:]) if isinstance(output, tuple) else y

        handle = plain.base_model.layers[1].register_forward_hook(write)
        log_p = plain(b.tokens).logits.double().log_softmax(dim=-1)
        handle.remove()
        for c, t in b.valid.nonzero().tolist():
            if t + 1 < N_POSITIONS and b.tokens[c, t + 1] != 0:
                loss = -log_p[c, t, b.tokens[c, t + 1]].item()
                losses.setdefault(int(b.document[c, t]), []).append(loss)
    return losses


def mean_loss(losses):
    return np.mean([loss for one in losses.values() for loss in one])


def test_reconstruction_equals_its_definitions_on_the_kept_rows(measured, rows):
    x, documents = rows
    f, x_hat = in_numpy(planted(), x)
    row, n_firings = measured["planted"]
    squared_error = ((x - x_hat) ** 2).sum()
    assert row["n_tokens_eval"] == row["n_tokens_dead"] == len(x)
    assert row["n_documents_eval"] == len(set(documents))
    # The measured SAE computes in float32.
    assert row["fvu"] == pytest.approx(squared_error / ((x - x.mean(axis=0)) ** 2).sum(), rel=1e-5)
    assert row["mse"] == pytest.approx(squared_error / len(x), rel=1e-5)
    assert row["l0"] == pytest.approx((f > 0).sum(axis=1).mean(), rel=1e-12)
    assert n_firings.tolist() == (f > 0).sum(axis=0).tolist()
    assert row["dead_fraction"] == pytest.approx(((f > 0).sum(axis=0) == 0).mean())
    assert row["dead_fraction"] > 0


def test_shape_and_size_of_reconstructions_equal_their_definitions(measured, rows):
    x, _ = rows
    f, x_hat = in_numpy(planted(), x)
    row = measured["planted"].row
    norms, norms_hat = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    dot = (x * x_hat).sum(axis=1)
    expected = {
        "l1": (f @ np.linalg.norm(planted().W_dec.numpy(), axis=1)).mean(),
        "cosine": (dot / norms / norms_hat).mean(),
        "l2_ratio": (norms_hat / norms).mean(),
        "reconstruction_bias": (x_hat**2).sum() / dot.sum(),
        "mse_per_dimension": ((x - x_hat) ** 2).mean(),
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-5), key
    n_active = np.sort((f > 0).sum(axis=1))
    for q in (5, 25, 50, 75, 95):
        expected = np.quantile(n_active, q / 100, method="inverted_cdf")
        assert row[f"l0_p{q:02d}"] == expected, q


def test_fvu_without_outliers_and_standardised_equal_their_definitions(measured, rows):
    x, _ = rows
    _, x_hat = in_numpy(planted(), x)
    row = measured["planted"].row
    error, spread = (x - x_hat) ** 2, (x - x.mean(axis=0)) ** 2
    others = np.argsort(VARIANCE)[:-2]
    without = error[:, others].sum() / spread[:, others].sum()
    assert row["fvu_without_outliers"] == pytest.approx(without, rel=1e-5)
    standardised = (error / VARIANCE).sum() / (spread / VARIANCE).sum()
    assert row["fvu_standardised"] == pytest.approx(standardised, rel=1e-5)
    assert abs(standardised - row["fvu"]) > 0.01 and abs(without - row["fvu"]) > 0.01


def test_a_constant_bias_is_counted_as_error(lm, rows, mean, max_norm):
    """Variance of x - x_hat, as in dictionary_learning, would forgive it."""
    sae = perfect()
    with torch.no_grad():
        sae.b_dec += 5.0
    sae.encode = lambda x: type(sae).encode(sae, x + 5.0)  # undoes the subtraction of b_dec
    row = evaluate(Evaluation(lm, HOOK, BATCHES, max_norm), {"sae": sae}, mean, 10_000)["sae"].row
    x, _ = rows
    variance = ((x - x.mean(axis=0)) ** 2).sum() / len(x)
    assert row["fvu"] == pytest.approx(25 * D_MODEL / variance, rel=1e-4)


def test_fvu_is_no_mean_of_ratios(measured, rows):
    x, _ = rows
    _, x_hat = in_numpy(planted(), x)
    ratios = ((x - x_hat) ** 2).sum(axis=1) / ((x - x.mean(axis=0)) ** 2).sum(axis=1)
    assert abs(ratios.mean() - measured["planted"].row["fvu"]) > 0.05


def other_rows(lm, max_norm):
    found = []
    for b in BATCHES:
        acts = activations(lm, b.tokens, [HOOK])[HOOK]
        found.append(acts[~(b.valid & (acts.norm(dim=-1) <= max_norm))])
    return torch.cat(found)


def test_other_rows_are_measured_apart(measured, lm, max_norm):
    """First positions, special tokens and rows above the limit: not in fvu, but not hidden."""
    x = other_rows(lm, max_norm).double().numpy()
    f, x_hat = in_numpy(planted(), x)
    row = measured["planted"].row
    assert row["n_tokens_excluded"] == len(x)
    assert row["n_tokens_excluded"] + row["n_tokens_eval"] == sum(
        b.tokens.numel() for b in BATCHES
    )
    assert row["l0_excluded"] == pytest.approx((f > 0).sum(axis=1).mean(), rel=1e-12)
    relative = ((x - x_hat) ** 2).sum() / (x**2).sum()
    assert row["relative_error_excluded"] == pytest.approx(relative, rel=1e-5)


class Wild(L1SAE):
    """Does as the planted one, but makes nonsense of the rows that do not count."""

    def encode(self, x):
        f = super().encode(x)
        others = (x[:, None] - self.others).abs().amax(dim=2).amin(dim=1) < 1e-4
        return torch.where(others[:, None], 1e3, f)


def scores(row):
    """What is said of the rows that count."""
    return {k: row[k] for k in row if not k.endswith("_excluded") and "random_error" not in k}


def test_first_positions_and_special_tokens_inflate_nothing(measured, lm, mean, max_norm):
    """The trap of BOS: its norm is a hundred times the others', and every feature fires on it."""
    wild = Wild(D_MODEL, 20)
    wild.load_state_dict(planted().state_dict())
    wild.others = other_rows(lm, max_norm)
    evaluation = Evaluation(lm, HOOK, BATCHES, max_norm, torch.from_numpy(VARIANCE).float())
    found = evaluate(evaluation, {"wild": wild.requires_grad_(False)}, mean, 10_000)["wild"].row
    assert found["l0_excluded"] == 20 > measured["planted"].row["l0_excluded"]
    assert scores(found) == pytest.approx(scores(measured["planted"].row), rel=1e-5)


def test_padding_is_no_target_and_no_row(measured, lm, mean, max_norm):
    fill = (0, -1, False)  # token, document, valid
    padded = [TokenBatch(*map(lambda x, v: pad(x, (0, 6), value=v), b, fill)) for b in BATCHES]
    evaluation = Evaluation(lm, HOOK, padded, max_norm, torch.from_numpy(VARIANCE).float())
    found = evaluate(evaluation, {"planted": planted()}, mean, 10_000)["planted"].row
    assert scores(found) == pytest.approx(scores(measured["planted"].row), rel=1e-5)


def test_a_silent_feature_is_bounded_and_a_dense_one_counted(measured, rows):
    x, _ = rows
    f, _ = in_numpy(planted(), x)
    row = measured["planted"].row
    assert row["dense_fraction"] == pytest.approx(((f > 0).mean(axis=0) > 0.1).mean())
    # (1 - rate)^n = 5 % where rate = 1 - 0.05^(1/n), which 3 / n bounds
    exact = 1 - 0.05 ** (1 / len(x))
    assert exact < row["dead_rate_below"] < 1.05 * exact


def test_divergence_is_kl_of_transformers_distributions(measured, folder, max_norm):
    def log_p(change):
        plain = load_plain(folder)
        found = []
        for b in BATCHES:

            def write(module, inputs, output, b=b):
                x = output[0] if isinstance(output, tuple) else output
                y = x.clone()
                keep = b.valid & (x.norm(dim=-1) <= max_norm)
                y[keep] = change(x[keep])
                return (y, *output[1:]) if isinstance(output, tuple) else y

            handle = plain.base_model.layers[1].register_forward_hook(write)
            logits = plain(b.tokens).logits[:, :-1].double()
            handle.remove()
            counted = b.valid[:, :-1] & (b.tokens[:, 1:] != 0)
            found.append(logits[counted].log_softmax(dim=-1))
        return torch.cat(found)

    with torch.no_grad():
        clean, spliced = log_p(lambda x: x), log_p(planted())
    expected = (clean.exp() * (clean - spliced)).sum(dim=-1).mean().item()
    assert measured["planted"].row["kl"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.02


def test_the_random_error_has_the_norm_of_the_dictionarys_and_none_if_that_is_perfect(measured):
    row = measured["perfect"].row
    assert row["kl_random_error"] == pytest.approx(0, abs=1e-6)
    x = torch.randn(33, D_MODEL, generator=torch.Generator().manual_seed(2))
    sae = planted()
    noisy = RandomError(sae)(x)
    torch.testing.assert_close((noisy - x).norm(dim=1), (x - sae(x)).norm(dim=1))
    cosine = torch.cosine_similarity(noisy - x, sae(x) - x)
    # Random directions in D_MODEL = 12 dimensions: a mean of 33 within 4 standard errors of 0
    assert cosine.mean().abs() < 4 / (33 * D_MODEL) ** 0.5


def test_what_is_undefined_is_none_and_fits_into_json(measured):
    row = measured["zero"].row
    assert row["reconstruction_bias"] is None
    assert row["fvu"] > 1
    json.dumps(row, allow_nan=False)


def test_cross_entropies_are_those_of_transformers_with_torch_hooks(
    measured, folder, max_norm, mean
):
    row = measured["planted"].row
    changes = {
        "ce_clean": lambda x: x,
        "ce_zero": torch.zeros_like,
        "ce_mean": lambda x: mean,
        "ce_sae": planted(),
    }
    expected = {}
    for name, change in changes.items():
        losses = reference_losses(folder, max_norm, change)
        expected[name] = mean_loss(losses)
        assert row[name] == pytest.approx(expected[name], abs=1e-5), name
    assert row["n_tokens_ce"] == sum(len(one) for one in losses.values())
    lost = expected["ce_sae"] - expected["ce_clean"]
    assert abs(lost) > 0.02
    assert row["nats_lost"] == pytest.approx(lost, abs=2e-5)
    for name in ("zero", "mean"):
        recovered = 1 - lost / (expected[f"ce_{name}"] - expected["ce_clean"])
        key = "ce_recovered" if name == "zero" else "ce_recovered_mean"
        assert row[key] == pytest.approx(recovered, rel=1e-3)


def test_a_perfect_dictionary_loses_nothing(measured):
    row = measured["perfect"].row
    assert row["fvu"] == row["mse"] == 0
    assert row["nats_lost"] == pytest.approx(0, abs=1e-6)
    assert row["ce_recovered"] == row["ce_recovered_mean"] == pytest.approx(1, abs=1e-5)
    assert row["l0"] == D_MODEL


def test_the_mean_of_the_rows_explains_no_variance(measured):
    assert measured["mean"].row["fvu"] == pytest.approx(1, rel=1e-6)


def test_a_dictionary_that_ablates_recovers_nothing(measured):
    zero, mean = measured["zero"].row, measured["training mean"].row
    assert zero["ce_sae"] == pytest.approx(zero["ce_zero"], abs=1e-6)
    assert zero["ce_recovered"] == pytest.approx(0, abs=1e-5)
    assert mean["ce_sae"] == pytest.approx(mean["ce_mean"], abs=1e-6)
    assert mean["ce_recovered_mean"] == pytest.approx(0, abs=1e-5)


def test_intervals_contain_their_estimates(measured):
    for name in ("planted", "other"):
        row = measured[name].row
        for key in ("l0", "fvu", "nats_lost", "ce_recovered"):
            assert row[f"{key}_low"] < row[key] < row[f"{key}_high"], (name, key)


def test_the_interval_of_nats_lost_is_a_paired_bootstrap_over_documents(
    measured, folder, max_norm
):
    clean = reference_losses(folder, max_norm, lambda x: x)
    spliced = reference_losses(folder, max_norm, planted())
    n = np.array([len(clean[d]) for d in clean])
    lost = np.array([sum(spliced[d]) - sum(clean[d]) for d in clean])
    drawn = np.random.default_rng(0).integers(len(n), size=(20_000, len(n)))
    draws = lost[drawn].sum(axis=1) / n[drawn].sum(axis=1)
    low, high = np.percentile(draws, [2.5, 97.5])
    row = measured["planted"].row
    # 1000 other draws: their percentiles scatter by about a tenth of the interval's width.
    assert row["nats_lost_low"] == pytest.approx(low, abs=0.15 * (high - low))
    assert row["nats_lost_high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_one_sae_is_measured_alike_alone_and_among_others(lm, measured, mean, max_norm):
    alone = evaluate(Evaluation(lm, HOOK, BATCHES, max_norm), {"other": planted(1)}, mean, 10_000)
    # Losses of other batches of logits differ in their last bits, which a ratio of differences
    # enlarges.
    for key, value in alone["other"].row.items():
        assert value == pytest.approx(measured["other"].row[key], rel=1e-4), key


def test_one_document_is_enough_and_its_interval_is_a_point(lm, mean):
    batches = [b._replace(document=torch.where(b.valid, 0, -1)) for b in BATCHES]
    row, _ = evaluate(Evaluation(lm, HOOK, batches, math.inf), {"sae": planted()}, mean, 10_000)[
        "sae"
    ]
    assert row["n_documents_eval"] == 1
    assert row["fvu_low"] == row["fvu"] == row["fvu_high"]
    assert math.isfinite(row["ce_recovered"])


def test_cross_entropy_takes_only_as_many_batches_as_its_tokens_need(lm, mean, max_norm):
    evaluation = Evaluation(lm, HOOK, BATCHES, max_norm)
    row = evaluate(evaluation, {"sae": planted()}, mean, 50)["sae"].row
    n_valid = [int(b.valid.sum()) for b in BATCHES]
    assert n_valid[0] < 50 <= sum(n_valid[:2])
    counted = [int((b.valid[:, :-1] & b.valid[:, 1:]).sum()) for b in BATCHES]
    assert row["n_tokens_ce"] == sum(counted[:2])


def test_taken_batches_hold_just_the_tokens_asked_for():
    n_valid = [int(b.valid.sum()) for b in BATCHES]
    assert len(take_tokens(BATCHES, n_valid[0])) == 1
    assert len(take_tokens(BATCHES, n_valid[0] + 1)) == 2
    assert len(take_tokens(BATCHES, 10**6)) == N_BATCHES


def test_no_held_out_context_is_refused():
    with pytest.raises(UserError, match="held-out text has no full context"):
        take_tokens([], 10)

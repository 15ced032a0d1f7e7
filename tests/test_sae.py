"""Each architecture against its paper: NumPy formulas, cases by hand, identities, planted truth.

The formulas are written out from the papers, in their orientation, and share no code with ours.
"""

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sparse_coding.sae import (
    ARCHITECTURES,
    L1SAE,
    SAE,
    MatryoshkaSAE,
    NormWeightedL1SAE,
    TiedL1SAE,
    keep_largest,
)

BATCH, D_IN, D_SAE, L1_COEFF = 7, 12, 20, 0.7


K = 6


class Weights(NamedTuple):
    """An SAE's parameters in the papers' orientation: one feature per encoder row."""

    encoder: np.ndarray  # (d_sae, d_in)
    decoder: np.ndarray  # (d_in, d_sae)
    b_enc: np.ndarray
    b_dec: np.ndarray
    threshold: np.ndarray | None


def cunningham_2023(w, x):
    """c = ReLU(M x + b), x_hat = M^T c, alpha ||c||_1; x centred by b_dec, M = decoder^T."""
    c = np.maximum(w.decoder.T @ (x - w.b_dec) + w.b_enc, 0)
    return c, w.decoder @ c + w.b_dec, np.abs(c).sum()


def bricken_2023(w, x):
    """f = ReLU(W_e (x - b_d) + b_e), x_hat = W_d f + b_d, lambda ||f||_1."""
    f = np.maximum(w.encoder @ (x - w.b_dec) + w.b_enc, 0)
    return f, w.decoder @ f + w.b_dec, np.abs(f).sum()


def conerly_2024(w, x):
    """f = ReLU(W_e x + b_e), x_hat = W_d f + b_d, lambda sum_i f_i ||W_d,i||_2."""
    f = np.maximum(w.encoder @ x + w.b_enc, 0)
    return f, w.decoder @ f + w.b_dec, sum(f * np.sqrt((w.decoder**2).sum(axis=0)))


def gao_2024(w, x):
    """z = ReLU(TopK(W_enc (x - b_pre) + b_enc)), x_hat = W_dec z + b_pre; no penalty."""
    pre = w.encoder @ (x - w.b_dec) + w.b_enc
    z = np.zeros(len(pre))
    for i in sorted(range(len(pre)), key=lambda i: -pre[i])[:K]:
        z[i] = max(pre[i], 0)
    return z, w.decoder @ z + w.b_dec, 0.0


def rajamanoharan_2024(w, x):
    """f = pi * H(pi - theta), pi = W_enc x + b_enc, x_hat = W_dec f + b_dec, lambda ||f||_0."""
    pre = w.encoder @ x + w.b_enc
    f = np.where(pre > w.threshold, pre, 0)
    return f, w.decoder @ f + w.b_dec, (pre > w.threshold).sum()


PAPERS = {
    "tied_l1": cunningham_2023,
    "l1": bricken_2023,
    "norm_weighted_l1": conerly_2024,
    "topk": gao_2024,
    "jumprelu": rajamanoharan_2024,
}
L1_FAMILY = ("tied_l1", "l1", "norm_weighted_l1")


def new_sae(architecture: str, seed: int, d_in: int = D_IN, d_sae: int = D_SAE, k: int = K) -> SAE:
    cls = ARCHITECTURES[architecture]
    generator = torch.Generator().manual_seed(seed)
    return cls(d_in, d_sae, generator, **({"k": k} if cls.sparsity_is_chosen else {}))


def make_sae(architecture: str) -> SAE:
    generator = torch.Generator().manual_seed(8)
    sae = new_sae(architecture, 8).double()
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.3 * noise
        if architecture == "batch_topk":
            sae.threshold.fill_(0.9)
    sae.normalise()
    return sae


@pytest.fixture(params=list(ARCHITECTURES))
def sae(request):
    return make_sae(request.param)


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(9)
    return 0.5 + 2 * torch.randn(BATCH, D_IN, generator=generator, dtype=torch.float64)


def set_parameters(sae, **values):
    with torch.no_grad():
        for name, value in values.items():
            getattr(sae, name).copy_(torch.as_tensor(value))
    return sae


# The papers' formulas.


@pytest.mark.parametrize("architecture", list(PAPERS))
def test_encode_decode_and_loss_are_the_papers(architecture, x):
    sae = make_sae(architecture)
    tensors = (sae.W_enc.T, sae.W_dec.T, sae.b_enc, sae.b_dec)
    threshold = sae.threshold.detach().numpy() if architecture == "jumprelu" else None
    weights = Weights(*(tensor.detach().numpy() for tensor in tensors), threshold)
    rows = [PAPERS[sae.name](weights, row) for row in x.numpy()]
    f, x_hat, penalty = (np.stack(parts) for parts in zip(*rows, strict=True))
    mse = np.mean([np.sum((row - hat) ** 2) for row, hat in zip(x.numpy(), x_hat, strict=True)])
    loss = sae.loss(x, L1_COEFF)
    for ours, theirs in [
        (sae.encode(x), f),
        (sae(x), x_hat),
        (loss.mse, mse),
        (loss.penalty, penalty.mean()),
        (loss.total, mse + L1_COEFF * penalty.mean()),
    ]:
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cls", [TiedL1SAE, L1SAE])
def test_a_centred_case_worked_by_hand(cls):
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    sae = set_parameters(cls(2, 3), W_dec=rows, b_enc=[0.0, -0.5, -1.0], b_dec=[1.0, -1.0])
    set_parameters(sae, **({} if cls is TiedL1SAE else {"W_enc": rows.T}))
    x = torch.tensor([[3.0, 1.0], [1.0, -3.0]])  # centred: (2, 2) and (0, -2)
    loss = sae.loss(x, 0.4)
    torch.testing.assert_close(loss.f, torch.tensor([[2.0, 1.5, 1.8], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(sae(x), torch.tensor([[4.08, 1.94], [1.0, -1.0]]))
    # Errors (-1.08, -0.94) and (0, -2): squares 2.05 and 4. Features sum to 5.3 and 0.
    expected = torch.tensor([3.025, 2.65, 3.025 + 0.4 * 2.65])
    torch.testing.assert_close(torch.stack([loss.mse, loss.penalty, loss.total]), expected)


def test_a_norm_weighted_case_worked_by_hand():
    sae = set_parameters(
        NormWeightedL1SAE(2, 3),
        W_enc=[[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]],
        W_dec=[[3.0, 4.0], [0.0, 2.0], [0.5, 0.0]],  # norms 5, 2 and 0.5
        b_enc=[-1.0, 0.5, -1.0],
        b_dec=[1.0, -1.0],
    )
    x = torch.tensor([[3.0, 1.0], [1.0, -3.0]])
    loss = sae.loss(x, 0.4)
    torch.testing.assert_close(loss.f, torch.tensor([[2.0, 1.5, 1.6], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(sae(x), torch.tensor([[7.8, 10.0], [1.0, -1.0]]))
    # Errors (-4.8, -9) and (0, -2): squares 104.04 and 4. Weighted features 10 + 3 + 0.8 and 0.
    expected = torch.tensor([54.02, 6.9, 54.02 + 0.4 * 6.9])
    torch.testing.assert_close(torch.stack([loss.mse, loss.penalty, loss.total]), expected)


def test_batch_topk_keeps_the_largest_of_the_whole_batch_and_encodes_by_its_threshold(x):
    sae = make_sae("batch_topk")
    pre = np.maximum((x - sae.b_dec).detach().numpy() @ sae.W_enc.detach().numpy(), -np.inf)
    pre = pre + sae.b_enc.detach().numpy()
    edge = sorted(pre.flatten(), reverse=True)[K * BATCH - 1]
    assert edge > 0
    expected = np.where(pre >= edge, pre, 0)
    np.testing.assert_allclose(sae.loss(x).f.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    n_per_row = (expected > 0).sum(axis=1)
    assert n_per_row.min() < K < n_per_row.max()
    np.testing.assert_allclose(
        sae.encode(x).detach().numpy(), np.where(pre > 0.9, pre, 0), rtol=1e-12, atol=1e-12
    )


def test_batch_topks_threshold_follows_the_smallest_activations_of_its_batches():
    sae = new_sae("batch_topk", 1)
    sae.observe(torch.tensor([[0.0, 3.0], [2.0, 0.0]]))
    assert sae.threshold == 2.0
    sae.observe(torch.tensor([4.0, 7.0]))
    assert sae.threshold.item() == pytest.approx(2.2)
    sae.observe(torch.zeros(3))
    sae.observe(torch.zeros(0))
    assert sae.threshold.item() == pytest.approx(2.2)


def test_auxk_decodes_the_error_by_the_largest_dead_features(x):
    sae = make_sae("topk")
    dead = torch.tensor([1, 4, 5, 8, 9, 13, 16, 17, 19])  # the d_in / 2 = 6 largest may speak
    W_enc, W_dec = sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy()
    squares = []
    for row, f in zip(x.numpy(), sae.encode(x).detach().numpy(), strict=True):
        error = row - f @ W_dec - sae.b_dec.detach().numpy()
        pre = (row - sae.b_dec.detach().numpy()) @ W_enc + sae.b_enc.detach().numpy()
        largest = sorted(dead.tolist(), key=lambda i: -pre[i])[:6]
        error_hat = sum(max(pre[i], 0) * W_dec[i] for i in largest)
        squares.append(np.sum((error - error_hat) ** 2))
    loss = sae.loss(x, dead=dead)
    assert loss.penalty.item() == pytest.approx(np.mean(squares), rel=1e-12)
    assert loss.total.item() == pytest.approx((loss.mse + loss.penalty / 32).item(), rel=1e-12)
    assert sae.loss(x, dead=dead[:0]).penalty == 0
    # The error is a target: living features that are silent here learn nothing from it.
    (loss.total - loss.mse).backward()
    learns = sae.W_dec.grad.any(dim=1)
    assert learns[dead].any()
    learns[dead] = False
    assert not learns.any()


def test_gated_by_the_papers_formulas_and_who_learns_from_what(x):
    sae = make_sae("gated")
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "r_mag", "b_mag")
    W_enc, W_dec, b_gate, b_dec, r_mag, b_mag = (getattr(sae, n).detach().numpy() for n in names)
    squares, frozen, gates, expected = [], [], [], []
    for row in x.numpy():
        gate = np.array([(row - b_dec) @ W_enc[:, i] + b_gate[i] for i in range(D_SAE)])
        weights = W_enc * np.exp(r_mag)  # equation 7: W_mag from W_gate by r_mag
        magnitude = np.maximum((row - b_dec) @ weights + b_mag, 0)
        f = np.heaviside(gate, 0) * magnitude
        expected.append(f)
        squares.append(np.sum((row - f @ W_dec - b_dec) ** 2))
        gates.append(np.maximum(gate, 0).sum())
        frozen.append(np.sum((row - np.maximum(gate, 0) @ W_dec - b_dec) ** 2))
    loss = sae.loss(x, L1_COEFF)
    np.testing.assert_allclose(sae.encode(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    parts = [np.mean(squares), np.mean(gates), np.mean(squares) + np.mean(frozen)]
    parts[2] += L1_COEFF * parts[1]
    measured = [loss.mse, loss.penalty, loss.total]
    np.testing.assert_allclose([part.item() for part in measured], parts, rtol=1e-12)
    # The reconstruction does not teach the gate's bias, the rest nothing of the decoder.
    loss.mse.backward(retain_graph=True)
    assert sae.b_enc.grad is None or not sae.b_enc.grad.any()
    sae.zero_grad()
    (loss.total - loss.mse).backward()
    for parameter in (sae.W_dec, sae.r_mag, sae.b_mag):
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-12
    assert sae.b_enc.grad.any()


def test_matryoshka_is_batch_topk_with_the_mean_error_of_its_prefixes(x):
    sae = MatryoshkaSAE(D_IN, D_SAE, torch.Generator().manual_seed(8), k=K, prefixes=(3, 8, D_SAE))
    sae = sae.double()
    f = keep_largest(sae.pre_activations(x).flatten(), K * BATCH).view(BATCH, D_SAE)
    errors = [
        (x - f[:, :m] @ sae.W_dec[:m] - sae.b_dec).square().sum(dim=1).mean() for m in (3, 8, 20)
    ]
    loss = sae.loss(x)
    assert torch.equal(loss.f, f)
    torch.testing.assert_close(loss.total, sum(errors) / 3)
    torch.testing.assert_close(loss.mse, errors[-1])
    assert MatryoshkaSAE(D_IN, 64).prefixes == (2, 6, 14, 30, 64)
    assert MatryoshkaSAE(D_IN, 5).prefixes == (1, 2, 5)
    for broken in [(3, 3, 20), (5, 3, 20), (3, 8), (0, 20)]:
        with pytest.raises(AssertionError, match="prefixes"):
            MatryoshkaSAE(D_IN, D_SAE, prefixes=broken)


def test_p_anneal_penalises_f_to_the_p_and_its_scale_makes_up_for_each_change(x):
    sae = make_sae("p_anneal")
    assert [sae._p_at(at) for at in (0.0, 0.3, 1.0)] == pytest.approx([1.0, 1.0, 0.2])
    powers = []
    for step in range(20):
        sae.anneal(step, 20)
        powers.append(sae.p)
        loss = sae.loss(x, L1_COEFF)
        f = loss.f.detach().numpy()
        norm = np.sum(f[f > 0] ** sae.p) / BATCH
        assert loss.penalty.item() == pytest.approx(sae.scale.item() * norm, rel=1e-12)
        sae.observe(loss.f.detach())
        after = sae.loss(x, L1_COEFF).penalty
        assert after.item() == pytest.approx(loss.penalty.item(), rel=1e-6)
    assert powers[:7] == [1.0] * 7
    assert powers[-1] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in zip(powers, powers[1:], strict=False))
    sae.loss(x, L1_COEFF).total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


def test_a_threshold_learns_from_the_entries_near_it_and_no_others():
    # d loss / d threshold by the paper's equations, for one feature and four tokens by hand.
    sae = set_parameters(ARCHITECTURES["jumprelu"](1, 1), W_enc=[[1.0]], W_dec=[[1.0]])
    set_parameters(sae, threshold=[2.0])
    x = torch.tensor(
        [[1.4], [1.6], [2.4], [2.6]]
    )  # bandwidth 1: the second and the third are near
    sae.loss(x, 0.7).total.backward()
    # Second: f = 0, error 1.6, d mse / d f = -2 * 1.6 / 4. Third: f = x, no error.
    expected = -(2.0 * (-2 * 1.6 / 4) + 0.7 / 4) - 0.7 / 4
    assert sae.threshold.grad.item() == pytest.approx(expected, rel=1e-6)


def test_the_quadratic_penalty_is_an_l0_whose_price_rises_with_the_distance_from_k(x):
    """d (l0 / k - 1)^2 = 2 / k (l0 / k - 1) d l0: the gradients are `jumprelu`'s at that price."""
    sae, plain = make_sae("jumprelu_target"), make_sae("jumprelu")
    l0 = (sae.encode(x) > 0).double().sum(dim=1).mean().item()
    sae.k = 3
    loss = sae.loss(x, L1_COEFF)
    assert loss.penalty.item() == pytest.approx((l0 / 3 - 1) ** 2, rel=1e-12)
    loss.total.backward()
    plain.loss(x, 4 * D_IN * 2 / 3 * (l0 / 3 - 1)).total.backward()
    for ours, theirs in zip(sae.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# One coefficient, one meaning.


def test_one_l1_coefficient_is_one_loss_in_every_class(x):
    tied = make_sae("tied_l1")
    shared = {"W_dec": tied.W_dec, "W_enc": tied.W_enc, "b_dec": tied.b_dec}
    untied = set_parameters(make_sae("l1"), **shared, b_enc=tied.b_enc)
    b_enc = tied.b_enc - tied.b_dec @ tied.W_enc
    weighted = set_parameters(make_sae("norm_weighted_l1"), **shared, b_enc=b_enc)
    expected = tied.loss(x, L1_COEFF)
    for sae in (untied, weighted):
        for ours, theirs in zip(sae.loss(x, L1_COEFF), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_growing_the_decoder_does_not_lower_the_norm_weighted_loss(x):
    sae = make_sae("norm_weighted_l1")
    growth = torch.linspace(0.1, 9.0, D_SAE, dtype=torch.float64)
    grown = set_parameters(
        copy.deepcopy(sae),
        W_dec=sae.W_dec * growth[:, None],
        W_enc=sae.W_enc / growth,
        b_enc=sae.b_enc / growth,
    )
    torch.testing.assert_close(grown.loss(x, L1_COEFF).total, sae.loss(x, L1_COEFF).total)
    assert not torch.allclose(grown.encode(x), sae.encode(x))


# Starting and staying.


def test_rows_start_at_norm_1_and_the_encoder_at_their_transpose(sae):
    fresh = type(sae)(D_IN, D_SAE, torch.Generator().manual_seed(3))
    torch.testing.assert_close(fresh.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(fresh.W_enc, fresh.W_dec.T)
    assert not fresh.b_enc.any()
    assert not fresh.b_dec.any()


def test_the_projected_gradient_is_orthogonal_to_unit_rows(sae, x):
    sae.loss(x, L1_COEFF).total.backward()
    full = sae.W_dec.grad.clone()
    sae.project_gradient()
    projected = sae.W_dec.grad
    if not sae.has_unit_norm_rows:
        assert torch.equal(projected, full)
        return
    along = (projected * sae.W_dec).sum(dim=1)
    assert along.abs().max() < 1e-12 * full.norm()
    # What was removed is parallel to the rows: nothing else was lost.
    removed = full - projected
    parallel = removed.norm(dim=1) - (removed * sae.W_dec).sum(dim=1).abs()
    assert parallel.abs().max() < 1e-12 * full.norm()
    assert removed.norm() > 1e-3 * full.norm()


def test_every_class_starts_by_encoding_what_is_left_of_the_mean(sae, x):
    fresh = new_sae(sae.name, 3).double()
    centred = fresh.encode(x - x.mean(dim=0))  # all biases are zero
    fresh.initialise_centre(x.mean(dim=0))
    torch.testing.assert_close(fresh.encode(x), centred, rtol=1e-12, atol=1e-12)
    zero = torch.zeros(D_SAE, dtype=torch.float64)
    torch.testing.assert_close(fresh.decode(zero), x.mean(dim=0))


@pytest.mark.parametrize(("l0", "n_firing"), [(5.0, 100), (0.2, 4), (1e-9, 1)])
@pytest.mark.parametrize("architecture", [*L1_FAMILY, "jumprelu"])
def test_every_feature_starts_by_firing_on_its_share_of_the_rows(architecture, l0, n_firing):
    x = torch.randn(400, D_IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    fresh = new_sae(architecture, 3).double()
    fresh.initialise_centre(x.mean(dim=0))
    fresh.initialise_sparsity(x, l0)
    assert ((fresh.encode(x) > 0).sum(dim=0) == n_firing).all()
    # No row is so near to the edge that rounding to float32 would move it across.
    assert ((fresh.float().encode(x.float()) > 0).sum(dim=0) == n_firing).all()


@pytest.mark.parametrize("architecture", L1_FAMILY)
def test_starting_sparse_never_raises_a_bias(architecture, x):
    sae = make_sae(architecture)
    # Asked to fire on 6 rows of 7, most features would have to be raised: they fire on fewer.
    before, n_firing = sae.b_enc.detach().clone(), (sae.encode(x) > 0).sum(dim=0)
    assert (n_firing < 6).sum() > D_SAE / 2
    sae.initialise_sparsity(x, 6 / 7 * D_SAE)
    assert (sae.b_enc <= before).all()
    assert torch.equal(sae.b_enc[n_firing < 6], before[n_firing < 6])


@pytest.mark.parametrize("architecture", [*L1_FAMILY, "jumprelu"])
def test_starting_sparse_leaves_the_features_that_were_not_chosen(architecture, x):
    sae = make_sae(architecture)
    edge = sae.threshold if architecture == "jumprelu" else sae.b_enc
    before, chosen = edge.detach().clone(), torch.tensor([3, 11])
    sae.initialise_sparsity(x, 1.0, chosen)
    moved = (edge != before).nonzero().flatten()
    assert set(moved.tolist()) <= {3, 11}
    assert len(moved) > 0

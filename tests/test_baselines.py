"""Dictionaries that need no SAE: identities, planted truth, other libraries, the contract.

The first imports bring `test_contract`'s checks here, which then run on this file's dictionaries.
"""

import numpy as np
import pytest
import torch
from test_contract import (  # noqa: F401
    BATCH,
    D_IN,
    D_SAE,
    K,
    make_sae,
    test_a_features_row_is_what_it_writes,
    test_encode_and_decode_change_nothing,
    test_encode_and_decode_keep_the_leading_dimensions,
    test_encode_gives_the_same_twice,
    test_encode_is_the_same_in_training_and_in_evaluation_mode,
    test_encode_treats_every_row_by_itself,
    test_float64_inputs_and_weights_stay_float64,
    test_forward_decodes_what_encode_returns,
    test_w_dec_has_one_row_per_feature,
    x,
)

from sparse_coding.baselines import (
    PerTokenTopK,
    covariance,
    frozen_decoder,
    ica,
    least_squares_gain,
    neuron_basis,
    nmf,
    pca,
    random_directions,
    random_rotation,
    whitened_random_directions,
)
from sparse_coding.consistency import max_cosine
from sparse_coding.errors import UserError
from sparse_coding.kernels import make_adam, make_step
from sparse_coding.kernels.reference import ReferenceStep
from sparse_coding.sae import ARCHITECTURES

UNTIED = [name for name in ARCHITECTURES if name != "tied_l1"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 3000, d: int = D_IN) -> torch.Tensor:
    """Correlated, heavy-tailed rows of unequal variance, not centred."""
    sources = torch.distributions.Laplace(0.0, 1.0)
    torch.manual_seed(0)
    z = sources.sample((n, d)) * torch.linspace(0.2, 3, d)
    return z @ torch.randn(d, d, generator=generator(1)) + torch.randn(d, generator=generator(2))


X = data()
DATA = covariance([X], len(X))
N = D_SAE // 2  # signed directions
DICTIONARIES = {
    "pca": lambda: pca(DATA, N),
    "random": lambda: random_directions(DATA.mean, N, generator()),
    "whitened_random": lambda: whitened_random_directions(DATA, N, generator()),
    "top_k_of_random": lambda: PerTokenTopK(random_directions(DATA.mean, N, generator()), 3),
    "frozen_decoder": lambda: frozen_decoder(make_sae("l1")),
}
COMPLETE = {
    "neuron_basis": lambda: neuron_basis(DATA.mean),
    "neuron_basis_around_0": lambda: neuron_basis(torch.zeros(D_IN)),
    "random_rotation": lambda: random_rotation(DATA.mean, generator()),
    "pca": lambda: pca(DATA),
}
INVERTIBLE = COMPLETE | {
    "ica": lambda: ica(X, seed=0, max_iter=20).dictionary,
}


@pytest.fixture(params=list(DICTIONARIES))
def dictionary(request):
    """What test_contract's checks run on here."""
    return DICTIONARIES[request.param]()


@pytest.fixture(params=list(COMPLETE))
def basis(request):
    return COMPLETE[request.param]()


# Split directions.


@pytest.mark.parametrize("name", INVERTIBLE)
def test_all_features_of_a_complete_basis_give_x_back(name):
    # Weights are rounded to float32; values are about 10, ICA's condition number is about 50.
    atol = 1e-3 if name == "ica" else 3e-5
    torch.testing.assert_close(INVERTIBLE[name]()(X[:50]), X[:50], rtol=0, atol=atol)


def test_a_direction_is_active_on_one_side_at_a_time(basis):
    positive, negative = basis.encode(X).chunk(2, dim=1)
    assert ((positive > 0) & (negative > 0)).sum() == 0
    assert ((positive > 0) | (negative > 0)).float().mean() > 0.999
    assert (positive >= 0).all() and (negative >= 0).all()


@pytest.mark.parametrize("name", DICTIONARIES | INVERTIBLE)
def test_rows_have_unit_norm(name):
    norms = (DICTIONARIES | INVERTIBLE)[name]().W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)


def test_the_halves_of_a_raw_neuron_are_its_positive_and_negative_part():
    f = neuron_basis(torch.zeros(D_IN)).encode(X)
    assert torch.equal(f[:, :D_IN], X.clamp(min=0)) and torch.equal(f[:, D_IN:], (-X).clamp(min=0))


def test_a_random_rotation_is_orthogonal_and_of_no_preferred_sign():
    first_entries = []
    for seed in range(400):
        rotation = random_rotation(torch.zeros(3), generator(seed)).W_dec[:3]
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), rtol=0, atol=1e-5)
        first_entries.append(rotation[0, 0].item())
    # Uniform on the sphere, a coordinate has mean 0 and variance 1/3; QR's own signs give -0.5.
    assert abs(np.mean(first_entries)) < 4 * (1 / 3 / 400) ** 0.5
    assert abs(np.mean(np.square(first_entries)) - 1 / 3) < 0.07


# The covariance and what is fitted to it.


def test_mean_and_covariance_are_numpys_whatever_the_batches():
    expected = X.double().numpy()
    for size in (1, 7, 1000, 5000):
        found = covariance(X.split(size), 5000)
        assert found.n == len(X)
        np.testing.assert_allclose(found.mean, expected.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(
            found.matrix, np.cov(expected.T, bias=True), rtol=1e-9, atol=1e-9
        )


def test_covariance_leaves_the_activations_as_they_are():
    rows = X.double()
    covariance([rows], len(rows))
    assert torch.equal(rows, X.double())


def test_a_mean_far_larger_than_the_spread_does_not_cancel():
    far = torch.randn(1000, 3, dtype=torch.float64, generator=generator()) + 1e7
    expected = np.cov(far.T.numpy(), bias=True)
    np.testing.assert_allclose(covariance(far.split(100), 1000).matrix, expected, rtol=1e-6)


def test_covariance_reads_no_further_than_it_is_told():
    batches = iter(X.split(100))
    found = covariance(batches, 250)
    assert found.n == 250
    np.testing.assert_allclose(found.mean, X[:250].double().numpy().mean(axis=0), rtol=1e-12)
    assert len(list(batches)) == len(X) / 100 - 3


def test_one_activation_has_no_covariance():
    with pytest.raises(UserError, match="2 or more"):
        covariance([X[:1]], 10)


def test_pca_is_scikit_learns():
    from sklearn.decomposition import PCA

    other = PCA(N).fit(X.double().numpy())
    signed = pca(DATA, N).encode(X[:20]).chunk(2, dim=1)
    ours, theirs = (signed[0] - signed[1]).numpy(), other.transform(X[:20].double().numpy())
    np.testing.assert_allclose(abs(ours), abs(theirs), rtol=1e-3, atol=1e-3)


def test_pcas_axes_are_numpys_singular_vectors_up_to_sign():
    rows = X.double().numpy()
    theirs = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2]
    for n in (N, 4):
        ours = pca(DATA, n).W_dec.numpy()
        np.testing.assert_allclose(abs(ours[:n] @ theirs[:n].T), np.eye(n)[:, :D_IN], atol=1e-5)
        np.testing.assert_array_equal(ours[n:], -ours[:n])


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: random_rotation(DATA.mean, generator(seed)),
        lambda seed: random_directions(DATA.mean, N, generator(seed)),
        lambda seed: whitened_random_directions(DATA, N, generator(seed)),
        lambda seed: ica(X, seed, max_iter=3).dictionary,
    ],
)
def test_a_seed_gives_the_same_directions_and_another_seed_others(make):
    assert torch.equal(make(0).W_dec, make(0).W_dec)
    assert not torch.allclose(make(0).W_dec, make(1).W_dec, atol=0.1)


def test_random_directions_are_uniform_on_the_sphere():
    rows = random_directions(torch.zeros(3), 4000, generator()).W_dec[:4000]
    # Uniform on the sphere in three dimensions, a coordinate is uniform on [-1, 1]; 0.026 is the
    # 1 % point of Kolmogorov and Smirnov's distance.
    for coordinate in rows.T:
        steps = torch.arange(1, 4001) / 4000
        assert ((coordinate.sort().values + 1) / 2 - steps).abs().max() < 0.026


def test_whitened_directions_read_what_a_direction_of_the_data_holds_alone():
    found = whitened_random_directions(DATA, 500, generator())
    rows = found.W_dec[:500].double()
    positive, negative = found.double().encode(X.double()).chunk(2, dim=1)
    # The reading of g has variance |g|^2 = 1; with the row w scaled to 1 that is 1 / (w C^-1 w).
    alone = 1 / (rows @ DATA.matrix.inverse() * rows).sum(dim=1)
    read = (positive - negative).var(dim=0, correction=0)
    torch.testing.assert_close(read, alone, rtol=1e-4, atol=0)


def test_whitened_directions_cover_the_data_evenly():
    n = 20_000
    found = whitened_random_directions(DATA, n, generator())
    # E[g g^T] = 1 / d_in: so many of them, scaled by d_in / n, give every x back.
    x_hat = D_IN / n * (found(X) - found.mean) + found.mean
    error = (X - x_hat).square().sum() / (X - found.mean).square().sum()
    assert error < 0.01


def test_whitening_leaves_out_directions_without_variance():
    flat = torch.cat([X[:, :5], X[:, :2].sum(dim=1, keepdim=True), torch.ones(len(X), 1)], dim=1)
    found = whitened_random_directions(covariance([flat], len(flat)), 9, generator())
    assert found.W_dec.isfinite().all() and found.W_enc.isfinite().all()
    # x_5 = x_0 + x_1 always, x_6 is constant: so are they in what is written.
    torch.testing.assert_close(found.W_dec[:, 5], found.W_dec[:, :2].sum(dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.W_dec[:, 6], torch.zeros(18), rtol=0, atol=1e-6)


def planted_sources(n: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that mix five independent Laplace sources, and the mixing (sources, d_in)."""
    uniform = torch.rand(n, 5, dtype=torch.float64, generator=generator(3)) - 0.5
    sources = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    mixing = torch.randn(5, D_IN, dtype=torch.float64, generator=generator(4))
    return sources @ mixing + 7.0, mixing


@pytest.mark.parametrize("is_white", [False, True])
def test_ica_finds_planted_sources_where_pca_does_not(is_white):
    rows, mixing = planted_sources()
    if is_white:  # mixed by a rotation: whitening has nothing left to do
        q, _ = torch.linalg.qr(mixing.T)
        rows, mixing = (rows - 7.0) @ mixing.pinverse() @ q.T, q.T
    planted = mixing / mixing.norm(dim=1, keepdim=True)
    found = ica(rows, seed=0)
    assert found.has_converged and found.n_iterations < 200
    assert found.dictionary.d_sae == 2 * 5  # the rank of the sample
    similarity = planted.float() @ found.dictionary.W_dec.T
    assert similarity.max(dim=1).values.min() > 0.999
    axes = pca(covariance([rows], len(rows)), 5)
    assert (planted.float() @ axes.W_dec.T).max(dim=1).values.min() < 0.95


def test_icas_components_are_scikit_learns():
    from sklearn.decomposition import FastICA

    rows, _ = planted_sources()
    ours = ica(rows, seed=0, tol=1e-8).dictionary.W_dec[:5].double().numpy()
    theirs = FastICA(5, whiten="unit-variance", tol=1e-8, random_state=3).fit(rows.numpy())
    theirs = theirs.mixing_.T / np.linalg.norm(theirs.mixing_.T, axis=1, keepdims=True)
    similarity = abs(ours @ theirs.T)
    np.testing.assert_allclose(similarity.max(axis=1), 1, atol=1e-6)
    assert sorted(similarity.argmax(axis=1)) == list(range(5))


def test_icas_readings_are_uncorrelated_and_of_its_rows_size():
    rows, _ = planted_sources()
    found = ica(rows, seed=0).dictionary.double()
    positive, negative = found.encode(rows).chunk(2, dim=1)
    covariance = np.cov((positive - negative).T.numpy(), bias=True)
    sizes = covariance.diagonal() ** 0.5
    np.testing.assert_allclose(covariance / np.outer(sizes, sizes), np.eye(5), atol=1e-4)
    torch.testing.assert_close(found(rows[:100]), rows[:100], rtol=0, atol=1e-4)


def test_ica_says_when_it_has_not_converged():
    found = ica(X, seed=0, max_iter=2)
    assert (found.n_iterations, found.has_converged) == (2, False)


def test_ica_of_too_few_rows_is_refused():
    with pytest.raises(UserError, match="too few"):
        ica(X[:D_IN], seed=0)


# Per-token top-k.


def test_top_k_keeps_what_writes_most():
    # Rows of norms 1, 3, 0.5, 2: contributions 4, 3, 2.5 and 2 in the order of features.
    sae = make_sae("norm_weighted_l1")
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True))
        sae.W_dec.mul_(torch.linspace(0.5, 3, D_SAE)[:, None])
    rows = X[:40]
    f, norms = sae.encode(rows).detach().numpy(), sae.W_dec.detach().norm(dim=1).numpy()
    for k in (1, 4):
        expected = np.zeros_like(f)
        for row in range(len(f)):
            largest = np.argsort(-f[row] * norms)[:k]
            expected[row, largest] = f[row, largest]
        np.testing.assert_array_equal(PerTokenTopK(sae, k).encode(rows).detach().numpy(), expected)


def test_top_k_changes_nothing_where_k_is_as_many_as_are_active(basis):
    whole = PerTokenTopK(basis, 2 * D_IN)
    assert torch.equal(whole.encode(X[:50]), basis.encode(X[:50]))
    more = PerTokenTopK(basis, 99)
    assert more.k == 2 * D_IN and torch.equal(more(X[:50]), basis(X[:50]))


def test_at_most_k_features_are_active(basis):
    l0 = PerTokenTopK(basis, 5).encode(X).count_nonzero(dim=1)
    assert l0.max() == 5 and l0.float().mean() > 4.99


def squared_error(dictionary, rows=X):
    return (rows - dictionary(rows)).square().sum(dim=1)


def test_on_orthonormal_directions_the_error_is_the_energy_of_what_is_left_out(basis):
    basis = basis.double()
    rows = X.double()
    read = (rows - basis.mean) @ basis.W_dec[:D_IN].T
    left_out = read.square().sort(dim=1).values[:, : D_IN - 4].sum(dim=1)
    torch.testing.assert_close(
        squared_error(PerTokenTopK(basis, 4), rows), left_out, rtol=1e-4, atol=1e-4
    )


def test_the_best_k_axes_of_each_token_beat_the_leading_k_of_all():
    for k in (1, 3, 6):
        by_token, leading = PerTokenTopK(pca(DATA), k), pca(DATA, k)
        assert (squared_error(by_token) <= squared_error(leading) * (1 + 1e-4) + 1e-3).all()
        assert squared_error(by_token).mean() < 0.98 * squared_error(leading).mean()
        # The leading axes' error is the sum of the variances behind them.
        variances = torch.linalg.eigvalsh(DATA.matrix)[: D_IN - k]
        assert squared_error(leading).double().mean().item() == pytest.approx(
            variances.sum().item(), rel=1e-4
        )


def test_no_other_orthonormal_basis_of_the_same_k_beats_pcas_leading_axes():
    error = squared_error(pca(DATA, 3)).mean()
    for seed in range(20):
        rotation = random_rotation(DATA.mean, generator(seed))
        rows = rotation.W_dec[:3].double()
        centred = X.double() - DATA.mean
        assert (centred - centred @ rows.T @ rows).square().sum(dim=1).mean() > error


@pytest.mark.parametrize("k", [1, 3, 8])
def test_orthonormal_directions_need_no_gain(basis, k):
    # The mean of the neuron basis around 0 is not the data's; the identity does not need it.
    assert least_squares_gain(PerTokenTopK(basis, k), X) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", ["random", "whitened_random", "frozen_decoder"])
def test_no_other_gain_writes_nearer_to_x(name):
    dictionary = DICTIONARIES[name]().requires_grad_(False)
    plain = PerTokenTopK(dictionary, 5)
    gain = least_squares_gain(plain, X)
    centre = dictionary.decode(torch.zeros(1, dictionary.d_sae))
    written, wanted = ((one - centre).flatten().double().numpy() for one in (plain(X), X))
    expected = np.linalg.lstsq(written[:, None], wanted, rcond=None)[0][0]
    assert gain == pytest.approx(expected, rel=1e-5)
    assert abs(gain - 1) > 0.02
    best = squared_error(PerTokenTopK(dictionary, 5, gain)).sum()
    for other in (1.0, 0.98 * gain, 1.02 * gain):
        assert squared_error(PerTokenTopK(dictionary, 5, other)).sum() > best


def test_a_gain_changes_neither_what_is_kept_nor_the_centre():
    random = DICTIONARIES["random"]()
    plain, scaled = PerTokenTopK(random, 3), PerTokenTopK(random, 3, 2.5)
    assert torch.equal(scaled.encode(X), 2.5 * plain.encode(X))
    torch.testing.assert_close(
        scaled(X) - DATA.mean.float(), 2.5 * (plain(X) - DATA.mean.float()), rtol=0, atol=1e-4
    )


def test_what_writes_nothing_has_gain_1():
    assert least_squares_gain(PerTokenTopK(neuron_basis(X[0]), 3), X[:1]) == 1


def test_k_must_be_positive():
    with pytest.raises(UserError, match="1 or more"):
        PerTokenTopK(pca(DATA), 0)


# The frozen decoder.


@pytest.mark.parametrize("architecture", UNTIED)
def test_a_frozen_decoder_computes_what_its_sae_does(architecture, x):  # noqa: F811
    sae = make_sae(architecture)
    frozen = frozen_decoder(sae)
    assert torch.equal(frozen.encode(x), sae.encode(x)) and torch.equal(frozen(x), sae(x))
    assert frozen.W_dec.data_ptr() != sae.W_dec.data_ptr()


@pytest.mark.parametrize("architecture", UNTIED)
def test_training_moves_everything_but_the_frozen_decoder(architecture, x):  # noqa: F811
    frozen = frozen_decoder(make_sae(architecture))
    before = {name: value.clone() for name, value in frozen.named_parameters()}
    step = make_step(frozen, make_adam(frozen, lr=1e-2), "auto")
    assert isinstance(step, ReferenceStep)  # a fast step would teach the decoder
    coefficient = torch.tensor(0.3)
    first = frozen.loss(x, coefficient).total
    for _ in range(50):
        step(x, coefficient)
    for name, value in frozen.named_parameters():
        assert torch.equal(value, before[name]) == (name == "W_dec"), name
    assert frozen.loss(x, coefficient).total < 0.9 * first


def test_an_encoder_that_is_the_decoder_cannot_learn_alone():
    with pytest.raises(UserError, match="no encoder of its own"):
        frozen_decoder(make_sae("tied_l1"))


def test_nmf_finds_planted_parts_and_encodes_each_row_exactly():
    generator = torch.Generator().manual_seed(0)
    parts = torch.rand(6, 16, generator=generator)
    parts *= torch.rand(6, 16, generator=generator) < 0.3
    codes = torch.rand(800, 6, generator=generator)
    codes *= torch.rand(800, 6, generator=generator) < 0.4
    rows = codes @ parts - 1.0  # negative values: the method works above the smallest
    found = nmf(rows, 6, seed=0)
    assert max_cosine(parts, found.W_dec)[0].value.min() > 0.9
    error = (found(rows) - rows).square().sum() / (rows - rows.mean(dim=0)).square().sum()
    assert error < 1e-3
    f = found.encode(rows[:40])
    assert (f >= 0).all()
    assert torch.equal(f[:7], found.encode(rows[:7]))
    # Karush, Kuhn, Tucker: the gradient is 0 where f > 0 and not negative where f = 0.
    gradient = (found.decode(f) - rows[:40]) @ found.W_dec.T
    assert gradient[f > 0].abs().max() < 1e-4
    assert gradient[f == 0].min() > -1e-4

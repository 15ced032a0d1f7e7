"""Similarities of dictionaries against numpy, scipy's definition by hand, and planted truth."""

import itertools

import numpy as np
import pytest
import torch

from sparse_coding.consistency import (
    Correlation,
    bootstrap_mean,
    correlation_of_pairs,
    join,
    matched_cosine,
    max_cosine,
    one_to_one,
    random_directions,
    shift,
    sparse_codes,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(n_tokens, d_sae, seed, density=0.1):
    """Non-negative activations, most of them 0."""
    values = normal(n_tokens, d_sae, seed=seed).abs()
    kept = torch.rand(n_tokens, d_sae, generator=torch.Generator().manual_seed(seed + 1)) < density
    return values * kept


def dense(codes, d_sae):
    out = np.zeros((codes.n_tokens, d_sae), np.float32)
    for t in range(codes.n_tokens):
        entries = slice(codes.starts[t], codes.starts[t + 1])
        out[t, codes.features[entries]] = codes.values[entries]
    return out


def pearson(a, b):
    """Columns of a against columns of b, by numpy."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.corrcoef(a, b, rowvar=False)[: a.shape[1], a.shape[1] :]


# --- cosines -----------------------------------------------------------------------------------


def test_the_largest_cosine_both_ways_over_several_blocks(monkeypatch):
    monkeypatch.setattr("sparse_coding.consistency.COSINE_ROWS", 7)
    a, b = normal(30, 5), 3 * normal(20, 5, seed=1)
    cosine = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    of_a, of_b = max_cosine(a, b)
    np.testing.assert_allclose(of_a.value, cosine.max(dim=1).values, rtol=1e-5)
    np.testing.assert_array_equal(of_a.partner, cosine.argmax(dim=1))
    np.testing.assert_allclose(of_b.value, cosine.max(dim=0).values, rtol=1e-5)
    np.testing.assert_array_equal(of_b.partner, cosine.argmax(dim=0))


def test_a_dictionary_equals_itself_in_another_order_and_scale_but_not_its_opposite():
    a = normal(40, 64)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    of_a, _ = max_cosine(a, 5 * a[order])
    np.testing.assert_allclose(of_a.value, 1, rtol=1e-5)
    np.testing.assert_array_equal(order[of_a.partner], np.arange(40))
    assert max_cosine(a, -a)[0].value.mean() < 0.5  # an absolute value would make it 1


def test_rows_of_zeros_have_no_direction_and_no_nan():
    of_a, _ = max_cosine(torch.zeros(2, 4), normal(3, 4))
    np.testing.assert_array_equal(of_a.value, 0)


def test_one_to_one_matching_is_the_best_of_all_permutations():
    a, b = normal(5, 3), normal(6, 3, seed=1)
    cosine = (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    best = max(
        sum(cosine[i, j].item() for i, j in enumerate(chosen))
        for chosen in itertools.permutations(range(6), 5)
    )
    assert matched_cosine(a, b).sum().item() == pytest.approx(best, rel=1e-5)
    assert matched_cosine(b, a).sum().item() == pytest.approx(best, rel=1e-5)
    # Two features of A that share their nearest in B cannot both have it.
    twice = torch.tensor([[1.0, 0], [1, 0.1]])
    assert max_cosine(twice, torch.eye(2))[0].value.mean() > 0.99
    assert matched_cosine(twice, torch.eye(2)).mean() < 0.6
    rows, columns = one_to_one(np.array([[1.0, 2.0], [1.5, 3.0]]))
    assert list(zip(rows, columns, strict=True)) == [(0, 0), (1, 1)]


def test_random_directions_have_the_shape_and_if_asked_the_covariance():
    like = normal(5000, 4) * torch.tensor([4.0, 1, 1, 1]) + torch.tensor([2.0, 0, 0, 0])
    plain = random_directions(like, torch.Generator().manual_seed(0))
    alike = random_directions(like, torch.Generator().manual_seed(0), keep_covariance=True)
    assert plain.shape == alike.shape == like.shape
    units = like / like.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(np.cov(plain.T), np.eye(4), atol=0.1)
    np.testing.assert_allclose(np.cov(alike.T), np.cov(units.T), atol=0.03)
    np.testing.assert_allclose(alike.mean(0), units.mean(0), atol=0.03)


def test_the_null_of_the_cosine_grows_with_the_dictionary():
    a = normal(200, 32)
    null = [
        max_cosine(a, random_directions(normal(n, 32), torch.Generator().manual_seed(1)))[0]
        for n in (32, 1024)
    ]
    assert null[1].value.mean() > null[0].value.mean() + 0.1


# --- activations -------------------------------------------------------------------------------


def test_codes_keep_every_entry_and_join_and_shift_like_dense_rows():
    f = sparse(50, 8, seed=0)
    f[3] = 0  # a token without any
    codes = sparse_codes(f)
    np.testing.assert_array_equal(dense(codes, 8), f)
    joined = join([sparse_codes(part) for part in f.split([20, 1, 29])])
    for mine, whole in zip(joined, codes, strict=True):
        np.testing.assert_array_equal(mine, whole)
    for n in (0, 1, 17, 50, 63):
        np.testing.assert_array_equal(dense(shift(codes, n), 8), np.roll(f, n, axis=0))
    picked = codes.take(np.array([3, 0, 49]))
    np.testing.assert_array_equal(dense(picked, 8), f[[3, 0, 49]])
    kept = np.array([True, False, True, True, False, False, True, True])
    np.testing.assert_array_equal(dense(codes.keep(kept), 5), f[:, kept])


def test_streamed_correlations_equal_numpys(monkeypatch):
    monkeypatch.setattr("sparse_coding.consistency.CORRELATION_ROWS", 4)
    a, b = sparse(400, 11, seed=0), sparse(400, 7, seed=5)
    b[:, 0] = 2 * a[:, 3] + 0.1 * b[:, 0]
    a[:, 2] = 0  # never fires
    a[:, 5] = 0.7  # always fires alike: it never varies either
    correlation = Correlation(11, 7)
    for part in torch.arange(400).split([100, 3, 297]):
        correlation.add(sparse_codes(a[part]), sparse_codes(b[part]))
    expected = pearson(a, b)
    expected[[2, 5]] = np.nan
    np.testing.assert_allclose(correlation.matrix(), expected, atol=1e-9)
    of_a, of_b = correlation.best()
    alive = ~np.isnan(expected).all(axis=1)
    np.testing.assert_allclose(of_a.value[alive], expected[alive].max(axis=1), atol=1e-9)
    np.testing.assert_array_equal(of_a.partner[alive], expected[alive].argmax(axis=1))
    assert np.isnan(of_a.value[[2, 5]]).all()
    np.testing.assert_allclose(of_b.value, np.nanmax(expected, axis=0), atol=1e-9)
    np.testing.assert_array_equal(of_b.partner, np.nanargmax(expected, axis=0))
    assert of_a.partner[3] == 0
    assert of_a.value[3] > 0.99


def test_large_activations_do_not_cost_the_correlation_its_digits():
    """Sums of squares in float32 would leave nothing of a variance a millionth of the mean."""
    f = 1000 + normal(3000, 2)
    correlation = Correlation(2, 2)
    correlation.add(sparse_codes(f), sparse_codes(f))
    np.testing.assert_allclose(correlation.matrix(), pearson(f, f), atol=1e-6)


def test_tokens_that_cannot_be_paired_are_refused():
    with pytest.raises(ValueError, match="3 tokens of A cannot be paired with 4 of B"):
        Correlation(2, 2).add(sparse_codes(normal(3, 2)), sparse_codes(normal(4, 2)))


def test_correlations_of_pairs_equal_numpys_and_their_jackknife_leaves_out_documents():
    a, b = sparse(600, 9, seed=0), sparse(600, 6, seed=7)
    b[:, 4] = a[:, 1]
    partner = np.array([0, 4, 2, 5, 5, 1, 1, 0, 3])
    group = np.repeat(np.arange(20), 30)
    found = correlation_of_pairs(sparse_codes(a), sparse_codes(b), partner, group)
    expected = pearson(a, b)[np.arange(9), partner]
    np.testing.assert_allclose(found.value, expected, atol=1e-9)
    assert found.mean.value == pytest.approx(expected.mean())
    means = [
        pearson(a[group != g], b[group != g])[np.arange(9), partner].mean() for g in range(20)
    ]
    half = 2.0930 * np.sqrt(19 / 20 * 20 * np.var(means))  # Student's t of 19 degrees
    assert found.mean.low == pytest.approx(expected.mean() - half, rel=1e-4)
    assert found.mean.high == pytest.approx(expected.mean() + half, rel=1e-4)


def test_the_interval_over_documents_holds_its_truth():
    """Pairs with a correlation of 0.5 in every document: of 60 samples about 57 contain it."""
    n_held = 0
    for seed in range(60):
        random = np.random.default_rng(seed)
        scale = random.lognormal(sigma=0.5, size=(25, 1, 1))  # documents differ
        shared, own_a, own_b = random.normal(size=(3, 25, 40, 8)) * scale
        a, b = (torch.tensor((shared + own).reshape(1000, 8)).float() for own in (own_a, own_b))
        codes = sparse_codes(a), sparse_codes(b)
        mean = correlation_of_pairs(*codes, np.arange(8), np.repeat(np.arange(25), 40)).mean
        n_held += mean.low <= 0.5 <= mean.high
    assert 53 <= n_held <= 60


def test_a_partner_that_was_chosen_on_other_tokens_earns_nothing_by_chance():
    """The best of 200 independent features correlates in the sample, and not outside it."""
    a, b = (sparse_codes(sparse(4000, 200, seed=seed, density=0.02)) for seed in (0, 50))
    halves = [[codes.take(np.arange(4000)[half::2]) for codes in (a, b)] for half in (0, 1)]
    correlation = Correlation(200, 200)
    correlation.add(*halves[0])
    in_sample, _ = correlation.best()
    assert in_sample.value.mean() > 0.08
    group = np.repeat(np.arange(40), 50)
    held_out = correlation_of_pairs(*halves[1], in_sample.partner, group).mean
    assert held_out.low < 0 < held_out.high or abs(held_out.value) < 0.01


def test_shifted_tokens_are_a_null_for_equal_dictionaries():
    codes = sparse_codes(sparse(3000, 30, seed=0))
    correlation = Correlation(30, 30)
    correlation.add(codes, shift(codes, 1500))
    assert correlation.best()[0].value.max() < 0.15
    same = Correlation(30, 30)
    same.add(codes, codes)
    np.testing.assert_allclose(same.best()[0].value, 1, atol=1e-9)


def test_the_mean_leaves_out_nan_and_its_interval_is_the_standard_errors():
    values = np.append(normal(4000).numpy() + 3, [np.nan, np.nan])
    found = bootstrap_mean(values)
    clean = values[:4000].astype(np.float64)
    half = 1.96 * clean.std() / np.sqrt(4000)
    assert found.value == pytest.approx(clean.mean())
    assert found.low == pytest.approx(clean.mean() - half, abs=half / 8)
    assert found.high == pytest.approx(clean.mean() + half, abs=half / 8)
    assert np.isnan(bootstrap_mean(np.array([np.nan])).value)

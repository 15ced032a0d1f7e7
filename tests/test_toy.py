"""Toy activations have the statistics that are asked for; scores are right on known answers."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from sparse_coding.errors import UserError
from sparse_coding.toy import (
    SuperpositionModels,
    ToyActivations,
    ToySetting,
    assignment,
    detection,
    feature_dimensionality,
    match_truth,
    toy_truth,
)

N_ROWS = 40_000


def batch(setting, seed=0, n_rows=N_ROWS):
    return ToyActivations(toy_truth(setting, seed), n_rows, 5).batch(0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the generator -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [{}, {"zipf": 1.0, "correlation": 0.8}, {"n_children": 3}, {"n_children": 1, "zipf": 0.5}],
)
def test_features_fire_as_often_as_asked_and_the_rest_is_arithmetic(more):
    setting = ToySetting(noise=0.0, **more)
    x, a = batch(setting)
    rates = (a > 0).double().mean(0).numpy()
    deviation = np.sqrt(setting.frequencies() / N_ROWS)
    assert np.abs(rates - setting.frequencies()).max() < 5 * deviation.max()
    assert (a > 0).double().sum(1).mean() == pytest.approx(3.0, abs=0.05)
    assert setting.frequencies().sum() == pytest.approx(3.0)
    on = a[a > 0]
    assert on.min() >= 0.5
    assert on.max() <= 1.5
    assert on.mean() == pytest.approx(1.0, abs=0.01)
    torch.testing.assert_close(x, a @ toy_truth(setting, 0).directions, rtol=1e-4, atol=1e-5)


def test_frequencies_fall_as_a_power():
    rates = ToySetting(l0=1.0, zipf=1.5).frequencies()
    np.testing.assert_allclose(rates / rates[0], np.arange(1.0, 65.0) ** -1.5)


def test_children_fire_only_with_their_parent_and_at_their_rate():
    setting = ToySetting(n_children=3, child_rate=0.4)
    _, a = batch(setting)
    on = (a > 0).numpy()
    for child in range(setting.n_roots, 64):
        parent = on[:, child % setting.n_roots]
        assert not (on[:, child] & ~parent).any()
        assert on[parent, child].mean() == pytest.approx(0.4, abs=0.04)


def test_correlated_features_fire_together_as_the_copula_says():
    """Of two normal variables with correlation r, both are above t as often as integrals say."""
    from scipy.stats import multivariate_normal, norm

    setting = ToySetting(n_features=8, l0=1.6, correlation=0.7)
    truth = toy_truth(setting, 0)
    _, a = batch(setting)
    on = (a > 0).numpy()
    r = 0.7 * (truth.loadings @ truth.loadings.T)
    threshold = norm.isf(0.2)
    for i, j in ((0, 1), (2, 5), (3, 7)):
        covariance = [[1, r[i, j]], [r[i, j], 1]]
        both = multivariate_normal(cov=covariance).cdf([-threshold, -threshold])
        assert (on[:, i] & on[:, j]).mean() == pytest.approx(both, abs=0.008)
    assert np.abs(r - np.diag(np.diag(r))).max() > 0.5, "some pairs agree strongly"


def test_noise_has_its_deviation_in_every_dimension():
    setting = ToySetting(noise=0.15)
    x, a = batch(setting)
    rest = x - a @ toy_truth(setting, 0).directions
    torch.testing.assert_close(rest.std(0), torch.full((32,), 0.15), rtol=0.03, atol=0)


def test_a_batch_depends_on_its_number_and_seed_and_a_stream_goes_on_where_it_stopped():
    truth = toy_truth(ToySetting(), 0)
    one, same, other = (ToyActivations(truth, 16, seed) for seed in (1, 1, 2))
    stream = iter(one)
    first, second = next(stream), next(stream)
    assert torch.equal(same.batch(1)[0], second)
    assert not torch.equal(first, second)
    assert not torch.equal(other.batch(0)[0], first)
    resumed = ToyActivations(truth, 16, 9)
    resumed.load_state_dict(one.state_dict())
    assert torch.equal(next(iter(resumed)), next(stream))


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"l0": 0.0}, "l0 0.0 is not possible; it must be more than 0"),
        ({"l0": 65.0}, "it must be at most 64, or a feature would fire in over 100 % of rows"),
        ({"correlation": 1.0}, r"correlation 1.0 is not possible; it must be in \[0, 1\)"),
        ({"n_children": 2}, "a multiple of 1 \\+ n_children = 3"),
    ],
)
def test_impossible_settings_are_one_line(given, line):
    with pytest.raises(UserError, match=line):
        ToySetting(**given)


# --- scores ------------------------------------------------------------------------------------


def test_the_truth_scores_one_in_any_order_and_scale():
    truth = toy_truth(ToySetting(), 0).directions
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    found = match_truth(truth, 3 * truth[order])
    assert found == pytest.approx((1, 1, 1, 1, 0, 1), abs=1e-6)
    features, rows = assignment(truth, truth[order])
    np.testing.assert_array_equal(order[rows], features)


def test_opposite_directions_are_not_the_truth():
    truth = toy_truth(ToySetting(), 0).directions
    assert match_truth(truth, -truth).recovered_70 == 0


def test_scores_of_random_rows_equal_numpys():
    truth, rows = normal(64, 32).double().numpy(), normal(128, 32, seed=1).double().numpy()
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (truth, rows)]
    cosine = units[0] @ units[1].T
    found = match_truth(torch.tensor(truth), torch.tensor(rows))
    assert found.mmcs_truth == pytest.approx(cosine.max(axis=1).mean())
    assert found.mmcs_dictionary == pytest.approx(cosine.max(axis=0).mean())
    assert found.n_false == (cosine.max(axis=0) < 0.5).sum() > 0
    assert found.recovered_90 == 0
    assert found.hungarian <= found.mmcs_truth


def test_missing_partners_cost_and_false_features_are_counted():
    truth = torch.eye(4)
    found = match_truth(truth, truth[:2])
    assert found.hungarian == pytest.approx(0.5)
    assert found.recovered_90 == 0.5
    assert match_truth(truth, torch.cat([truth, -truth[:3]])).n_false == 3
    assert match_truth(truth, truth[:0]) == (0, 0, 0, 0, 0, 0)


def test_detection_is_sklearns():
    generator = torch.Generator().manual_seed(0)
    a = (torch.rand(500, 5, generator=generator) < 0.3) * 1.0
    f = torch.relu(a + 0.8 * torch.randn(500, 5, generator=generator))
    a[:, 4] = 1.0  # always on: it cannot be scored
    found = detection(f, a)
    on, scores = a.numpy().astype(bool)[:, :4], f.numpy()[:, :4]
    expected = [f1_score(on[:, i], scores[:, i] > 0) for i in range(4)]
    assert found.f1 == pytest.approx(np.mean(expected))
    expected = [roc_auc_score(on[:, i], scores[:, i]) for i in range(4)]
    assert found.auroc == pytest.approx(np.mean(expected))
    silent = detection(torch.zeros(500, 5), a)
    assert (silent.f1, silent.auroc) == (0, 0.5)
    with pytest.raises(UserError, match="every true feature fires always or never"):
        detection(f, torch.ones(500, 5))


# --- the toy model -----------------------------------------------------------------------------


def test_dimensionality_of_known_polytopes():
    def polygon(n):
        angles = torch.arange(n) * 2 * math.pi / n
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    def dimensionality(W):
        return feature_dimensionality(W).tolist()

    assert dimensionality(3 * torch.eye(4)) == pytest.approx([1] * 4)
    assert dimensionality(torch.tensor([[1.0], [-1.0]])) == pytest.approx([0.5] * 2)
    assert dimensionality(polygon(3)) == pytest.approx([2 / 3] * 3)
    assert dimensionality(polygon(5)) == pytest.approx([2 / 5] * 5)
    tetrahedron = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert dimensionality(tetrahedron) == pytest.approx([3 / 4] * 4)
    assert dimensionality(torch.tensor([[2.0, 0], [0, 0]])) == pytest.approx([1, 0])
    both = torch.stack([torch.eye(2), torch.tensor([[1.0, 0], [-1, 0]])])
    assert dimensionality(both)[0] == pytest.approx([1, 1])
    assert dimensionality(both)[1] == pytest.approx([0.5, 0.5])


def test_the_models_loss_is_the_papers_and_each_model_has_its_own():
    models = SuperpositionModels(2, 5, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        models.b.copy_(normal(2, 1, 5, seed=3))
    x, importance = torch.rand(2, 7, 5), torch.tensor([1.0, 0.5, 0.2, 0.1, 0])
    for i, loss in enumerate(models.loss(x, importance).tolist()):
        W, b = models.W[i].detach().numpy(), models.b[i].detach().numpy()
        x_hat = np.maximum(x[i].numpy() @ W @ W.T + b, 0)
        expected = ((x[i].numpy() - x_hat) ** 2 * importance.numpy()).sum(1).mean()
        assert loss == pytest.approx(expected, rel=1e-5)

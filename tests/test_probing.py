"""Sparse probes against scikit-learn, and planted children and absorbers of concepts."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from sparse_coding.probing import (
    absorbed,
    by_parent,
    choose_cost,
    coverage,
    covering_features,
    f1_by_number,
    fit_probe,
    n_needed,
    ranked_features,
    separation,
    weighted_scores,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(n: int = 90, n_positive: int = 31) -> torch.Tensor:
    """Which of n documents are positive, in no order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(5))
    return order < n_positive


# --- choosing ----------------------------------------------------------------------------------


def test_separation_is_cohens_d_of_numpy():
    features, positive = drawn(90, 7).double(), labels()
    features[:, 3] *= 100
    members = torch.arange(90) < 70
    found = separation(
        features, torch.stack([positive, positive & members]),
        torch.stack([~positive, ~positive & members]),
    )  # fmt: skip
    for row, who in zip(found, (np.ones(90, bool), members.numpy()), strict=True):
        a = features.numpy()[positive.numpy() & who]
        b = features.numpy()[~positive.numpy() & who]
        within = (len(a) - 1) * a.var(axis=0, ddof=1) + (len(b) - 1) * b.var(axis=0, ddof=1)
        expected = np.abs(a.mean(axis=0) - b.mean(axis=0)) / np.sqrt(
            within / (len(a) + len(b) - 2)
        )
        np.testing.assert_allclose(row.numpy(), expected, rtol=1e-9)


def test_what_does_not_vary_is_chosen_last_and_the_label_itself_first():
    positive = labels()
    noise = drawn(90, 2)
    constant = torch.linspace(0, 0.7, 31).expand(90, 31)
    features = torch.cat([constant, noise, positive[:, None].float()], dim=1)
    (found,) = ranked_features(features, positive[None], ~positive[None], 34)
    assert found[0] == 33 and found[3:].tolist() == list(range(31))


def test_folds_leave_out_whole_parents_and_have_positives_to_train_on():
    positive, parent = labels(), torch.arange(90) % 17 + 20 * labels().long()
    folds, is_grouped = by_parent(positive, parent)
    assert is_grouped and len(folds) == 5
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(90))
    for train, test in folds:
        assert not set(parent[train].tolist()) & set(parent[test].tolist())
        assert positive[train].any() and not positive[train].all()


def test_positives_of_one_parent_are_divided_by_documents_and_that_is_said():
    positive = labels()
    folds, is_grouped = by_parent(positive, torch.where(positive, 99, torch.arange(90) % 7))
    assert not is_grouped
    assert all(positive[train].any() and positive[test].any() for train, test in folds)


# --- fitting and scoring -----------------------------------------------------------------------


@pytest.mark.parametrize("d", (3, 130))  # by Newton's method, and not
def test_the_probe_is_scikit_learns_on_standardised_features(d):
    positive = labels()
    x = drawn(90, d)
    x[:, :3] = x[:, :3] * torch.tensor([1.0, 50, 0.01]) + 4
    x[:, 1] += 40 * positive
    found = fit_probe(x, positive, 0.1)
    z = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    expected = LogisticRegression(C=0.1, class_weight="balanced", tol=1e-10, max_iter=10_000)
    expected.fit(z.numpy(), positive.numpy())
    reference = expected.decision_function(z.numpy())
    np.testing.assert_allclose(found.score(x).numpy(), reference, atol=1e-4)


def test_the_penalty_is_strong_where_features_are_noise_and_weak_where_they_are_not():
    positive, parent = labels(), torch.arange(90)
    folds, _ = by_parent(positive, parent)
    noise = drawn(90, 40)
    clear = 3 * positive[:, None] + drawn(90, 1, seed=1)
    assert choose_cost(noise, positive, folds) == 1e-3
    assert choose_cost(clear, positive, folds) >= 1e-1


def test_a_parents_habits_choose_no_weak_penalty():
    """Features tell parents apart, not the label: with documents left out they would do."""
    parent = torch.arange(90) // 6
    positive = parent % 2 == 0
    features = torch.nn.functional.one_hot(parent).float()
    grouped, _ = by_parent(positive, parent)
    loose, _ = by_parent(positive, torch.arange(90))
    assert choose_cost(features, positive, grouped) == 1e-3
    assert choose_cost(features, positive, loose) == 10


def test_scores_are_scikit_learns_with_ties_and_weights():
    score, positive = drawn(90).mul(2).round(), labels()
    weights = torch.randint(4, (6, 90), generator=torch.Generator().manual_seed(2)).double()
    weights[0] = 1
    found = weighted_scores(score, positive, weights)
    for i, w in enumerate(weights.numpy()):
        y, s = positive.numpy(), score.numpy()
        assert found.auroc[i].item() == pytest.approx(roc_auc_score(y, s, sample_weight=w))
        expected = average_precision_score(y, s, sample_weight=w)
        assert found.average_precision[i].item() == pytest.approx(expected)


# --- splitting ---------------------------------------------------------------------------------


def test_f1_is_of_documents_left_out_and_of_the_folds_own_features():
    positive = labels()
    features = drawn(90, 6)
    features[:, 2] += 2 * positive
    folds, _ = by_parent(positive, torch.arange(90) % 30)
    chosen = torch.tensor([[2, 0]] * 4 + [[1, 2]])  # the last fold's first feature says nothing
    found = f1_by_number(features, positive, folds, chosen)
    guessed = np.zeros((2, 90), bool)
    for (train, test), ranked in zip(folds, chosen, strict=True):
        for n in (1, 2):
            x = features[:, ranked[:n]].double().numpy()
            z = (x - x[train].mean(0)) / x[train].std(0)
            model = LogisticRegression(C=1.0, class_weight="balanced")
            model.fit(z[train], positive.numpy()[train])
            guessed[n - 1, test] = model.predict(z[test])
    assert found == pytest.approx([f1_score(positive.numpy(), row) for row in guessed], abs=1e-3)


@pytest.mark.parametrize(
    "f1, n", [([0.9, 0.92, 0.99], 1), ([0.5, 0.8, 0.84, 0.85], 3), ([0.3], 1), ([0.1, 0.2], 2)]
)
def test_features_are_needed_until_the_first_small_gain(f1, n):
    assert n_needed(f1) == n


def test_children_that_divide_a_parent_cover_it_together():
    """The parent fires on 40 of 90 documents, its children on 25 and 15 of them."""
    document = torch.arange(90)
    parent = document < 40
    fires = torch.stack(
        [document < 200, document < 25, (document >= 25) & (document < 40), document % 9 == 0,
         document >= 60], dim=1,
    )  # fmt: skip
    assert covering_features(parent, fires, 3) == [1, 2]
    ones = torch.ones(1, 90, dtype=torch.float64)
    one, both = (coverage(parent, fires[:, some], ones) for some in ([1], [1, 2]))
    assert (one.firing.item(), one.silent.item()) == (25 / 40, 0)
    assert (both.firing.item(), both.silent.item()) == (1, 0)
    everywhere = coverage(parent, fires[:, [0]], ones)
    assert (everywhere.firing.item(), everywhere.silent.item()) == (1, 1)


# --- absorption --------------------------------------------------------------------------------


def planted_absorption() -> dict:
    """Direction 0; features: main, along it, one absorber at cosine 0.6, one at 0.05."""
    W_dec = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0.05, 0, 0.99875]])
    f = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [2.0, 3.0, 0], [0, 0, 4.0], [0, 10.0, 0]])
    direction = torch.tensor([3.0, 0, 0]).double()
    total = torch.tensor([2.0, 3.6, 4.0, 2.0, 3.0]).double()
    return {"f": f, "W_dec": W_dec, "direction": direction, "total": total}


def test_the_planted_share_is_absorbed_where_the_main_feature_is_silent():
    found = absorbed(main=torch.tensor([0]), **planted_absorption())
    assert found.is_silent.tolist() == [False, True, False, True, True]
    # 3 * 0.6 of 3.6; the third feature is too far from the direction; no more than all
    assert found.share.tolist() == pytest.approx([0, 0.5, 0, 0, 1])


def test_a_dictionary_without_an_absorber_absorbs_nothing():
    planted = planted_absorption()
    planted["W_dec"][1] = torch.tensor([0, 1.0, 0])
    found = absorbed(main=torch.tensor([0]), **planted)
    assert found.share.tolist() == [0] * 5 and found.is_silent.sum() == 3


def test_at_most_three_features_absorb_and_main_ones_do_not():
    W_dec = torch.tensor([[1.0, 0]] * 6)
    f = torch.tensor([[0.0, 1, 2, 3, 4, 0]])
    whole = torch.tensor([20.0]).double()
    direction = torch.tensor([1.0, 0]).double()
    found = absorbed(f, W_dec, direction, torch.tensor([0]), whole)
    assert found.share.item() == pytest.approx((4 + 3 + 2) / 20)
    assert absorbed(f, W_dec, direction, torch.tensor([0, 5]), whole).share.item() == found.share
    assert absorbed(f, W_dec, direction, torch.tensor([0, 1]), whole).share.item() == 0

"""Polysemanticity's statistics against planted truth, float64 formulas and other libraries."""

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control
from sklearn.metrics import (
    average_precision_score,
    mutual_info_score,
    precision_recall_curve,
    roc_auc_score,
)

from sparse_coding.polysemanticity import (
    Labelled,
    activity_bins,
    auroc,
    average_precision,
    best_threshold,
    choose_concept,
    concept_shares,
    corrected_mutual_information,
    detection,
    discoveries,
    effective_number,
    eligible,
    entropy,
    lift_p,
    lifts,
    mutual_information,
    n_superclasses,
    rao_entropy,
)

N_CONCEPTS, N_DOCUMENTS, N_TOKENS = 6, 60, 40


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def labels():
    concept = torch.arange(N_CONCEPTS).repeat_interleave(N_DOCUMENTS)
    n_tokens = torch.full((len(concept),), float(N_TOKENS), dtype=torch.float64)
    return Labelled(concept, n_tokens, torch.tensor([0, 0, 1, 1, 2, 2]))


def planted(labels, m, n_units, p_active=0.3, mean=3.0, seed=0):
    """Units of the first m concepts, active in some of their documents, several tokens each."""
    g = generator(seed)
    shape = (len(labels.concept), n_units)
    met = (torch.rand(shape, generator=g) < p_active) & (labels.concept[:, None] < m)
    return met * (1 + torch.poisson(torch.full(shape, mean - 1), generator=g))


# --- concentration -----------------------------------------------------------------------------


def test_effective_number_of_even_units_is_the_number_of_concepts(labels):
    for m in range(1, N_CONCEPTS + 1):
        mass = (labels.concept < m).double()[:, None]
        shares = concept_shares(mass, labels, torch.ones(1, len(mass), dtype=torch.float64))
        assert entropy(shares)[0].exp().item() == pytest.approx(m)
        assert effective_number(mass, labels).item() == pytest.approx(m)


def test_effective_number_is_of_rates_not_of_counts(labels):
    """Three times the tokens and three times the mass in one concept is the same unit."""
    mass = planted(labels, 3, 5).double()
    factor = torch.where(labels.concept == 1, 3.0, 1.0).double()
    longer = labels._replace(n_tokens=labels.n_tokens * factor)
    scaled = mass * factor[:, None]
    assert torch.allclose(effective_number(scaled, longer), effective_number(mass, labels))
    assert not torch.allclose(effective_number(scaled, labels), effective_number(mass, labels))


def test_jackknife_equals_leaving_documents_out_one_by_one(labels):
    mass = planted(labels, 4, 3, p_active=0.2).double().numpy()
    concept, n_tokens = labels.concept.numpy(), labels.n_tokens.numpy().copy()
    n_tokens[::7] = 25  # documents of unequal length
    labels = labels._replace(n_tokens=torch.from_numpy(n_tokens))

    def plain(kept):
        of = [kept & (concept == c) for c in range(N_CONCEPTS)]
        q = np.array([mass[k].sum(0) / n_tokens[k].sum() for k in of])
        q /= q.sum(0)
        return -(q * np.log(np.where(q > 0, q, 1))).sum(0)

    everything = np.ones(len(concept), bool)
    h = plain(everything)
    bias = 0
    for d in range(len(concept)):
        kept = everything.copy()
        kept[d] = False
        bias = bias + (1 - 1 / N_DOCUMENTS) * (plain(kept) - h)
    found = effective_number(torch.from_numpy(mass), labels).numpy()
    np.testing.assert_allclose(found, np.exp(h - bias), rtol=1e-10)


def test_effective_number_does_not_depend_on_the_rate(labels):
    """Bursty units of 4 concepts: the plain number is too low for rare ones, the corrected not."""
    ones = torch.ones(1, len(labels.concept), dtype=torch.float64)
    for p_active in (0.1, 0.9):
        mass = planted(labels, 4, 300, p_active, mean=6.0)
        corrected = effective_number(mass, labels)
        assert corrected.mean().item() == pytest.approx(4, abs=0.05)
        plain = entropy(concept_shares(mass, labels, ones))[0].exp().mean().item()
        assert (plain < 3.85) == (p_active == 0.1)


def test_a_unit_of_one_document_has_one_concept_and_a_silent_one_none(labels):
    mass = torch.zeros(len(labels.concept), 2)
    mass[5, 0] = 7.0
    found = effective_number(mass, labels)
    assert found[0].item() == pytest.approx(1) and found[1].isnan()
    assert not eligible(mass).any()


def test_rao_entropy_of_planted_units(labels):
    """Two concepts of one superclass: 1/4; of two: 1/2; one concept: 0."""
    kinds = ([0], [0, 1], [0, 2], [0, 1, 2, 3, 4, 5])
    mass = torch.stack([torch.isin(labels.concept, torch.tensor(k)) for k in kinds], dim=1)
    even = (1 - 1 / 6) - 0.5 / 6  # 6 concepts in pairs of a superclass
    assert rao_entropy(mass.double(), labels).tolist() == pytest.approx([0, 0.25, 0.5, even])


def test_rao_entropy_is_unbiased_in_few_documents(labels):
    rare = rao_entropy(planted(labels, 4, 2000, p_active=0.05, mean=6.0), labels)
    dense = rao_entropy(planted(labels, 4, 200, p_active=0.9, mean=6.0), labels)
    assert rare.mean().item() == pytest.approx(dense.mean().item(), abs=0.01)


# --- lifts -------------------------------------------------------------------------------------


def two_rates(labels, lift, n_units, p=0.2, seed=0):
    """Active in a share p of the documents, in those of concept 0 `lift` times as often."""
    share = torch.where(labels.concept == 0, lift * p, p)[:, None]
    return (torch.rand(len(share), n_units, generator=generator(seed)) < share).float()


def test_lift_is_the_rate_over_that_of_all_others(labels):
    active = planted(labels, 5, 4)
    found = lifts(active, labels, labels.draws(50, generator())).value
    a, c = active.double().numpy(), labels.concept.numpy()
    for k in range(N_CONCEPTS):
        inside, outside = a[c == k].sum(0) / (60 * 40), a[c != k].sum(0) / (300 * 40)
        np.testing.assert_allclose(found[k], inside / outside)


@pytest.mark.parametrize("lift", [1.0, 2.0])
def test_false_positives_at_the_bound_are_as_nominal(labels, lift):
    """p <= .05 where the lift is exactly what is tested, in 4 to 6 % of 1,500 units."""
    active = two_rates(labels, lift, 1500)
    p = lift_p(active, labels, labels.draws(1000, generator(1)), min_lift=lift)
    rate = (p[0] <= 0.05).double().mean().item()
    assert abs(rate - 0.05) < 3 * (0.05 * 0.95 / 1500) ** 0.5


def test_lifts_above_the_bound_are_found_with_their_bound(labels):
    active = two_rates(labels, 4.0, 200)
    weights = labels.draws(1000, generator(1))
    found, p = lifts(active, labels, weights), lift_p(active, labels, weights)
    assert (p[0] <= 0.05).double().mean() > 0.95
    assert (p[1:] > 0.05).all()
    # a one-sided 95 % bound is below the truth in 95 % of the units
    assert 0.90 < (found.low[0] < 4.0).double().mean() < 0.99


def test_a_silent_unit_has_no_significant_lift(labels):
    active = torch.zeros(len(labels.concept), 1)
    assert lift_p(active, labels, labels.draws(20, generator())).tolist() == [[1.0]] * 6


def test_discoveries_equal_scipys_benjamini_hochberg():
    p = torch.rand(40, 50, generator=generator(), dtype=torch.float64)
    p[:5] *= 1e-3
    expected = false_discovery_control(p.flatten().numpy()).reshape(40, 50) <= 0.05
    assert (discoveries(p).numpy() == expected).all() and expected.any()
    assert not discoveries(torch.full((7,), 0.2)).any()


def test_polysemantic_means_two_superclasses(labels):
    significant = torch.zeros(N_CONCEPTS, 3, dtype=torch.bool)
    significant[[0, 1], 0] = True  # of one superclass
    significant[[1, 2, 5], 1] = True
    assert n_superclasses(significant, labels.superclass).tolist() == [1, 3, 0]


def test_draws_keep_documents_in_their_concepts(labels):
    weights = labels.draws(30, generator())
    assert (weights @ labels.one_hot.T == N_DOCUMENTS).all()
    assert (weights[0] == 1).all() and (weights[1:] != 1).any(dim=1).all()


# --- detection and information -----------------------------------------------------------------


def scores(labels, seed=3):
    """Ties in plenty: documents' largest activations, most of them 0."""
    noise = torch.rand(len(labels.concept), 4, generator=generator(seed))
    signal = (labels.concept == 2).float()[:, None] * torch.tensor([0.0, 0.2, 1.0, -0.5])
    return ((noise + signal) * 5).round().sub(2).clamp_min(0) / 5


def test_auroc_and_average_precision_equal_scikit_learns(labels):
    score = scores(labels)
    truth = (labels.concept == 2)[:, None].expand_as(score)
    for j in range(4):
        pair = truth[:, j].numpy(), score[:, j].numpy()
        assert auroc(score, truth)[j].item() == pytest.approx(roc_auc_score(*pair))
        found = average_precision(score, truth)[j].item()
        assert found == pytest.approx(average_precision_score(*pair))


def test_best_threshold_has_the_largest_f1(labels):
    values, truth = scores(labels)[:, 1], labels.concept == 2
    precision, recall, thresholds = precision_recall_curve(truth.numpy(), values.numpy())
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert best_threshold(values, truth) == pytest.approx(thresholds[f1[:-1].argmax()])


def test_the_concept_is_chosen_on_one_half_and_scored_on_the_other(labels):
    """A unit of noise scores by chance on the other half, whatever was chosen for it."""
    choosing, heldout = scores(labels), scores(labels, seed=4)
    concept = choose_concept(choosing, labels)
    by_hand = [
        max(range(6), key=lambda c: roc_auc_score((labels.concept == c).numpy(), column.numpy()))
        for column in choosing.T
    ]
    assert concept.tolist() == by_hand
    noise = torch.rand(len(heldout), 300, generator=generator(5))
    fresh = torch.rand(len(heldout), 300, generator=generator(6))
    chosen = choose_concept(noise, labels)
    winners = auroc(noise, labels.concept[:, None] == chosen).mean().item()
    assert winners > 0.54  # what choosing and scoring on the same half would report
    honest = detection(noise, labels, fresh, labels, chosen).auroc.mean().item()
    assert honest == pytest.approx(0.5, abs=0.006)


def test_detection_of_a_perfect_unit_and_of_one_that_is_silent_in_b(labels):
    perfect = (labels.concept == 4).float()[:, None]
    both = torch.cat([perfect, perfect], dim=1)
    found = detection(both, labels, both * torch.tensor([1.0, 0.0]), labels, torch.tensor([4, 4]))
    assert [x[0].item() for x in found] == [1.0] * 5
    assert found.auroc[1] == 0.5 and found.recall[1] == 0 and found.f1[1] == 0
    assert found.average_precision[1].item() == pytest.approx(1 / 6)


def test_mutual_information_equals_scikit_learns_and_its_null_is_taken_off(labels):
    score = scores(labels)
    bins = activity_bins(score)
    found = mutual_information(bins, labels.concept, N_CONCEPTS)
    for j in range(4):
        expected = mutual_info_score(bins[:, j].numpy(), labels.concept.numpy())
        assert found[j].item() == pytest.approx(expected)
    noise = activity_bins(torch.rand(len(score), 200, generator=generator(7)))
    plain = mutual_information(noise, labels.concept, N_CONCEPTS).mean().item()
    corrected = corrected_mutual_information(noise, labels, generator(8), 20).mean().item()
    assert plain > 0.01 and abs(corrected) < 0.002


def test_activity_bins_are_quantiles_of_what_is_active():
    score = torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 4.0])[:, None]
    assert activity_bins(score, 2)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]

"""Sums per document and unit, thresholds, and statistics of tokens, against plain NumPy."""

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score

from sparse_coding.consistency import sparse_codes
from sparse_coding.errors import UserError
from sparse_coding.token_information import (
    TokenLabels,
    conditional_information,
    firings,
    purity_by_decile,
    token_statistics,
)
from sparse_coding.unit_activity import rate_thresholds, unit_activity

N_ROWS, N_UNITS = 3000, 70  # more units than one thread's block


@pytest.fixture
def acts():
    x = torch.randn(N_ROWS, N_UNITS, generator=torch.Generator().manual_seed(0))
    x[:, 1] = (x[:, 1] - 2.5).relu()  # fires on 0.6 %
    x[:, 2] = 0
    x[:, 3] = 1  # constant: every row is a tie
    return x


def parts(x):
    return iter(x.split([1, 700, 1300, 999]))


def test_thresholds_leave_exactly_the_rate(acts):
    found = rate_thresholds(parts(acts), N_ROWS, (0.001, 0.01, 0.2))
    for rate, row in zip((0.001, 0.01, 0.2), found, strict=True):
        fires = (acts > row).sum(dim=0)
        dense = torch.ones(N_UNITS, dtype=torch.bool)
        dense[1:4] = False
        assert (fires[dense] == round(rate * N_ROWS)).all()
        ordered = acts[:, 0].sort(descending=True).values
        assert row[0] == ordered[round(rate * N_ROWS)]
    assert found[0, 1] > 0 and found[1:, 1].isnan().all()  # too sparse for the higher rates
    assert found[:, 2].isnan().all() and found[:, 3].isnan().all()


def test_of_equal_activations_all_fire_or_none(acts):
    """Numbers of few digits, as in bfloat16: the rate is met as nearly as can be."""
    rounded = (acts * 8).round() / 8
    rates = (0.01, 0.1, 0.2)
    found = rate_thresholds(parts(rounded), N_ROWS, rates)
    for rate, row in zip(rates, found, strict=True):
        fires = (rounded > row).sum(dim=0)
        for unit in (0, 4, 69):
            values = rounded[:, unit].unique()
            possible = [(rounded[:, unit] > v).sum().item() for v in values]
            nearest = min(possible, key=lambda n: abs(n - rate * N_ROWS))
            if row[unit].isnan():
                assert not 0.8 * rate * N_ROWS <= nearest <= 1.25 * rate * N_ROWS
            else:
                assert abs(fires[unit] - rate * N_ROWS) == abs(nearest - rate * N_ROWS)
    assert found[1:, [0, 4, 69]].isfinite().all()


def test_thresholds_are_never_negative(acts):
    negative = -acts[:, :1].abs() - 1
    assert rate_thresholds([negative], N_ROWS, (0.1,)).isnan().all()


def test_rates_that_leave_nothing_are_refused(acts):
    with pytest.raises(UserError, match="at least one token"):
        rate_thresholds([acts], N_ROWS, (0.0001,))
    with pytest.raises(UserError, match="below 1"):
        rate_thresholds([acts], N_ROWS, (1.0,))


def test_activity_equals_a_loop_over_documents(acts):
    document = torch.randint(0, 40, (N_ROWS,), generator=torch.Generator().manual_seed(1))
    thresholds = torch.stack([torch.full((N_UNITS,), 0.7), torch.zeros(N_UNITS)])
    thresholds[0, 5] = torch.nan
    found = unit_activity(parts(acts), document, 41, thresholds)
    for d in (0, 17, 40):
        x = acts[document == d]
        above = x > thresholds[:, None]
        assert torch.equal(found.active[:, d], above.sum(dim=1).float())
        mass = torch.where(above, x - thresholds[:, None], 0.0).sum(dim=1)
        assert torch.allclose(found.mass[:, d], mass, atol=1e-5)
        largest = x.clamp_min(0).amax(dim=0) if len(x) else torch.zeros(N_UNITS)
        assert torch.equal(found.largest[d], largest)
    assert found.active[0, :, 5].sum() == 0 and found.active[1, :, 5].sum() > 0


def test_rows_without_a_document_are_an_error(acts):
    with pytest.raises(ValueError, match="3000 rows of activations for 2999"):
        unit_activity(parts(acts), torch.zeros(N_ROWS - 1).long(), 1, torch.zeros(1, N_UNITS))


# --- tokens ------------------------------------------------------------------------------------

N_CONCEPTS, N_KINDS = 4, 50


@pytest.fixture
def labels():
    """Tokens that go with concepts: knowing the token says much of the concept."""
    rng = np.random.default_rng(0)
    concept = rng.integers(0, N_CONCEPTS, 20_000)
    token = (rng.geometric(0.08, 20_000) + 12 * concept) % N_KINDS
    return TokenLabels(token, concept, N_CONCEPTS)


def codes_of(*masks):
    return sparse_codes(torch.tensor(np.stack(masks, axis=1), dtype=torch.float32))


def test_firings_are_each_units_rows():
    rng = np.random.default_rng(1)
    masks = rng.random((200, 6)) < 0.1
    found = firings(codes_of(*masks.T), 7)
    for j in range(6):
        assert found[j].tolist() == np.flatnonzero(masks[:, j]).tolist()
    assert len(found[6]) == 0


def test_conditional_information_equals_a_sum_over_tokens(labels):
    rng = np.random.default_rng(2)
    fires = rng.random(len(labels.token)) < 0.02 + 0.1 * (labels.concept == 1)
    tokens = np.unique(labels.token)
    possible = np.array(
        [np.bincount(labels.concept[labels.token == t], minlength=4) for t in tokens]
    )
    met = np.array(
        [np.bincount(labels.concept[fires & (labels.token == t)], minlength=4) for t in tokens]
    )
    expected = 0.0
    for t in tokens:
        of_token = labels.token == t
        expected += of_token.sum() * mutual_info_score(fires[of_token], labels.concept[of_token])
    assert conditional_information(met, possible) == pytest.approx(expected)


def test_a_token_detector_says_nothing_beyond_the_token_and_a_context_detector_does(labels):
    rng = np.random.default_rng(3)
    chance = rng.random(len(labels.token))
    of_token = (labels.token == 20) & (chance < 0.5)
    of_concept = (labels.concept == 2) & (chance < 0.05)
    found = token_statistics(codes_of(of_token, of_concept, 0 * of_token), 3, labels, rng)
    assert found.purity[0] == 1 and found.entropy[0] == 0
    assert mutual_info_score(of_token, labels.concept) > 0.004  # it looks like a concept's unit
    assert abs(found.information[0]) < 0.002
    assert found.information[1] > 0.1
    assert np.isnan([found.purity[2], found.entropy[2], found.information[2]]).all()


def test_token_entropy_is_corrected_for_few_firings(labels):
    """A unit that fires anywhere has the tokens' own entropy, however seldom it fires."""
    rng = np.random.default_rng(4)
    share = np.bincount(labels.token) / len(labels.token)
    truth = -(share[share > 0] * np.log(share[share > 0])).sum()
    masks = [rng.random(len(labels.token)) < 0.02 for _ in range(30)]
    found = token_statistics(codes_of(*masks), 30, labels, rng)
    assert found.entropy.mean() == pytest.approx(truth, abs=0.01)


def test_purity_by_decile_of_a_unit_that_is_pure_at_its_strongest():
    concept = np.arange(1000) % 2
    strength = np.where(concept == 1, 2.0, 1.0) + np.linspace(0, 0.5, 1000)
    few = np.where(np.arange(1000) < 9, 1.0, 0.0)
    found = purity_by_decile(codes_of(strength, few), 2, concept, np.array([1, 1]))
    assert found[:, 0].tolist() == [0.0] * 5 + [1.0] * 5
    assert np.isnan(found[:, 1]).all()

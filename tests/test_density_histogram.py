"""Histograms of firing rates: every feature in its bin, silent ones apart."""

import math

import pytest
import torch

from sparse_coding.metrics import density_histogram


def histogram(n_firings, n_rows):
    return density_histogram(torch.tensor(n_firings), n_rows)


def test_the_histogram_counts_every_feature_once():
    generator = torch.Generator().manual_seed(0)
    for n_rows in (7, 100, 4321):
        n_firings = torch.randint(0, n_rows + 1, (57,), generator=generator).tolist()
        assert sum(bin_["n_features"] for bin_ in histogram(n_firings, n_rows)) == 57


@pytest.mark.parametrize("n_rows", [7, 100, 1000, 4321])
def test_a_feature_is_in_the_bin_around_its_rate(n_rows):
    for n in range(1, n_rows + 1, max(1, n_rows // 50)):
        (found,) = [bin_ for bin_ in histogram([n], n_rows) if bin_["n_features"]]
        rate = math.log10(n / n_rows)
        low, high = found["log10_density_low"], found["log10_density_high"]
        assert low - 1e-12 <= rate and (rate < high or n == n_rows), (n, low, high)


def test_silent_features_and_those_that_always_fire_are_told_apart():
    bins = histogram([0, 0, 0, 100, 100, 10], 100)
    assert bins[0] == {
        "log10_density_low": None, "log10_density_high": None, "n_features": 3, "n_tokens": 100
    }  # fmt: skip
    assert (bins[-1]["n_features"], bins[-1]["log10_density_high"]) == (2, 0)


def test_bins_touch_and_reach_from_one_firing_to_all():
    bins = histogram([1], 4321)[1:]
    for one, following in zip(bins, bins[1:], strict=False):
        assert one["log10_density_high"] == following["log10_density_low"]
    assert bins[0]["log10_density_low"] <= math.log10(1 / 4321) < bins[0]["log10_density_high"]

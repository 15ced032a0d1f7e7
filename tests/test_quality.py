"""The comparison of quality: intervals over seeds, and how a learning rate is chosen."""

import math

import pytest
import torch

from benchmarks.learners import Job
from benchmarks.quality import Config, Trained, _score, check, gaps
from sparse_coding.errors import UserError
from sparse_coding.sae import L1SAE


def row(library, seed, fvu, vs="peer", l0=30.0):
    identity = {"architecture": "topk", "library": library, "vs": vs, "seed": seed}
    return identity | {"fvu": fvu, "nats_lost": 2 * fvu, "l0": l0}


def test_a_gap_is_paired_by_seed_and_has_students_interval():
    theirs = [row("peer", seed, fvu) for seed, fvu in ((0, 0.5), (1, 0.2), (2, 0.4))]
    own = [row("ours", seed, fvu, l0=31.0) for seed, fvu in ((2, 0.43), (0, 0.51), (1, 0.22))]
    (gap,) = gaps(theirs + own)
    # Differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01, t(2) = 4.303.
    assert gap["gap"] == pytest.approx(0.02)
    assert gap["gap_high"] - gap["gap"] == pytest.approx(4.303 * 0.01 / math.sqrt(3), rel=1e-3)
    assert gap["gap"] - gap["gap_low"] == pytest.approx(gap["gap_high"] - gap["gap"])
    assert gap["nats_lost_gap"] == pytest.approx(0.04)
    assert (gap["l0_gap"], gap["n_seeds"]) == (pytest.approx(1.0), 3)


def test_ours_is_compared_with_the_peer_it_was_trained_for():
    rows = [row("a", 0, 0.5, "a"), row("a", 1, 0.6, "a"), row("ours", 0, 0.4, "a")]
    rows += [row("ours", 1, 0.5, "a"), row("b", 0, 0.3, "b"), row("b", 1, 0.3, "b")]
    rows += [row("ours", 0, 0.4, "b"), row("ours", 1, 0.4, "b")]
    first, second = gaps(rows)
    assert (first["vs"], first["gap"]) == ("a", pytest.approx(-0.1))
    assert (second["vs"], second["gap"]) == ("b", pytest.approx(0.1))


def test_an_l0_away_from_the_target_costs_and_silence_is_never_best():
    job = Job("topk", 2, 30.0, 1e-3, 0, 100, 64)

    def score(l0, fvu):
        return _score(Trained(job, L1SAE(2, 3), l0, fvu), 30.0)

    assert score(30.0, 0.3) == pytest.approx(0.3)
    assert score(60.0, 0.3) == pytest.approx(0.4)
    assert score(15.0, 0.3) > score(30.0, 0.3)
    assert score(0.0, 0.1) == score(30.0, math.nan) == torch.inf


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"architectures": ("p_anneal",)}, "--architectures p_anneal is unknown"),
        ({"peers": ("sparsify",)}, "--peers sparsify is unknown"),
        ({"seeds": (0,)}, "give two or more"),
    ],
)
def test_what_cannot_be_compared_is_refused(changes, line):
    with pytest.raises(UserError, match=line):
        check(Config(**changes))

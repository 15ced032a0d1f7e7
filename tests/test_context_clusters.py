"""Groups of contexts: planted ones are found, one is an answer, chance is none."""

import numpy as np
import pytest

from sparse_coding.context_clusters import chance, context_clusters, likeness


def contexts(n, centres, rng, concentration=1.5, d=24):
    """Unit vectors around some centres, n in all; none: anywhere."""
    noise = rng.normal(size=(n, d)) / np.sqrt(d)
    if len(centres):
        noise += concentration * centres[np.arange(n) % len(centres)]
    return noise / np.linalg.norm(noise, axis=1, keepdims=True)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random(rng, n=80):
    return [contexts(n, [], rng) for _ in range(8)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_planted_groups_are_counted(rng, k):
    centres = np.linalg.qr(rng.normal(size=(24, k)))[0].T
    found = context_clusters(contexts(80, centres, rng), chance(random(rng)))
    assert found.n == k
    assert found.z > 10


def test_random_contexts_are_one_group_and_no_more_alike_than_chance(rng):
    found = [context_clusters(contexts(80, [], rng), chance(random(rng))) for _ in range(20)]
    assert sum(one.n == 1 for one in found) >= 18
    assert abs(np.mean([one.z for one in found])) < 0.7


def test_groups_that_random_contexts_have_too_are_not_the_units(rng):
    """Text of two kinds: contexts of both kinds are what chance gives."""
    centres = np.linalg.qr(rng.normal(size=(24, 2)))[0].T
    null = chance([contexts(80, centres, rng) for _ in range(8)])
    both = context_clusters(contexts(80, centres, rng), null)
    assert both.n == 1 and abs(both.z) < 4
    assert context_clusters(contexts(80, centres[:1], rng), null).z > 10


def test_likeness_is_the_mean_cosine_of_pairs(rng):
    vectors = contexts(9, [], rng)
    pairs = [vectors[i] @ vectors[j] for i in range(9) for j in range(9) if i != j]
    assert likeness(vectors) == pytest.approx(np.mean(pairs))

"""Contexts: where they end, which are drawn, against brute force on a planted text."""

import numpy as np
import pytest
from planted_units import CAT, LENGTH, PIECES, planted_stream

from sparse_coding.examples import (
    FIRING,
    KINDS,
    MASK,
    NEAR_MISS,
    RANDOM,
    SAME_PREVIOUS,
    SAME_TOKEN,
    Pool,
    Stream,
    bounds,
    contexts_of,
    deciles,
    draw_examples,
    first_half,
    make_pool,
    quiet,
    spread,
)
from sparse_coding.intruders import TextEmbedding


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def stream():
    return planted_stream()


@pytest.fixture(scope="module")
def token(stream):
    return stream.token[stream.position]


def bag(texts):
    """Unit rows of counts of the pieces: an embedding that can be checked by eye."""
    found = np.array([[text.count(piece) for piece in PIECES] for text in texts], dtype=float)
    return found / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-12)


def test_a_context_ends_with_its_document_and_with_what_the_model_saw():
    pieces = [*"abcdefgh"]
    stream = Stream(
        np.arange(8), pieces, np.array([0, 0, 0, 1, 1, 1, 2, 2]), np.array([1, 2, 4, 7]),
        np.array([0, 0, 1, 1]),
    )  # fmt: skip
    found = contexts_of(stream, np.arange(4), radius=2)
    assert [context.text for context in found] == ["abc", "abc", "def", "gh"]
    assert [context.pieces[context.centre] for context in found] == ["b", "c", "e", "h"]
    assert [context.rows.tolist() for context in found] == [
        [-1, 0, 1], [-1, 0, 1], [-1, 2, -1], [-1, 3],
    ]  # fmt: skip
    assert found[2].masked == f"d{MASK}f"


def test_a_context_has_sixteen_tokens_on_both_sides_where_there_are_so_many(stream):
    begin, end = bounds(stream, np.arange(len(stream.position)))
    within = stream.position % LENGTH
    assert np.array_equal(stream.position - begin, np.minimum(within, 16))
    assert np.array_equal(end - stream.position, np.minimum(LENGTH - within, 17))


def test_quiet_rows_are_those_whose_context_holds_no_firing(stream, token):
    fires = (token == CAT) & (rng().random(len(token)) < 0.4)
    is_quiet = quiet(stream, fires, radius=5)
    begin, end = bounds(stream, np.arange(len(token)), 5)
    firing = set(stream.position[fires].tolist())
    expected = [not firing & set(range(b, e)) for b, e in zip(begin, end, strict=True)]
    assert is_quiet.tolist() == expected
    assert 0 < is_quiet.mean() < 1


def test_deciles_are_tenths_of_the_firings_weakest_first():
    values = rng().permutation(100).astype(np.float32)
    found = deciles(values, values >= 50)
    assert (found[values < 50] == -1).all()
    assert np.array_equal(found[values >= 50], (values[values >= 50] - 50) // 5)


def test_halves_share_no_group(stream):
    half = first_half(stream.group, rng())
    a, b = set(stream.group[half]), set(stream.group[~half])
    assert not a & b
    assert len(a) == len(b) == 60


def test_spread_repeats_a_group_only_after_all_others_were_taken():
    group = np.array([0] * 50 + [1] * 5 + [2])
    for seed in range(20):
        found = spread(np.arange(56), group, 4, rng(seed))
        assert sorted(group[found[:3]]) == [0, 1, 2]
        assert len(set(found)) == 4
        after_zero = spread(np.arange(56), group, 2, rng(seed), used=[0])
        assert sorted(group[after_zero]) == [1, 2]


@pytest.fixture(scope="module")
def drawn(stream, token):
    generator = rng(1)
    fires = (token == CAT) & (generator.random(len(token)) < 0.7)
    values = np.where(fires, generator.random(len(token)), 0.0)
    half = first_half(stream.group, generator)
    pool = make_pool(stream, np.flatnonzero(half), 400, bag, generator)
    return (
        draw_examples(stream, values, fires, half, pool, 20, bag, generator),
        fires,
        half,
        values,
    )


def test_examples_are_of_their_half_and_of_their_kind(stream, token, drawn):
    examples, fires, half, _ = drawn
    assert half[examples.row].all()
    assert np.array_equal(fires[examples.row], examples.of(FIRING))
    assert {kind: int(examples.of(kind).sum()) for kind in KINDS} == dict.fromkeys(KINDS, 20)
    assert (token[examples.row[examples.of(SAME_TOKEN)]] == CAT).all()
    previous = stream.token[stream.position - 1][examples.row]
    same = sorted(previous[examples.of(SAME_PREVIOUS)].tolist())
    assert same == sorted(previous[examples.of(FIRING)].tolist())
    assert len(np.unique(stream.group[examples.row[examples.of(FIRING)]])) == 20


def test_firing_examples_are_as_many_of_every_decile(drawn):
    examples, fires, half, values = drawn
    assert np.bincount(examples.decile[examples.of(FIRING)]).tolist() == [2] * 10
    rows = examples.row[examples.of(FIRING)]
    firing = np.sort(values[fires & half])
    share = np.searchsorted(firing, values[rows]) / len(firing)
    assert np.abs(share * 10 - examples.decile[examples.of(FIRING)] - 0.5).max() < 1


def test_a_near_miss_is_the_most_similar_silent_context_of_another_document(stream):
    """Two topics: the near misses of a unit of one topic are silent contexts of that topic."""
    generator = rng(2)
    topic = np.repeat(np.arange(60) % 2, LENGTH)
    token = generator.integers(20, size=60 * LENGTH) + 20 * topic
    document = np.repeat(np.arange(60), LENGTH)
    position = np.flatnonzero(np.arange(len(token)) % LENGTH > 0)
    topic = topic[position]
    topics = Stream(token, PIECES, document, position, document[position])
    fires = (topic == 1) & (generator.random(len(topic)) < 0.1)
    everything = np.ones(len(topic), dtype=bool)
    pool = make_pool(topics, np.arange(len(topic)), 200, bag, generator)
    found = draw_examples(topics, fires * 1.0, fires, everything, pool, 20, bag, generator)
    near, firing = (found.row[found.of(kind)] for kind in (NEAR_MISS, FIRING))
    assert (topic[near] == 1).all()
    assert topic[found.row[found.of(RANDOM)]].mean() < 0.8
    assert len(set(near)) == 20
    assert (topics.group[near] != topics.group[firing]).all()


def test_a_pool_without_silent_rows_has_no_near_misses(stream, token):
    fires = token == CAT
    rows = np.flatnonzero(fires)[:5]
    pool = Pool(rows, bag([c.text for c in contexts_of(stream, rows)]))
    everything = np.ones(len(token), dtype=bool)
    found = draw_examples(stream, fires * 1.0, fires, everything, pool, 10, bag, rng())
    assert not found.of(NEAR_MISS).any()
    assert not found.of(SAME_TOKEN).any()


def test_embeddings_are_unit_rows_whose_mean_over_the_fitted_texts_is_near_zero():
    texts = [f"word{i % 7} and thing{i % 11} of {i % 3}" for i in range(80)]
    embed = TextEmbedding(texts, seed=0, n=8)
    vectors = embed(texts)
    assert vectors.shape == (80, 8)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert np.abs(vectors.mean(axis=0)).max() < 0.2

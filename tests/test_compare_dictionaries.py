"""`python -m analysis.compare_dictionaries`: same tokens, same places, and numbers by hand."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_consistency import dense, pearson
from tiny_models import save_tiny_lm
from tiny_runs import run_program
from transformers import AutoTokenizer

from analysis.encoded import (
    Encoded,
    by_reading,
    encode,
    one_text,
    pair_tokens,
    places,
    visible_ends,
)
from analysis.program import MeasureConfig
from analysis.similarity import compare, firing, load_sides, side
from analysis.subjects import load_subjects
from sparse_coding.errors import UserError
from sparse_coding.sae import L1SAE

SAE = "outputs/runs/whole/saes/l1_x04_l0-6_s{}"
MIN_FIRINGS = 3


@pytest.fixture(scope="module")
def here(place):
    """The place as working directory, with a copy of an SAE and an LM with another tokenizer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield place


@pytest.fixture(scope="module")
def subjects(here, finished):
    return load_subjects([SAE.format(0), SAE.format(1)], MeasureConfig(device="cpu"))


@pytest.fixture(scope="module")
def encoded(subjects):
    return encode(subjects, 10**6, "cpu")


@pytest.fixture(scope="module")
def foreign(here, finished):
    """A dictionary of another language model, whose tokens are other pieces of the same text."""
    text = (here / "text.jsonl").read_text()
    save_tiny_lm("gpt2", here / "other", "cats and dogs near an oldest bluebird tree " * 9, seed=3)
    assert len(text) > 0
    (subject,) = load_subjects([SAE.format(1)], MeasureConfig(device="cpu", lm="other"))
    return encode([subject._replace(name="foreign")], 10**6, "cpu"), subject


# --- places ------------------------------------------------------------------------------------


def test_places_count_within_documents_across_what_is_between():
    document = np.array([-1, 0, 0, -1, 0, -1, 1, 1, -1, -1, 4])
    np.testing.assert_array_equal(places(document), [-1, 0, 1, -1, 2, -1, 0, 1, -1, -1, 0])


def test_visible_ends_are_where_the_decoded_tokens_end(here):
    tokenizer = AutoTokenizer.from_pretrained(here / "lm")
    text = "the cat  sees\n 한국어, é 🤖 old tree \n"
    ends = visible_ends(text, tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ends) == len(ids)
    before = ""
    for i, end in enumerate(ends):
        after = tokenizer.decode(ids[: i + 1])
        new = after[len(before) :].strip().strip("\ufffd")
        if end >= 0:
            assert after == text[:end], "all bytes of the character are there"
            assert text[:end].strip() == text[:end].lstrip(), "it is no white space"
        else:
            assert not new, "a token without an end completes no visible character"
        before = after
    assert sorted(set(ends[ends >= 0])) == sorted(ends[ends >= 0])


def test_two_tokenizers_meet_at_the_characters_where_both_have_a_token_end(encoded, foreign):
    other, _ = foreign
    in_a, in_b = pair_tokens(encoded, other)
    texts = [document.text for document in encoded.text.documents("heldout")]
    np.testing.assert_array_equal(encoded.document[in_a], other.document[in_b])
    expected = set()
    for index, text in enumerate(texts):
        ends = [visible_ends(text, one.tokenizer) for one in (encoded, other)]
        for end in set(ends[0]) & set(ends[1]) - {-1}:
            where = [int(np.flatnonzero(e == end)[0]) for e in ends]
            expected.add((index, *where))
    rows = [
        {(d, p): i for i, (d, p) in enumerate(zip(e.document, e.place, strict=True))}
        for e in (encoded, other)
    ]
    found = set(zip(in_a.tolist(), in_b.tolist(), strict=True))
    by_hand = {
        (rows[0][d, i], rows[1][d, j])
        for d, i, j in expected
        if (d, i) in rows[0] and (d, j) in rows[1]
    }
    assert found == by_hand
    assert 100 < len(found) < min(len(encoded.document), len(other.document))


def test_one_tokenizer_meets_at_every_token_that_both_kept(encoded, subjects):
    half = encode(subjects[:1], 10**6, "cpu")
    kept = np.arange(len(half.document)) % 3 > 0
    fewer = type(half)(half.codes, half.document[kept], half.place[kept], half.tokenizer, None)
    in_a, in_b = pair_tokens(encoded, fewer)
    np.testing.assert_array_equal(in_a, np.flatnonzero(kept))
    np.testing.assert_array_equal(in_b, np.arange(kept.sum()))


def test_tokens_without_an_end_of_their_own_are_never_paired(here, foreign):
    text = SimpleNamespace(documents=lambda split: [SimpleNamespace(text="한국 \n\n 어")])
    sides = []
    for folder in ("lm", "other"):
        tokenizer = AutoTokenizer.from_pretrained(here / folder)
        n = len(
            tokenizer(text.documents("heldout")[0].text, add_special_tokens=False)["input_ids"]
        )
        sides.append(Encoded({}, np.zeros(n, int), np.arange(n), tokenizer, text))
    assert all(len(one.place) > 9 for one in sides)
    assert [len(found) for found in pair_tokens(*sides)] == [3, 3]


# --- similarity --------------------------------------------------------------------------------


def test_features_that_hardly_fire_take_no_part(encoded, subjects):
    codes = encoded.codes[subjects[0].name]
    f = dense(codes, subjects[0].dictionary.d_sae) > 0
    even = encoded.document % 2 == 0
    for least in (1, 3, 30):
        expected = (f[even].sum(0) >= least) & (f[~even].sum(0) >= least)
        found = firing(codes, encoded.document, f.shape[1], least)
        np.testing.assert_array_equal(found, expected)
    assert 0 < side(subjects[0], encoded, 3).codes.features.max() < f.shape[1]


def test_each_number_of_a_pair_by_numpy(encoded, subjects):
    sides = [side(subject, encoded, MIN_FIRINGS) for subject in subjects]
    row, back = compare(*sides)
    kept = [firing(encoded.codes[s.name], encoded.document, 48, MIN_FIRINGS) for s in subjects]
    assert row["n_features_a"] == back["n_features_b"] == kept[0].sum()
    units = []
    for subject, alive in zip(subjects, kept, strict=True):
        W = subject.dictionary.W_dec.double().numpy()[alive]
        units.append(W / np.linalg.norm(W, axis=1, keepdims=True))
    cosine = units[0] @ units[1].T
    assert row["decoder_cosine"] == pytest.approx(cosine.max(axis=1).mean(), rel=1e-5)
    assert back["decoder_cosine"] == pytest.approx(cosine.max(axis=0).mean(), rel=1e-5)
    assert row["decoder_above_0.7"] == pytest.approx((cosine.max(axis=1) >= 0.7).mean())
    assert row["one_to_one_cosine"] == back["one_to_one_cosine"] <= row["decoder_cosine"] + 1e-9
    f = [dense(encoded.codes[s.name], 48)[:, k] for s, k in zip(subjects, kept, strict=True)]
    half = encoded.document % 2 == 1
    chosen = pearson(f[0][~half], f[1][~half])
    assert row["correlation_in_sample"] == pytest.approx(chosen.max(axis=1).mean(), rel=1e-6)
    held_out = pearson(f[0][half], f[1][half])
    partner = chosen.argmax(axis=1)
    expected = held_out[np.arange(len(partner)), partner]
    assert row["correlation"] == pytest.approx(expected.mean(), rel=1e-6)
    assert row["correlation_above_0.7"] == pytest.approx((expected >= 0.7).mean())
    expected = held_out[chosen.argmax(axis=0), np.arange(chosen.shape[1])]
    assert back["correlation"] == pytest.approx(expected.mean(), rel=1e-6)
    assert row["n_tokens_correlation"] == half.sum()


def test_a_dictionary_is_like_itself_and_its_nulls_are_not(encoded, subjects):
    one = side(subjects[0], encoded, MIN_FIRINGS)
    row, _ = compare(one, one)
    for key in ("decoder_cosine", "encoder_cosine", "one_to_one_cosine", "correlation"):
        assert row[key] == pytest.approx(1, abs=1e-5), key
        assert row[f"{key}_null"] < 0.8, key
    assert abs(row["correlation_null"]) < 0.02 < row["correlation_null_in_sample"]


def test_the_null_is_not_the_start_of_training(encoded, subjects):
    """SAEs of one seed begin with the directions of torch's generator of that seed."""
    subject = subjects[0]._replace(dictionary=L1SAE(12, 48, torch.Generator().manual_seed(0)))
    row, _ = compare(side(subject, encoded, MIN_FIRINGS), side(subject, encoded, MIN_FIRINGS))
    assert row["decoder_cosine_null"] < 0.8


def test_directions_of_two_language_models_are_not_compared(encoded, subjects, foreign):
    other, subject = foreign
    theirs = side(subject._replace(name="foreign"), other, MIN_FIRINGS)
    row, _ = compare(side(subjects[0], encoded, MIN_FIRINGS), theirs)
    assert not any(key.startswith(("decoder", "encoder", "one_to_one")) for key in row)
    assert row["correlation"] is not None
    assert row["n_tokens"] < len(encoded.document)


# --- the program -------------------------------------------------------------------------------


def test_the_program_compares_all_pairs_and_writes_them(place, finished):
    done = run_program(
        place, "analysis.compare_dictionaries", "outputs/runs/whole", "--min-firings", "3"
    )
    assert done.returncode == 0, done.stderr
    path = place / "outputs/runs/whole/results/compare_dictionaries.json"
    rows = json.loads(path.read_text())["rows"]
    names = {row["a"] for row in rows}
    assert len(names) == 4
    assert {(row["a"], row["b"]) for row in rows} == {
        (a, b) for a in names for b in names if a != b
    }
    for row in rows:
        assert row["correlation_low"] < row["correlation"] < row["correlation_high"]
        assert row["decoder_cosine"] > row["decoder_cosine_null_covariance_low"] - 0.2
    assert str(path.relative_to(place)) in done.stdout


def test_two_language_models_are_compared_from_the_command_line(place, finished, foreign):
    copy = place / "copied"
    shutil.copytree(place / SAE.format(1), copy, dirs_exist_ok=True)
    config = json.loads((copy / "cfg.json").read_text())
    config["metadata"]["model_name"] = "other"
    (copy / "cfg.json").write_text(json.dumps(config))
    done = run_program(
        place, "analysis.compare_dictionaries", SAE.format(0), "copied",
        "--heldout-fraction", "0.2", "--min-firings", "3", "--output", "between.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    row, _ = json.loads((place / "between.json").read_text())["rows"]
    assert (row["lm_a"], row["lm_b"]) == ("lm", "other")
    assert row["correlation_null"] < row["correlation"] + 0.05


def test_what_cannot_be_compared_is_one_line(here, finished, subjects):
    done = run_program(here, "analysis.compare_dictionaries", SAE.format(0))
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "error: 1 dictionary is named; give two or more, or a run folder"
    )
    with pytest.raises(UserError, match="no feature that fires on 99999 tokens of either half"):
        load_sides(subjects, 10**6, 99_999, "cpu")
    changed = subjects[0].origin.__class__(lm="lm", hook_name="h", text="pile")
    with pytest.raises(
        UserError, match=r"different settings of text \(pile, text.jsonl\); choose"
    ):
        one_text([subjects[0], subjects[1]._replace(origin=changed)])


def test_dictionaries_at_several_hooks_of_one_model_are_one_reading(subjects):
    origin = subjects[0].origin
    lower = type(origin)(**{**vars(origin), "hook_name": "blocks.0.hook_resid_post"})
    others = [subjects[0]._replace(name="lower", origin=lower), *subjects]
    (group,) = by_reading(others)
    encoded = encode(group, 10**6, "cpu")
    assert set(encoded.codes) == {subject.name for subject in others}
    assert len({codes.n_tokens for codes in encoded.codes.values()}) == 1
    alone = encode(others[:1], 10**6, "cpu").codes["lower"]
    assert torch.equal(torch.tensor(alone.starts), torch.tensor(encoded.codes["lower"].starts))

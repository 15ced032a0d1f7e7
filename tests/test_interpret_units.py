"""The program from end to end on a tiny model, and what it is made of against planted truth."""

import json
from collections import defaultdict

import numpy as np
import pytest
import torch
from test_judge import Stub, serving
from tiny_runs import run_program

from analysis.held_rows import drawn_contexts
from analysis.interpretation import (
    Family,
    decile_detections,
    detections,
    estimate,
    find,
    judged,
    make_tools,
    matched,
    read,
    threshold_leaving,
)
from analysis.interpretation_rows import judge_means, over_units
from analysis.subjects import Material, Origin
from sparse_coding.baselines import random_directions
from sparse_coding.examples import contexts_of
from sparse_coding.harvest import activations
from sparse_coding.storage import read_json
from sparse_coding.token_tags import TAGS

SMALL = "--n-units 6 --n-tokens 3000 --n-contexts 20 --n-trials 1 --n-draws 60 --device cpu"
RUN = "outputs/runs/whole"
NAME = "l1_x04_l0-6_s0"


def interpret(place, *arguments):
    settings = [*SMALL.split(), "--judge-attempts", "1", "--judge-timeout", "5"]
    return run_program(place, "analysis.interpret_units", *settings, *arguments)


@pytest.fixture(scope="module")
def sae(finished):
    """An SAE of ratio 4 of the finished run."""
    folders = sorted((finished[1] / "saes").glob("*x04*"))
    return str(folders[0].relative_to(finished[1].parents[2]))


@pytest.fixture(scope="module")
def results(place, sae):
    done = interpret(place, sae, "--output", "plain.json")
    assert done.returncode == 0, done.stderr
    by_what = defaultdict(list)
    for row in read_json(place / "plain.json")["rows"]:
        by_what[row["what"]].append(row)
    return done, by_what


# --- the program -------------------------------------------------------------------------------


def test_every_family_is_described_beside_both_baselines(results):
    done, rows = results
    assert "written: plain.json" in done.stdout
    found = {(r["family"], r["described_by"], r["negatives"]) for r in rows["description"]}
    assert len(found) == 3 * 3 * 4
    for row in rows["description"]:
        if row["described_by"] == "always_negative" and row["balanced_accuracy_n"]:
            half = [row[f"balanced_accuracy{end}"] for end in ("", "_low", "_high")]
            assert half == pytest.approx([0.5] * 3)
            assert row["recall"] == 0
        assert row["balanced_accuracy_n"] <= row["n_units"] <= row["n_sampled"] == 6
    shown = [r for r in rows["description"] if r["described_by"] == "rules"]
    assert all(0 < r["balanced_accuracy_low"] <= r["balanced_accuracy"] for r in shown)


def test_partners_fire_at_the_same_rate_where_it_was_set(results):
    """Of the half for finding; over both halves the rates are near each other."""
    rates = defaultdict(dict)
    for row in results[1]["unit"]:
        rates[row["index"]][row["family"]] = row["rate"]
    assert len(rates) >= 3
    for by_family in rates.values():
        for rate in by_family.values():
            assert rate == pytest.approx(by_family["sae"], rel=0.5)


def test_examples_are_marked_where_the_unit_fires(results):
    for row in results[1]["example"]:
        fires = [value > 0 for value in row["activations"]]
        assert ("<<" in row["text"]) == any(fires)
        assert len(row["tokens"]) == len(fires) <= 33
        assert fires[row["centre"]] == (row["kind"] == "firing")
        assert (row["decile"] is None) == (row["kind"] != "firing")
        assert row["text"].replace("<<", "").replace(">>", "") == "".join(row["tokens"])
    deciles = [r["decile"] for r in results[1]["example"] if r["kind"] == "firing"]
    assert set(deciles) == set(range(1, 11))


def test_a_family_mean_is_the_mean_of_its_units(results):
    _, rows = results
    for row in rows["description"]:
        if row["described_by"] != "rules" or not row["balanced_accuracy_n"]:
            continue
        key = f"{row['negatives']}_balanced_accuracy"
        units = [u.get(key) for u in rows["unit"] if u["family"] == row["family"]]
        units = [value for value in units if value is not None]
        assert len(units) == row["balanced_accuracy_n"]
        assert row["balanced_accuracy"] == pytest.approx(np.mean(units))


def test_intruder_rows_count_their_trials(results):
    _, rows = results
    for family in ("sae", "neuron_basis", "random_directions"):
        some = [r for r in rows["intruder"] if r["family"] == family]
        for intruder in ("random", "same_token"):
            for token in ("shown", "hidden"):
                cell = [r for r in some if (r["intruder"], r["token"]) == (intruder, token)]
                total = next(r["n_trials"] for r in cell if r["decile"] is None)
                assert total == sum(r["n_trials"] for r in cell if r["decile"] is not None)


def test_the_same_command_gives_the_same_rows(place, sae, results):
    done = interpret(place, sae, "--output", "interpreted_again.json")
    assert done.returncode == 0, done.stderr
    assert (
        read_json(place / "interpreted_again.json")["rows"]
        == read_json(place / "plain.json")["rows"]
    )


JUDGED = "--judge-model stub --judge-units 1 --judge-contexts 8 --families random_directions"


def test_a_judge_is_asked_once_and_its_answers_are_in_the_results(place, sae, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    with serving(Stub(mode="never")) as stub:
        asked = [*JUDGED.split(), "--judge-url", stub.url, "--output", "judged.json"]
        done = interpret(place, sae, *asked)
        assert done.returncode == 0, done.stderr
        n = len(stub.questions)
        log = (place / "judged.judge.jsonl").read_text().splitlines()
        assert len(log) == n == len(set(stub.questions)) > 0
        assert f"{n} questions asked" in done.stdout
        again = interpret(place, sae, *asked, "--overwrite")
        assert again.returncode == 0, again.stderr
        assert len(stub.questions) == n
    rows = read_json(place / "judged.json")["rows"]
    rows = [row for row in rows if row["what"] == "judge"]
    for row in rows:
        assert row["n_unparsable"] == 0
        if row["protocol"] in ("detection",):
            assert row["balanced_accuracy"] == 0.5
            assert row["recall"] == 0
    assert {row["protocol"] for row in rows} == {"detection", "fuzzing", "simulation", "intruder"}
    assert "sk-test" not in json.dumps(rows) + "\n".join(log)


def test_a_judge_that_breaks_leaves_the_other_results(place, sae, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(Stub(mode="500")) as stub:
        done = interpret(
            place, sae, *JUDGED.split(), "--judge-url", stub.url, "--output", "broken.json"
        )
        assert done.returncode == 0, done.stderr
        assert len(stub.questions) == 3
    assert "it stopped answering" in done.stdout
    rows = read_json(place / "broken.json")["rows"]
    assert any(row["what"] == "description" for row in rows)
    assert all(not row.get("n") for row in rows if row["what"] == "judge")


URL = ["--judge-url", "http://localhost:1/v1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (URL, "needs --judge-model"),
        ([*URL, "--judge-model", "m", "--judge-max-calls", "9"], "up to 1,206 questions"),
        (["--n-contexts", "3"], "10 or more"),
        (["--n-trials", "0"], "--n-trials 0"),
    ],
)
def test_a_bad_setting_is_one_line(place, sae, arguments, said):
    done = interpret(place, sae, *arguments, "--output", "never.json")
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not (place / "never.json").exists()


# --- its parts ---------------------------------------------------------------------------------

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def material(place):
    """Of documents with digits and lines: every word is the document's own or a number."""
    generator = np.random.default_rng(0)
    lines = []
    for i in range(120):
        words = [f"w{i}" if generator.random() < 0.5 else str(n) for n in range(60)]
        lines.append(json.dumps({"text": " ".join(words[:30]) + "\n" + " ".join(words[30:])}))
    (place / "digits.jsonl").write_text("\n".join(lines))
    text = str(place / "digits.jsonl")
    origin = Origin(str(place / "lm"), HOOK, text=text, heldout_fraction=0.5, context_length=32)
    return Material(origin, "cpu")


@pytest.fixture(scope="module")
def asked():
    directions = random_directions(torch.zeros(12), 5, torch.Generator().manual_seed(0))
    return {"random": (directions, torch.arange(5))}


@pytest.fixture(scope="module")
def measured(material, asked):
    return read(material, asked, 4000, 20, 0)


def test_rows_have_the_token_tags_and_document_that_stand_there(material, measured):
    held = measured[0]
    stream, evidence = held.stream, held.evidence
    batches, _ = drawn_contexts(material, 4000, 0)
    tokens = torch.cat([batch.tokens.flatten() for batch in batches]).tolist()
    document = torch.cat([batch.document.flatten() for batch in batches]).numpy()
    texts = [d.text for d in material.text.documents("heldout")]
    for row, position in enumerate(stream.position.tolist()):
        piece = material.lm.tokenizer.decode(tokens[position])
        assert stream.pieces[evidence.token[row]] == piece
        tags = evidence.tags[row]
        assert tags[TAGS.index("digit")] == any(c.isdigit() for c in piece)
        assert tags[TAGS.index("newline")] == ("\n" in piece)
        before = evidence.previous[row]
        begins = position % 32 == 0 or document[position - 1] != document[position]
        assert (before < 0) == begins
        if before >= 0:
            previous = stream.pieces[before]
            assert previous == material.lm.tokenizer.decode(tokens[position - 1])
            tags = evidence.previous_tags[row]
            assert tags[TAGS.index("digit")] == any(c.isdigit() for c in previous)
        else:
            assert not evidence.previous_tags[row].any()
    for context in contexts_of(stream, np.arange(0, len(stream.position), 97)):
        row = context.rows[context.centre]
        assert context.text in texts[document[stream.position[row]]]
    groups = [texts[d] for d in document[stream.position]]
    assert len(set(zip(groups, stream.group.tolist(), strict=True))) == len(set(groups))


def test_values_are_what_the_units_do_on_those_rows(material, asked, measured):
    held, values = measured
    (directions, units) = asked["random"]
    batch = drawn_contexts(material, 4000, 0)[0][0]
    x = activations(material.lm, batch.tokens, [HOOK])[HOOK].flatten(0, 1)
    first = held.stream.position < batch.tokens.numel()
    expected = directions.encode(x.float())[held.stream.position[first]][:, units]
    assert np.allclose(values["random"][first], expected, atol=1e-6)


def test_what_scores_shares_no_document_with_what_found(material, measured):
    held, values = measured
    tools = make_tools(material, held, 0)
    threshold = np.quantile(values["random"], 0.9, axis=0).astype(np.float32)
    family = Family("random", np.arange(5), values["random"], threshold)
    found = find(tools, family, judged(family, held)[-1], 50, 0)
    group = held.stream.group
    assert not set(group[found.finding.row]) & set(group[found.scoring.row])
    assert held.is_finding[found.finding.row].all()
    drawn = held.weights.sum(dim=0) > 0
    assert set(drawn.nonzero().flatten().tolist()) == set(group[~held.is_finding].tolist())
    every = decile_detections(held, found.scoring, found.description)
    recalls = [every[d].recall[0].item() for d in range(10)]
    whole = detections(held, found.scoring, found.description)["random"]
    assert np.mean(recalls) == pytest.approx(whole.recall[0].item())


def test_units_that_fire_in_few_documents_are_not_judged(measured):
    held, values = measured
    one_document = (held.stream.group[:, None] == 3) * np.ones((1, 5), dtype=np.float32)
    family = Family("random", np.arange(5), one_document, np.zeros(5, dtype=np.float32))
    assert judged(family, held) == []


def test_a_threshold_leaves_as_many_as_equal_values_allow():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for n in (1, 10, 100, 400):
        assert (values > threshold_leaving(n, values)).sum() == n
    assert threshold_leaving(900, values) == 0  # above 0 are no more than there are
    assert threshold_leaving(0, values) == np.inf
    coarse = np.repeat(np.arange(10.0), 10)
    assert (coarse > threshold_leaving(12, coarse)).sum() == 10
    assert (coarse > threshold_leaving(18, coarse)).sum() == 20


def test_matched_units_fire_as_often_as_their_partners_on_the_rows_for_finding():
    generator = np.random.default_rng(1)
    own = np.maximum(generator.normal(size=(500, 3)) - [1, 2, 9], 0).astype(np.float32)
    sae = Family("sae", np.arange(3), own, np.zeros(3, dtype=np.float32))
    dense = generator.normal(size=(500, 4)).astype(np.float32)
    half = generator.random(500) < 0.5
    found = matched(sae, "random_directions", np.arange(4), dense, half)
    counts = [int(found.fires(i)[half].sum()) for i in range(4)]
    assert counts == [int((own[half, i] > 0).sum()) for i in range(3)] + [0]
    assert counts[0] > counts[1] > 0 == counts[2]


def test_an_estimate_leaves_out_draws_that_are_undefined():
    draws = torch.tensor([0.5, torch.nan, 0.4, 0.6, 0.5], dtype=torch.float64)
    found = estimate(draws)
    assert found.value == 0.5
    assert 0.4 <= found.low <= 0.41 < 0.59 <= found.high <= 0.6
    assert np.isnan(estimate(torch.tensor([torch.nan, 1.0], dtype=torch.float64)).value)


def test_a_mean_over_units_leaves_out_units_that_are_undefined():
    draws = torch.rand(201, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws[0, 4] = torch.nan
    draws[7, 2] = torch.nan
    row = over_units("x", list(draws.T), torch.Generator().manual_seed(0))
    assert row["x_n"] == 4
    assert row["x"] == pytest.approx(draws[0, :4].mean().item())
    assert row["x_low"] < row["x"] < row["x_high"]
    assert over_units("x", [draws[:, 4]], torch.Generator()) == {"x": None, "x_n": 0}


def test_judges_means_are_over_units_and_count_what_is_unreadable():
    rows = [
        {"family": "sae", "protocol": "detection", "described_by": "rules", "n": 4,
         "n_unparsable": i, "balanced_accuracy": value}
        for i, value in enumerate((0.5, 1.0, None))
    ]  # fmt: skip
    (mean,) = judge_means(rows)
    assert (mean["n_units"], mean["n"], mean["n_unparsable"]) == (3, 12, 3)
    assert mean["balanced_accuracy"] == 0.75
    assert mean["balanced_accuracy_n"] == 2

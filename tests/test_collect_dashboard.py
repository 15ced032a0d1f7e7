"""`python -m analysis.collect_dashboard` on a tiny run, its parts against formulas, live texts."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix
from tiny_runs import run_in, run_program

from analysis.dashboard_features import best_neurons, histogram
from analysis.live_features import readable_pieces
from data_visualization import dashboard
from sparse_coding.formats import load_dictionary
from sparse_coding.models import direct_logits, load_lm
from sparse_coding.storage import read_json

RUN, NAME = "outputs/runs/whole", "l1_x04_l0-6_s0"
SMALL = "--n-documents 60 --n-tokens 3000 --n-contexts 20 --n-draws 50 --device cpu"


def collect(place, *arguments):
    return run_program(place, "analysis.collect_dashboard", *SMALL.split(), *arguments)


@pytest.fixture(scope="module")
def collected(place, finished):
    done = collect(place, RUN, "--n-effects", "4")
    assert done.returncode == 0, done.stderr
    folder = place / RUN / "results/dashboard" / NAME
    chunks = [read_json(path) for path in sorted((folder / "features").glob("*.json"))]
    entries = {entry["feature"]: entry for chunk in chunks for entry in chunk}
    return read_json(folder / "index.json"), entries, read_json(folder / "prompts.json")


def contexts(entry):
    """All contexts of a feature itself."""
    examples = entry["examples"]
    inside = [context for part in examples["intervals"] for context in part["contexts"]]
    return [*examples["top"], *inside, *examples["near_miss"]]


def at_focus(context):
    return context["acts"][context["focus"]]


def test_index_and_chunks_are_of_the_same_features(collected, place):
    index, entries, _ = collected
    features = [row["feature"] for row in index["rows"]]
    assert features == list(entries) == list(range(index["about"]["d_sae"]))
    first = read_json(place / RUN / "results/dashboard" / NAME / "features/00001.json")
    assert [entry["feature"] for entry in first] == features[32:64]


def test_counts_and_examples_agree(collected):
    index, entries, _ = collected
    n_tokens, n_alive = index["about"]["n_tokens"], 0
    for row in index["rows"]:
        entry = entries[row["feature"]]
        assert row["density"] == pytest.approx(row["n_firings"] / n_tokens, rel=1e-3)
        assert sum(entry["histogram"]["counts"]) == row["n_firings"]
        assert (
            sum(part["n_firings"] for part in entry["examples"]["intervals"]) == row["n_firings"]
        )
        top = [at_focus(context) for context in entry["examples"]["top"]]
        assert top == sorted(top, reverse=True)
        if row["n_firings"]:
            n_alive += 1
            assert top[0] == pytest.approx(row["max"], rel=1e-3)
        for part in entry["examples"]["intervals"]:
            for context in part["contexts"]:
                assert part["low"] * 0.999 <= at_focus(context) <= part["high"] * 1.001
        assert all(at_focus(context) == 0 for context in entry["examples"]["near_miss"])
        assert all(len(c["tokens"]) == len(c["acts"]) for c in contexts(entry))
    assert n_alive > 20


def test_strongest_contexts_are_of_different_documents_while_there_are_enough(collected):
    _, entries, _ = collected
    for entry in entries.values():
        documents = [context["document"] for context in entry["examples"]["top"]]
        n_repeated = len(documents) - len(set(documents))
        others = {c["document"] for c in contexts(entry) if at_focus(c) > 0}
        assert n_repeated == 0 or others == set(documents)


def test_concepts_are_measured_where_a_feature_is_active_enough(collected):
    index, entries, _ = collected
    judged = [row for row in index["rows"] if row["n_eff"] is not None]
    assert judged
    for row in judged:
        assert row["n_eff_low"] <= row["n_eff"] <= row["n_eff_high"]
        bars = entries[row["feature"]]["concepts"]
        assert len(bars) == 14
        assert sum(bar["share"] for bar in bars) == pytest.approx(1)
        assert all(bar["share_low"] <= bar["share"] + 1e-9 for bar in bars)
    dead = [row for row in index["rows"] if row["n_firings"] == 0]
    for row in dead:
        assert row["top_token"] is None
        assert row["interpretability"] is None


def test_neighbours_have_the_cosines_of_their_rows(collected, place):
    _, entries, _ = collected
    own = load_dictionary(place / RUN / "saes" / NAME).W_dec.detach().numpy()
    for feature in (0, 7, 17):
        neighbours = entries[feature]["neighbours"]
        assert len(neighbours) == 3
        for other in neighbours:
            rows = load_dictionary(place / RUN / "saes" / other["sae"]).W_dec.detach().numpy()
            cosines = rows @ own[feature] / np.linalg.norm(rows, axis=1)
            cosines /= np.linalg.norm(own[feature])
            assert other["feature"] == cosines.argmax()
            assert other["cosine"] == pytest.approx(cosines.max(), abs=1e-3)


def test_effects_are_of_so_many_features(collected):
    _, entries, _ = collected
    effects = [entry["effect"] for entry in entries.values() if entry["effect"]]
    assert 1 <= len(effects) <= 4
    for effect in effects:
        assert effect["kl"] > 0
        assert effect["n_firings"] == sum(one["n_firings"] for one in effect["by_concept"])


def test_the_feature_the_neuron_and_the_direction_stand_side_by_side(collected, place):
    _, entries, _ = collected
    for entry in list(entries.values())[:20]:
        n_firings = sum(sum(n) for n in entry["histogram"]["by_concept"].values())
        assert len(entry["on_concepts"]) == min(4, n_firings)
        beside = [entry[kind]["contexts"] for kind in ("nearest_neuron", "random_direction")]
        for contexts_of_one in (entry["on_concepts"], *beside):
            for context in contexts_of_one:
                assert at_focus(context) > 0
                assert context["concept"]


def test_prompts_leave_out_the_first_position(collected):
    _, _, prompts = collected
    assert len(prompts) == 14 + 6
    for prompt in prompts:
        assert len(prompt["tokens"]) == len(prompt["features"])
        assert prompt["features"][0] == []
        for found in prompt["features"]:
            strengths = [activation for _, activation in found]
            assert strengths == sorted(strengths, reverse=True)
    assert any(found for prompt in prompts for found in prompt["features"])


def test_a_text_typed_in_is_read_as_collected(collected, place):
    """Live texts go through the same model, mask and dictionary as the collected prompts."""
    _, _, prompts = collected
    asked = [{"text": "the red cat sees"}, {"text": " "}, {"text": "cat " * 200}]
    command = [sys.executable, "-m", "analysis.live_features", RUN, NAME, "--device", "cpu"]
    lines = "\n".join(map(json.dumps, asked)) + "\n"
    shell = ["bash", "-c", f"printf '%s' '{lines}' | {' '.join(command)}"]
    done = run_in(place, shell)
    ready, found, empty, long = done.stdout.splitlines()
    assert ready == "ready", done.stderr
    answer = json.loads(found)
    lm = load_lm(str(place / "lm"), device="cpu")
    sae = load_dictionary(place / RUN / "saes" / NAME)
    ids = lm.tokenizer("the red cat sees", add_special_tokens=False)["input_ids"]
    ids = [lm.tokenizer.bos_token_id, *ids]
    assert answer["tokens"] == [lm.tokenizer.decode([i]) for i in ids]
    gpt_neox = lm.model.original_model.gpt_neox
    hidden = gpt_neox(torch.tensor([ids]), output_hidden_states=True).hidden_states
    turns = gpt_neox.rotary_emb(hidden[1], torch.arange(len(ids))[None])
    # the last block by itself: what transformers calls the last hidden state is after the norm
    x = gpt_neox.layers[1](hidden[1], position_embeddings=turns)
    x = x[0] if isinstance(x, tuple) else x
    f = sae.encode(x.reshape(len(ids), -1).float())
    assert answer["features"][0] == []
    for place_, found_here in enumerate(answer["features"][1:], 1):
        assert found_here == [
            [i, pytest.approx(f[place_, i].item(), rel=1e-4)] for i, _ in found_here
        ]
        assert len(found_here) == min(8, int((f[place_] > 0).sum()))
    assert "empty" in json.loads(empty)["error"]
    assert "tokens" in json.loads(long)["error"]


def test_a_dictionary_of_no_run_and_its_site(place, finished):
    shutil.copytree(place / RUN / "saes" / NAME, place / "elsewhere")
    done = collect(place, "elsewhere", "--features", "3", "5", "--n-contexts", "0")
    assert done.returncode == 0, done.stderr
    index = read_json(place / "outputs/results/dashboard/elsewhere/index.json")
    assert [row["feature"] for row in index["rows"]] == [3, 5]
    assert all(row["description"] is None for row in index["rows"])
    done = run_program(place, "data_visualization.dashboard", "outputs", "--name", "elsewhere")
    assert done.returncode == 0, done.stderr
    script = (place / "outputs/dashboard/elsewhere/data/index.js").read_text()
    content = json.loads(script.removeprefix('dashboard.receive("index",').removesuffix(");\n"))
    assert content["columns"]["feature"] == [3, 5]
    assert set(content["columns"]) == set(dashboard.COLUMNS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((RUN, "--saes", "none"), "no SAE none; there are"),
        ((RUN, "--features", "9999"), "--features 9999: l1_x04_l0-6_s0 has 0 to"),
        ((RUN, "--n-documents", "3"), "--n-documents 3 is not possible; it must be 10 or more"),
        ((RUN, "--n-contexts", "4"), "it must be 10 or more, or 0"),
        ((RUN,), "exists; give --overwrite"),
        ((), "name a run's folder"),
    ],
)
def test_bad_input_is_one_line(collected, place, arguments, message):
    done = collect(place, *arguments)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert message in last


# --- parts ---------------------------------------------------------------------------------------


def test_direct_logits_are_those_of_the_norm_and_unembedding(place, finished):
    """LayerNorm(v) = (v - mean) / std * scale + bias: up to std and the bias, the same logits."""
    lm = load_lm(str(place / "lm"), device="cpu", dtype="float32")
    v = torch.randn(5, lm.d_model, generator=torch.Generator().manual_seed(0))
    hf = lm.model.original_model
    norm, unembed = hf.gpt_neox.final_layer_norm, hf.get_output_embeddings()
    with torch.no_grad():
        norm.weight.normal_(1, 0.3, generator=torch.Generator().manual_seed(1))
        written = unembed(norm(v)) - unembed(norm(torch.zeros_like(v)))
    std = v.std(dim=1, correction=0, keepdim=True)
    expected = (written - written.mean(dim=1, keepdim=True)) * std
    assert torch.allclose(direct_logits(lm, v), expected, atol=1e-3)


def test_best_neurons_are_of_the_largest_correlation():
    generator = np.random.default_rng(0)
    features = np.maximum(generator.normal(size=(400, 6)), 0).astype(np.float32)
    neurons = generator.normal(size=(400, 300)).astype(np.float32) + 5
    neurons[:, 280] -= 3 * features[:, 2]  # an opposite one, in the second part
    neurons[:, 7] += 2 * features[:, 4]
    neurons[:, 9] = 1.0  # never varies
    features[:, 5] = 0.0  # never fires
    best, value = best_neurons(csc_matrix(features), torch.from_numpy(neurons))
    keep = np.r_[0:9, 10:300]
    exact = np.corrcoef(features[:, :5].T, neurons[:, keep].T)[:5, 5:]
    assert best[:5].tolist() == keep[np.abs(exact).argmax(axis=1)].tolist()
    assert best[2] == 280
    assert value[2] < -0.5
    assert value[4] == pytest.approx(exact[4].max(), abs=1e-4)
    assert value[5] == 0


def test_histogram_counts_firings_of_each_concept():
    column = np.array([0, 1.0, 2.0, 3.0, 0, 3.0], dtype=np.float32)
    concept = np.array([0, 0, 0, 1, 1, 1])
    found = histogram(None, column, concept, ["a", "b", "c"])
    assert {name: sum(n) for name, n in found["by_concept"].items()} == {"a": 2, "b": 2}
    assert found["by_concept"]["b"][-1] == 2
    assert found["edges"][-1] == 3


def test_characters_of_several_tokens_are_read_whole(place, finished):
    lm = load_lm(str(place / "lm"), device="cpu")
    text = "the cat 한국어 sees"
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = readable_pieces(ids, lm.tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "한" in "".join(pieces)
    assert pieces.count("") == 6  # two more bytes of each of the three
    cut = readable_pieces(ids[: pieces.index("") + 1], lm.tokenizer)
    assert "\ufffd" in "".join(cut)

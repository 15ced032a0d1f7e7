"""Every program of analysis on dictionaries of other libraries, exactly as on our own.

Foreign files are made here of one SAE of a finished run, with what such files say of their
training and what they leave out; that their layouts are right is what the tests of formats show.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from analysis import (
    collect_dashboard,
    compare_baselines,
    compare_dictionaries,
    evaluate,
    find_units,
    interpret_units,
    measure_polysemanticity,
    probe_concepts,
    subjects,
)
from analysis.program import MeasureConfig
from analysis.subjects import Origin, load_subjects
from data_visualization import dashboard
from pretrained.catalogue import releases
from sparse_coding.errors import UserError
from sparse_coding.formats.dictionary_learning import save_dictionary_learning
from sparse_coding.formats.gemma_scope import save_gemma_scope
from sparse_coding.formats.openai import StandardisedDictionary, save_openai
from sparse_coding.formats.saelens import load_saelens, save_saelens
from sparse_coding.formats.sparsify import save_sparsify
from sparse_coding.sae import L1SAE, JumpReLUSAE, TopKSAE
from sparse_coding.storage import read_json, read_object, write_json

OURS = "outputs/runs/whole/saes/l1_x04_l0-6_s0"
HOOK = "blocks.1.hook_resid_post"
# What no foreign file knows of the tiny run's text, so that the same rows are read.
TEXT = {"text": "text.jsonl", "context_length": 32, "heldout_fraction": 0.2, "bos": "always"}
PLACE = {"lm": "lm", "hook_name": HOOK}
CORPUS = {"n_documents": 20, "n_tokens": 24, "n_draws": 30}
FOUR = ("citations", "dialogue", "http", "korean")


def like(sae, cls, **options):
    """The same weights in another class."""
    other = cls(sae.d_in, sae.d_sae, torch.Generator(), **options)
    other.load_state_dict(sae.state_dict(), strict=False)
    return other


@pytest.fixture(scope="module")
def foreign(finished, place):
    """Sources by format; the first two name their model and place, the others nothing."""
    root = place / "foreign"
    sae = load_saelens(place / OURS)
    said = {"lm_name": "lm", "submodule_name": "resid_post_layer_1"}
    theirs = save_dictionary_learning(sae, root / "trainer_0", metadata=said)
    config = read_json(theirs / "config.json")
    del config["trainer"]["sparse_coding"]
    write_json(theirs / "config.json", config | {"buffer": {"io": "out", "ctx_len": 32}})

    topk = like(sae, TopKSAE, k=6)
    module = save_sparsify(topk, root / "sparsify" / "layers.1", metadata={})
    run = {"model": "lm", "dataset": "text.jsonl", "ctx_len": 32, "hookpoints": ["layers.1"]}
    write_json(module.parent / "config.json", run)

    jumprelu = like(sae, JumpReLUSAE)
    with torch.no_grad():
        jumprelu.b_enc -= sae.b_dec @ sae.W_enc
        jumprelu.threshold.zero_()
    scope = save_gemma_scope(jumprelu, root / "layer_1" / "width_48" / "average_l0_6")
    standardised = StandardisedDictionary(like(sae, TopKSAE, k=6))
    old = root / "resid_out_layer1" / "10_48"
    old.mkdir(parents=True)
    torch.save(torch.load(theirs / "ae.pt"), old / "ae.pt", _use_new_zipfile_serialization=False)
    return {
        "dictionary_learning": theirs,
        "sparsify": module,
        "gemma_scope": scope,
        "openai": save_openai(standardised, root / "openai.pt"),
        "december_2023": old,
    }


@pytest.fixture
def here(place, foreign, monkeypatch):
    monkeypatch.chdir(place)
    return {name: str(path.relative_to(place)) for name, path in foreign.items()}


def rows_of(program, output: Path, **settings):
    program.main(program.Config(output=output, device="cpu", **settings))
    return json.loads(output.read_text())["rows"]


def without_names(rows):
    """All but how a dictionary is called, and what only a run knows of it."""
    names = {"name", "sae", "architecture", "target_l0", "l1_coeff", "seed", "sae_architecture",
             "sae_seed", "n_tokens_trained"}  # fmt: skip
    return [{k: v for k, v in row.items() if k not in names} for row in rows]


def assert_same_rows(theirs, ours):
    theirs, ours = without_names(theirs), without_names(ours)
    assert len(theirs) == len(ours) > 0
    for a, b in zip(theirs, ours, strict=True):
        assert a.keys() == b.keys()
        for key, value in b.items():
            about = {"rel": 1e-3, "abs": 1e-3} if isinstance(value, float) else {}
            assert a[key] == (pytest.approx(value, **about) if about else value), key


def test_files_say_where_they_were_trained_as_far_as_they_do(here):
    cfg = MeasureConfig(device="cpu")
    (theirs,) = load_subjects([here["dictionary_learning"]], cfg)
    assert (theirs.origin.lm, theirs.origin.hook_name) == ("lm", HOOK)
    assert theirs.origin.context_length == 32 and theirs.facts["ratio"] == 4
    (module,) = load_subjects([here["sparsify"]], cfg)
    assert (module.origin.lm, module.origin.hook_name, module.origin.text) == (
        "lm", HOOK, "text.jsonl",
    )  # fmt: skip
    for name in ("gemma_scope", "openai", "december_2023"):
        with pytest.raises(UserError, match="give --lm"):
            load_subjects([here[name]], cfg)
        (told,) = load_subjects([here[name]], MeasureConfig(device="cpu", **PLACE))
        assert told.origin.hook_name == HOOK


def test_a_dictionary_of_an_older_saelens_asks_for_bos_and_for_a_centred_model(tmp_path):
    """Before 6 no `prepend_bos` meant True."""
    save_saelens(L1SAE(12, 20, torch.Generator()), tmp_path / "a", metadata={})
    config = read_object(tmp_path / "a/cfg.json") | {"model_name": "gpt2-small"}
    config |= {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    config |= {"hook_point": HOOK}
    del config["metadata"]
    write_json(tmp_path / "a/cfg.json", config)
    (found,) = load_subjects([str(tmp_path / "a")], MeasureConfig(device="cpu"))
    assert found.origin == Origin("gpt2-small@centred", HOOK, bos="always")
    assert releases()["gpt2-small-res-jb"].model == "gpt2@centred"


def test_the_model_that_a_release_names_goes_before_its_files(here, monkeypatch):
    """They have short names that only their library looks up."""
    known = {"theirs": SimpleNamespace(model="the/one", architecture="L1", dictionaries=())}
    said = {"lm": "lm", "hook_name": HOOK, "architecture": "l1"}
    monkeypatch.setattr(subjects, "training_facts", lambda _: said)
    monkeypatch.setattr(subjects, "releases", lambda: known)
    monkeypatch.setattr(subjects, "fetched", lambda _: Path(here["dictionary_learning"]))
    (found,) = load_subjects(["theirs/a"], MeasureConfig(device="cpu"))
    assert (found.origin.lm, found.origin.hook_name) == ("the/one", HOOK)
    assert found.facts["architecture"] == "l1"


@pytest.mark.parametrize(
    ("name", "hook_name"),
    [
        ("layers.1", HOOK),
        ("gpt_neox.layers.1", HOOK),
        ("h.1", HOOK),
        ("layers.1.mlp", None),  # which norm its output passes depends on the model
        ("layers.1.attention", None),
    ],
)
def test_only_the_output_of_a_block_is_taken_for_a_hook(name, hook_name, here, tmp_path):
    module = tmp_path / "run" / name
    save_sparsify(TopKSAE(12, 20, torch.Generator(), k=3), module, metadata={})
    write_json(module.parent / "config.json", {"model": "lm", "hookpoints": [name]})
    if hook_name:
        (found,) = load_subjects([str(module)], MeasureConfig(device="cpu"))
        assert found.origin.hook_name == hook_name
    else:
        with pytest.raises(UserError, match=f"give --hook-name, .* calls its place '{name}'"):
            load_subjects([str(module)], MeasureConfig(device="cpu"))


def test_gemma_scope_2_names_its_model_and_block(here, tmp_path):
    sae = JumpReLUSAE(12, 20, torch.Generator())
    tensors = {name: value.contiguous() for name, value in sae.state_dict().items()}
    save_file(tensors, tmp_path / "params.safetensors")
    said = {"model_name": "lm", "hf_hook_point_in": "model.layers.1.output"}
    write_json(tmp_path / "config.json", said)
    (found,) = load_subjects([str(tmp_path)], MeasureConfig(device="cpu"))
    assert (found.origin.lm, found.origin.hook_name) == ("lm", HOOK)


def test_two_folders_of_one_name_are_two_dictionaries(here, foreign, tmp_path):
    """Published sets have one: layer_1/average_l0_6, layer_2/average_l0_6."""
    sae = load_saelens(OURS)
    paths = [
        str(save_dictionary_learning(sae, tmp_path / layer / "10_48", metadata={}))
        for layer in ("a", "b")
    ]
    cfg = MeasureConfig(device="cpu", **PLACE)
    assert [s.name for s in load_subjects(paths, cfg)] == ["a/10_48", "b/10_48"]
    with pytest.raises(UserError, match="10_48 is named twice"):
        load_subjects([paths[0], paths[0]], cfg)


def test_evaluate_compare_and_interpret_take_every_format(here, tmp_path):
    sources, settings = tuple(here.values()), PLACE | TEXT
    found = rows_of(
        evaluate, tmp_path / "e.json", dictionaries=(OURS, *sources), n_tokens=800,
        n_tokens_ce=200, random_error=False, **settings,
    )  # fmt: skip
    assert len({row["name"] for row in found}) == 1 + len(here)
    for key in ("l0", "fvu", "nats_lost"):
        for row in (found[1], found[3], found[5]):  # the same function in three layouts
            assert row[key] == pytest.approx(found[0][key], rel=1e-3, abs=1e-4)
    pairs = rows_of(
        compare_dictionaries, tmp_path / "c.json", dictionaries=sources, n_tokens=800,
        min_firings=2, **settings,
    )  # fmt: skip
    assert len(pairs) == len(here) * (len(here) - 1)
    found = rows_of(
        interpret_units, tmp_path / "i.json", dictionaries=sources, n_units=4, n_tokens=2000,
        n_contexts=10, n_trials=1, n_draws=20, families=(), **settings,
    )  # fmt: skip
    assert len({row["name"] for row in found}) == len(here)


@pytest.mark.parametrize("name", ["dictionary_learning", "gemma_scope"])
def test_find_units_finds_the_same_in_an_imported_dictionary(name, here, tmp_path):
    settings = CORPUS | {"concepts": FOUR, "rate": 0.03, "n_show": 2}
    del settings["n_draws"]
    ours = rows_of(find_units, tmp_path / "ours.json", source=OURS, **settings)
    told = PLACE | TEXT if name == "gemma_scope" else TEXT
    theirs = rows_of(find_units, tmp_path / "theirs.json", source=here[name], **told, **settings)
    assert_same_rows(theirs, ours)


def test_a_dictionary_without_a_run_is_probed_beside_what_needs_none(here, tmp_path, capsys):
    settings = CORPUS | {"concepts": FOUR, "ks": (1, 2), "n_tokens_train": 2048}
    settings |= {"families": ("untrained", "pca", "random_directions")}
    theirs = rows_of(
        probe_concepts, tmp_path / "p.json", source=here["sparsify"], heldout_fraction=0.2,
        **settings,
    )  # fmt: skip
    assert "left out, for only a run knows how to train them: untrained" in capsys.readouterr().out
    families = {row["family"] for row in theirs}
    assert families == {"dense", "sae", "pca", "random_directions"}
    config = json.loads((tmp_path / "p.json").read_text())["config"]
    assert config["families"] == ["pca", "random_directions"]


@pytest.mark.parametrize("name", ["gemma_scope", "openai"])
def test_units_of_an_imported_dictionary_are_measured(name, here, tmp_path):
    settings = CORPUS | PLACE | TEXT | {"concepts": FOUR, "n_tokens_train": 2048, "n_effects": 1}
    settings |= {"n_units": 20, "rate": 0.03, "rates": (0.03,), "families": ("mlp_neurons", "pca")}
    rows = rows_of(measure_polysemanticity, tmp_path / "m.json", source=here[name], **settings)
    found = {row["family"] for row in rows if row["what"] == "family" and row["n_units"]}
    assert found == {"sae", "mlp_neurons", "pca"}


def test_an_imported_dictionary_is_set_against_baselines_as_our_own(here, tmp_path):
    settings = {"n_tokens": 800, "n_tokens_ce": 200, "n_tokens_train": 2048, "random_lms": ()}
    settings |= {"families": ("pca", "random_directions"), **PLACE, **TEXT}
    rows = {
        name: rows_of(compare_baselines, tmp_path / f"{name}.json", source=source, **settings)
        for name, source in (("ours", OURS), ("theirs", here["december_2023"]))
    }
    assert_same_rows(rows["theirs"], rows["ours"])


def test_controls_are_left_out_where_flags_name_other_activations(here, tmp_path, capsys):
    """Those in the run's folder are of the run's own."""
    settings = {"n_tokens": 800, "n_tokens_ce": 200, "n_tokens_train": 2048, "context_length": 16}
    rows = rows_of(
        compare_baselines, tmp_path / "b.json", source=OURS, families=("untrained", "pca"),
        random_lms=("random",), **settings,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "left out" in said and "untrained, the model with random weights" in said
    assert {row["family"] for row in rows} == {"sae", "pca"}


def test_the_feature_browser_shows_an_imported_dictionary(here, place, monkeypatch):
    cfg = collect_dashboard.Config(
        source=here["december_2023"], device="cpu", features=(3, 5), n_contexts=0, n_tokens=2000,
        n_documents=20, n_draws=20, **PLACE, **TEXT,
    )  # fmt: skip
    collect_dashboard.main(cfg)
    index = read_json(place / "outputs/results/dashboard/10_48/index.json")
    assert [row["feature"] for row in index["rows"]] == [3, 5]
    monkeypatch.setattr("sys.argv", ["dashboard", "outputs", "--name", "10_48"])
    dashboard.main()
    assert (place / "outputs/dashboard/10_48/index.html").is_file()

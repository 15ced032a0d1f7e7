"""`python -m analysis.evaluate` and how dictionaries find the activations they are for."""

import json
import shutil

import pytest
import torch
from tiny_runs import run_program

from analysis.program import MeasureConfig, cell, results_path
from analysis.subjects import Material, load_subjects
from sparse_coding.errors import UserError
from sparse_coding.formats.dictionary_learning import save_dictionary_learning
from sparse_coding.formats.saelens import load_saelens

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def evaluated(place, finished):
    done = run_program(place, "analysis.evaluate", "outputs/runs/whole", "--n-tokens-ce", "300")
    assert done.returncode == 0, done.stderr
    return done, json.loads((place / "outputs/runs/whole/results/evaluate.json").read_text())


def test_every_sae_of_a_run_is_measured_on_the_documents_that_the_run_held_out(
    evaluated, finished
):
    _, content = evaluated
    summary = json.loads((finished[1] / "summary.json").read_text())["rows"]
    assert [row["name"] for row in content["rows"]] == sorted(row["name"] for row in summary)
    by_name = {row["name"]: row for row in content["rows"]}
    for row in summary:
        # the run stopped at 1,500 tokens; here all that is held out counts
        assert by_name[row["name"]]["n_tokens_eval"] > row["n_tokens_eval"]
        assert by_name[row["name"]]["fvu"] == pytest.approx(row["fvu"], rel=0.1)
        assert by_name[row["name"]]["seed"] == row["seed"]


def test_the_same_tokens_give_the_runs_own_numbers(place, finished):
    done = run_program(
        place, "analysis.evaluate", "outputs/runs/whole/saes/l1_x04_l0-6_s1",
        "--n-tokens", "1500", "--n-tokens-ce", "600", "--output", "same.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((place / "same.json").read_text())["rows"]
    summary = json.loads((finished[1] / "summary.json").read_text())["rows"]
    (expected,) = [other for other in summary if other["name"] == row["name"]]
    for key in ("l0", "fvu", "fvu_low", "ce_sae", "kl", "cosine", "n_tokens_eval", "ce_zero"):
        assert row[key] == pytest.approx(expected[key], rel=1e-4), key
    # what mean-ablation writes is the mean of more rows here
    assert row["ce_mean"] == pytest.approx(expected["ce_mean"], rel=0.02)


def test_the_table_and_the_path_are_printed(evaluated):
    done, content = evaluated
    assert all(row["name"] in done.stdout for row in content["rows"])
    assert done.stdout.rstrip().endswith("results/evaluate_density.json")


def test_results_are_not_replaced_unasked(place, evaluated):
    done = run_program(place, "analysis.evaluate", "outputs/runs/whole")
    assert done.returncode == 2
    assert done.stderr.strip().startswith("error: outputs/runs/whole/results/evaluate.json exists")


def test_an_imported_dictionary_is_measured_exactly_as_our_own(place, finished, tmp_path):
    sae = load_saelens(finished[1] / "saes/l1_x04_l0-6_s0")
    imported = tmp_path / "imported"
    save_dictionary_learning(sae, imported, metadata={})
    arguments = ["--n-tokens", "800", "--n-tokens-ce", "200", "--no-random-error"]
    flags = [
        "--lm", "lm", "--hook-name", HOOK, "--text", "text.jsonl", "--context-length", "32",
        "--heldout-fraction", "0.2", "--bos", "always",
    ]  # fmt: skip
    rows = {}
    for name, source, more in (
        ("ours", "outputs/runs/whole/saes/l1_x04_l0-6_s0", []),
        ("imported", str(imported), flags),
    ):
        output = tmp_path / f"{name}.json"
        done = run_program(
            place, "analysis.evaluate", source, *arguments, *more, "--output", str(output)
        )
        assert done.returncode == 0, done.stderr
        (rows[name],) = json.loads(output.read_text())["rows"]
    for key in ("l0", "fvu", "nats_lost", "kl", "dead_fraction", "n_tokens_eval"):
        assert rows["imported"][key] == pytest.approx(rows["ours"][key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name at least one run folder, dictionary or release"),
        (["outputs/runs/none"], "outputs/runs/none"),
        (["imported"], "give --lm, as TransformerLens calls it: imported does not say it"),
        (["imported", "--lm", "lm"], "give --hook-name, as TransformerLens"),
        (["imported", "--lm", "lm", "--hook-name", "blocks.9.hook_resid_post"], "L from 0 to 1"),
        (["outputs/runs/whole", "--n-tokens", "0"], "--n-tokens 0 is not possible"),
        (["outputs/runs/whole", "--text", "none.jsonl"], "none.jsonl"),
    ],
)
def test_bad_input_is_one_clear_line(place, finished, arguments, message):
    if not (place / "imported").exists():
        save_dictionary_learning(
            load_saelens(finished[1] / "saes/l1_x01_l0-6_s0"), place / "imported", metadata={}
        )
    done = run_program(place, "analysis.evaluate", *arguments, "--output", "bad.json")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert message in done.stderr
    assert not (place / "bad.json").exists()


def test_a_dictionary_of_another_width_is_refused(place, finished, monkeypatch):
    monkeypatch.chdir(place)
    source = "outputs/runs/whole/saes/l1_x01_l0-6_s0"
    (subject,) = load_subjects([source], MeasureConfig(device="cpu"))
    material = Material(subject.origin, "cpu")
    material.check([subject])
    wide = subject._replace(dictionary=torch.nn.Module())
    wide.dictionary.d_in, wide.dictionary.joins_hooks = 99, False
    with pytest.raises(UserError, match="has d_in 99, but blocks.1.hook_resid_post of lm is 12"):
        material.check([wide])


def test_two_runs_with_saes_of_the_same_name_are_told_apart(place, finished, monkeypatch):
    monkeypatch.chdir(place)
    if not (place / "outputs/runs/copy").exists():
        shutil.copytree("outputs/runs/whole", "outputs/runs/copy")
    subjects = load_subjects(
        ["outputs/runs/whole/saes/l1_x01_l0-6_s0", "outputs/runs/copy"],
        MeasureConfig(device="cpu"),
    )
    names = [subject.name for subject in subjects]
    assert names[:2] == ["whole/l1_x01_l0-6_s0", "copy/l1_x01_l0-6_s0"]
    assert len(set(names)) == len(names) == 5


def test_flags_go_before_what_the_files_say(place, finished, monkeypatch):
    monkeypatch.chdir(place)
    source = "outputs/runs/whole/saes/l1_x01_l0-6_s0"
    (plain,) = load_subjects([source], MeasureConfig(device="cpu"))
    (other,) = load_subjects([source], MeasureConfig(device="cpu", context_length=16, text="x"))
    assert (plain.origin.lm, plain.origin.hook_name) == ("lm", HOOK)
    assert (plain.origin.context_length, plain.origin.heldout_fraction) == (32, 0.2)
    assert (other.origin.context_length, other.origin.text) == (16, "x")
    assert other.origin.heldout_fraction == 0.2


def test_training_moments_are_those_of_training_rows(place, finished, monkeypatch):
    monkeypatch.chdir(place)
    source = "outputs/runs/whole/saes/l1_x01_l0-6_s0"
    (subject,) = load_subjects([source], MeasureConfig(device="cpu"))
    material = Material(subject.origin, "cpu")
    rows = torch.cat([rows.acts[HOOK] for rows in material.training_rows]).double()
    moments = material.training_moments(HOOK, 10**9)
    torch.testing.assert_close(moments.mean.double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    variance = rows.var(0, correction=0)
    torch.testing.assert_close(moments.variance.double(), variance, rtol=1e-4, atol=1e-6)


def test_results_of_one_run_go_into_it_and_of_several_beside(tmp_path):
    cfg, one, other = MeasureConfig(), tmp_path / "one", tmp_path / "other"
    assert results_path(cfg, "x", [one, one]) == one / "results/x.json"
    for runs in ([one, other], [one, None], [None]):
        assert str(results_path(cfg, "x", runs)) == "outputs/results/x.json"


def test_a_cell_shows_its_interval():
    row = {"a": 0.5, "a_low": 0.25, "a_high": 0.75, "b": 2.0, "c": None}
    assert cell(row, "a", "{:.2f}") == "0.50 [0.25, 0.75]"
    assert (cell(row, "b", "{:.0f}"), cell(row, "c", "{}"), cell(row, "d", "{}")) == (
        "2",
        "-",
        "-",
    )

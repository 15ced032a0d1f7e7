"""Recovery of known features: scores of a truth and of its null, the programs, their figures."""

import json

import pytest
import torch
from tiny_runs import run_program

from analysis.toy_recovery import Fit, Recovery, estimate, over_seeds
from data_visualization import fig_feature_dimensionality, fig_toy_recovery
from sparse_coding.ladder import ladder
from sparse_coding.sae import TopKSAE
from sparse_coding.toy import ToySetting, toy_truth

FEW = Fit(n_steps=600, batch_tokens=256, lr=5e-3, n_rows=2000, n_null_draws=3)


@pytest.fixture(scope="module")
def recovery():
    """16 orthogonal features: what is planted can be read off without interference."""
    setting = ToySetting(d_in=16, n_features=16, l0=2.0)
    truth = toy_truth(setting, 0)._replace(directions=torch.eye(16))
    return Recovery(truth, 0, FEW)


def test_the_truth_itself_scores_one_and_its_null_does_not(recovery):
    truth = TopKSAE(16, 16, None, 16)
    with torch.no_grad():
        truth.W_enc.copy_(torch.eye(16))
        truth.W_dec.copy_(torch.eye(16))
    row = recovery.scores(truth)
    for key in ("mmcs_truth", "mmcs_dictionary", "recovered_90", "hungarian", "f1", "auroc"):
        assert row[key] == pytest.approx(1), key
    assert (row["n_false"], row["n_alive"]) == (0, 16)
    assert row["fvu"] < 1e-9
    assert row["l0"] == pytest.approx(2.0, abs=0.1)
    null = recovery.null(1, 2)
    assert null["recovered_90"] == 0
    assert null["mmcs_truth"] < 0.7
    assert null["auroc"] < 0.8


def test_trained_saes_recover_what_is_planted_and_never_saw_the_rows_of_the_scores(recovery):
    specs = ladder(("topk", "l1"), (1,), (), (2.0,), (0,))
    for row in recovery.saes(specs):
        assert row["mmcs_truth"] > 0.9, row["architecture"]
        assert row["f1"] > 0.7, row["architecture"]  # topk fires twice where one feature is on
    seen = {tuple(x) for x in recovery.source.batch(0)[0].tolist()}
    assert not seen & {tuple(x) for x in recovery.x.tolist() if any(x)}


def test_features_that_do_not_count_are_left_out():
    setting = ToySetting(d_in=16, n_features=16, l0=2.0)
    truth = toy_truth(setting, 0)._replace(directions=torch.eye(16))
    counted = torch.arange(16) < 4
    recovery = Recovery(truth, 0, FEW, counted)
    assert recovery.directions.shape == (4, 16)
    assert recovery.l0 == pytest.approx(0.5, abs=0.06)


def test_seeds_become_an_interval_and_conditions_stay_apart():
    rows = [
        {"setting": "easy", "ratio": ratio, "seed": seed, "f1": f1}
        for ratio, values in ((1, (0.5, 0.7)), (4, (0.8,)))
        for seed, f1 in enumerate(values)
    ]
    first, second = over_seeds(rows, ("f1",))
    assert first["f1"] == pytest.approx(0.6)
    # deviation 0.1414, t(1) = 12.706, sqrt(2) seeds
    assert first["f1_high"] == pytest.approx(0.6 + 12.706 * 0.1, rel=1e-3)
    assert first["f1_n"] == 2
    assert second["f1_low"] is None
    assert "seed" not in first
    assert estimate("x", [3.0]) == {"x": 3.0, "x_low": None, "x_high": None, "x_n": 1}


def test_the_program_writes_rows_that_its_figure_draws(place):
    done = run_program(
        place, "analysis.recover_toy_features", "--settings", "easy", "noisy", "--phase-settings",
        "easy", "--phase-ratios", "2", "--phase-l1-coeffs", "0.1", "1", "--architecture", "l1",
        "topk", "--n-steps", "60", "--n-rows", "500", "--seeds", "0", "1", "--n-processes", "1",
        "--output", "toy.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "toy.json").read_text())["rows"]
    kinds = {(row["setting"], row["kind"], row["architecture"], row["l1_coeff"]) for row in rows}
    expected = {("sae", "l1", None), ("sae", "topk", None), ("null", "random", None)}
    expected |= {("baseline", "pca", None), ("baseline", "ica", None), ("baseline", "nmf", None)}
    phase = {("easy", "sae", "l1", 0.1), ("easy", "sae", "l1", 1.0)}
    assert kinds == {(s, *rest) for s in ("easy", "noisy") for rest in expected} | phase
    for row in rows:
        assert row["f1_n"] == 2
        assert row["recovered_90_low"] <= row["recovered_90"] <= row["recovered_90_high"]
    figure = fig_toy_recovery.draw(rows)
    drawn = [
        line.get_ydata()[0]
        for ax in figure.axes[:1]
        for line in ax.lines
        if line.get_label() in {"_l1", "_topk", "_pca", "_ica", "_nmf"}
    ]
    of_figure = [
        row["recovered_90"] for row in rows if row["l1_coeff"] is None and row["kind"] != "null"
    ]
    assert sorted(drawn) == pytest.approx(sorted(of_figure))


def test_toy_models_put_features_in_superposition_only_when_they_are_sparse(place):
    done = run_program(
        place, "analysis.toy_model_superposition", "--n-features", "10", "--d-hidden", "3",
        "--inverse-densities", "1.05", "16", "--n-steps", "1500", "--seeds", "0", "1",
        "--sae-architecture", "topk", "--sae-steps", "60", "--n-processes", "1",
        "--output", "models.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "models.json").read_text())["rows"]
    dense, sparse = (row for row in rows if row["kind"] == "model")
    assert dense["dimensions_per_feature"] == pytest.approx(1, abs=0.15)
    assert sparse["n_represented"] > 6
    assert sparse["dimensions_per_feature"] < 0.6
    figure = fig_feature_dimensionality.draw(rows)
    (points,) = (line for line in figure.axes[0].lines if line.get_label() == "one feature: D")
    features = [row["dimensionality"] for row in rows if row["kind"] == "feature"]
    assert sorted(points.get_ydata()) == sorted(features)


@pytest.mark.parametrize(
    ("program", "arguments", "line"),
    [
        ("recover_toy_features", "--settings esay", "error: --settings esay is unknown; it must"),
        ("recover_toy_features", "--l0 99", "error: toy data: l0 99.0 is not possible"),
        ("recover_toy_features", "--architecture l2", "l2"),
        (
            "toy_model_superposition",
            "--inverse-densities 0.5",
            "error: --inverse-densities 0.5 is",
        ),
    ],
)
def test_bad_arguments_are_one_line(place, program, arguments, line):
    done = run_program(place, f"analysis.{program}", *arguments.split())
    assert done.returncode == 2
    assert line in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

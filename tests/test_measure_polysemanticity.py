"""`python -m analysis.measure_polysemanticity`, its validation, and `find_units`."""

import json
import re

import pytest
import torch
from tiny_runs import run_program

from analysis import validate_polysemanticity as validate
from analysis.find_units import least_lift
from analysis.unit_scores import Mean, mean_over_seeds
from analysis.units import concept_contexts
from data_visualization import fig_find_units, fig_histogram, fig_polysemanticity
from sparse_coding import polysemanticity
from sparse_coding.models import load_lm

FOUR = ("citations", "dialogue", "http", "korean")
SMALL = (
    "outputs/runs/whole --n-documents 60 --n-tokens 24 --device cpu --n-draws 60 --concepts "
    "citations dialogue http korean"
)
MEASURE = (
    f"{SMALL} --n-units 60 --rates 0.01 0.03 --rate 0.03 --n-tokens-ica 3000 --families "
    "mlp_neurons untrained pca random_directions --random-lms"
)
FIND = f"{SMALL} --rate 0.03 --n-show 2 --output found.json"


@pytest.fixture(scope="module")
def measured(place, finished):
    done = run_program(place, "analysis.measure_polysemanticity", *MEASURE.split())
    assert done.returncode == 0, done.stderr
    path = place / "outputs/runs/whole/results/polysemanticity.json"
    return done, json.loads(path.read_text())["rows"]


def test_every_family_is_there_at_every_rate(measured):
    _, rows = measured
    families = [row for row in rows if row["what"] == "family"]
    names = {(row["family"], row["ratio"]) for row in families}
    others = ("mlp_neurons", "pca", "random_directions")
    assert names == {("sae", 4), ("sae", 1), ("untrained", 4), *((name, None) for name in others)}
    conditions = {row["condition"] for row in families}
    assert conditions == {"0.01", "0.03", "native", "topk"}
    assert len(families) == len(names) * len(conditions)
    for row in families:
        seeds = {"sae": 2, "untrained": 2, "random_directions": 3}.get(row["family"], 1)
        assert row["n_seeds"] == seeds
        assert row["n_units"] <= row["n_sampled"] <= 60 * seeds


def test_units_fire_at_the_rate_that_they_are_cut_to(measured):
    """Thresholds are of sources A; on sources B, other text, the rate is near."""
    _, rows = measured
    for row in rows:
        if row["what"] == "family" and row["condition"] == "0.03" and row["n_units"]:
            assert 0.015 < row["rate"] < 0.06


def test_family_rows_are_means_of_their_units(measured):
    _, rows = measured
    units = [row for row in rows if row["what"] == "unit"]
    for row in rows:
        if row["what"] != "family" or row["condition"] != "0.03" or not row["n_units"]:
            continue
        mine = [u for u in units if (u["family"], u["ratio"]) == (row["family"], row["ratio"])]
        assert len(mine) == row["n_units"]
        seeds = {u["seed"] for u in mine}
        means = [
            sum(u["n_eff"] for u in mine if u["seed"] == seed)
            / sum(u["seed"] == seed for u in mine)
            for seed in seeds
        ]
        assert row["n_eff"] == pytest.approx(sum(means) / len(means))
        assert row["n_eff_low"] < row["n_eff"] < row["n_eff_high"]
        n_poly = sum(u["n_superclasses"] >= 2 for u in mine)
        assert row["polysemantic"] == pytest.approx(n_poly / len(mine))


def test_contrasts_are_differences_of_family_rows(measured):
    _, rows = measured
    found = {(r["family"], r["ratio"], r["condition"]): r for r in rows if r["what"] == "family"}
    contrasts = [row for row in rows if row["what"] == "contrast"]
    assert contrasts
    for row in contrasts:
        sae = found["sae", 4, row["condition"]]
        other = found[row["family"], row["ratio"], row["condition"]]
        assert row["n_eff_difference"] == pytest.approx(sae["n_eff"] - other["n_eff"])
        assert row["n_eff_difference_low"] < row["n_eff_difference_high"]
        assert -1 <= row["cliffs_delta"] <= 1


def test_the_figure_shows_every_family(measured):
    _, rows = measured
    figure = fig_polysemanticity.draw(rows)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert {"MLP neurons", "PCA", "random directions", "SAE untrained"} <= set(labels)
    points = [line for line in figure.axes[0].lines if line.get_label() == "_PCA"]
    pca = next(
        r for r in rows
        if r["what"] == "family" and r["family"] == "pca" and r["condition"] == "0.03"
    )  # fmt: skip
    assert points[0].get_xdata()[0] == pca["n_eff"]


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("measure_polysemanticity", ["nowhere"], "nowhere"),
        ("measure_polysemanticity", ["outputs/runs/whole", "--rate", "0.5"], "--rate 0.5 is not"),
        (
            "measure_polysemanticity",
            ["outputs/runs/whole", "--ratio", "9", "--output", "x.json"],
            r"the run has no SAE of ratio 9; it has \[1, 4\]",
        ),
        ("find_units", ["outputs/runs/whole", "--concepts", "http"], "two or more different"),
        (
            "find_units",
            ["outputs/runs/whole", "--concepts", "a", "b"],
            "no concept a, b; there are",
        ),
        ("validate_polysemanticity", ["--n-units", "0"], "--n-units 0 is not possible"),
    ],
)
def test_bad_input_is_one_line(place, finished, program, arguments, message):
    done = run_program(place, f"analysis.{program}", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr


# --- draws -------------------------------------------------------------------------------------


def test_intervals_of_a_mean_cover_it():
    """Units around 5 with what documents add to all of them: 95 % intervals hold 5 in 90-99 %."""
    g = torch.Generator().manual_seed(0)
    hits = []
    for _ in range(200):
        of_documents = 0.3 * torch.randn(1, generator=g).double()
        units = [5 + of_documents + torch.randn(40, generator=g).double() for _ in range(2)]
        draws = [
            torch.cat([u[None], u + 0.3 * torch.randn(200, 1, generator=g).double()])
            for u in units
        ]  # each seed's own draws; the same documents for both
        draws[1][1:] = units[1] + (draws[0][1:] - units[0])[:, :1]
        low, high = mean_over_seeds(units, draws, 200, g).interval[1:]
        hits.append(low < 5 < high)
        without = mean_over_seeds(units, None, 200, g).interval
        assert without.high - without.low < high - low
    assert 0.90 < sum(hits) / 200 < 0.99


def test_draws_are_centred_at_the_corrected_estimate():
    estimate = torch.full((10,), 3.0).double()
    draws = torch.full((51, 10), 2.0).double()  # biased: below the estimate in every draw
    found = mean_over_seeds([estimate], [draws], 50, torch.Generator().manual_seed(0))
    assert found.interval == (3.0, 3.0, 3.0)


def test_differences_use_the_same_draws():
    shared = torch.randn(100, generator=torch.Generator().manual_seed(0)).double()
    difference = Mean(5.0, 5 + shared).minus(Mean(3.0, 3 + shared))
    assert difference == pytest.approx((2.0, 2.0, 2.0))


# --- reading -----------------------------------------------------------------------------------


class FourDocuments:
    tokens = torch.arange(4 * 10).reshape(4, 10)


def test_contexts_are_documents_without_their_first_positions():
    tokenizer = load_lm("tiny-a").tokenizer
    batch = concept_contexts(FourDocuments, tokenizer, "always")
    assert batch.tokens.shape == (4, 11)
    assert (batch.tokens[:, 0] == tokenizer.bos_token_id).all()
    assert (batch.document[:, 0] == -1).all()
    assert batch.document[:, 1:].unique(dim=1).flatten().tolist() == [0, 1, 2, 3]
    assert not batch.valid[:, :5].any() and batch.valid[1:, 5:].all()
    without = concept_contexts(FourDocuments, tokenizer, "never")
    assert torch.equal(without.tokens, FourDocuments.tokens)
    assert not without.valid[:, :4].any() and without.valid[1:, 4:].all()


# --- validation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validation():
    cfg = validate.Config(n_units=300, n_documents=200, n_draws=200)
    labels = validate.corpus_like(cfg.n_documents)
    generator = torch.Generator().manual_seed(0)
    return cfg, labels, labels.draws(cfg.n_draws, generator), generator


def test_planted_units_have_the_rate_and_shares_that_were_asked_for(validation):
    _, labels, _, generator = validation
    shares = validate.mixture(2, 400, labels, generator)
    assert torch.allclose(shares.sum(dim=0), torch.ones(400))
    top = shares.topk(2, dim=0).indices
    assert (labels.superclass[top[0]] != labels.superclass[top[1]]).all()
    rate = torch.full((400,), 0.01)
    active, mass = validate.plant(shares, rate, labels, generator)
    assert (active.sum(dim=0) / labels.n_tokens.sum()).mean().item() == pytest.approx(
        0.01, rel=0.05
    )
    assert ((mass > 0) == (active > 0)).all()
    found = polysemanticity.concept_sums(active, labels, torch.ones(1, len(active)).double())[0]
    expected = shares.double().mean(dim=1)
    assert torch.allclose(found.sum(dim=1) / found.sum(), expected, rtol=0.08)


def test_the_measure_passes_its_validation(validation):
    rows = []
    for check in (validate.separation, validate.calibration, validate.false_positives):
        rows += check(*validation)
    assert all(row["passed"] is not False for row in rows), rows
    by_name = {(row["check"], row["of"]): row for row in rows}
    assert by_name["AUROC of n_eff", "m = 2 against 1"]["value"] > 0.99


def test_the_validation_notices_a_measure_that_is_not_corrected(validation, monkeypatch):
    def plain(mass, labels):
        weights = torch.ones(1, len(mass), dtype=torch.float64)
        shares = polysemanticity.concept_shares(mass, labels, weights)
        return polysemanticity.entropy(shares)[0].exp()

    monkeypatch.setattr(polysemanticity, "effective_number", plain)
    assert any(row["passed"] is False for row in validate.density(*validation))


def test_the_validation_notices_a_test_that_is_too_eager(validation, monkeypatch):
    lift_p = polysemanticity.lift_p

    def eager(*arguments, **named):
        return lift_p(*arguments, **named) / 4

    monkeypatch.setattr(polysemanticity, "lift_p", eager)
    assert any(row["passed"] is False for row in validate.false_positives(*validation))


def test_intraclass_correlation_of_repeats():
    g = torch.Generator().manual_seed(0)
    truth, noise = torch.randn(5000, 1, generator=g), torch.randn(5000, 2, generator=g)
    assert validate.intraclass_correlation((truth + noise).double()) == pytest.approx(
        0.5, abs=0.03
    )
    assert validate.intraclass_correlation(truth.expand(-1, 2).double()) == pytest.approx(1)


# --- finding -----------------------------------------------------------------------------------


def test_least_lift_is_that_of_the_weakest_named_concept(validation):
    _, labels, _, _ = validation
    rate = {0: 0.4, 3: 0.2}
    active = torch.zeros(len(labels.concept), 3)
    for i, concept in enumerate(labels.concept.tolist()):
        active[i, 0] = round(60 * rate.get(concept, 0.1))
        active[i, 1] = 60 * (concept == 0)  # only in one of them
    active[:3, 2] = 60  # in too few documents to be judged
    found = least_lift(active, labels, [0, 3])
    assert found.tolist() == pytest.approx([2.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def searched(place, finished):
    done = run_program(place, "analysis.find_units", *FIND.split())
    assert done.returncode == 0, done.stderr
    return done, json.loads((place / "found.json").read_text())["rows"]


def test_found_units_are_shown_with_their_contexts(searched):
    _, rows = searched
    units = [row for row in rows if row["what"] == "unit"]
    roles = [(row["family"], row["role"]) for row in units]
    for family in ("mlp_neurons", "neuron_basis", "random_directions", "sae"):
        assert roles.count((family, "several")) == 2
    names = FOUR
    assert [role for family, role in roles if family == "sae"][:4] == list(names)
    for row in units:
        if not row["n_firings"]:
            assert row["share_http"] is None and row["n_eff"] is None
            continue
        assert 0 < sum(row[f"share_{name}"] for name in names) < 1 + 1e-9
        assert all(row[f"lift_{name}_low"] <= row[f"lift_{name}"] for name in names)
    contexts = [row for row in rows if row["what"] == "context"]
    assert len(contexts) == 4 * 2 * 4 + 4
    assert all(row["token"] for row in contexts)


def test_the_figure_of_found_units_shows_their_shares(searched):
    _, rows = searched
    several, single = fig_find_units.draw(rows).axes
    units = [row for row in rows if row["what"] == "unit" and row["n_firings"]]
    shown = [row for row in units if row["role"] != "several"]
    assert len(single.get_yticklabels()) == len(shown)
    assert len(several.get_yticklabels()) == sum(
        row["role"] == "several" and row["family"] != "sae" for row in units
    )
    texts = [text.get_text() for text in single.texts]
    assert texts[:4] == [f"{shown[0][f'share_{name}']:.0%}" for name in FOUR]
    with pytest.raises(ValueError, match="no rows"):
        fig_find_units.draw([])


def test_histograms_hold_every_firing_once(searched):
    _, rows = searched
    units = [row for row in rows if row["what"] == "unit"]
    bins = [row for row in rows if row["what"] == "histogram"]
    n_shown = 0
    for unit in units:
        same = [row for row in bins if all(row[k] == unit[k] for k in ("family", "unit", "role"))]
        if not same:
            assert unit["role"] == "several" or unit["n_firings"] == 0
            continue
        n_shown += 1
        assert sum(row["n_firings"] for row in same) == unit["n_firings"]
        for name in FOUR:
            n = sum(row["n_firings"] for row in same if row["concept"] == name)
            if unit["n_firings"]:
                assert n / unit["n_firings"] == pytest.approx(unit[f"share_{name}"])
    assert n_shown >= 5


def test_the_histogram_stacks_the_concepts(searched):
    _, rows = searched
    bins = [row for row in rows if row["what"] == "histogram"]
    figure = fig_histogram.draw(rows)
    ax = figure.axes[0]
    unit = next(row for row in bins if row["role"] == "several" and row["family"] == "mlp_neurons")
    same = [row for row in bins if all(row[k] == unit[k] for k in ("family", "unit", "role"))]
    assert ax.get_title(loc="left") == f"MLP neuron {unit['unit']}"
    bars = [bar for container in ax.containers for bar in container]
    assert sum(bar.get_height() for bar in bars) == sum(row["n_firings"] for row in same)
    low = same[0]["low"]
    tops = [bar.get_y() + bar.get_height() for bar in bars if bar.get_x() == low]
    assert max(tops) == sum(row["n_firings"] for row in same if row["low"] == low)
    with pytest.raises(ValueError, match="no rows"):
        fig_histogram.draw([])

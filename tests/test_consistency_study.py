"""`python -m analysis.consistency`: which SAEs are trained, which pairs are compared."""

import json
from collections import Counter

import pytest
from tiny_runs import run_program

from analysis.consistency import SHARED, Config, conditions, hook, plan, summarise
from data_visualization import fig_consistency

STUDY = (
    "--lm lm --layers 1 --ratios 1 2 --ratio 2 --seeds 2 --target-l0 6 --text text.jsonl "
    "--context-length 32 --heldout-fraction 0.2 --n-tokens-train 6000 --min-firings 3 "
    "--device cpu --runs studied --output study.json --other-lms"
)


@pytest.fixture(scope="module")
def studied(place):
    done = run_program(place, "analysis.consistency", *STUDY.split())
    assert done.returncode == 0, done.stderr
    return done, json.loads((place / "study.json").read_text())["rows"]


def test_every_condition_has_its_pairs_and_their_mean(studied):
    _, rows = studied
    pairs = [row for row in rows if row["what"] == "pair"]
    summary = [row for row in rows if row["what"] == "condition"]
    found = {(row["condition"], row["a"], row["b"]): row for row in summary}
    assert set(found) == {
        ("seed", "ratio 1", "ratio 1"),
        ("seed", "ratio 2", "ratio 2"),
        ("ratio", "ratio 1", "ratio 2"),
        ("ratio", "ratio 2", "ratio 1"),
        ("seed", "lm@random", "lm@random"),
        ("random", "lm", "lm@random"),
        ("random", "lm@random", "lm"),
    }
    for (condition, a, b), row in found.items():
        mine = [
            p for p in pairs if (p["condition"], p["label_a"], p["label_b"]) == (condition, a, b)
        ]
        assert len(mine) == row["n_pairs"] == 2
        x, y = (p["correlation"] for p in mine)
        assert row["correlation"] == pytest.approx((x + y) / 2)
        half = 12.706 * abs(x - y) / 2  # t of one degree of freedom, deviation |x - y| / sqrt 2
        assert row["correlation_high"] - row["correlation"] == pytest.approx(half, rel=1e-3)


def test_no_pair_shares_a_seed(studied):
    _, rows = studied
    for row in rows:
        if row["what"] == "pair":
            assert row["seed_a"] != row["seed_b"], row["a"]
            assert (row["lm_a"] == row["lm_b"]) == ("decoder_cosine" in row)
    seeds = Counter((r["label_a"], r["label_b"], r["seed_a"]) for r in rows if r["what"] == "pair")
    assert set(seeds.values()) == {1}, "every SAE stands once on a side"


def test_a_finished_run_is_not_trained_again_and_other_settings_are_refused(place, studied):
    done, _ = studied
    assert done.stdout.count("easy_training_base.py --lm") == 2
    again = run_program(place, "analysis.consistency", *STUDY.split()[:-1], "--overwrite")
    assert "easy_training_base.py --lm lm" not in again.stdout
    other = STUDY.replace("--target-l0 6", "--target-l0 7").replace("study.json", "x.json")
    refused = run_program(place, "analysis.consistency", *other.split())
    assert refused.returncode == 2
    line = "was trained with target_l0 [6.0], but [7.0] is asked for; give another --runs or"
    assert line in refused.stderr.strip().splitlines()[-1]


def test_the_whole_plan_holds_every_kind_that_is_compared():
    cfg = Config(layers=(12, 6, 18), ratios=(1, 32), other_lms=("tiny-a", "tiny-b"))
    depths = {"tiny-a": 1, "tiny-b": 1}
    trained = {
        (t.lm, hook(layer), ratio)
        for t in plan(cfg, depths)
        for layer in t.layers
        for ratio in t.ratios
    }
    compared = {kind for c in conditions(cfg, depths) for kind in (c.a, c.b)}
    assert {tuple(kind) for kind in compared} <= trained
    names = [t.name for t in plan(cfg, depths)]
    assert len(set(names)) == len(names)
    alone = [(c.a, c.b) for c in conditions(cfg, depths)]
    assert len(set(alone)) == len(alone), "nothing is compared twice"


def test_the_figure_draws_the_means_and_their_nulls(studied):
    _, rows = studied
    figure = fig_consistency.draw(rows)
    found = {(row["a"], row["b"]): row for row in rows if row["what"] == "condition"}
    cosines, correlations, ratios, models = figure.axes
    for ax, key in ((cosines, "decoder_cosine"), (correlations, "correlation")):
        for to in (1, 2):
            (line,) = (x for x in ax.lines if x.get_label() == f"in 1:{to}")
            expected = [found[f"ratio {a}", f"ratio {to}"][key] for a in (1, 2)]
            assert list(line.get_ydata()) == pytest.approx(expected)
        nulls = [x.get_ydata()[0] for x in ax.lines if x.get_label() == "_null"]
        assert nulls == pytest.approx(
            [found["ratio 1", f"ratio {to}"][f"{key}_null"] for to in (1, 2)]
        )
    shown = [text.get_text() for text in ratios.texts]
    pairs = [("ratio 1", "ratio 1"), ("ratio 1", "ratio 2"), ("ratio 2", "ratio 1")]
    expected = [found[pair]["correlation"] for pair in [*pairs, ("ratio 2", "ratio 2")]]
    assert shown == [f"{value:.2f}".lstrip("0") for value in expected]
    own = found["ratio 2", "ratio 2"]["correlation"]  # the model's SAEs are those of ratio 2
    assert models.texts[0].get_text() == f"{own:.2f}".lstrip("0")


def test_what_was_not_measured_for_every_pair_has_no_mean():
    rows = [
        dict.fromkeys(SHARED, 9)
        | {"condition": "model", "label_a": "x", "label_b": "y", "correlation": c}
        | ({"decoder_cosine": 0.5} if c == 0.2 else {})
        for c in (0.2, 0.4)
    ]
    (row,) = summarise(rows)
    assert row["correlation"] == pytest.approx(0.3)
    assert "decoder_cosine" not in row

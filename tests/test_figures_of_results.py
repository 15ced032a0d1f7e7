"""Figures of training, sparsity, quality, speed, splitting and descriptions show their rows."""

import math

import pytest
from test_figures import ROOT, summary_row

from data_visualization import (
    fig_interpretability,
    fig_layers,
    fig_quality,
    fig_sparsity,
    fig_speed,
    fig_splitting,
    fig_training,
    report,
    style,
)


def logged(ratios=(1, 8), seeds=(0, 1), steps=(10, 20, 30)) -> list[dict]:
    return [
        {"name": f"l1_x{ratio:02d}_l0-30_s{seed}", "step": step, "n_tokens": 1000 * step,
         "fvu": 1 / ratio / step + seed, "l0": 100 / step + ratio, "dead_fraction": 0.01 * seed}
        for step in steps for ratio in ratios for seed in seeds
    ]  # fmt: skip


def lines(ax) -> dict[str, list[tuple[float, float]]]:
    """By label the points of each line."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in ax.lines
    }


def test_training_draws_every_seed_and_the_mean():
    fvu, l0, dead = fig_training.draw(logged()).axes
    drawn = lines(fvu)
    assert drawn["_l1_x08_l0-30_s1"] == [(1000 * n, 1 / 8 / n + 1) for n in (10, 20, 30)]
    assert drawn["1:8"] == [(1000 * n, pytest.approx(1 / 8 / n + 0.5)) for n in (10, 20, 30)]
    assert lines(l0)["1:1"][0] == (10_000, pytest.approx(11))
    assert lines(dead)["1:1"][2] == (30_000, pytest.approx(0.005))
    assert fvu.get_ylabel() == "fraction of variance unexplained"


def test_training_means_are_of_steps_that_every_seed_has():
    """A run that goes on may have logged one seed more than the other."""
    rows = [row for row in logged() if not (row["name"].endswith("s1") and row["step"] == 30)]
    fvu = fig_training.draw(rows).axes[0]
    assert len(lines(fvu)["1:8"]) == 2
    assert len(lines(fvu)["_l1_x08_l0-30_s0"]) == 3


def test_settings_of_one_ratio_have_names_of_their_own():
    more = [row | {"name": row["name"].replace("l0-30", "l0-60")} for row in logged()]
    labels = lines(fig_training.draw(logged() + more).axes[0])
    assert {"l1_x01_l0-30", "l1_x01_l0-60", "l1_x08_l0-30", "l1_x08_l0-60"} <= labels.keys()


def test_the_l0_asked_for_is_a_line_and_a_coefficient_is_none():
    asked = fig_training.draw(logged()).axes[1]
    assert [y for _, y in lines(asked)["_L0 asked for"]] == [30, 30]
    free = [row | {"name": row["name"].replace("l0-30", "c1.5")} for row in logged()]
    assert "_L0 asked for" not in lines(fig_training.draw(free).axes[1])


def test_a_name_without_a_ratio_is_refused():
    with pytest.raises(ValueError, match="mine does not say its ratio"):
        fig_training.draw([logged()[0] | {"name": "mine"}])


def quality_row(library, l0, fvu) -> dict:
    return {"what": "point", "architecture": "topk", "library": library, "n_seeds": 3, "l0": l0,
            "l0_low": l0 - 1, "l0_high": l0 + 1, "fvu": fvu, "fvu_low": fvu - 0.01,
            "fvu_high": fvu + 0.01, "nats_lost": 3 * fvu, "nats_lost_low": 2 * fvu,
            "nats_lost_high": 4 * fvu, "n_steps": 300, "ratio": 2, "n_tokens_eval": 20_000,
            "n_tokens_ce": 4000, "n_documents_eval": 13}  # fmt: skip


def test_quality_draws_each_frontier_through_its_points():
    rows = [quality_row("ours", 30, 0.2), quality_row("sae_lens", 64, 0.25),
            quality_row("sae_lens", 33, 0.31), quality_row("sae_lens", 16, 0.4)]  # fmt: skip
    # What is no point of a frontier is not drawn.
    rows.append(rows[0] | {"what": "sae", "l0": 500})
    fvu, nats, *_ = (ax for ax in fig_quality.draw(rows).axes if ax.lines)
    assert lines(nats)["this project"] == [(30, pytest.approx(0.6))]
    assert lines(fvu)["this project"] == [(30, 0.2)]
    assert lines(fvu)["SAELens"] == [(16, 0.4), (33, 0.31), (64, 0.25)]
    bars = [list(line.get_ydata()) for line in fvu.lines if line.get_label() == "_interval"]
    assert [0.19, 0.21] in [[round(y, 6) for y in bar] for bar in bars]
    assert len(bars) == 4
    with pytest.raises(ValueError, match="no label for the library other"):
        fig_quality.draw([quality_row("other", 30, 0.2)])


def test_equal_l0s_look_equal():
    rows = [quality_row("ours", 30, 0.2), quality_row("sae_lens", 30.01, 0.3)]
    for ax in (ax for ax in fig_quality.draw(rows).axes if ax.lines):
        low, high = ax.get_xlim()
        assert low * high == pytest.approx(30**2, rel=0.01)
        assert high / low == pytest.approx(2)


def test_speed_has_the_limit_line_and_both_ratios():
    rows = style.read_rows(ROOT / "benchmarks/results/train_step.json")
    left, right = fig_speed.draw(rows).axes
    ours = {row["ratio"]: row for row in rows if row["method"] == "auto"}
    limit = dict(lines(left)["limit: one product x W_enc"])
    assert limit[32] == pytest.approx(ours[32]["tokens_per_s"] / ours[32]["encode_limit_fraction"])
    assert dict(lines(left)["this project"])[8] == ours[8]["tokens_per_s"]
    assert dict(lines(right)["peers in float32"])[16] == ours[16]["vs_fastest_fp32_peer"]
    theirs = [row for row in rows if row["method"].startswith("sae_lens") and row["ratio"] == 4]
    fastest = max(row["tokens_per_s"] for row in theirs if row["dtype"] == "float32")
    assert dict(lines(left)["SAELens, float32"])[4] == fastest
    strokes = [line.get_ydata() for line in left.lines if line.get_label() == "_fastest round"]
    best_round = 1000 * ours[8]["batch_tokens"] / ours[8]["ms_per_step_min"]
    assert [ours[8]["tokens_per_s"], pytest.approx(best_round)] in [list(ys) for ys in strokes]


def test_layers_are_groups_of_bars_from_zero():
    rows = [
        summary_row(ratio, 30, hook_name=f"blocks.{layer}.hook_resid_post", dead_fraction=0.1,
                    n_documents_eval=17, fvu=0.1 * layer / ratio + seed / 100)
        for layer in (3, 9) for ratio in (1, 4) for seed in (0, 1)
    ]  # fmt: skip
    fvu = fig_layers.draw(rows).axes[0]
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in fvu.containers}
    assert heights["1:4"] == [pytest.approx(0.3 / 4 + 0.005)]
    assert len(fvu.containers) == 4
    assert [text.get_text() for text in fvu.get_xticklabels()] == ["3.post", "9.post"]
    assert fvu.get_ylim()[0] == 0
    with pytest.raises(ValueError, match="several architectures or sparsities"):
        fig_layers.draw([*rows, rows[0] | {"architecture": "topk"}])


def test_sparsity_shows_divergence_and_perplexity_above_the_clean_one():
    rows = [summary_row(4, l0, 30 / l0, kl=3 / l0, kl_low=2 / l0, kl_high=4 / l0)
            for l0 in (10.0, 40.0)]  # fmt: skip
    kl, perplexity = fig_sparsity.draw(rows).axes
    name = f"_{rows[0]['name']}"
    assert lines(kl)[name] == [(10, 0.3)]
    expected = math.exp(rows[0]["ce_clean"] + rows[0]["nats_lost"])
    assert lines(perplexity)[name] == [(10, pytest.approx(expected))]
    assert lines(perplexity)["clean"][0][1] == pytest.approx(math.exp(rows[0]["ce_clean"]))


def probe_row(kind, family, ratio, **values) -> dict:
    row = {"kind": kind, "concept": "all", "labels": "true", "family": family, "ratio": ratio,
           "seed": "all", "n_concepts": 14, "n_documents": 2800, "n_seeds": 3}  # fmt: skip
    for key, value in values.items():
        row |= {key: value, f"{key}_low": value - 0.1, f"{key}_high": value + 0.1}
    return row


def splitting_rows() -> list[dict]:
    rows = [
        probe_row(kind, family, ratio, **{key: value * ratio}) | {"labels": labels}
        for kind, key, labels, scale in (
            ("splitting", "n_needed", "true", 1),
            ("absorption", "absorption", "true", 1),
            ("absorption", "absorption", "shuffled", 0.1),
        )
        for family, value in (("sae", 1.0 * scale), ("untrained", 0.5 * scale))
        for ratio in (1, 4)
    ]
    covers = {"best_covers": 0.7, "best_covers_silent": 0.2, "top_covers": 0.8,
              "top_covers_silent": 0.3}  # fmt: skip
    same_seed = dict.fromkeys(covers, 0.95)  # starts with the parent's rows
    for shares_start, values in ((False, covers), (True, same_seed)):
        for family, less in (("sae", 0.0), ("untrained", 0.05)):
            of_family = {key: value - less for key, value in values.items()}
            rows.append(probe_row("children", family, 4, **of_family))
            rows[-1]["shares_start"] = shares_start
    return rows


def heights(ax, label) -> list[float]:
    return [y for _, y in lines(ax)[label]]


def test_splitting_shows_every_measure_beside_its_null_and_the_untrained():
    needed, absorbed, best, three = fig_splitting.draw(splitting_rows()).axes
    assert heights(needed, "trained") == [1, 4]
    assert heights(absorbed, "untrained") == [0.5, 2]
    assert heights(absorbed, "trained, null") == [0.1, 0.4]
    assert heights(absorbed, "untrained, null") == [0.05, 0.2]
    assert heights(best, "trained") == [0.7]
    assert heights(best, "untrained") == [pytest.approx(0.65)]
    assert heights(three, "trained, null") == [0.3]
    assert heights(three, "untrained, null") == [0.25]


def test_splitting_of_one_seed_has_its_own_children_and_no_intervals_over_seeds():
    rows = [row | {"seed": 0} for row in splitting_rows() if row.get("shares_start") is not False]
    for row in rows:
        row.pop("n_needed_low", None)
        row.pop("n_needed_high", None)
    needed, _, best, _ = fig_splitting.draw(rows).axes
    assert heights(needed, "trained") == [1, 4]
    assert "_interval" not in lines(needed)
    assert heights(best, "trained") == [0.95]


def test_splitting_of_one_ratio_leaves_out_children_that_it_has_not():
    rows = [row for row in splitting_rows() if row["kind"] != "children" and row["ratio"] == 4]
    assert len(fig_splitting.draw(rows).axes) == 2


def description_rows() -> list[dict]:
    about = {"name": "l1_x04_s0", "hook_name": "blocks.1.hook_resid_post", "ratio": 4, "seed": 0,
             "n_units": 20, "n_tokens_eval": 4000, "n_groups_eval": 80}  # fmt: skip
    rows = []
    for n, family in enumerate(fig_interpretability.FAMILIES):
        for negatives in fig_interpretability.NEGATIVES:
            rows.append({"what": "description", "described_by": "rules", "negatives": negatives,
                         "balanced_accuracy": 0.6 + n / 100})  # fmt: skip
        for d in range(1, 11):
            score = 0.5 + d / 100 + n / 1000
            rows.append({"what": "decile", "decile": d, "balanced_accuracy": score})
        rows.append({"what": "intruder", "decile": None, "intruder": "random", "token": "hidden",
                     "accuracy": 0.3 + n / 100})  # fmt: skip
        for row in rows:
            row.setdefault("family", family)
    for row in rows:
        for key in ("balanced_accuracy", "accuracy"):
            if key in row:
                row |= {f"{key}_low": row[key] - 0.05, f"{key}_high": row[key] + 0.05}
    return [about | row for row in rows]


def test_interpretability_draws_scores_deciles_and_intruders():
    axes = fig_interpretability.draw(description_rows()).axes
    assert [y for _, y in lines(axes[0])["neurons"]] == [0.61]
    assert len(axes) == 4 + 2
    deciles = dict(lines(axes[4])["random directions"])
    assert deciles[10] == pytest.approx(0.602)
    assert [y for _, y in lines(axes[5])["SAE features"]] == [0.3]


def test_interpretability_without_deciles_says_so():
    rows = [row for row in description_rows() if row["what"] != "decile"]
    with pytest.raises(ValueError, match="no scores by decile"):
        fig_interpretability.draw(rows)


DRAWN_TWICE = ("fig_quality", "fig_sparsity", "fig_speed", "fig_splitting", "fig_interpretability")


@pytest.mark.parametrize(
    "entry",
    [entry for entry in report.ENTRIES if entry.figure in DRAWN_TWICE],
    ids=lambda entry: entry.figure + entry.suffix,
)
def test_published_numbers_give_the_same_bytes(entry, tmp_path):
    places = [
        ROOT / "outputs/published",
        ROOT / "benchmarks",
        ROOT / "outputs/published/l0_targets",
    ]
    (place, *_) = report.found(places, entry.source)
    sections = [
        report.draw(entry, place / entry.source, tmp_path / folder, "figure", "")
        for folder in "ab"
    ]
    assert [section.error for section in sections] == [None, None]
    for kind in ("png", "pdf"):
        a, b = ((tmp_path / folder / f"figure.{kind}").read_bytes() for folder in "ab")
        assert a == b


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ('{"a": 1}\nnonsense\n{"b": 1}\n', "line 2, is not valid JSON"),
        ("[1]\n", "has no rows"),
    ],
)
def test_broken_logs_are_one_line(tmp_path, text, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        style.read_lines(path)


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert style.read_lines(path) == [{"a": 1}, {"a": 2}]


def test_a_line_that_breaks_off_within_a_character_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"a": 1}\n{"a": "é'.encode()[:-1])
    assert style.read_lines(path) == [{"a": 1}]

"""Figures show their rows: plotted data, both forms, error lines, no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle, StepPatch

from data_visualization import fig_feature_density, fig_reconstruction, style

ROOT = Path(__file__).parents[1]
TARGET = 30.0


def summary_row(ratio: int, l0: float, coeff: float = 1.5, **other) -> dict:
    """A plausible row; every number differs from every other."""
    fvu = 0.3 / ratio**0.3 * (30 / l0) ** 0.3
    row = {
        "name": f"l1_x{ratio:02d}_c{coeff}_s0", "architecture": "l1", "ratio": ratio,
        "l1_coeff": coeff, "target_l0": None, "seed": 0, "lm": "small",
        "hook_name": "blocks.3.hook_resid_post", "n_tokens_trained": 300_000,
        "n_tokens_eval": 29_870, "n_tokens_ce": 4_011, "ce_clean": 3.371,
        "l0": l0, "l0_low": 0.97 * l0, "l0_high": 1.02 * l0,
        "fvu": fvu, "fvu_low": 0.96 * fvu, "fvu_high": 1.05 * fvu,
        "nats_lost": 1.7 * fvu, "nats_lost_low": 1.5 * fvu, "nats_lost_high": 2.1 * fvu,
    }  # fmt: skip
    return row | other


def one_l0() -> list[dict]:
    return [summary_row(r, 30 + 0.1 * r, target_l0=TARGET) for r in (8, 1, 32, 2)]


def several_l0s() -> list[dict]:
    return [summary_row(r, l0 + r, 30 / l0) for r in (1, 4) for l0 in (80.0, 10.0, 33.0)]


def points(ax) -> dict[str, tuple[float, float]]:
    """Label and place of each drawn point."""
    lines = [line for line in ax.lines if len(line.get_xdata()) == 1]
    return {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in lines}


def paths(ax, label: str) -> set[tuple]:
    """The corners of each line of a kind: `_interval` or `_line`."""
    lines = [line for line in ax.lines if line.get_label() == label]
    return {tuple(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines}


def density_rows(ratio: int, silent: int, counts: tuple[int, ...], **other) -> list[dict]:
    same = {
        "name": f"l1_x{ratio:02d}_c1.5_s0", "architecture": "l1", "ratio": ratio,
        "l1_coeff": 1.5, "seed": 0, "hook_name": "blocks.3.hook_resid_post", "n_tokens": 30_000,
    }  # fmt: skip
    bins = [(None, None, silent)]
    bins += [(-4 + 0.5 * i, -3.5 + 0.5 * i, n) for i, n in enumerate(counts)]
    keys = ("log10_density_low", "log10_density_high", "n_features")
    return [same | dict(zip(keys, values, strict=True)) | other for values in bins]


def write(folder: Path, source: str, content: object) -> Path:
    path = folder / source
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def run(name: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"data_visualization.{name}", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("i, measure", enumerate(("fvu", "nats_lost")))
def test_points_against_l0_are_the_rows(i, measure):
    rows = several_l0s()
    ax = fig_reconstruction.draw(rows).axes[i]
    assert points(ax) == {f"_{row['name']}": (row["l0"], row[measure]) for row in rows}


@pytest.mark.parametrize("i, measure", enumerate(("fvu", "nats_lost")))
def test_points_against_the_ratio_are_the_rows(i, measure):
    rows = one_l0()
    ax = fig_reconstruction.draw(rows).axes[i]
    assert points(ax) == {f"_{row['name']}": (row["ratio"], row[measure]) for row in rows}


@pytest.mark.parametrize("i, measure", enumerate(("fvu", "nats_lost")))
def test_intervals_are_drawn_in_both_directions_against_l0(i, measure):
    rows = several_l0s()
    ax = fig_reconstruction.draw(rows).axes[i]
    upright = {
        ((row["l0"], row[f"{measure}_low"]), (row["l0"], row[f"{measure}_high"])) for row in rows
    }
    level = {
        ((row["l0_low"], row[measure]), (row["l0_high"], row[measure])) for row in rows
    }  # fmt: skip
    assert paths(ax, "_interval") == upright | level


def test_axes_hold_every_interval():
    for rows in (one_l0(), several_l0s(), [summary_row(8, 30.0)]):
        rows[0]["nats_lost_low"] = -0.02  # a lucky sample: better than the clean model
        for ax in fig_reconstruction.draw(rows).axes:
            for interval in paths(ax, "_interval"):
                for x, y in interval:
                    assert ax.get_xlim()[0] <= x <= ax.get_xlim()[1]
                    assert ax.get_ylim()[0] <= y <= ax.get_ylim()[1]


def test_a_line_joins_the_sparsities_of_one_ratio_in_the_order_of_l0():
    rows = several_l0s()
    lines = {
        tuple(sorted((row["l0"], row["fvu"]) for row in rows if row["ratio"] == ratio))
        for ratio in (1, 4)
    }
    assert paths(fig_reconstruction.draw(rows).axes[0], "_line") == lines


def test_a_line_joins_the_ratios_of_one_target_and_seed():
    rows = [
        row | {"seed": seed, "fvu": row["fvu"] + seed / 99} for row in one_l0() for seed in (0, 1)
    ]
    lines = {
        tuple(sorted((row["ratio"], row["fvu"]) for row in rows if row["seed"] == seed))
        for seed in (0, 1)
    }
    assert paths(fig_reconstruction.draw(rows).axes[0], "_line") == lines


def test_architectures_are_never_joined_and_have_markers_of_their_own():
    rows = [summary_row(8, 30.0), summary_row(8, 60.0, architecture="tied_l1", name="tied_x08")]
    ax = fig_reconstruction.draw(rows).axes[0]
    assert paths(ax, "_line") == set()
    shapes = {line.get_marker() for line in ax.lines if line.get_label() in points(ax)}
    assert len(shapes) == 2


def test_a_ratio_has_the_same_colour_in_both_figures():
    density = fig_feature_density.draw(density_rows(8, 2, (3, 5, 1)))
    (histogram,) = (p for p in density.axes[0].patches if isinstance(p, StepPatch))
    line = fig_reconstruction.draw([summary_row(8, 30.0)]).axes[0].lines[0]
    assert histogram.get_facecolor() == pytest.approx(to_rgba(line.get_color()))


def test_ratios_have_distinct_colours():
    assert len({style.ratio_colour(ratio) for ratio in (1, 2, 4, 8, 16, 32)}) == 6


def test_hooks_have_panels_of_their_own():
    rows = one_l0() + [row | {"hook_name": "blocks.7.hook_mlp_out"} for row in one_l0()[:2]]
    assert [len(points(ax)) for ax in fig_reconstruction.draw(rows).axes] == [4, 4, 2, 2]


def test_the_caption_says_what_was_measured_on_what():
    caption = fig_reconstruction.draw(one_l0())._supxlabel.get_text().replace("\n", " ")
    for fact in ("small blocks.3.hook_resid_post", "300k", "29.9k", "4.01k", "3.37 nats"):
        assert fact in caption


def test_histogram_heights_are_shares_of_all_features():
    ax = fig_feature_density.draw(density_rows(8, 2, (3, 0, 5))).axes[0]
    (histogram,) = (p for p in ax.patches if isinstance(p, StepPatch))
    (never,) = (p for p in ax.patches if isinstance(p, Rectangle))
    assert list(histogram.get_data().values) == [0.3, 0.0, 0.5]
    assert list(histogram.get_data().edges) == [-4.0, -3.5, -3.0, -2.5]
    assert never.get_height() == pytest.approx(0.2, abs=1e-12)


def test_a_bin_that_no_row_names_is_empty():
    rows = density_rows(8, 0, (3, 0, 5))
    del rows[2]
    ax = fig_feature_density.draw(rows).axes[0]
    (histogram,) = (p for p in ax.patches if isinstance(p, StepPatch))
    assert list(histogram.get_data().values) == [3 / 8, 0.0, 5 / 8]


def test_features_that_never_fired_stand_apart():
    ax = fig_feature_density.draw(density_rows(8, 2, (3, 5))).axes[0]
    (never,) = (p for p in ax.patches if isinstance(p, Rectangle))
    assert ax.get_xlim()[0] < never.get_x()
    assert never.get_x() + never.get_width() < -4.0


def test_each_ratio_has_a_panel_in_rising_order():
    rows = density_rows(16, 1, (4, 2)) + density_rows(2, 0, (7, 2)) + density_rows(4, 3, (1, 1))
    titles = [ax.get_title(loc="left") for ax in fig_feature_density.draw(rows).axes]
    assert titles == ["1:2, 9 features", "1:4, 5 features", "1:16, 7 features"]


def test_saes_of_one_ratio_share_a_panel_as_outlines():
    other = {"name": "l1_x08_c6.0_s0", "l1_coeff": 6.0}
    rows = density_rows(8, 2, (3, 5)) + density_rows(8, 4, (5, 1), **other)
    figure = fig_feature_density.draw(rows)
    outlines = [p for p in figure.axes[0].patches if isinstance(p, StepPatch)]
    assert [list(p.get_data().values) for p in outlines] == [[0.3, 0.5], [0.5, 0.1]]
    assert not any(p.get_fill() for p in outlines)


def test_a_dictionary_in_which_nothing_fires_is_drawn():
    ax = fig_feature_density.draw(density_rows(8, 12, ())).axes[0]
    assert [p.get_height() for p in ax.patches] == [1.0]


@pytest.mark.parametrize(
    "name, source, rows",
    [
        ("fig_reconstruction", "summary.json", one_l0()),
        ("fig_feature_density", "results/feature_density.json", density_rows(8, 2, (3, 5))),
    ],
)
def test_the_command_writes_png_and_pdf_and_prints_their_paths(name, source, rows, tmp_path):
    done = run(name, write(tmp_path, source, {"config": {}, "rows": rows}))
    png, pdf = (tmp_path / "figures" / f"{name}.{kind}" for kind in ("png", "pdf"))
    assert (done.returncode, done.stdout.split()) == (0, [str(png), str(pdf)])
    assert (png.read_bytes()[:8], pdf.read_bytes()[:5]) == (b"\x89PNG\r\n\x1a\n", b"%PDF-")
    assert {path.name for path in png.parent.iterdir()} == {png.name, pdf.name}


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "does not exist"),
        ("{", "is not valid JSON"),
        ({"rows": []}, "has no rows"),
        ([1], "has no rows"),
        ({"rows": [{"name": "l1_x08", "ratio": 8}]}, "l1_x08 lacks"),
        ({"rows": [summary_row(8, 30.0, fvu=None)]}, "has fvu = None"),
        ({"rows": [summary_row(8, 30.0, nats_lost=float("nan"))]}, "has nats_lost = nan"),
    ],
)  # fmt: skip
def test_bad_json_is_one_clear_line(content, said, tmp_path):
    if content is not None:
        write(tmp_path, "summary.json", content)
    done = run("fig_reconstruction", tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert said in done.stderr


@pytest.mark.parametrize("bounds", [(-3.0, None), (-2.0, -3.0), ("a", "b")])
def test_a_bin_that_is_no_interval_is_refused(bounds):
    rows = density_rows(8, 2, (3, 5))
    rows[1]["log10_density_low"], rows[1]["log10_density_high"] = bounds
    with pytest.raises(ValueError, match="has a bin from"):
        fig_feature_density.draw(rows)


def test_the_same_rows_give_the_same_bytes(tmp_path):
    first, second = (
        [path.read_bytes() for path in style.save(fig_reconstruction.draw(one_l0()), folder, "f")]
        for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert first == second


def test_drawing_imports_neither_torch_nor_the_library():
    code = (
        "import sys; from data_visualization import fig_reconstruction, fig_feature_density; "
        "print([m for m in ('torch', 'sparse_coding', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "n, words",
    [(950, "950"), (30_000, "30k"), (29_870, "29.9k"), (1_250_000, "1.25M"), (2e9, "2B")],
)
def test_counts_are_written_short(n, words):
    assert style.count(n) == words

"""The report: one page that holds what a run has results for, and says what it has not."""

import json
import re
import subprocess
import sys

import pytest
from chromium import opened_pages
from test_figures import ROOT, summary_row
from test_figures_of_results import logged, quality_row

from data_visualization import report


def run_report(*folders) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_visualization.report", *map(str, folders)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path):
    """A run with a log, a summary, one broken file and one of another version."""
    run = tmp_path / "run<b>"
    (run / "results").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged()))
    more = {"target_l0": 30.0, "kl": 1.0, "kl_low": 0.9, "kl_high": 1.1}
    rows = [summary_row(r, 30, name=f"<script>{r}</script>", **more) for r in (1, 8)]
    content = {"config": {"lm": "<img src=x>"}, "environment": {"device": "cpu"}, "rows": rows}
    (run / "summary.json").write_text(json.dumps(content))
    (run / "config.json").write_text(json.dumps({"config": {"ratios": [1, 8]}}))
    (run / "results/consistency.json").write_text('{"rows": [')
    old = {"rows": [{"what": "family", "n_units": 3}]}
    (run / "results/polysemanticity.json").write_text(json.dumps(old))
    return run


def test_what_is_broken_or_missing_is_said_and_the_rest_drawn(folder):
    done = run_report(folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = done.stdout.splitlines()
    assert "fig_training" in said
    assert "fig_reconstruction" in said
    assert sum(line.startswith("not drawn: fig_consistency; ") for line in said) == 1
    assert any(line.startswith("not drawn: fig_polysemanticity; ") for line in said)
    assert f"missing: fig_find_units; python -m analysis.find_units {folder}" in said
    page = (folder / "report.html").read_text()
    assert "is not valid JSON" in page
    assert len(re.findall(r"data:image/png;base64,", page)) == 3
    assert "[0.96" not in page
    assert "0.3 [0.288, 0.315]" in page  # FVU of ratio 1 with its interval
    assert page.count("<script") == 0
    assert "&lt;script&gt;8&lt;/script&gt;" in page
    assert "&lt;img src=x&gt;" in page


def test_the_same_results_give_the_same_bytes(folder):
    run_report(folder)
    names = ["report.html", "figures/fig_training.png", "figures/fig_training.pdf"]
    before = [(folder / name).read_bytes() for name in names]
    run_report(folder)
    assert [(folder / name).read_bytes() for name in names] == before


def test_results_are_looked_for_in_other_folders_too(folder, tmp_path):
    other = tmp_path / "other"
    (other / "results").mkdir(parents=True)
    content = {"rows": [quality_row("ours", 30, 0.2)]}
    (other / "results/quality.json").write_text(json.dumps(content))
    assert "fig_quality" in run_report(folder, other).stdout.splitlines()
    assert (folder / "figures/fig_quality.png").is_file()


def test_every_folder_with_results_has_its_own_picture(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    more = {"target_l0": 30.0, "kl": 1.0, "kl_low": 0.9, "kl_high": 1.1}
    rows = [summary_row(r, 30, **more) for r in (1, 2, 4)]
    (other / "summary.json").write_text(json.dumps({"rows": rows}))
    said = run_report(folder, other).stdout.splitlines()
    assert {"fig_reconstruction", "fig_reconstruction_other"} <= set(said)
    first, second = (folder / "figures" / f"{name}.png"
                     for name in ("fig_reconstruction", "fig_reconstruction_other"))  # fmt: skip
    assert first.read_bytes() != second.read_bytes()
    page = (folder / "report.html").read_text()
    assert "<h2>What the dictionaries keep: other</h2>" in page
    assert "<b>other</b>" in page  # its table


def test_two_results_of_one_figure_are_two_pictures(tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("train_step", "train_step_topk"):
        content = (ROOT / f"benchmarks/results/{name}.json").read_text()
        (tmp_path / "results" / f"{name}.json").write_text(content)
    said = run_report(tmp_path).stdout.splitlines()
    assert {"fig_speed", "fig_speed_topk"} <= set(said)
    one, other = (tmp_path / "figures" / f"{name}.png" for name in ("fig_speed", "fig_speed_topk"))
    assert one.read_bytes() != other.read_bytes()


def test_a_run_does_not_miss_what_belongs_to_no_run(folder, tmp_path):
    said = run_report(folder).stdout
    assert "missing: fig_baselines; " in said
    assert "fig_quality" not in said
    (tmp_path / "results").mkdir()
    content = {"rows": [quality_row("ours", 30, 0.2)]}
    (tmp_path / "results/quality.json").write_text(json.dumps(content))
    said = run_report(tmp_path).stdout
    assert "missing: fig_speed_topk; python -m benchmarks.train_step --architecture topk" in said
    assert "missing: fig_baselines; python -m analysis.compare_baselines outputs/runs/NAME" in said


def test_one_layer_is_nothing_to_compare(folder):
    assert "fig_layers" not in run_report(folder).stdout
    content = json.loads((folder / "summary.json").read_text())
    content["rows"] = [
        row | {"hook_name": f"blocks.{layer}.hook_resid_post", "dead_fraction": 0.1,
               "n_documents_eval": 17}
        for row in content["rows"] for layer in (3, 9)
    ]  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(content))
    assert "fig_layers" in run_report(folder).stdout.splitlines()


@pytest.mark.parametrize("text", ['{"config": {"a"', "[1, 2]", "\x00"])
def test_broken_settings_are_one_line_of_the_page(folder, text):
    (folder / "config.json").write_text(text)
    done = run_report(folder)
    assert (done.returncode, done.stderr) == (0, "")
    page = (folder / "report.html").read_text()
    assert re.findall(r"<p class=error>[^<]*config\.json (?:is not valid JSON|holds no)", page)
    assert page.count("data:image/png") == 3


def test_settings_are_listed_with_what_they_are_part_of(folder):
    content = {"config": {"lm": {"name": "small"}, "wandb": ""}, "environment": {"commit": "abc"}}
    (folder / "config.json").write_text(json.dumps(content))
    run_report(folder)
    page = (folder / "report.html").read_text()
    assert "<tr><td>lm.name</td><td>small</td></tr>" in page
    assert "<tr><td>commit</td><td>abc</td></tr>" in page
    assert "wandb" not in page


def test_numbers_that_cannot_be_divided_by_do_not_end_the_report(folder):
    content = json.loads((ROOT / "benchmarks/results/train_step.json").read_text())
    for row in content["rows"]:
        row["encode_limit_fraction"] = 0.0
    (folder / "results/train_step.json").write_text(json.dumps(content))
    done = run_report(folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "not drawn: fig_speed; " in done.stdout


def test_values_that_a_figure_refuses_are_named_with_their_file(folder):
    (folder / "metrics.jsonl").write_text(json.dumps(logged()[0] | {"fvu": None}) + "\n")
    expected = f"not drawn: fig_training; {folder}/metrics.jsonl: l1_x01_l0-30_s0 has fvu = None"
    assert expected in run_report(folder).stdout


def test_a_page_that_cannot_be_written_is_one_line(folder):
    (folder / "report.html").mkdir()
    done = run_report(folder)
    assert done.returncode == 2
    assert done.stderr == f"error: {folder}/report.html could not be written: Is a directory\n"


def test_nothing_to_draw_is_an_error_in_one_line(tmp_path):
    done = run_report(tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {tmp_path} has no results that could be drawn"
    assert (
        run_report(tmp_path / "none").stderr.strip() == f"error: {tmp_path / 'none'} is no folder"
    )
    assert not (tmp_path / "report.html").exists()


def test_every_figure_is_in_the_report():
    modules = {path.stem for path in (ROOT / "data_visualization").glob("fig_*.py")}
    assert {entry.figure for entry in report.ENTRIES} == modules


def test_the_page_opens_without_asking_for_anything(folder):
    run_report(folder)
    with opened_pages() as new_page:
        page = new_page()
        page.goto((folder / "report.html").as_uri())
        assert page.locator("h1").inner_text() == "run<b>"
        assert page.locator("img").count() == 3
        widths = page.eval_on_selector_all("img", "images => images.map(i => i.naturalWidth)")
        assert min(widths) > 800
        page.click("#fig_training summary")
        assert page.locator("#fig_training table tr").count() == 1 + 12
        assert page.said == []
        assert [url for url in page.asked if not url.startswith(("file:", "data:"))] == []

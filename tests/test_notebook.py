"""The notebook is the script: same cells, and its cells run from the first to the last."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from build_notebook import ROOT, SCRIPT, difference, execute, notebook_of
from tiny_models import save_tiny_lm

SAMPLE = '''# %% [markdown]
# # A title
# and a *line*.

# %%
import os, sys
seed = os.environ["SPARSE_CODING_ARGS"].split("--seed ")[1]
print("progress", file=sys.stderr)

# %%
print("seed", seed)
'''  # fmt: skip


def build(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    path = folder / "sample.py"
    path.write_text(script)
    command = [sys.executable, ROOT / "tests/build_notebook.py", "--script", path, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def printed(cell: dict) -> str:
    return "".join(output.get("text", "") for output in cell["outputs"])


def test_cells_are_the_scripts():
    cells = [(cell.cell_type, cell.source) for cell in notebook_of(SAMPLE).cells]
    assert cells[0] == ("markdown", "# A title\nand a *line*.")
    assert cells[2] == ("code", 'print("seed", seed)')
    assert len(cells) == 3


def test_the_same_script_gives_the_same_bytes():
    assert nbformat.writes(notebook_of(SAMPLE)) == nbformat.writes(notebook_of(SAMPLE))


def test_cells_run_with_the_settings_and_keep_what_they_print(tmp_path):
    done = build(tmp_path, SAMPLE, "--args", "--preset demo --seed 17")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "sample.ipynb"
    assert done.stdout.splitlines()[-1] == str(path)
    cells = nbformat.read(path, as_version=4).cells
    assert (cells[1]["outputs"], printed(cells[2])) == ([], "seed 17\n")


def test_a_saved_figure_is_shown_under_its_cell(tmp_path):
    script = f"""# %%
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from matplotlib.figure import Figure
from data_visualization import style
style.show(style.save(Figure(), Path("figures"), "empty"))
"""
    (cell,) = execute(notebook_of(script), tmp_path, "").cells
    assert [sorted(output["data"]) for output in cell.outputs] == [["image/png", "text/plain"]]


def test_a_failing_cell_is_one_clear_line_and_leaves_the_old_notebook(tmp_path):
    (tmp_path / "sample.ipynb").write_text("old")
    done = build(tmp_path, SAMPLE + "1 / 0\n", "--args", "--seed 1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: sample.ipynb is left as it was")
    assert "ZeroDivisionError" in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.glob("*sample.ipynb*")] == ["sample.ipynb"]
    assert (tmp_path / "sample.ipynb").read_text() == "old"


@pytest.mark.parametrize(
    "edited, said",
    [
        (SAMPLE, ""),
        (SAMPLE.replace("*line*", "*word*"), "cell 0 of sample.ipynb differs from sample.py"),
        (SAMPLE.replace('"seed"', '"sown"'), "cell 2 of sample.ipynb differs from sample.py"),
        (SAMPLE + "\n# %%\nmore = 1\n", "sample.ipynb has 3 cells, sample.py 4"),
    ],
)
def test_check_finds_a_notebook_that_is_not_the_scripts(edited, said, tmp_path):
    nbformat.write(notebook_of(SAMPLE), tmp_path / "sample.ipynb")
    done = build(tmp_path, edited, "--check")
    expected = f"error: {said}; run `make notebook`\n" if said else ""
    assert (done.returncode, done.stderr) == (int(bool(said)), expected)


def test_the_committed_notebook_is_the_scripts():
    assert difference(SCRIPT, SCRIPT.with_suffix(".ipynb")) is None


def test_the_committed_notebook_shows_its_results():
    notebook = nbformat.read(SCRIPT.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)


def test_the_notebook_runs_from_the_first_cell_to_the_last(tmp_path):
    documents = [
        f"Document {i} counts {i} things, {i * 7} more and {i * i}. " * 9 for i in range(80)
    ]
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": d}) + "\n" for d in documents)
    )
    save_tiny_lm("gpt_neox", tmp_path / "lm", " ".join(documents))
    lm, text, output = (shlex.quote(str(tmp_path / name)) for name in ("lm", "text.jsonl", "out"))
    arguments = (
        f"--lm {lm} --text {text} --output {output} "
        "--hook-name blocks.1.hook_resid_post --context-length 32 --ratios 1 2 --n-tokens 4096 "
        "--batch-tokens 128 --n-tokens-eval 512 --n-tokens-ce 256 --heldout-fraction 0.2 "
        "--target-l0 4 --initial-l0 6 --device cpu --dtype float32 --name small"
    )
    notebook = execute(notebook_of(SCRIPT.read_text(encoding="utf-8")), ROOT, arguments)
    summary = json.loads((tmp_path / "out/runs/small/summary.json").read_text())
    assert [row["ratio"] for row in summary["rows"]] == [1, 2]
    shown = "".join(printed(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert all(row["name"] in shown for row in summary["rows"])

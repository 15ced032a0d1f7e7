"""Make easy_training_base.ipynb from easy_training_base.py and execute it.

    python tests/build_notebook.py            # minutes: the demo preset runs in the notebook
    python tests/build_notebook.py --check    # a second: are the notebook's cells the script's?

The notebook is never edited by hand. Its cells run in a fresh kernel that reads the settings from
the variable SPARSE_CODING_ARGS, as a person's own Jupyter would.
"""

import argparse
import os
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "easy_training_base.py"
ARGUMENTS = "--preset demo --name notebook --overwrite"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebook_of(script: str) -> NotebookNode:
    """The unexecuted notebook of a py:percent script; the same script gives the same bytes."""
    notebook = jupytext.reads(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(METADATA)
    notebook.nbformat_minor = 5  # the first version whose cells have ids
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i:02d}"
        cell.metadata = nbformat.from_dict({})
    nbformat.validate(notebook)
    return notebook


def execute(notebook: NotebookNode, folder: Path, arguments: str) -> NotebookNode:
    """The notebook with the outputs of its cells, run in `folder`.

    Progress on stderr is left out: it is told while a program runs and says nothing afterwards.
    Raises `CellExecutionError` if a cell does.
    """
    n_cells = len(notebook.cells)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        on_cell_start=lambda cell, cell_index: print(
            f"cell {cell_index + 1} of {n_cells}", flush=True
        ),
    )
    client.execute(env=os.environ | {"SPARSE_CODING_ARGS": arguments})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict(METADATA)  # without the kernel's version
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        nbformat.write(notebook, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def difference(script: Path, notebook: Path) -> str | None:
    """How the notebook's cells differ from the script's, in one line; None if they do not."""
    if not notebook.is_file():
        return f"{notebook.name} does not exist"
    expected = _cells(notebook_of(script.read_text(encoding="utf-8")))
    found = _cells(nbformat.read(notebook, as_version=4))
    if len(expected) != len(found):
        return f"{notebook.name} has {len(found)} cells, {script.name} {len(expected)}"
    for i, (cell, wanted) in enumerate(zip(found, expected, strict=True)):
        if cell != wanted:
            return f"cell {i} of {notebook.name} differs from {script.name}"
    return None


def _cells(notebook: NotebookNode) -> list[tuple[str, str, str]]:
    return [(cell.get("id", ""), cell.cell_type, cell.source) for cell in notebook.cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare only, execute nothing")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the py:percent script")
    parser.add_argument("--args", default=ARGUMENTS, help=f'settings (default: "{ARGUMENTS}")')
    given = parser.parse_args()
    path = given.script.with_suffix(".ipynb")
    if not given.script.is_file():
        sys.exit(f"error: {given.script} does not exist")
    if given.check:
        wrong = difference(given.script, path)
        sys.exit(f"error: {wrong}; run `make notebook`" if wrong else None)
    notebook = notebook_of(given.script.read_text(encoding="utf-8"))
    try:
        write(execute(notebook, given.script.parent, given.args), path)
    except CellExecutionError as error:
        last_line = f"{error.ename}: {error.evalue}"
        sys.exit(f"error: {path.name} is left as it was; a cell failed with {last_line}")
    print(path)


if __name__ == "__main__":
    main()

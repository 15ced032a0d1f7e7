"""The feature browser: a folder of files that opens from disk, without a server or a network.

    python -m data_visualization.dashboard RUN_FOLDER
    python -m data_visualization.dashboard RUN_FOLDER --name l1_x04_l0-30_s0

Seconds. Reads RUN_FOLDER/results/dashboard/NAME (analysis.collect_dashboard writes it), writes
RUN_FOLDER/dashboard/NAME: open its index.html. Of a dictionary that is no run's the folder is
outputs. Texts of your own: python -m data_visualization.serve RUN_FOLDER
"""

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_visualization.files import read_json, refuse, whole_file

SITE = Path(__file__).parent / "site"
COLUMNS = (
    "feature", "density", "n_firings", "max", "top_token", "n_eff", "n_eff_low", "n_eff_high",
    "concept", "auroc", "auroc_low", "auroc_high", "interpretability", "description",
)  # fmt: skip
CHUNK = 32  # features of one file
COMMAND = "python -m analysis.collect_dashboard"


def read(path: Path) -> Any:
    """A JSON file of the collected data; `ValueError` in one line if it is missing or broken."""
    return read_json(path, f"write it with {COMMAND}")


def as_script(name: str, content: Any) -> str:
    """A script that hands `content` to the page. ASCII alone: no character ends it early."""
    return f"dashboard.receive({json.dumps(name)},{json.dumps(content, separators=(',', ':'))});\n"


def index_of(source: Path) -> dict[str, Any]:
    """The index by columns, which is half as long as by rows."""
    content = read(source / "index.json")
    rows = content.get("rows") if isinstance(content, dict) else None
    is_list = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not rows or not is_list or not isinstance(content.get("about"), dict):
        raise ValueError(f"{source / 'index.json'} lists no features; collect it anew")
    missing = [key for key in COLUMNS if any(key not in row for row in rows)]
    if missing:
        raise ValueError(
            f"{source / 'index.json'} lacks {', '.join(missing)}: it is of another version; "
            "collect it anew"
        )
    columns = {key: [row[key] for row in rows] for key in COLUMNS}
    more = {key: content.get(key, {}) for key in ("config", "environment")}
    return {"about": content["about"], "chunk": CHUNK, "columns": columns, **more}


def contents(source: Path) -> Iterator[tuple[str, Any]]:
    """Name and content of every script of the site's data but `sites`."""
    index = index_of(source)
    yield "index", index
    yield "prompts", read(source / "prompts.json")
    features = index["columns"]["feature"]
    for number, first in enumerate(range(0, len(features), CHUNK)):
        name = f"features/{number:05d}"
        chunk, due = read(source / f"{name}.json"), features[first : first + CHUNK]
        is_list = isinstance(chunk, list) and all(isinstance(entry, dict) for entry in chunk)
        if not is_list or [entry.get("feature") for entry in chunk] != due:
            raise ValueError(f"{source / name}.json is not what index.json lists; collect it anew")
        yield name, chunk


def build(source: Path, target: Path) -> Path:
    """Write the site of one dictionary into `target`, whole or not at all; returns its page."""
    temporary, old = (
        target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("tmp", "old")
    )
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(SITE, temporary)
        (temporary / "data" / "features").mkdir(parents=True)
        for name, content in contents(source):
            write_script(temporary, name, content)
        write_script(temporary, "sites", [])
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    tell_sites(target.parent)
    return target / "index.html"


def tell_sites(folder: Path) -> None:
    """Tell every site of a folder which ones stand beside it: a page cannot look by itself."""
    names = sorted(path.parents[1].name for path in folder.glob("[!.]*/data/index.js"))
    for name in names:
        write_script(folder / name, "sites", names)


def write_script(site: Path, name: str, content: Any) -> None:
    """`site`/data/`name`.js, whole or not at all."""
    path = site / "data" / f"{name}.js"
    with whole_file(path) as temporary:
        temporary.write_text(as_script(name, content), encoding="ascii")


def sources(folder: Path, name: str | None) -> list[Path]:
    """Collected data of all dictionaries of a run folder, or of one."""
    collected = folder / "results" / "dashboard"
    found = sorted(path.parent for path in collected.glob("*/index.json"))
    if not found:
        raise ValueError(f"{collected} holds no data of a dictionary; {COMMAND} writes them")
    names = [path.name for path in found]
    if name is not None and name not in names:
        raise ValueError(f"no data of {name} were collected; there are {', '.join(names)}")
    return [path for path in found if name in (None, path.name)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_visualization.dashboard")
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("run_folder", type=Path, help="a run's folder, or outputs")
    parser.add_argument("--name", help="one dictionary; default: all that were collected")
    parser.add_argument("--overwrite", action="store_true", help="replace a site that exists")
    arguments = parser.parse_args()
    try:
        found = sources(arguments.run_folder, arguments.name)
        targets = [arguments.run_folder / "dashboard" / source.name for source in found]
        existing = [str(target) for target in targets if target.exists()]
        if existing and not arguments.overwrite:
            raise ValueError(f"{', '.join(existing)} exists; give --overwrite to replace it")
    except ValueError as error:
        refuse(error)
    failed = []
    for source, target in zip(found, targets, strict=True):
        try:
            print(build(source, target))
        except (ValueError, OSError) as error:  # the others are built all the same
            failed.append(error)
    if failed:
        refuse("; ".join(map(str, failed)))


if __name__ == "__main__":
    main()

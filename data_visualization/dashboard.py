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
import sys
from pathlib import Path
from typing import Any

SITE = Path(__file__).parent / "site"
COLUMNS = (
    "feature", "density", "n_firings", "max", "top_token", "n_eff", "n_eff_low", "n_eff_high",
    "concept", "auroc", "auroc_low", "auroc_high", "interpretability", "description",
)  # fmt: skip
COMMAND = "python -m analysis.collect_dashboard"


def read(path: Path) -> Any:
    """A JSON file of the collected data; `ValueError` in one line if it is missing or broken."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; write it with {COMMAND}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); collect it anew") from None


def as_script(name: str, content: Any) -> str:
    """A script that hands `content` to the page. ASCII alone: no character ends it early."""
    return f"dashboard.receive({json.dumps(name)},{json.dumps(content, separators=(',', ':'))});\n"


def index_of(source: Path) -> dict[str, Any]:
    """The index by columns, which is half as long as by rows."""
    content = read(source / "index.json")
    rows = content.get("rows") if isinstance(content, dict) else None
    if not rows or not isinstance(content.get("about"), dict):
        raise ValueError(f"{source / 'index.json'} lists no features; collect it anew")
    missing = [key for key in COLUMNS if any(key not in row for row in rows)]
    if missing:
        raise ValueError(
            f"{source / 'index.json'} lacks {', '.join(missing)}: it is of another version; "
            "collect it anew"
        )
    columns = {key: [row[key] for row in rows] for key in COLUMNS}
    more = {key: content.get(key, {}) for key in ("config", "environment")}
    return {"about": content["about"], "columns": columns, **more}


def build(source: Path, target: Path) -> Path:
    """Write the site of one dictionary into `target`, whole or not at all; returns its page."""
    index = index_of(source)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        shutil.copytree(SITE, temporary)
        (temporary / "data" / "features").mkdir(parents=True)
        write = {"index": index, "prompts": read(source / "prompts.json")}
        for name, content in write.items():
            path = temporary / "data" / f"{name}.js"
            path.write_text(as_script(name, content), encoding="ascii")
        for chunk in sorted((source / "features").glob("*.json")):
            name = f"features/{chunk.stem}"
            path = temporary / "data" / f"{name}.js"
            path.write_text(as_script(name, read(chunk)), encoding="ascii")
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target / "index.html"


def sources(folder: Path, name: str | None) -> list[Path]:
    """Collected data of all dictionaries of a run folder, or of one."""
    collected = folder / "results" / "dashboard"
    found = sorted(path.parent for path in collected.glob("*/index.json"))
    if name is not None:
        found = [path for path in found if path.name == name]
    if not found:
        what = f"{collected / name}" if name else f"{collected}"
        raise ValueError(f"{what} holds no collected data; write them with {COMMAND} {folder}")
    return found


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
        for source, target in zip(found, targets, strict=True):
            print(build(source, target))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

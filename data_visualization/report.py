"""Every figure that a run has results for, and one page with figures, tables and provenance.

    python -m data_visualization.report RUN_FOLDER
    python -m data_visualization.report outputs/published benchmarks    # what the README shows

Seconds to a minute. Results are looked for in the folders in turn; figures and report.html go into
the first. The page is one file that needs nothing else: no network, no scripts. What is missing is
named with the command that makes it. A results file that cannot be drawn is one line, the others
are drawn all the same.
"""

import argparse
import base64
import html
import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_visualization.style import Row, is_number, read_lines, read_rows, save

MAX_ROWS = 60  # of a table; all of them are in the results file
STYLE = """
:root { color-scheme: light dark; --line: #d9dde3; --soft: #56606c; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --line: #363d46; --soft: #a3adb9; --panel: #1c2026; }
  body { background: #14171b; color: #e6e9ed; } a { color: #7cbcf2; }
  img { background: #fff; border-radius: 6px; padding: 6px; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .2rem; }
p { margin: .4rem 0; } .soft { color: var(--soft); } .error { color: #c23b1d; }
img { max-width: 100%; height: auto; } pre, code { font: .86em ui-monospace, monospace; }
pre { background: var(--panel); padding: .5rem .8rem; border-radius: 6px; overflow-x: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .84rem; }
th, td { text-align: right; padding: .15rem .7rem .15rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
details { margin: .4rem 0; } summary { cursor: pointer; }
@media print { details { display: none; } h2 { break-after: avoid; } img { break-inside: avoid; } }
"""


class Entry(NamedTuple):
    """One figure: where it reads, what it answers, what makes its results."""

    figure: str
    source: str
    title: str
    command: str


RUN = "FOLDER"  # stands for the folder in commands
TRAIN = "python easy_training_base.py"
ENTRIES = (
    Entry("fig_training", "metrics.jsonl", "How training went", TRAIN),
    Entry("fig_reconstruction", "summary.json", "What the dictionaries keep", TRAIN),
    Entry("fig_sparsity", "summary.json", "What sparsity costs the model", TRAIN),
    Entry("fig_layers", "summary.json", "Layer by layer", TRAIN),
    Entry("fig_feature_density", "results/feature_density.json", "How often features fire", TRAIN),
    Entry("fig_baselines", "results/compare_baselines.json",
          "Beside PCA, ICA, neurons and random directions",
          f"python -m analysis.compare_baselines {RUN}"),
    Entry("fig_consistency", "results/consistency.json", "Which conditions find the same features",
          "python -m analysis.consistency"),
    Entry("fig_polysemanticity", "results/polysemanticity.json",
          "How many concepts units stand for",
          f"python -m analysis.measure_polysemanticity {RUN}"),
    Entry("fig_find_units", "results/find_units.json",
          "One neuron for several things, one feature for each",
          f"python -m analysis.find_units {RUN}"),
    Entry("fig_histogram", "results/find_units.json", "Weak and strong firings by concept",
          f"python -m analysis.find_units {RUN}"),
    Entry("fig_interpretability", "results/interpret_units.json",
          "How well words say what units fire on", f"python -m analysis.interpret_units {RUN}"),
    Entry("fig_probe_concepts", "results/probe_concepts.json", "Concepts read from few features",
          f"python -m analysis.probe_concepts {RUN}"),
    Entry("fig_splitting", "results/probe_concepts.json", "Splitting and absorption",
          f"python -m analysis.probe_concepts {RUN}"),
    Entry("fig_toy_recovery", "results/recover_toy_features.json",
          "Features found whose truth is known", "python -m analysis.recover_toy_features"),
    Entry("fig_feature_dimensionality", "results/feature_dimensionality.json",
          "Features in superposition in a toy model",
          "python -m analysis.toy_model_superposition"),
    Entry("fig_quality", "results/quality.json", "Quality beside other libraries",
          "python -m benchmarks.quality"),
    Entry("fig_speed", "results/train_step.json", "Speed beside other libraries",
          "python -m benchmarks.train_step"),
)  # fmt: skip


class Section(NamedTuple):
    """What became of an entry: a picture and its rows, or the one line that says why not."""

    entry: Entry
    path: Path
    picture: bytes | None
    rows: list[Row]
    error: str | None


def draw(entry: Entry, path: Path, figures: Path) -> Section:
    """Draw and save one figure. Rows of another version are an error, not the end."""
    module = importlib.import_module(f"data_visualization.{entry.figure}")
    try:
        rows = read_lines(path) if path.suffix == ".jsonl" else read_rows(path)
        png, _ = save(module.draw(rows), figures, entry.figure)
        return Section(entry, path, png.read_bytes(), rows, None)
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split())
        reason = said if str(path) in said else f"{path}: {said}"
    except (LookupError, TypeError, AttributeError, ArithmeticError, StopIteration) as error:
        reason = f"{path} is of another version ({type(error).__name__}: {error}); make it anew"
    return Section(entry, path, None, [], reason)


def found(folders: Sequence[Path], source: str) -> Path | None:
    """The first of the folders that has it."""
    return next((folder / source for folder in folders if (folder / source).is_file()), None)


# --- the page ------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """A cell: numbers to four digits, nothing for None, everything escaped."""
    if value is None:
        return ""
    if is_number(value) and not isinstance(value, int):
        return f"{value:.4g}"
    return html.escape(str(value))


def cell(row: Row, key: str) -> str:
    """A value, with its interval where it has one, or its lower bound alone."""
    low, high = row.get(f"{key}_low"), row.get(f"{key}_high")
    if low is None or row.get(key) is None:
        return text(row.get(key))
    return f"{text(row[key])} [{text(low)}, {text(high) if high is not None else '…'}]"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """One table for each kind of row: what all rows share stands above it, once."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("what") or row.get("kind") or "rows"), []).append(row)
    for kind, some in kinds.items():
        keys = [key for key in dict.fromkeys(key for row in some for key in row)
                if not key.endswith(("_low", "_high"))
                and not any(isinstance(row.get(key), list | dict) for row in some)]  # fmt: skip
        same = [key for key in keys if len(some) > 1
                and len({str(row.get(key)) for row in some}) == 1]  # fmt: skip
        shared = ", ".join(f"{html.escape(key)} {text(some[0][key])}" for key in same
                           if some[0].get(key) is not None)  # fmt: skip
        shown = [key for key in keys if key not in same]
        yield f"<p><b>{html.escape(kind)}</b> <span class=soft>{shared}</span></p>"
        yield "<div class=scroll><table><tr>"
        yield "".join(f"<th>{html.escape(key)}</th>" for key in shown) + "</tr>"
        for row in some[:MAX_ROWS]:
            yield "<tr>" + "".join(f"<td>{cell(row, key)}</td>" for key in shown) + "</tr>"
        yield "</table></div>"
        if len(some) > MAX_ROWS:
            yield f"<p class=soft>{MAX_ROWS} of {len(some):,} rows; all are in the file.</p>"


def section_html(section: Section, folder: Path) -> Iterator[str]:
    """Heading, picture, how to make it again, and the rows behind it, folded."""
    entry, title = section.entry, html.escape(section.entry.title)
    yield f"<section id={entry.figure}><h2>{title}</h2>"
    question = importlib.import_module(f"data_visualization.{entry.figure}").__doc__
    yield f"<p class=soft>{html.escape(question.splitlines()[0])}</p>"
    if section.picture is None:
        yield f"<p class=error>{html.escape(section.error or '')}</p></section>"
        return
    picture = base64.b64encode(section.picture).decode()
    yield f'<p><img alt="{title}" src="data:image/png;base64,{picture}"></p>'
    made = command(entry, folder)
    source = section.path.parent.parent if "/" in entry.source else section.path.parent
    again = f"python -m data_visualization.{entry.figure} {source}"
    yield f"<pre>{html.escape(made)}\n{html.escape(again)}</pre>"
    yield f"<details><summary>Numbers: {html.escape(str(section.path))}</summary>"
    yield from tables(section.rows)
    yield from provenance(section.path)
    yield "</details></section>"


def provenance(path: Path) -> Iterator[str]:
    """With what settings a results file was made, and where."""
    if path.suffix != ".json":
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        yield f"<p class=error>{html.escape(f'{path} is not valid JSON: {error}')}</p>"
        return
    if not isinstance(content, dict):
        yield f"<p class=error>{html.escape(str(path))} holds no settings</p>"
        return
    for key in ("config", "environment"):
        some = content.get(key)
        if isinstance(some, dict):
            listed = ", ".join(f"{k} {v}" for k, v in some.items() if v not in (None, "", [], {}))
            yield f"<p class=soft>{key}: {html.escape(listed)}</p>"


SUMMARY = ("name", "ratio", "l0", "fvu", "nats_lost", "dead_fraction", "n_tokens_trained",
           "n_tokens_eval")  # fmt: skip


def summary_html(folders: Sequence[Path]) -> Iterator[str]:
    """The dictionaries, one line each."""
    path = found(folders, "summary.json")
    if path is None:
        return
    try:
        rows = read_rows(path)
    except ValueError:
        return  # said where its figure would be
    keys = [key for key in SUMMARY if any(key in row for row in rows)]
    yield "<h2>The dictionaries</h2><p class=soft>On held-out documents; brackets are 95 % "
    yield "intervals over documents.</p><div class=scroll><table><tr>"
    yield "".join(f"<th>{key}</th>" for key in keys) + "</tr>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{cell(row, key)}</td>" for key in keys) + "</tr>"
    yield "</table></div>"


def command(entry: Entry, folder: Path) -> str:
    """What makes the results: of this run, if it is one."""
    is_run = (folder / "config.json").is_file()
    return entry.command.replace(RUN, str(folder) if is_run else "outputs/runs/NAME")


def page(folders: Sequence[Path], sections: Sequence[Section], missing: Sequence[Entry]) -> str:
    """The whole page. The same results give the same bytes: no date but those in them."""
    name = html.escape(folders[0].resolve().name)
    parts = [
        '<!doctype html><html lang=en><head><meta charset=utf-8>',
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">",
        f"<title>{name}</title><style>{STYLE}</style></head><body><h1>{name}</h1><ul>",
    ]  # fmt: skip
    parts += [
        f"<li><a href=#{section.entry.figure}>{html.escape(section.entry.title)}</a></li>"
        for section in sections
    ]
    parts += ["</ul>", *summary_html(folders)]
    for section in sections:
        parts += section_html(section, folders[0])
    config = found(folders, "config.json")
    if config is not None:
        parts.append("<h2>Settings and provenance</h2>")
        parts += provenance(config)
    if missing:
        parts.append("<h2>Not measured here</h2><ul>")
        parts += [
            f"<li>{html.escape(entry.title)}: <code>{html.escape(command(entry, folders[0]))}"
            "</code></li>"
            for entry in missing
        ]
        parts.append("</ul>")
    return "\n".join([*parts, "</body></html>\n"])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m data_visualization.report")
    parser.description = __doc__.splitlines()[0]
    about = "a run's folder, or outputs; others are looked through too"
    parser.add_argument("folder", type=Path, nargs="+", help=about)
    folders = parser.parse_args().folder
    absent = [str(folder) for folder in folders if not folder.is_dir()]
    if absent:
        sys.exit(f"error: {', '.join(absent)} is no folder")
    sections, missing = [], []
    for entry in ENTRIES:
        path = found(folders, entry.source)
        if path is None:
            missing.append(entry)
            print(f"missing: {entry.figure}; {command(entry, folders[0])}")
            continue
        section = draw(entry, path, folders[0] / "figures")
        sections.append(section)
        print(f"not drawn: {entry.figure}; {section.error}" if section.error else entry.figure)
    if not any(section.picture for section in sections):
        sys.exit(f"error: {folders[0]} has no results that could be drawn")
    target = folders[0] / "report.html"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page(folders, sections, missing), encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        sys.exit(f"error: {target} could not be written: {error.strerror}")
    finally:
        temporary.unlink(missing_ok=True)
    print(f"written: {target}")


if __name__ == "__main__":
    main()

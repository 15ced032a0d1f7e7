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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_visualization.files import read_json, refuse, whole_file
from data_visualization.style import (
    OF_ANOTHER_VERSION,
    Row,
    is_number,
    read_lines,
    read_rows,
    save,
)

MAX_ROWS = 60  # of a table; all of them are in the results file
STYLE = """
:root { color-scheme: light dark; --line: #d9dde3; --soft: #56606c; --panel: #f6f7f9;
  --error: #b3320f; }
@media (prefers-color-scheme: dark) {
  :root { --line: #363d46; --soft: #a3adb9; --panel: #1c2026; --error: #ff8f70; }
  body { background: #14171b; color: #e6e9ed; } a { color: #7cbcf2; }
  img { background: #fff; border-radius: 6px; padding: 6px; }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .2rem; }
p, li, summary { overflow-wrap: anywhere; } p { margin: .4rem 0; }
.soft { color: var(--soft); } .error { color: var(--error); }
img { max-width: 100%; height: auto; box-sizing: border-box; }
pre, code { font: .86em ui-monospace, monospace; }
pre { background: var(--panel); padding: .5rem .8rem; border-radius: 6px; overflow-x: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .84rem; }
th, td { text-align: right; padding: .15rem .7rem .15rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child, .settings td { text-align: left; }
th { color: var(--soft); font-weight: 600; }
details { margin: .4rem 0; } summary { cursor: pointer; }
@media print { details { display: none; } h2 { break-after: avoid; } img { break-inside: avoid; } }
"""


class Entry(NamedTuple):
    """One figure: where it reads, what it answers and shows, what makes its results."""

    figure: str
    source: str
    title: str
    shows: str
    command: str
    suffix: str = ""
    """Of the picture's file, where one figure draws several results files."""
    compares: tuple[str, ...] = ()
    """Rows that all agree in these keys leave it nothing to compare: it is not drawn."""


RUN = "FOLDER"  # stands for the folder in commands
TRAIN = "python easy_training_base.py"
ENTRIES = (
    Entry("fig_training", "metrics.jsonl", "How training went",
          "Unexplained variance, active features per token and dead features over training; seeds "
          "thin, the L0 asked for dashed.", TRAIN),
    Entry("fig_reconstruction", "summary.json", "What the dictionaries keep",
          "Unexplained variance and nats lost when the model runs on reconstructions of held-out "
          "text.", TRAIN),
    Entry("fig_sparsity", "summary.json", "What sparsity costs the model",
          "Divergence from the clean model's predictions, and perplexity beside the clean one.",
          TRAIN),
    Entry("fig_layers", "summary.json", "Layer by layer",
          "The same measures side by side for every layer, model and ratio.", TRAIN,
          compares=("lm", "hook_name")),
    Entry("fig_feature_density", "results/feature_density.json", "How often features fire",
          "The share of held-out tokens on which features fire; apart, those that never do.",
          TRAIN),
    Entry("fig_baselines", "results/compare_baselines.json",
          "Beside PCA, ICA, neurons and random directions",
          "What each family keeps with as many active features per token as the SAE, also on "
          "models that were never trained.", f"python -m analysis.compare_baselines {RUN}"),
    Entry("fig_consistency", "results/consistency.json", "Which conditions find the same features",
          "Of each feature its most similar one in a dictionary of another ratio, seed, layer or "
          "model, above what chance gives.", "python -m analysis.consistency"),
    Entry("fig_polysemanticity", "results/polysemanticity.json",
          "How many concepts units stand for",
          "The effective number of concepts of SAE features and of controls that fire as often, "
          "and the share that stands for unrelated ones.",
          f"python -m analysis.measure_polysemanticity {RUN}"),
    Entry("fig_find_units", "results/find_units.json",
          "One neuron for several things, one feature for each",
          "Of the units found for all of some concepts, and for each, what share of their firings "
          "belongs to which.", f"python -m analysis.find_units {RUN}"),
    Entry("fig_histogram", "results/find_units.json", "Weak and strong firings by concept",
          "The activations of such units, stacked by concept.",
          f"python -m analysis.find_units {RUN}"),
    Entry("fig_interpretability", "results/interpret_units.json",
          "How well words say what units fire on",
          "Scores of rules about tokens against four kinds of silent tokens, by strength of "
          "firing, and how often an intruder is found; neurons and random directions beside.",
          f"python -m analysis.interpret_units {RUN}"),
    Entry("fig_probe_concepts", "results/probe_concepts.json", "Concepts read from few features",
          "How well the k best features tell a concept from the others, beside controls and a "
          "probe of all dimensions.", f"python -m analysis.probe_concepts {RUN}"),
    Entry("fig_splitting", "results/probe_concepts.json", "Splitting and absorption",
          "Features that a concept needs, what others absorb, and what of a feature its children "
          "in larger dictionaries cover; untrained SAEs and chance beside.",
          f"python -m analysis.probe_concepts {RUN}"),
    Entry("fig_toy_recovery", "results/recover_toy_features.json",
          "Features found whose truth is known",
          "The share of planted features that dictionaries recover, by architecture, ratio and "
          "sparsity.", "python -m analysis.recover_toy_features"),
    Entry("fig_feature_dimensionality", "results/feature_dimensionality.json",
          "Features in superposition in a toy model",
          "How many dimensions a feature takes as features get rarer, and whether SAEs find them.",
          "python -m analysis.toy_model_superposition"),
    Entry("fig_quality", "results/quality.json", "Quality beside other libraries",
          "Each architecture here and in other libraries, trained on the same activations for as "
          "many steps.", "python -m benchmarks.quality"),
    Entry("fig_speed", "results/train_step.json", "Speed beside other libraries: L1",
          "Tokens per second of a training step, and our speed over the fastest peer's; dotted: "
          "the one product that no step can do without.", "python -m benchmarks.train_step"),
    Entry("fig_speed", "results/train_step_topk.json", "Speed beside other libraries: TopK",
          "The same measures of a TopK step.",
          "python -m benchmarks.train_step --architecture topk", "_topk"),
)  # fmt: skip


class Section(NamedTuple):
    """What became of an entry: a picture and its rows, or the one line that says why not."""

    name: str
    title: str
    entry: Entry
    path: Path
    picture: bytes | None
    rows: list[Row]
    error: str | None


def draw(entry: Entry, path: Path, figures: Path, name: str, title: str) -> Section | None:
    """Draw and save one figure. Rows of another version are an error, not the end.

    None if there is nothing to compare.
    """
    module = importlib.import_module(f"data_visualization.{entry.figure}")
    try:
        rows = read_lines(path) if path.suffix == ".jsonl" else read_rows(path)
        if entry.compares and len({tuple(str(row.get(k)) for k in entry.compares)
                                   for row in rows}) == 1:  # fmt: skip
            return None
        png, _ = save(module.draw(rows), figures, name)
        return Section(name, title, entry, path, png.read_bytes(), rows, None)
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split())
        reason = said if str(path) in said else f"{path}: {said}"
    except OF_ANOTHER_VERSION as error:
        reason = f"{path} is of another version ({type(error).__name__}: {error}); make it anew"
    return Section(name, title, entry, path, None, [], reason)


def found(folders: Sequence[Path], source: str) -> list[Path]:
    """Those of the folders that have it."""
    return [folder for folder in folders if (folder / source).is_file()]


def drawn(folders: Sequence[Path]) -> tuple[list[Section], list[Entry]]:
    """Every figure of every folder, and what none of them has results for.

    The first folder's picture has the figure's name, others have their folder's name behind it.
    What belongs to no run is not missing in one.
    """
    sections, missing = [], []
    for entry in ENTRIES:
        having = found(folders, entry.source)
        for folder in having:
            name, title = entry.figure + entry.suffix, entry.title
            if len(having) > 1:
                title += f": {folder.resolve().name}"
                name += "" if folder is having[0] else f"_{folder.resolve().name}"
            section = draw(entry, folder / entry.source, folders[0] / "figures", name, title)
            if section is not None:
                sections.append(section)
                print(f"not drawn: {name}; {section.error}" if section.error else name)
        if not having and (belongs_to_runs(entry) or not is_run(folders[0])):
            missing.append(entry)
            print(f"missing: {entry.figure}{entry.suffix}; {command(entry, folders[0])}")
    return sections, missing


def belongs_to_runs(entry: Entry) -> bool:
    return entry.command == TRAIN or RUN in entry.command


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "metrics.jsonl"))


def command(entry: Entry, folder: Path) -> str:
    """What makes the results: of this run, if it is one."""
    return entry.command.replace(RUN, str(folder) if is_run(folder) else "outputs/runs/NAME")


# --- the page ------------------------------------------------------------------------------------


def text(value: Any) -> str:
    """A cell: numbers to four digits, nothing for None, everything escaped."""
    if value is None:
        return ""
    if is_number(value):
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
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
        yield from table(some, keys, kind)


def table(rows: Sequence[Row], keys: Sequence[str], caption: str) -> Iterator[str]:
    """The first rows; what is the same in all stands in the caption."""
    same = [key for key in keys if len(rows) > 1
            and len({cell(row, key) for row in rows}) == 1]  # fmt: skip
    shared = ", ".join(f"{html.escape(key)} {cell(rows[0], key)}" for key in same
                       if rows[0].get(key) is not None)  # fmt: skip
    shown = [key for key in keys if key not in same]
    yield f"<p><b>{html.escape(caption)}</b> <span class=soft>{shared}</span></p>"
    yield "<div class=scroll><table><tr>"
    yield "".join(f"<th>{html.escape(key)}</th>" for key in shown) + "</tr>"
    for row in rows[:MAX_ROWS]:
        yield "<tr>" + "".join(f"<td>{cell(row, key)}</td>" for key in shown) + "</tr>"
    yield "</table></div>"
    if len(rows) > MAX_ROWS:
        yield f"<p class=soft>{MAX_ROWS} of {len(rows):,} rows; all are in the file.</p>"


def section_html(section: Section, folder: Path) -> Iterator[str]:
    """Heading, picture, how to make it again, and the rows behind it, folded."""
    entry, title = section.entry, html.escape(section.title)
    yield f'<section id="{html.escape(section.name)}"><h2>{title}</h2>'
    question = importlib.import_module(f"data_visualization.{entry.figure}").__doc__
    yield f"<p class=soft>{html.escape(question.splitlines()[0])} {html.escape(entry.shows)}</p>"
    if section.picture is None:
        yield f"<p class=error>{html.escape(section.error or '')}</p>"
        yield f"<pre>{html.escape(command(entry, folder))}</pre></section>"
        return
    picture = base64.b64encode(section.picture).decode()
    yield f'<p><img alt="{html.escape(entry.shows)}" src="data:image/png;base64,{picture}"></p>'
    made = command(entry, folder)
    source = section.path.parent.parent if "/" in entry.source else section.path.parent
    program = "report" if entry.suffix else entry.figure
    again = f"python -m data_visualization.{program} {source}"
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
        content = read_json(path, "its settings are not known")
    except (ValueError, OSError) as error:
        yield f"<p class=error>{html.escape(str(error))}</p>"
        return
    if not isinstance(content, dict):
        yield f"<p class=error>{html.escape(str(path))} holds no settings</p>"
        return
    for key in ("config", "environment"):
        some = content.get(key)
        if isinstance(some, dict):
            yield f"<p><b>{key}</b></p><div class=scroll><table class=settings>"
            yield from (f"<tr><td>{html.escape(name)}</td><td>{text(value)}</td></tr>"
                        for name, value in settings(some))  # fmt: skip
            yield "</table></div>"


def settings(some: dict[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    """Settings that are set, those of a part with its name before theirs."""
    for key, value in some.items():
        if isinstance(value, dict):
            yield from settings(value, f"{within}{key}.")
        elif value not in (None, "", []):
            name = f"{within}{key}"
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else value


SUMMARY = ("name", "ratio", "l0", "fvu", "nats_lost", "dead_fraction", "n_tokens_trained",
           "n_tokens_eval")  # fmt: skip


def summary_html(folders: Sequence[Path]) -> Iterator[str]:
    """The dictionaries, one line each, a table per folder."""
    for n, folder in enumerate(found(folders, "summary.json")):
        try:
            rows = read_rows(folder / "summary.json")
        except (ValueError, OSError):
            continue  # said where its figure would be
        if n == 0:
            yield "<h2>The dictionaries</h2><p class=soft>On held-out documents; brackets are "
            yield "95 % intervals over documents.</p>"
        keys = [key for key in SUMMARY if any(key in row for row in rows)]
        yield from table(rows, keys, folder.resolve().name)


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
        f'<li><a href="#{html.escape(section.name)}">{html.escape(section.title)}</a></li>'
        for section in sections
    ]
    parts += ["</ul>", *summary_html(folders)]
    for section in sections:
        parts += section_html(section, folders[0])
    for folder in found(folders, "config.json"):
        parts.append("<h2>Settings and provenance</h2>")
        parts += provenance(folder / "config.json")
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
        refuse(f"{', '.join(absent)} is no folder")
    sections, missing = drawn(folders)
    if not any(section.picture for section in sections):
        refuse(f"{folders[0]} has no results that could be drawn")
    target = folders[0] / "report.html"
    try:
        with whole_file(target) as temporary:
            temporary.write_text(page(folders, sections, missing), encoding="utf-8")
    except OSError as error:
        refuse(f"{target} could not be written: {error.strerror}")
    print(f"written: {target}")


if __name__ == "__main__":
    main()

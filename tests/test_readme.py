"""What the README tells a user to type exists and is accepted."""

import json
import re
import shlex
from pathlib import Path

import pytest

from sparse_coding.config import parse_config
from sparse_coding.metrics import t_interval

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "easy_training_base.py").read_text(encoding="utf-8")


def training_commands(text: str) -> list[str]:
    """Arguments of every call of the entry script, with lines that end in a backslash joined."""
    joined = text.replace("\\\n", " ")
    called = r"(?:python|torchrun [^`\n]*?) easy_training_base\.py([^`\n#|]*)"
    found = re.findall(called, joined)
    return [arguments.strip() for arguments in found]


def tree_names() -> list[str]:
    """The names in the README's file tree, with the folder they are listed under."""
    block = README.split("## What is where")[1].split("```")[1]
    names = []
    for line in block.strip().splitlines():
        folder = "sparse_coding/" if line.startswith("  ") else ""
        words = re.split(r"\s{2,}", line.strip())[0] if not folder else line
        names += [folder + word for word in re.findall(r"[\w./-]+(?:\.py|\.ipynb|/)", words)]
    return names


@pytest.mark.parametrize("arguments", training_commands(README) + training_commands(SCRIPT))
def test_every_training_command_is_accepted(arguments):
    if arguments != "--help":
        parse_config(shlex.split(arguments))


def test_the_readme_shows_several_training_commands():
    assert len(training_commands(README)) >= 5


@pytest.mark.parametrize("name", tree_names())
def test_every_name_in_the_file_tree_exists(name):
    assert (ROOT / name).exists()


def test_the_file_tree_leaves_no_library_module_out():
    listed = set(tree_names())
    modules = {f"sparse_coding/{path.name}" for path in (ROOT / "sparse_coding").glob("*.py")}
    assert modules - listed - {"sparse_coding/__init__.py"} == set()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make ([\w./-]+)", README))))
def test_every_make_target_exists(target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_every_local_link_and_picture_exists(path):
    assert (ROOT / path).exists()


EXACT_PEERS = ("sae_lens", "sae_lens-compiled", "dictionary_learning")
ROUNDED_PEERS = (
    "sae_lens-bfloat16", "sae_lens-bfloat16-compiled", "dictionary_learning-bfloat16",
)  # fmt: skip


@pytest.mark.parametrize("ratio", [1, 2, 4, 8, 16, 32])
def test_the_table_of_speeds_is_the_benchmarks(ratio):
    path = ROOT / "benchmarks" / "results" / "train_step.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    at_ratio = {row["method"]: row for row in rows if row["ratio"] == ratio}
    ms = {method: row["ms_per_step"] for method, row in at_ratio.items()}
    exact, single, plain = ms["auto"], ms["auto-float32"], ms["plain-bfloat16"]
    peer, rounded = (min(ms[m] for m in names) for names in (EXACT_PEERS, ROUNDED_PEERS))
    mb = min(at_ratio[m]["peak_mb"] for m in EXACT_PEERS if at_ratio[m]["peak_mb"])
    cells = [f"{n:,.0f}" for n in (exact, single, peer, rounded, plain)]
    cells += [f"{n:.1f}" for n in (peer / exact, peer / single, rounded / exact, plain / exact)]
    cells += [f"{at_ratio['auto']['peak_mb']:.0f} / {mb:.0f}"]
    assert f"| 1:{ratio} | {' | '.join(cells)} |" in README


@pytest.mark.parametrize("name", ["topk", "d_768", "d_2048", "batch_8192"])
def test_the_table_of_other_sizes_is_the_benchmarks(name):
    path = ROOT / "benchmarks" / "results" / f"train_step_{name}.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    single = {
        (row["d_in"], row["batch_tokens"], row["ratio"]): row["vs_fastest_fp32_peer"]
        for row in rows
        if row["method"] == "auto-float32"
    }
    for row in [row for row in rows if row["method"] == "auto"]:
        size = row["d_in"], row["batch_tokens"], row["ratio"]
        names = ("vs_fastest_peer", "vs_plain_fused_bf16")
        factors = [row["vs_fastest_fp32_peer"], single[size], *(row[name] for name in names)]
        cells = [row["architecture"], *map(str, size[:2]), f"1:{size[2]}"]
        cells += [f"{row['ms_per_step']:.0f}", *(f"{factor:.1f}" for factor in factors)]
        assert f"| {' | '.join(cells)} | {row['encode_limit_fraction']:.0%} |" in README


def test_the_table_of_quality_is_the_benchmarks():
    path = ROOT / "benchmarks" / "results" / "quality.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    gaps = {
        (row["architecture"], row["vs"], row["target_l0"]): row
        for row in rows
        if row["what"] == "gap"
    }
    pairs = list(dict.fromkeys(key[:2] for key in gaps))
    assert len(pairs) == 13 and len(gaps) == 3 * len(pairs)
    for pair in pairs:
        at = [gaps[*pair, target] for target in (15.0, 30.0, 60.0)]
        cells = [*pair, *(with_interval(row, "fvu_gap", "{:+.3f}") for row in at)]
        cells += [with_interval(row, "nats_lost_gap", "{:+.2f}") for row in at]
        assert f"| {' | '.join(cells)} |" in README


def test_the_counts_of_hostile_files_are_the_fuzzs():
    rows = json.loads((ROOT / "benchmarks/results/fuzz.json").read_text(encoding="utf-8"))["rows"]
    n, n_refused = (sum(row[key] for row in rows) for key in ("n_cases", "n_refused"))
    assert f"| {len(rows)} readers, {n:,} damaged files: {n_refused:,} refused in one" in README
    assert f"took over {max(row['slowest_seconds'] for row in rows):.1f} s" in README


def published(name):
    path = ROOT / "outputs" / "published" / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


def with_interval(row, key, form):
    if row.get(key) is None:
        return "-"
    low, high = (form.format(row[f"{key}_{end}"]) for end in ("low", "high"))
    return f"{form.format(row[key])} [{low}, {high}]"


def test_the_table_of_consistency_is_the_studys():
    def short(label):
        return label.replace("smollm2-135m", "smollm2").replace("ratio ", "1:")

    lines = set()
    for row in published("consistency"):
        null = row.get("decoder_cosine_null_covariance")
        cells = [row["condition"], short(row["a"]), short(row["b"])]
        cells += [with_interval(row, "decoder_cosine", "{:.2f}")]
        cells += ["-" if null is None else f"{null:.2f}"]
        cells += [
            with_interval(row, "correlation", "{:.2f}"),
            f"{row['correlation_above_0.7']:.0%}",
        ]
        lines.add(f"| {' | '.join(cells)} |")
    section = README.split("### When do two dictionaries")[1].split("\n### ")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(table) > 10
    assert not [line for line in table if line not in lines]
    nulls = [abs(row["correlation_null"]) for row in published("consistency")]
    assert max(nulls) < 0.005


def test_the_table_of_baselines_is_the_programs():
    section = README.split("### Does an SAE keep more")[1].split("\n### ")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")][1:]
    rows = [row for row in published("compare_baselines") if "@" not in row["lm"]]
    lines = set()
    for row in rows:
        cells = [f"{row['l0']:.1f}", with_interval(row, "fvu", "{:.3f}")]
        cells += [with_interval(row, "fvu_minus_sae", "{:+.3f}")]
        cells += [with_interval(row, "nats_lost", "{:.2f}")]
        cells += [with_interval(row, "nats_lost_minus_sae", "{:+.2f}")]
        if row["family"] == "sae" and row["k"] is None:
            cells[2] = cells[4] = "-"
        lines.add(" | ".join(cells))
    found = {line.strip("| ").split(" | ", 1)[1] for line in table}
    assert found == lines


def test_the_table_of_known_features_is_the_programs():
    section = README.split("### Are features found")[1].split("\n### ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    shown = {"PCA": "pca", "ICA": "ica", "NMF": "nmf", "never trained (null)": "random"}
    found = {
        (shown.get(name, name), setting): cell
        for name, *cells in table[1:]
        for setting, cell in zip(table[0][1:], cells, strict=True)
    }
    expected = {}
    for row in published("recover_toy_features"):
        if row["l1_coeff"] is None:
            ends = (row[f"recovered_90{end}"] for end in ("", "_low", "_high"))
            value, low, high = (f"{100 * min(max(end, 0), 1):.0f}" for end in ends)
            expected[row["architecture"], row["setting"]] = f"{value} [{low}, {high}]"
    assert len(expected) == 14 * 5
    assert found == expected


def test_the_table_of_comparisons_is_the_benchmarks():
    path = ROOT / "benchmarks" / "results" / "analysis.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    seconds = {(row["what"], row["method"], row.get("n_tokens")): row for row in rows}
    streamed = seconds["correlation", "ours", 1_000_000]
    dense = seconds["correlation", "dense", 20_000]
    rate = f"{streamed['tokens_per_s']:,.0f} tokens/s; dense products: {dense['tokens_per_s']:.0f}"
    assert f"L0 32 | {streamed['seconds']:.0f} | {rate} tokens/s |" in README
    assert dense["largest_difference"] < 1e-7
    assert f"both ways | {seconds['max_cosine', 'planted', None]['seconds']:.0f} |" in README
    for case in ("planted", "random"):
        assert f"{case} | {seconds['one_to_one', case, None]['seconds']:.0f} |" in README


def test_the_speed_of_units_is_the_benchmarks():
    path = ROOT / "benchmarks" / "results" / "units.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = {row["what"]: row for row in content["rows"]}
    config = content["config"]
    assert f"{config['n_units']:,} units on {config['n_tokens']:,} tokens of 16" in README
    passes = rows["activity"]
    assert f"{passes['seconds']:.0f} s ({passes['tokens_per_s']:,.0f} tokens/s)" in README
    assert f"{rows['encode']['seconds']:.0f} s of it the product" in README
    assert f"threshold, {rows['thresholds']['seconds']:.0f} s" in README
    assert f"At most {max(row['peak_mb'] for row in rows.values()) / 1000:.1f} GB" in README


def test_the_tables_of_polysemanticity_are_the_programs():
    section = README.split("### For how many concepts")[1].split("\n### ")[0]
    found = [line for line in section.splitlines() if line.startswith("| ")]
    measured = published("polysemanticity")
    contrasts = {
        (row["family"], row["ratio"]): with_interval(row, "n_eff_difference", "{:+.2f}")
        for row in measured
        if row["what"] == "contrast" and row["condition"] == "0.003"
    }
    lines = set()
    for row in measured:
        if row["what"] == "family" and row["condition"] == "0.003":
            cells = [f"{row['n_units']:,} of {row['n_sampled']:,}"]
            cells += [with_interval(row, "n_eff", "{:.2f}")]
            cells += [contrasts.get((row["family"], row["ratio"]), "-")]
            lines.add(" | ".join([*cells, with_interval(row, "polysemantic", "{:.2f}")]))
    families = {line.strip("| ").split(" | ", 1)[1] for line in found if " of " in line[:40]}
    assert {line for line in families if line[0].isdigit()} == lines

    for row in published("validate_polysemanticity"):
        value = with_interval(row, "value", "{:.3f}")
        cells = [row["check"], row["of"], value, row["limit"], f"{row['n']:,}"]
        assert f"| {' | '.join(cells)} |" in found

    names = ("citations", "dialogue", "http", "korean")
    units = {
        " | ".join(f"{row[f'share_{name}']:.0%}" for name in names) + f" | {row['n_eff']:.1f}"
        for row in published("find_units")
        if row["what"] == "unit"
    }
    shown = [line.strip("| ").split(" | ", 1)[1] for line in found if line.count("%") == 4]
    assert len(shown) == 6 and set(shown) <= units
    card = next(
        row for row in published("describe_concepts")
        if row["kind"] == "control" and (row["features"], row["concept"]) == ("characters", "all")
    )  # fmt: skip
    low, high = (f"{100 * card[f'accuracy_{end}']:.1f}" for end in ("low", "high"))
    assert f"{100 * card['accuracy']:.1f} % [{low}, {high}] of {card['accuracy_n']:,}" in section


def lines_of(section):
    found = README.split(section)[1].split("\n### ")[0]
    return [line for line in found.splitlines() if line.startswith("| ")]


def test_the_tables_of_probes_are_the_programs():
    found = lines_of("### How few features tell")
    rows = published("probe_concepts")
    true = [row for row in rows if row["labels"] == "true" and row["seed"] in ("all", None)]
    probes = {
        (row["family"], row["ratio"], row["k"]): row for row in true if row["kind"] == "probe"
    }
    expected = set()
    for family, ratio, k in probes:
        if k == 1:
            of = [probes[family, ratio, n] for n in (1, 5, 16)]
            scores = [with_interval(row, "auroc", "{:.3f}") for row in of]
            cells = [f"1:{ratio}" if ratio else "-", scores[0]]
            cells += [with_interval(of[0], "minus_random", "{:+.3f}"), *scores[1:]]
            expected.add(" | ".join(cells))
    shown = {line.strip("| ").split(" | ", 1)[1] for line in found}
    assert len(expected) == 12 and expected <= shown
    (dense,) = (row for row in true if row["family"] == "dense")
    assert f"- | - | - | - | {with_interval(dense, 'auroc', '{:.3f}')}" in shown

    for row in true:
        if row["kind"] == "splitting":
            same = [
                one for one in rows if one["kind"] == "absorption" and one["seed"] == "all"
                and (one["family"], one["ratio"]) == (row["family"], row["ratio"])
            ]  # fmt: skip
            cells = [f"1:{row['ratio']}", with_interval(row, "n_needed", "{:.2f}")]
            for labels in ("true", "shuffled"):
                (one,) = (one for one in same if one["labels"] == labels)
                cells.append(with_interval(one, "absorption", "{:.3f}"))
            assert " | ".join(cells) in shown


def test_the_table_of_descriptions_is_the_programs():
    found = lines_of("### How well do words say")
    rows = published("interpret_units")
    names = {"SAE features": "sae", "neurons": "neuron_basis"}
    names |= {"random directions": "random_directions"}
    n = 0
    for line in found:
        ratio, name, *cells = line.strip("| ").split(" | ")
        if name not in names:
            continue
        n += 1
        of = [row for row in rows if row["family"] == names[name] and f"1:{row['ratio']}" == ratio]
        rules = [row for row in of if row.get("described_by") == "rules"]
        columns = [
            [row["balanced_accuracy"] for row in rules if row["negatives"] == kind]
            for kind in ("random", "near_miss", "same_previous", "same_token")
        ]
        hidden = [row for row in of if row["what"] == "intruder" and row["token"] == "hidden"]
        columns.append([row["accuracy"] for row in hidden if row["intruder"] == "random"])
        for cell, values, digits in zip(cells, columns, (3, 3, 3, 3, 2), strict=True):
            mean = t_interval(values)
            assert cell == f"{mean[0]:.{digits}f} [{mean[1]:.{digits}f}, {mean[2]:.{digits}f}]"
    assert n == 9


def test_the_table_of_saebench_is_the_benchmarks():
    path = ROOT / "benchmarks" / "results" / "saebench.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    for row in rows:
        if row["what"] == "metric":
            values = (row["value_ours"], row["value_theirs"])
            cells = [row["ours"], row["theirs"], *(f"{value:,.4g}" for value in values)]
            why = "" if row["agrees"] else row["why"]
            assert f"| {' | '.join(cells)} | {why} |" in README
            assert not row["agrees"] or abs(row["relative_difference"]) < 1e-5
    ours, theirs = (row["s"] for row in rows if row["what"] == "speed")
    assert f"{ours:.0f} s and theirs {theirs:.0f} s ({theirs / ours:.2f} times" in README

"""What fuzzing and reading found, each as the smallest file that did it; and secrets planted."""

import json
import os
import subprocess
import sys

import pyarrow
import pytest
import torch
from build_notebook import ROOT
from fuzz_readers import HOOK, READERS, parts
from pyarrow import parquet
from test_cache import HOOKS
from test_faults import CountedRows
from test_faults import shards_of_100 as shards_of_100  # a fixture
from test_fuzz import check_refusal, limits
from tiny_models import TEXT, save_tiny_lm

from analysis.program import MeasureConfig
from analysis.subjects import load_subjects
from data_visualization import report, style
from data_visualization.files import refuse
from sparse_coding.checkpoint import load_run, save_checkpoint
from sparse_coding.errors import MAX_CHARACTERS, UNREAD, UserError
from sparse_coding.formats.tensors import read_tensors
from sparse_coding.harvest import harvest_to_cache
from sparse_coding.models import load_lm
from sparse_coding.text_files import FileReader

BY_NAME = {reader.name: reader for reader in READERS}


def refused(name, path, match):
    """The reader of that name refuses the path in one line."""
    reader = BY_NAME[name]
    with pytest.raises(reader.refusal, match=match) as caught, limits():
        reader.read(path)
    check_refusal(caught.value)


def written(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    BY_NAME[name].write(path)
    return path


# --- errors ------------------------------------------------------------------------------------


def test_an_error_is_one_line_that_no_terminal_acts_upon():
    line = str(UserError("a\nb \x1b[2J \ud800 é" + "x" * 10**6))
    assert line.startswith(r"a b \x1b[2J \ud800 éxxx")
    assert len(line) < MAX_CHARACTERS + 100
    line.encode()


@pytest.mark.parametrize("n_lines", [1, 100_000])
def test_a_program_whose_reader_has_gone_ends_without_a_word(n_lines):
    """As `--help | head`: what is written next, or at the end, goes nowhere."""
    program = "from sparse_coding.errors import report_user_errors_in_one_line as report; report()"
    program += f"; import sys; sys.stdin.read(); [print(i) for i in range({n_lines})]"
    command = [sys.executable, "-c", program]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONUNBUFFERED", None)  # one line stays in the buffer to the end
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=environment, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == (0 if n_lines == 1 else UNREAD)


def test_a_figures_program_spells_out_what_a_terminal_would_act_upon(capsys):
    with pytest.raises(SystemExit):
        refuse(ValueError("row \x1b[2J\nlacks l0"))
    assert capsys.readouterr().err == "error: row \\x1b[2J lacks l0\n"


def test_a_number_beyond_all_floats_is_shown_and_not_drawn(tmp_path):
    path = written("runs/reported", tmp_path)
    content = json.loads((path / "config.json").read_text())
    content["config"]["lr"] = 10**400
    (path / "config.json").write_text(json.dumps(content))
    assert "1" + "0" * 400 in report.page([path], [], [])
    assert not any(map(style.is_number, (10**400, -(10**400), float("nan"), float("inf"), True)))
    assert all(map(style.is_number, (0, -1.5, 10**300)))


def test_a_value_of_a_row_is_quoted_in_part():
    row = {"name": "a", "l0": [1] * 10**5}
    with pytest.raises(ValueError, match=r"a has l0 = \[1, 1, 1.*it must be a finite") as error:
        style.check_rows([row], [], ["l0"])
    assert len(str(error.value)) < 200


# --- texts and archives ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["[" * 3000, '{"text": ' + "9" * 5000 + "}", '{"text": "\\ud800"}']
)
def test_a_hostile_line_of_json_is_refused_with_its_number_or_skipped(line, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "whole"}\n' + line + "\n")
    refused("text.jsonl", path, "line 2 is broken")
    reader = FileReader(path, "text", skip_broken_lines=True)
    assert [document.text for document in reader.documents()] == ["whole"]


@pytest.mark.parametrize("start", [4, 40, 60])
def test_a_parquet_file_with_damaged_pages_is_refused(start, tmp_path):
    path = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"text": ["one two " * 50] * 9}), path)
    content = path.read_bytes()
    path.write_bytes(content[:start] + b"\xff" * 24 + content[start + 24 :])
    refused("text.parquet", path, "no whole parquet file")


def test_a_parquet_file_without_the_field_says_what_it_has(tmp_path):
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "text.parquet")
    refused("text.parquet", tmp_path / "text.parquet", "no field 'text'; found 'body'")


def test_one_text_named_a_thousand_times_is_held_once(tmp_path):
    """Some kilobytes that would unfold to 4 GB if all rows of a batch were made at once."""
    path = tmp_path / "text.parquet"
    size, index = 2**24, pyarrow.array([0] * 256, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array(["a" * size]))
    parquet.write_table(
        pyarrow.table({"text": column}), path, compression="zstd", dictionary_pagesize_limit=2**30
    )
    assert path.stat().st_size < 10**5
    reader = FileReader(path, "text", False)
    with limits():
        assert sum(len(document.text) == size for document in reader.documents()) == 256


@pytest.mark.parametrize("damage", ["cut_in_front", "unpacks_to_nonsense"])
def test_an_archive_damaged_where_its_directory_does_not_tell_is_refused(damage, tmp_path):
    path = written("archive.zip", tmp_path)
    content = path.read_bytes()
    nonsense = content[:40] + b"\xff" * 5 + content[45:]  # where the data begin
    path.write_bytes(content[20:] if damage == "cut_in_front" else nonsense)
    refused("archive.zip", path, "archive.zip")


# --- runs, caches, checkpoints -------------------------------------------------------------------


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": 3}', '{"config": null}'])
@pytest.mark.parametrize("name", ["runs/read", "runs/resumed"])
def test_a_runs_config_of_another_kind_is_refused(name, content, tmp_path):
    path = written(name, tmp_path)
    (path / "config.json").write_text(content)
    refused(name, path, "config.json")


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": "a"}', '{"l0": 1}', "[" * 3000])
def test_a_damaged_log_stops_the_resuming_in_one_line(line, tmp_path):
    path = written("runs/resumed", tmp_path)
    (path / "metrics.jsonl").write_text(line + "\n")
    refused("runs/resumed", path, "metrics.jsonl is damaged")


@pytest.mark.parametrize(
    ("key", "value"),
    [("context_size", "many"), ("model_name", 7), ("hook_name", ["a"]), ("dataset_path", {})],
)
def test_what_a_dictionary_says_of_its_origin_must_be_of_its_kind(key, value, tmp_path):
    path = written("runs/read", tmp_path)
    config = json.loads((path / "saes/small/cfg.json").read_text())
    config["metadata"][key] = value
    (path / "saes/small/cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="which cannot be; give it as an option"):
        load_subjects([str(path)], MeasureConfig())


@pytest.mark.parametrize(
    ("key", "value"),
    [("hooks", {}), ("hooks", {HOOK: 2**70}), ("widths", 0), ("widths", 1.5), ("dtype", []),
     ("dtype", "int8"), ("n_tokens", 7),
     ("shards", {}), ("shards", [{}]), ("shards", [{"rows": 103, "files": {"a": {}}}]),
     ("statistics", {}), ("settings", None), ("extra", 1)],
)  # fmt: skip
def test_a_caches_manifest_of_another_kind_is_refused(key, value, tmp_path):
    path = written("cache", tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    if key == "widths":
        key, value = "hooks", dict.fromkeys(manifest["hooks"], value)
    path.write_text(json.dumps(manifest | {key: value}))
    refused("cache", path.parent, "manifest.json")


@pytest.mark.parametrize(
    "changes",
    [{"n_rows": -1}, {"n_rows": 2**70}, {"n_valid": "x"}, {"n_dropped": True}, {"more": 1},
     {"max_norms": 2.5}, {"max_norms": {HOOK: 2.5}}, {"max_norms": dict.fromkeys(HOOKS, -1.0)},
     {"n_token_batches": 3}],
)  # fmt: skip
def test_a_shard_that_ends_at_no_possible_place_is_refused(changes, tmp_path):
    path = written("cache", tmp_path) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][1]["ends_at"] |= changes
    path.write_text(json.dumps(manifest))
    refused("cache", path.parent, "manifest.json has shards that end nowhere: delete the folder")


@pytest.mark.parametrize("max_norms", [None, 3, {}, {"hook": "9"}, {"hook": -1.0}])
def test_a_cache_without_its_norm_limits_is_refused(max_norms, tmp_path, shards_of_100):
    folder = harvest_to_cache(CountedRows(), tmp_path, {}, 500, "float32").folder
    path = folder / "manifest.json"
    extra = {} if max_norms is None else {"max_norms": max_norms}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra": extra}))
    line = f"{path} has not the norm limits of its hooks: delete the folder {folder} to harvest"
    with pytest.raises(UserError, match=line):
        harvest_to_cache(CountedRows(), tmp_path, {}, 500, "float32")


def test_a_shard_of_another_shape_is_refused(tmp_path):
    path = next((written("cache", tmp_path) / HOOK).glob("shard_*"))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[20,12]", b"[12,20]"))
    refused("cache", path.parents[1], r"holds \(12, 20\) of torch.float32, not \(20, 12\)")


@pytest.mark.parametrize(
    ("key", "value"),
    [("trainer|mean", torch.zeros(1)), ("trainer|scale", torch.tensor(2)),
     ("source|n_delivered", torch.tensor(-1)), ("source|seed", torch.zeros(2)),
     ("trainer|pool", torch.zeros(4, 4))],
)  # fmt: skip
def test_a_checkpoint_whose_parts_have_other_shapes_is_refused(key, value, tmp_path):
    (path,) = written("checkpoints", tmp_path).iterdir()
    save_checkpoint(path.parent, 3, read_tensors(path) | {key: value}, keep=1)
    before = parts()["trainer"].state_dict()
    into = parts()
    with pytest.raises(UserError, match="belongs to other SAEs|no source can resume"):
        load_run(path.parent, into)
    for name, tensor in into["trainer"].state_dict().items():
        assert torch.equal(tensor, before[name]) or key.startswith("source")


@pytest.mark.parametrize("content", ["true", '{"a": []}', '{"a": {"b": 1}}', '{"a": {"b": {}}}'])
def test_a_damaged_record_of_what_was_fetched_is_refused(content, tmp_path):
    path = written("fetched", tmp_path)
    (path / "fetched.json").write_text(content)
    refused("fetched", path, "fetched.json")


@pytest.mark.parametrize(
    "line", ['{"key": "a", "answer": 3}', '{"key": [], "answer": ""}', "[" * 3000]
)
def test_a_damaged_log_of_a_judge_is_refused(line, tmp_path):
    (tmp_path / "log").write_text(line + "\n")
    refused("judge.jsonl", tmp_path / "log", "holds no judge's answers")


# --- language models -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm") / "lm"
    save_tiny_lm("gpt2", folder, TEXT, n_layers=1)
    return folder


@pytest.fixture
def changed_lm(lm, tmp_path):
    """A copy of the model with other values in its config.json."""

    def change(**values):
        folder = tmp_path / "lm"
        folder.mkdir()
        for file in lm.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))
        return folder

    return change


@pytest.mark.parametrize(
    "values",
    [{"n_layer": 10**9}, {"n_embd": 2**20}, {"vocab_size": 2**40}, {"n_positions": 2**31},
     {"n_inner": 2**40}, {"model_type": 3}, {"model_type": "none"}, {"n_head": 0}],
    ids=lambda values: next(iter(values)),
)  # fmt: skip
def test_a_models_config_that_asks_for_what_its_weights_lack_is_refused(values, changed_lm):
    with pytest.raises(UserError, match="cannot be loaded") as caught, limits():
        load_lm(str(changed_lm(**values)), device="cpu", dtype="float32")
    check_refusal(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", ["{", "[]", "{}", "3"])
def test_a_models_file_of_another_kind_is_refused(name, content, changed_lm):
    folder = changed_lm()
    (folder / name).write_text(content)
    try:
        load_lm(str(folder), device="cpu", dtype="float32")
    except UserError as error:
        assert "cannot be loaded" in str(error)  # an empty tokenizer_config.json is a valid one
    else:
        assert (name, content) == ("tokenizer_config.json", "{}")


def test_code_that_comes_with_a_model_is_neither_run_nor_offered_to_be_run(changed_lm, tmp_path):
    mark = tmp_path / "was_run"
    names = {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M", "AutoTokenizer": ["m.T", None]}
    folder = changed_lm(model_type="strange", auto_map=names)
    (folder / "m.py").write_text(f"open({str(mark)!r}, 'w')\n")
    code = f"from sparse_coding.models import size_of; size_of({str(folder)!r})"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], input="y\n" * 9, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert "contains custom code" in done.stderr.splitlines()[-1]
    assert "[y/N]" not in done.stdout
    assert not mark.exists()


class Command:
    """What runs a shell command wherever pickle follows it."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_a_pickle_in_a_models_folder_is_not_followed(changed_lm, tmp_path):
    folder = changed_lm()
    (folder / "model.safetensors").unlink()
    state = {"transformer.wte.weight": Command(tmp_path / "was_run")}
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_lm(str(folder), device="cpu", dtype="float32")
    assert not (tmp_path / "was_run").exists()

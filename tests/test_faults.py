"""Runs that survive: kills, damage, full disks, bad sources, two starts, clocks that jump."""

import dataclasses
import errno
import itertools
import json
import os
import resource
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from build_notebook import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import command, run_in

from sparse_coding import harvest
from sparse_coding.cache import CacheWriter
from sparse_coding.checkpoint import (
    load_newest_checkpoint,
    load_run,
    save_checkpoint,
    save_run,
)
from sparse_coding.config import RunConfig
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.harvest import KeptRows, Rows, harvest_to_cache
from sparse_coding.ladder import ladder
from sparse_coding.reporting import Reporter
from sparse_coding.runs import Run, run_settings
from sparse_coding.sae import ARCHITECTURES
from sparse_coding.sources import TensorActivations
from sparse_coding.storage import disk_errors_in_one_line
from sparse_coding.training import Trainer, TrainingConfig

# Runs the entry script and kills it with SIGKILL at one call: its number, counted from 1. A file
# that was to be written then has half of its bytes.
KILLED = """
import os, runpy, signal, sys
module, name, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
sys.path.insert(0, {root!r})
target = __import__(module, fromlist=["x"])
if "." in name:
    target = getattr(target, name.split(".")[0])
    name = name.split(".")[1]
real, calls = getattr(target, name), [0]
def killed(*arguments, **named):
    calls[0] += 1
    result = real(*arguments, **named)
    if calls[0] == number:
        path = next((a for a in arguments if hasattr(a, "write_bytes")), None)
        if path is not None:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            path.with_name(".tmpAbC9eF").write_bytes(b"half")  # safetensors writes here first
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(target, name, killed)
sys.argv = [{root!r} + "/easy_training_base.py", *sys.argv[4:]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ALL = (
    "--architecture",
    *ARCHITECTURES,
    "--ratios",
    "2",
    "--checkpoint-every",
    "30",
    "--n-tokens",
    "6400",
    "--n-tokens-eval",  # nothing is measured here but whether all is equal
    "200",
    "--n-tokens-ce",
    "100",
)
STREAMED = (*ALL, "--no-cache", "--buffer-tokens", "3000")


def killed_at(place: Path, module: str, name: str, number: int, *arguments: str) -> int:
    """Status of the entry script, killed at a call of a function."""
    script = KILLED.format(root=str(ROOT))
    arguments = (module, name, str(number), *command(*arguments)[2:])
    return run_in(place, [sys.executable, "-c", script, *arguments]).returncode


def same_weights(one: Path, other: Path) -> bool:
    files = sorted(path.relative_to(one) for path in one.glob("saes/*/sae_weights.safetensors"))
    pairs = [(load_file(one / file), load_file(other / file)) for file in files]
    return len(files) == len(ARCHITECTURES) and all(
        torch.equal(a[name], b[name]) for a, b in pairs for name in a | b
    )


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("mode", [ALL, STREAMED], ids=["cache", "streaming"])
def test_a_run_killed_again_and_again_ends_as_the_unbroken_one(place, tmp_path, mode):
    for name in ("lm", "text.jsonl"):
        (tmp_path / name).symlink_to(place / name)
    whole = run_in(tmp_path, command("--name", "one", "--output", "whole", *mode))
    assert whole.returncode == 0, whole.stderr
    again = ("--name", "one", *mode)
    if mode is ALL:  # in the middle of the only shard
        assert killed_at(tmp_path, "sparse_coding.cache", "save_file", 1, *again) == -9
        again = (*again, "--resume")
    half_a_checkpoint = "sparse_coding.checkpoint", "save_file", 2
    assert killed_at(tmp_path, *half_a_checkpoint, *again) == -9
    assert list((tmp_path / "outputs/runs/one").rglob(".*.tmp"))
    resume = ("--name", "one", *mode, "--resume")
    if mode is ALL:
        assert killed_at(tmp_path, "sparse_coding.runs", "Run.log", 9, *resume) == -9
    done = run_in(tmp_path, command(*resume))
    assert done.returncode == 0, done.stderr
    one, other = tmp_path / "whole/runs/one", tmp_path / "outputs/runs/one"
    assert same_weights(one, other)
    assert log_of(one) == log_of(other)
    files = [sorted(p.relative_to(run) for p in run.rglob("*")) for run in (one, other)]
    assert files[0] == files[1]
    assert not list(tmp_path.rglob(".*tmp*"))


def trainer_and_source(n_steps: int = 40) -> dict:
    x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(1)) + 1
    specs = ladder(("l1", "topk"), (2,), (), (2.0,), (0,))
    cfg = TrainingConfig(n_steps, 64, initial_l0=3.0, step="reference")
    return {"source": TensorActivations(x, 64, seed=3), "one": Trainer(specs, cfg, x[:500])}


def train(parts: dict, n_steps: int) -> dict:
    for x in itertools.islice(parts["source"], n_steps):
        parts["one"].step(x)
    return parts


def flip_a_bit(path: Path, place: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_of_a_tensor_makes_the_checkpoint_before_it_the_newest(tmp_path, capsys):
    parts = trainer_and_source()
    for step in (10, 20):
        newest = save_run(tmp_path, step, train(parts, 10), keep=2)
    flip_a_bit(newest)
    with safe_open(newest, "pt") as file:  # safetensors itself sees nothing wrong
        assert all(file.get_tensor(name).isfinite().all() for name in file.keys())  # noqa: SIM118
    resumed = trainer_and_source()
    assert load_run(tmp_path, resumed) == 10
    assert f"{newest} is damaged (its tensors do not have the checksum" in capsys.readouterr().out
    ends = [train(parts, 20), train(resumed, 30)]
    states = [end["one"].state_dict() for end in ends]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_checkpoint_whose_tensors_were_renamed_is_damaged(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"a": torch.ones(2), "b": torch.zeros(2)}, keep=1)
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"'))
    with pytest.raises(UserError, match=r"every checkpoint .* is damaged: step_.*--overwrite"):
        load_newest_checkpoint(tmp_path)


def test_a_damaged_checkpoint_does_not_push_out_the_good_ones_saved_after_it(tmp_path):
    for step in (10, 20):
        newest = save_checkpoint(tmp_path, step, {"a": torch.ones(9) * step}, keep=2)
    flip_a_bit(newest)
    for step in (12, 14):  # a run that went on from 10 and is stopped twice
        save_checkpoint(tmp_path, step, {"a": torch.ones(9) * step}, keep=1)
    assert load_newest_checkpoint(tmp_path)[0] == 14
    assert len(list(tmp_path.iterdir())) == 1


class CountedRows(Rows):
    """50 batches of ten known rows; `fault` is asked before each, `shift` is added to all."""

    def __init__(self, fault=None, shift=0.0) -> None:
        self.fault, self.shift, self.max_norms = fault, shift, {"hook": 9.0}
        self.lm, self.hook_names, self.n_valid, self.n_dropped = None, ("hook",), 0, 0

    def token_batches(self):
        for i in range(50):
            if self.fault is not None:
                self.fault(i)
            yield i

    def seen(self, batches):
        return batches

    def keep(self, i):
        x = torch.randn(10, 6, generator=torch.Generator().manual_seed(i)) + self.shift
        return KeptRows({"hook": x}, torch.arange(10) + i, torch.full((10,), i))


@pytest.fixture
def shards_of_100(monkeypatch):
    monkeypatch.setattr(harvest, "hook_width", lambda lm, name: 6)
    monkeypatch.setattr(harvest, "CacheWriter", lambda *given: CacheWriter(*given, 100))


def contents(folder: Path) -> dict:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "flipped": flip_a_bit,
    "deleted": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["hook/shard_00002", "tokens/shard_00004", "hook/statistics"])
def test_a_damaged_shard_is_harvested_again_alone(tmp_path, shards_of_100, damage, name, capsys):
    folder = harvest_to_cache(CountedRows(), tmp_path, {}, 500, "float32").folder
    before = contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    path = folder / f"{name}.safetensors"
    DAMAGES[damage](path)
    assert harvest_to_cache(CountedRows(), tmp_path, {}, 500, "float32").n_tokens == 500
    assert contents(folder) == before
    changed = {p.stem for p in times if p.stat().st_mtime_ns != times[p]}
    assert changed == {path.stem}
    assert path.name in capsys.readouterr().err


def test_a_shard_that_comes_out_differently_is_refused(tmp_path, shards_of_100):
    folder = harvest_to_cache(CountedRows(), tmp_path, {}, 500, "float32").folder
    flip_a_bit(folder / "hook/shard_00001.safetensors")
    with pytest.raises(UserError, match="shard_00001.* came out differently"):
        harvest_to_cache(CountedRows(shift=1.0), tmp_path, {}, 500, "float32")


def test_a_source_that_raises_loses_no_whole_shard_and_is_gone_on_with(tmp_path, shards_of_100):
    def fault(i):
        if i == 37:
            raise ConnectionError("the network is gone")

    with pytest.raises(ConnectionError):
        harvest_to_cache(CountedRows(fault), tmp_path / "a", {}, 500, "float32")
    (progress,) = (tmp_path / "a").rglob("progress.json")
    assert sum(shard["rows"] for shard in json.loads(progress.read_text())["shards"]) == 300
    folders = [
        harvest_to_cache(CountedRows(), tmp_path / name, {}, 500, "float32").folder
        for name in "ab"
    ]
    assert contents(folders[0]) == contents(folders[1])


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_while_harvesting_is_one_line_and_gone_on_with(
    tmp_path, shards_of_100, monkeypatch
):
    n_written = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(
            "sparse_coding.cache.save_file",
            lambda *given: full_disk() if next(n_written) == 5 else save_file(*given),
        )
        line = "shard_0000.* cannot be written: No space left on device.*make room"
        with pytest.raises(UserError, match=line):
            harvest_to_cache(CountedRows(), tmp_path / "a", {}, 500, "float32")
    folders = [
        harvest_to_cache(CountedRows(), tmp_path / name, {}, 500, "float32").folder
        for name in "ab"
    ]
    assert contents(folders[0]) == contents(folders[1])


def test_what_safetensors_says_of_a_full_disk_is_the_same_line(tmp_path):
    from safetensors import SafetensorError

    with (
        pytest.raises(UserError, match="x cannot be written: .*No space left"),
        disk_errors_in_one_line(Path("x")),
    ):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(FileNotFoundError), disk_errors_in_one_line(Path("x")):
        (tmp_path / "none").read_text()


def test_a_disk_that_fills_at_a_checkpoint_leaves_the_last_one_and_a_resumable_run(
    tmp_path, monkeypatch
):
    parts = trainer_and_source()
    save_run(tmp_path, 10, train(parts, 10), keep=1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot be written"):
        patch.setattr("sparse_coding.checkpoint.save_file", full_disk)
        save_run(tmp_path, 20, train(parts, 10), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000010.safetensors"]
    resumed = trainer_and_source()
    assert load_run(tmp_path, resumed) == 10
    states = [part["one"].state_dict() for part in (train(resumed, 10), parts)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def open_run(output: Path, **changes) -> Run:
    cfg = dataclasses.replace(RunConfig(output=output, name="one"), **changes)
    run = Run(cfg, run_settings(cfg), "cpu")
    run.start()
    return run


def test_a_disk_that_fills_in_the_middle_of_a_log_line_is_one_line_and_the_log_is_mended(
    tmp_path,
):
    run = open_run(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # nothing prints below
    try:
        with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: File too large"):
            for step in range(100):
                run.log([{"step": step, "name": "a" * 50}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    run._lock_file.close()
    run = open_run(tmp_path, resume=True)
    assert run.metrics.stat().st_size == 1000
    assert not run.metrics.read_text().endswith("\n")
    run.cut_log(10)
    run.log([{"step": 11}])
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == list(range(12))


@pytest.mark.parametrize("where", ["weights", "error"])
def test_a_diverged_run_pushes_out_no_good_checkpoint(tmp_path, where):
    """Also where the next line of the log, which would say so, is steps away."""
    parts = trainer_and_source()
    good = save_run(tmp_path, 10, train(parts, 10), keep=1)
    lane = parts["one"].lanes[1]
    with torch.no_grad():
        (lane.sae.W_enc if where == "weights" else lane.sums[None])[0, 0] = torch.nan
    with pytest.raises(UserError, match="^topk.* diverged before step 10: .*lower --lr"):
        save_run(tmp_path, 20, parts, keep=1)
    assert list(tmp_path.iterdir()) == [good]
    assert load_run(tmp_path, trainer_and_source()) == 10


def test_control_c_and_a_full_disk_are_one_line_wherever_they_come(monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    report_user_errors_in_one_line()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "figures/a.png")
    line = "error: [Errno 28] No space left on device: 'figures/a.png'"
    for error, status, said in (
        (full, 2, line),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (UserError("no"), 2, "error: no"),
    ):
        with pytest.raises(SystemExit) as end:
            sys.excepthook(type(error), error, None)
        assert end.value.code == status
        assert capsys.readouterr().err == said + "\n"


def test_a_file_is_on_the_disk_before_its_name_and_all_new_folders_with_it(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        sync(descriptor)

    def replaced(source: Path, target: Path) -> None:
        done.append(f"{source.name} -> {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    save_checkpoint(tmp_path / "new/run", 3, {"a": torch.ones(2)}, keep=1)
    name = "step_000000003.safetensors"
    hidden = f".{name}.{os.getpid()}.tmp"
    assert {done.pop(0), done.pop(0)} == {"sync new", f"sync {tmp_path.name}"}
    assert done == [f"sync {hidden}", f"{hidden} -> {name}", "sync run"]


def test_a_run_killed_before_its_configuration_was_written_can_be_begun(tmp_path):
    folder = tmp_path / "runs/one"
    folder.mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / ".config.json.77.tmp").touch()
    run = open_run(tmp_path)
    assert sorted(path.name for path in run.folder.iterdir()) == [".lock", "config.json"]


def test_a_run_killed_while_it_was_being_replaced_is_still_a_run(tmp_path, monkeypatch):
    run = open_run(tmp_path)
    run._lock_file.close()
    (run.folder / "checkpoints").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        open_run(tmp_path, overwrite=True)
    assert (run.folder / "config.json").is_file()
    assert not (run.folder / "checkpoints").exists()
    open_run(tmp_path, overwrite=True)


def test_a_clock_that_goes_back_changes_no_rate(tmp_path, monkeypatch):
    clock = itertools.count(2e9, -3600.0)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    with Reporter(open_run(tmp_path), 100) as reporter:
        for step in (10, 20):
            time.sleep(0.01)
            reporter.log([{"step": step, "n_tokens": 64 * step, "l0": 1.0, "fvu": 0.5}])
    log_lines = map(json.loads, reporter.run.metrics.read_text().splitlines())
    rates = [line["tokens_per_second"] for line in log_lines]
    assert all(0 < rate < 64 * 20 / 0.01 for rate in rates)


def test_ten_hours_of_logs_and_checkpoints_keep_memory_and_files_flat(tmp_path, monkeypatch):
    """36,000 steps of a second: a line every 25, a checkpoint every 500, as by default."""
    with open(os.devnull, "w") as nowhere:  # a capture of the output would grow by itself
        monkeypatch.setattr(sys, "stderr", nowhere)
        sizes, n_files, run = ten_hours(tmp_path)
    assert len(sizes) == 72
    # One number kept per step would be a megabyte. Measured: 33 kB, under pytest 146 kB.
    assert abs(sizes[-1] - sizes[10]) < 300_000
    assert max(n_files) <= 2 + 3  # checkpoints; configuration, log, lock
    n_lines = 36_000 // 25 * 2
    assert run.metrics.stat().st_size < 400 * n_lines  # 1.2 MB in ten hours


def ten_hours(place: Path) -> tuple[list[int], set[int], Run]:
    parts = trainer_and_source(n_steps=36_000)
    sizes, n_files = [], set()
    tracemalloc.start()
    with Reporter(run := open_run(place), 36_000) as reporter:
        for step in range(25, 36_001, 25):
            rows = train(parts, 1)["one"].metrics()
            reporter.log([row | {"step": step} for row in rows])
            if step % 500 == 0:
                save_run(run.checkpoints, step, parts, keep=2)
                sizes.append(tracemalloc.get_traced_memory()[0])
                n_files.add(sum(path.is_file() for path in run.folder.rglob("*")))
    tracemalloc.stop()
    return sizes, n_files, run

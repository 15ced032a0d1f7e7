"""Many processes equal one: torchrun with gloo, tiny models, kills and refusals."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import shared_training as shared
import torch
from build_notebook import ROOT
from safetensors.torch import load_file
from tiny_runs import SECRETS, command, run_in

from sparse_coding.checkpoint import load_newest_checkpoint
from sparse_coding.config import RunConfig
from sparse_coding.errors import UserError
from sparse_coding.ladder import SAESpec, shares
from sparse_coding.models import LMSize
from sparse_coding.planning import Job, check_division
from sparse_coding.processes import ALONE, open_processes
from sparse_coding.runs import Run, run_settings
from sparse_coding.sae import TRAINABLE

# Sums over 2 or 4 parts round otherwise: 1e-14 a step in float64. Adam divides by the root of
# second moments that start at 0, and f^p of p_anneal has an infinite slope at 0: both amplify what
# rounding began, the latter to 3e-11 in 60 steps.
TOLERANCE = {"p_anneal": 1e-8}
OTHERS = 1e-11
HALF, WHOLE = shared.N_STEPS // 2, shared.N_STEPS


def torchrun(n: int, *program: str) -> list[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*run, str(n), *program]


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A folder with what 2 processes left after half of the steps, and 4 going on from it."""
    folder = tmp_path_factory.mktemp("shared")
    for n, first, last in ((2, 0, HALF), (4, HALF, WHOLE)):
        program = (str(ROOT / "tests/shared_training.py"), str(folder), str(first), str(last))
        done = run_in(folder, torchrun(n, *program))
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def one():
    """States of one process by step, its log, finished SAEs and facts."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        x = shared.rows()
        trainers = shared.begin(ALONE, "ladder", x)
        states, log = {}, []
        for first, last in ((0, HALF), (HALF, WHOLE)):
            log += shared.train(trainers, x, slice(None), range(first, last))
            states[last] = {k: v.clone() for k, v in shared.state_of(trainers).items()}
        return states, log, shared.weights_of(trainers), shared.facts_of(trainers)
    finally:
        torch.set_default_dtype(default)


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    difference = (a.double() - b.double()).abs().max()
    return (difference / b.double().abs().max().clamp(min=1e-9)).item()


def assert_close(found: dict, expected: dict, architecture: str) -> None:
    keys = {key for key in expected if f"|{architecture}_x" in key}
    assert keys and {key for key in found if f"|{architecture}_x" in key} == keys
    for key in keys:
        assert found[key].shape == expected[key].shape, key
        limit = TOLERANCE.get(architecture, OTHERS)
        assert relative_difference(found[key], expected[key]) < limit, key


def assert_same_row(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        same = pytest.approx(value, rel=1e-10) if isinstance(value, float) else value
        assert found[key] == same, (key, expected)


@pytest.mark.parametrize("architecture", TRAINABLE)
@pytest.mark.parametrize("parallel", ["data", "features"])
def test_two_processes_train_as_one_with_the_joined_batch(left, one, parallel, architecture):
    states, *_ = one
    assert_close(load_file(left / f"{parallel}_{HALF}.safetensors"), states[HALF], architecture)


@pytest.mark.parametrize("architecture", TRAINABLE)
@pytest.mark.parametrize("parallel", shared.MODES)
def test_four_processes_go_on_from_two_that_divided_otherwise(left, one, parallel, architecture):
    states, _, weights, _ = one
    assert_close(load_file(left / f"{parallel}_{WHOLE}.safetensors"), states[WHOLE], architecture)
    finished = load_file(left / f"{parallel}_{WHOLE}_finished.safetensors")
    assert_close(finished, weights, architecture)


def test_two_processes_with_other_saes_of_the_ladder_have_the_bits_of_one(left, one):
    states, *_ = one
    found = load_file(left / f"ladder_{HALF}.safetensors")
    assert found.keys() == states[HALF].keys()
    assert all(torch.equal(found[key], states[HALF][key]) for key in found)


@pytest.mark.parametrize("parallel", shared.MODES)
def test_the_log_and_the_facts_are_those_of_one_process(left, one, parallel):
    _, log, _, facts = one
    found = []
    for step in (HALF, WHOLE):
        lines, found_facts = json.loads((left / f"{parallel}_{step}.json").read_text())
        found += lines
    assert [line["name"] for line in found] == [line["name"] for line in log]
    for line, expected in zip(found, log, strict=True):
        assert_same_row(line, expected)
    for name, saes in facts.items():
        assert list(found_facts[name]) == list(saes)
        for sae, values in saes.items():
            assert_same_row(found_facts[name][sae], values)


def test_one_process_goes_on_from_four(left, one):
    states, *_ = one
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for parallel in shared.MODES:
            trainers = shared.begin(ALONE, "ladder", shared.rows())
            shared.restore(trainers, load_file(left / f"{parallel}_{WHOLE}.safetensors"))
            resumed = shared.state_of(trainers)
            for architecture in TRAINABLE:
                assert_close(resumed, states[WHOLE], architecture)
    finally:
        torch.set_default_dtype(default)


def test_features_die_are_revived_and_resampled_while_that_is_compared(one):
    states, log, *_ = one
    assert any(line["dead_fraction"] > 0 for line in log if line["name"].startswith("l1_"))
    for name in ("topk", "batch_topk", "matryoshka"):
        assert states[HALF][f"saes|{name}_x04_l0-3_s0/dead.current"].any()
        penalties = [line["penalty"] for line in log if line["name"].startswith(name)]
        assert max(penalties) > 0  # AuxK's


# --- the entry script ---------------------------------------------------------------------------


def begun(place: Path, n: int, *arguments: str, restarts: int = 0) -> subprocess.Popen:
    environment = SECRETS | os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program = ("--max-restarts", str(restarts), *command(*arguments)[1:])
    return subprocess.Popen(
        torchrun(n, *program), cwd=place, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def worker(process: subprocess.Popen, rank: int) -> psutil.Process:
    children = psutil.Process(process.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def wait_for_log(process: subprocess.Popen, run: Path, n_bytes: int = 4000) -> None:
    log = run / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size > n_bytes):
        time.sleep(0.005)


def contents(folder: Path, *patterns: str) -> dict[Path, bytes]:
    paths = [path for pattern in patterns for path in folder.rglob(pattern)]
    assert paths, (folder, patterns)
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def log_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def assert_same_run(run: Path, other: Path) -> None:
    assert log_of(run) == log_of(other)
    for name in ("summary.json", "results/feature_density.json"):
        rows = [json.loads((folder / name).read_text())["rows"] for folder in (run, other)]
        assert rows[0] == rows[1]
    same = "saes/*/*", "checkpoints/step_000000187.safetensors"
    assert contents(run, *same) == contents(other, *same)


def test_a_killed_process_ends_the_others_in_one_line_and_torchrun_goes_on_to_the_same_run(
    finished, place
):
    _, whole = finished
    process = begun(
        place, 2, "--name", "whole", "--output", "killed", "--seed", "0", "1",
        "--checkpoint-every", "20", restarts=1,
    )  # fmt: skip
    run = place / "killed/runs/whole"
    wait_for_log(process, run)
    worker(process, 1).kill()
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "another process of this run has ended" in lines[0], stderr
    assert "Traceback" not in stderr
    assert load_newest_checkpoint(run / "checkpoints")[0] == 187
    assert_same_run(run, whole)
    (cache,) = (place / "killed/cache").iterdir()
    shards = "*/*.safetensors"
    assert contents(cache, shards) == contents(place / "outputs/cache" / cache.name, shards)


def test_processes_that_stream_agree_on_a_signal_and_one_goes_on_to_the_same_run(place):
    arguments = (
        "--name", "stream2", "--no-cache", "--buffer-tokens", "1000", "--seed", "0", "1",
    )  # fmt: skip
    done = run_in(place, command(*arguments, "--output", "whole"))
    assert done.returncode == 0, done.stderr
    run = place / "outputs/runs/stream2"
    process = begun(place, 2, *arguments)
    wait_for_log(process, run)
    worker(process, 1).terminate()
    _, stderr = process.communicate()
    assert process.returncode == 1
    lines = [line for line in stderr.splitlines() if "stopped by SIGTERM at step" in line]
    assert len(lines) == 1, stderr
    step, _ = load_newest_checkpoint(run / "checkpoints")
    assert lines[0].startswith(f"stopped by SIGTERM at step {step} of 187")
    done = run_in(place, command(*arguments, "--resume", "--parallel", "data"))
    assert done.returncode == 0, done.stderr
    assert_same_run(run, place / "whole/runs/stream2")


def test_of_several_processes_only_the_first_speaks(place):
    done = run_in(place, torchrun(2, *command("--name", "two", "--ratios", "4")[1:]))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "1 cannot be given to 2 processes" in errors[0], done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (place / "outputs/runs/two").exists()


FAILS = """
import argparse, os, sys, time
from sparse_coding.errors import UserError, report_user_errors_in_one_line
report_user_errors_in_one_line()
kind, who = sys.argv[1:]
rank = int(os.environ["RANK"])
if rank == 0:
    time.sleep(60 if who == "others" else 1)  # torchrun ends it as soon as another has ended
if kind == "line":
    raise UserError(f"{rank} bytes are not enough of \\udcff")
if kind == "traceback":
    import an_absent_module
argparse.ArgumentParser().parse_args(["an_absent_argument"])
"""
FAILS_LATER = """
import sys
from sparse_coding.errors import UserError, report_user_errors_in_one_line
report_user_errors_in_one_line()
from sparse_coding.processes import open_processes
print("a warning", file=sys.stderr)
processes = open_processes("cpu")
print("another warning", file=sys.stderr, flush=True)
processes.wait()
if not processes.is_first:
    raise UserError("rank 1 is at fault")
processes.wait()
"""


def stderr_of(program: str, place: Path, n: int, *arguments: str) -> str:
    (place / "program.py").write_text(program)
    done = run_in(place, torchrun(n, "program.py", *arguments))
    assert done.returncode != 0
    return done.stderr


ENDS = """
import atexit, sys, torch.distributed as dist
from sparse_coding.processes import leave_to_first, open_processes
atexit.register(lambda: print(f"met: {dist.is_initialized()}", file=sys.stderr, flush=True))
processes = open_processes("cpu")
if sys.argv[1] == "at once":
    leave_to_first(processes)
"""


@pytest.mark.parametrize("when", ["at once", "at its end"])
def test_every_process_parts_from_the_others_before_it_exits(tmp_path, when):
    """Where they did not, two runs in three had one that aborted; torchrun then ends the rest."""
    (tmp_path / "program.py").write_text(ENDS)
    done = run_in(tmp_path, torchrun(3, "program.py", when))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("met: False") == 3 and "met: True" not in done.stderr


@pytest.mark.parametrize("who", ["others", "all"])
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("line", "bytes are not enough"),
        ("traceback", "ModuleNotFoundError: No module named 'an_absent_module'"),
        ("usage", "error: unrecognized arguments: an_absent_argument"),
    ],
)
def test_what_ends_a_process_before_all_have_met_is_said_once(tmp_path, kind, line, who):
    stderr = stderr_of(FAILS, tmp_path, 3, kind, who)
    assert stderr.count(line) == 1, stderr
    assert stderr.count("import an_absent_module") == (kind == "traceback")


def test_what_ends_a_later_process_is_said_and_what_follows_from_it_is_not(tmp_path):
    stderr = stderr_of(FAILS_LATER, tmp_path, 2)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: rank 1 is at fault"], stderr
    assert (stderr.count("a warning"), stderr.count("another warning")) == (1, 1)  # the first's


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_process_refuses_to_share_a_gpu(monkeypatch, rank):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="2 processes were started and there are 1 GPUs here"):
        open_processes("cuda")


def run_of_job(output: Path, **changes) -> Run:
    cfg = dataclasses.replace(RunConfig(output=output, name="one"), **changes)
    run = Run(cfg, run_settings(cfg), "cpu")
    run.start()
    run._lock_file.close()  # as when the process ends
    return run


def test_only_the_torchrun_that_began_a_run_continues_it_by_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    run = run_of_job(tmp_path)
    run.log([{"step": 1}])
    for overwrite in (False, True):  # of the same command line
        assert run_of_job(tmp_path, overwrite=overwrite).resumes
        assert run.metrics.exists()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    with pytest.raises(UserError, match="exists; give --name"):
        run_of_job(tmp_path)
    assert not run_of_job(tmp_path, overwrite=True).resumes
    assert not run.metrics.exists()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with pytest.raises(UserError, match="exists; give --name"):
        run_of_job(tmp_path)


def job(n_processes: int, parallel: str) -> Job:
    lm = LMSize("tiny", 2, 12, 20, 100, 40, torch.device("cpu"), torch.float32)
    specs = [SAESpec("l1", ratio, 1.0, None, 0) for ratio in (1, 2)]
    return Job(
        lm, 1, 0, specs, 1000, 1, 64, 32, None, True,
        n_processes=n_processes, parallel=parallel,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("n_processes", "parallel", "line"),
    [
        (3, "ladder", "2 cannot be given to 3 processes"),
        (6, "data", "--batch-tokens 64 is not divisible by 6 processes"),
        (8, "features", "the 12 of --ratios 1 are not divisible by 8 processes"),
    ],
)
def test_what_cannot_be_divided_is_refused_in_one_line(n_processes, parallel, line):
    with pytest.raises(UserError, match=line):
        check_division(job(n_processes, parallel))
    check_division(job(2, parallel))


def test_shares_of_a_ladder_are_about_equal_and_hold_every_sae_once():
    specs = [SAESpec("l1", ratio, 1.0, None, 0) for ratio in (1, 2, 4, 8, 16, 32)]
    parts = shares(specs, 3)
    assert sorted(spec.ratio for part in parts for spec in part) == [1, 2, 4, 8, 16, 32]
    assert [sum(spec.ratio for spec in part) for part in parts] == [32, 16, 15]

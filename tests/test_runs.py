"""Run folders and checkpoints: nothing is overwritten silently, nothing is half written."""

import dataclasses
import importlib.metadata
import json
import os
import signal

import psutil
import pytest
import torch

from sparse_coding.checkpoint import (
    StopSignal,
    load_newest_checkpoint,
    load_run,
    save_checkpoint,
    save_run,
)
from sparse_coding.config import RunConfig
from sparse_coding.errors import UserError
from sparse_coding.runs import Run, check_memory, default_name, run_settings
from sparse_coding.storage import atomic_path


@pytest.fixture
def cfg(tmp_path):
    return RunConfig(output=tmp_path, name="one")


def open_run(cfg, **changes):
    cfg = dataclasses.replace(cfg, **changes)
    run = Run(cfg, run_settings(cfg), "cpu")
    run.start()
    return run


def close(run):
    run._lock_file.close()


def test_config_is_written_first_with_what_the_run_was_made_from(cfg):
    run = open_run(cfg)
    content = json.loads((run.folder / "config.json").read_text())
    assert content["config"]["lr"] == cfg.lr
    assert content["environment"]["versions"]["torch"] == importlib.metadata.version("torch")


def test_nothing_is_written_before_the_start(cfg):
    Run(cfg, run_settings(cfg), "cpu")
    assert not list(cfg.output.iterdir())


def test_an_existing_run_folder_is_refused(cfg):
    close(open_run(cfg))
    with pytest.raises(UserError, match="one exists; give --name .* --resume .* --overwrite"):
        open_run(cfg)


def test_overwrite_replaces_the_folder(cfg):
    run = open_run(cfg)
    (run.folder / "old").touch()
    close(run)
    assert not (open_run(cfg, overwrite=True).folder / "old").exists()


def test_overwrite_does_not_touch_a_folder_that_is_no_run(cfg):
    folder = cfg.output / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds no run"):
        open_run(cfg, overwrite=True)
    assert (folder / "thesis.tex").exists()


def test_a_running_run_is_not_replaced(cfg):
    run = open_run(cfg)
    with pytest.raises(UserError, match="in use by another process"):
        open_run(cfg, overwrite=True)
    assert (run.folder / "config.json").exists()


def test_resume_needs_the_same_settings_but_not_the_same_logging(cfg):
    close(open_run(cfg))
    close(open_run(cfg, resume=True, log_every=7))
    with pytest.raises(UserError, match=r"begun with lr = 0.002, not 0.5"):
        open_run(cfg, resume=True, lr=0.5)


def test_resume_without_a_run_says_so(cfg):
    with pytest.raises(UserError, match="nothing to continue"):
        open_run(cfg, resume=True)


def test_the_log_is_cut_back_to_the_checkpoint_and_to_whole_lines(cfg):
    run = open_run(cfg)
    run.log([{"step": 10}, {"step": 20}, {"step": 30}])
    with open(run.metrics, "a") as file:
        file.write('{"step": 4')
    run.cut_log(20)
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [10, 20]


def test_default_names_differ_by_model_hook_preset_and_seed():
    base = RunConfig()
    changed = [
        {"lm": "gpt2"},
        {"hook_name": ("blocks.3.hook_mlp_out",)},
        {"preset": "offline"},
        {"seed": (1,)},
    ]
    names = {default_name(dataclasses.replace(base, **change)) for change in [{}, *changed]}
    assert len(names) == 5
    assert "/" not in default_name(RunConfig(lm="EleutherAI/pythia-70m@random"))


@pytest.mark.parametrize(
    "change",
    [
        {"seed": tuple(range(71))},
        {"hook_name": tuple(f"blocks.{layer}.hook_resid_post" for layer in range(30))},
        {"lm": "\N{GREEK SMALL LETTER MU}" * 99 + "/" + "\N{GREEK SMALL LETTER MU}" * 127},
    ],
)
def test_a_long_default_name_is_cut_and_found_again(tmp_path, change):
    cfg = RunConfig(output=tmp_path, **change)
    close(open_run(cfg))
    close(open_run(cfg, resume=True))
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == default_name(cfg) and len(folder.name.encode()) <= 200
    assert folder.name.startswith(f"{cfg.lm.rpartition('/')[2][:80]}")
    other = dataclasses.replace(cfg, seed=(*cfg.seed, 99))  # the end is what is cut off
    assert default_name(other) != default_name(cfg)


def test_a_default_name_that_fits_is_whole():
    seeds = "".join(f"_s{seed}" for seed in range(44))
    name = default_name(RunConfig(seed=tuple(range(44)), lm="n"))
    assert name == f"n_blocks.12.hook_resid_post_demo{seeds}" and 190 < len(name) <= 200


def test_a_checkpoint_returns_bit_equal_and_only_the_newest_stay(tmp_path):
    tensors = {"a": torch.randn(3, 5).T, "b": torch.tensor(7)}
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, tensors, keep=2)
    assert len(list(tmp_path.iterdir())) == 2
    step, loaded = load_newest_checkpoint(tmp_path)
    assert step == 3
    assert torch.equal(loaded["a"], tensors["a"])
    assert torch.equal(loaded["b"], tensors["b"])


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(50)}, keep=2)
    newest = save_checkpoint(tmp_path, 2, {"a": torch.zeros(50)}, keep=2)
    newest.write_bytes(newest.read_bytes()[:-20])
    step, loaded = load_newest_checkpoint(tmp_path)
    assert (step, loaded["a"].sum()) == (1, 50)
    assert newest.name in capsys.readouterr().out


def test_a_checkpoint_that_does_not_fit_is_refused_and_the_old_ones_stay(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"a": torch.ones(50)}, keep=1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="no space for a checkpoint"):
        save_checkpoint(tmp_path, 2, {"a": torch.ones(50)}, keep=1)
    assert load_newest_checkpoint(tmp_path)[0] == 1


def test_every_part_of_a_run_gets_its_own_state_back(tmp_path):
    class Part:
        def __init__(self, state):
            self.state = state

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    save_run(tmp_path, 9, {"a": Part({"x": torch.ones(2)}), "a.b": Part({"x": 3})}, keep=1)
    loaded = {"a": Part(None), "a.b": Part(None)}
    assert load_run(tmp_path, loaded) == 9
    assert torch.equal(loaded["a"].state["x"], torch.ones(2))
    assert loaded["a.b"].state["x"] == 3


def test_a_run_without_a_checkpoint_starts_at_step_zero(tmp_path):
    assert load_run(tmp_path / "checkpoints", {}) == 0


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_the_first_interrupt_is_remembered_and_the_second_one_kills():
    # Python's own handler, which is not there if the tests were started in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stop = StopSignal()
        with pytest.raises(KeyboardInterrupt), stop.awaited():
            signal.raise_signal(signal.SIGINT)
            assert stop.name == "SIGINT"
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_the_loop_did_not_ask_for_ends_the_program_behind_it():
    stop = StopSignal()
    with pytest.raises(SystemExit) as end, stop.awaited():
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"
    assert end.value.code == "stopped by SIGTERM; go on with --resume"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        path = save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, keep=1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_plan_that_does_not_fit_into_memory_is_refused_with_both_numbers():
    available = psutil.virtual_memory().available
    cpu = torch.device("cpu")
    check_memory(available // 2, cpu, "training", "train fewer")
    line = r"training needs about 1000.0 GB of memory and \d+\.\d GB are available on cpu: train"
    with pytest.raises(UserError, match=line):
        check_memory(10**12, cpu, "training", "train fewer")

"""The entry script as a user runs it: a subprocess, a small saved model, a local text, offline."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from build_notebook import ROOT
from safetensors.torch import load_file
from tiny_runs import command, run_in, run_program

from sparse_coding.formats import load_dictionary
from sparse_coding.formats.saelens import load_saelens


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run_in(place, command(*arguments))


def test_the_table_has_a_line_for_every_sae_of_the_ladder(finished):
    done, _ = finished
    for ratio in ("x01", "x04"):
        for seed in ("s0", "s1"):
            assert f"l1_{ratio}_l0-6_{seed}" in done.stdout


def test_a_run_folder_is_complete_in_itself(finished):
    _, folder = finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    expected = {
        "config.json", "metrics.jsonl", "summary.json", "results/feature_density.json",
        "figures/fig_reconstruction.png", "figures/fig_reconstruction.pdf",
        "saes/l1_x04_l0-6_s1/cfg.json", "saes/l1_x04_l0-6_s1/sae_weights.safetensors",
        "saes/l1_x04_l0-6_s1/sparsity.safetensors",
    }  # fmt: skip
    assert expected <= files


def test_summary_rows_carry_their_numbers_with_n_and_intervals(finished):
    _, folder = finished
    content = json.loads((folder / "summary.json").read_text())
    assert content["config"]["batch_tokens"] == 64
    assert len(content["rows"]) == 4
    for row in content["rows"]:
        assert row["n_tokens_trained"] == 12000 // 64 * 64
        assert row["n_tokens_eval"] >= 1500
        assert row["n_tokens_ce"] >= 600 * 0.9  # the last position of a context has no target
        assert row["d_sae"] == row["ratio"] * row["d_in"]
        assert row["fvu_low"] <= row["fvu"] <= row["fvu_high"]
        assert 0 <= row["dead_fraction"] <= 1
        assert row["l0"] == pytest.approx(6.0, rel=0.4)  # 187 small steps; the target is near


def test_training_lowers_the_unexplained_variance(finished):
    _, folder = finished
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    of_one = [line["fvu"] for line in lines if line["name"] == "l1_x04_l0-6_s0"]
    assert [line["step"] for line in lines][:4] == [5] * 4
    assert of_one[-1] < 0.5 * of_one[0]


def test_saved_saes_are_those_that_were_measured(finished):
    _, folder = finished
    rows = json.loads((folder / "summary.json").read_text())["rows"]
    sae = load_saelens(folder / "saes" / rows[0]["name"])
    metadata = json.loads((folder / "saes" / rows[0]["name"] / "cfg.json").read_text())["metadata"]
    assert sae.name == rows[0]["architecture"]
    assert metadata["l0"] == rows[0]["l0"]
    assert metadata["hook_name"] == "blocks.1.hook_resid_post"


def test_the_same_command_again_is_refused_in_one_line(finished, place):
    done = run(place, "--name", "whole", "--seed", "0", "1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: outputs/runs/whole exists")
    assert "Traceback" not in done.stderr


def signalled(place: Path, number: int, is_time: Callable[[], bool], *arguments: str) -> str:
    """What the entry script says last of all when it is sent a signal at that time."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command(*arguments), cwd=place, env=environment, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    while process.poll() is None and not is_time():
        time.sleep(0.001)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == 1
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


def test_a_run_stopped_in_harvest_training_and_evaluation_ends_bitwise_equal(finished, place):
    _, whole = finished
    where = ("--name", "one", "--output", "stopped")
    resumed = (*where, "--seed", "0", "1", "--checkpoint-every", "50", "--resume")
    run_folder, at_once = place / "stopped/runs/one", "go on with --resume"
    log, checkpoints = run_folder / "metrics.jsonl", run_folder / "checkpoints"

    said = signalled(
        place, signal.SIGINT, lambda: any(place.glob("stopped/cache/*/lock")), *resumed[:-1]
    )
    assert said == f"stopped by SIGINT; {at_once}" and not checkpoints.exists()
    said = signalled(
        place, signal.SIGTERM, lambda: log.exists() and log.stat().st_size > 2000, *resumed
    )
    assert re.fullmatch(rf"stopped by SIGTERM at step \d+ of 187; {at_once}", said)
    last = checkpoints / "step_000000187.safetensors"
    assert not last.exists()
    said = signalled(place, signal.SIGINT, last.exists, *resumed)
    assert said in (
        f"stopped by SIGINT{place}; {at_once}" for place in ("", " at step 187 of 187")
    )
    assert not (run_folder / "summary.json").exists()
    done = run(place, *resumed)
    assert done.returncode == 0, done.stderr
    for path in sorted(whole.glob("saes/*/sae_weights.safetensors")):
        one, other = load_file(path), load_file(run_folder / path.relative_to(whole))
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), (path, name)
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key != "tokens_per_second"}
            for line in path.read_text().splitlines()
        ]
        for path in (whole / "metrics.jsonl", log)
    ]
    assert logs[0] == logs[1]


def test_a_stream_that_is_stopped_while_it_fills_a_window_ends_as_the_unbroken_one(place):
    """A window gives some 32 steps, and takes longer to fill than they take."""
    streamed = ("--no-cache", "--buffer-tokens", "2000", "--checkpoint-every", "1")
    streamed += ("--n-tokens", "2500", "--ratios", "1", "--log-every", "1")
    folders = [place / "outputs/runs" / name for name in ("filled", "unbroken")]
    filled, unbroken = [(*streamed, "--name", folder.name) for folder in folders]
    log, last_of_window = folders[0] / "metrics.jsonl", '"step": 31,'
    said = signalled(
        place, signal.SIGTERM, lambda: log.exists() and last_of_window in log.read_text(), *filled
    )
    assert re.fullmatch(r"stopped by SIGTERM at step 3[1-4] of 39; go on with --resume", said)
    for arguments in ((*filled, "--resume"), unbroken):
        done = run(place, *arguments)
        assert done.returncode == 0, done.stderr
    for path in sorted(folders[1].glob("saes/*/sae_weights.safetensors")):
        one, other = (load_file(p) for p in (path, folders[0] / path.relative_to(folders[1])))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_two_hooks_stream_without_a_cache_and_share_one_pass(place):
    done = run(
        place, "--name", "stream", "--no-cache", "--hook-name", "blocks.0.hook_resid_post",
        "blocks.1.hook_mlp_out", "--ratios", "2", "--n-tokens", "3000", "--buffer-tokens", "500",
        "--architecture", "tied_l1", "norm_weighted_l1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "outputs/runs/stream/summary.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        f"{hook}/{architecture}_x02_l0-6_s0"
        for hook in ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
        for architecture in ("tied_l1", "norm_weighted_l1")
    ]
    saved = place / "outputs/runs/stream/saes" / rows[0]["name"]
    assert load_saelens(saved).name == "tied_l1"


def test_transcoders_are_trained_measured_at_their_target_saved_and_evaluated(place):
    done = run(
        place, "--name", "mlp", "--hook-name", "blocks.1.mlp.hook_in", "--ratios", "4",
        "--target-hook-name", "blocks.1.hook_mlp_out", "--architecture", "l1", "batch_topk",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "outputs/runs/mlp/summary.json").read_text())["rows"]
    for row in rows:
        assert (row["hook_name"], row["hook_name_out"]) == (
            "blocks.1.mlp.hook_in",
            "blocks.1.hook_mlp_out",
        )
        assert row["fvu"] < 0.4
        assert load_saelens(place / "outputs/runs/mlp/saes" / row["name"]).is_transcoder
    settings = ("--n-tokens", "1500", "--n-tokens-ce", "600")
    done = run_program(place, "analysis.evaluate", "outputs/runs/mlp", *settings)
    assert done.returncode == 0, done.stderr
    again = json.loads((place / "outputs/runs/mlp/results/evaluate.json").read_text())["rows"]
    by_name = {row["name"]: row for row in again}
    for row in rows:
        for key in ("l0", "fvu", "ce_sae", "kl", "ce_zero", "n_tokens_eval"):
            assert by_name[row["name"]][key] == pytest.approx(row[key], rel=1e-4), key
    done = run_program(place, "analysis.compare_baselines", "outputs/runs/mlp")
    assert done.returncode == 2 and "is a transcoder" in done.stderr


def test_crosscoders_are_trained_on_all_hooks_measured_saved_and_evaluated(place):
    hooks = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    done = run(
        place, "--name", "cross", "--hook-name", *hooks, "--ratios", "2",
        "--architecture", "crosscoder", "batch_topk_crosscoder",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((place / "outputs/runs/cross/summary.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [
        f"{name}_x02_l0-6_s0" for name in ("crosscoder", "batch_topk_crosscoder")
    ]
    for row in rows:
        assert row["hook_name"] == "+".join(hooks)
        assert row["d_sae"] == 2 * row["d_in"] == 48
        assert max(row["fvu"], *(row[f"fvu_{hook}"] for hook in hooks)) < 0.4
        loaded = load_dictionary(place / "outputs/runs/cross/saes" / row["name"])
        assert loaded.joins_hooks and loaded.name == row["architecture"]
    settings = ("--n-tokens", "1500", "--n-tokens-ce", "600")
    done = run_program(place, "analysis.evaluate", "outputs/runs/cross", *settings)
    assert done.returncode == 0, done.stderr
    again = json.loads((place / "outputs/runs/cross/results/evaluate.json").read_text())["rows"]
    by_name = {row["name"]: row for row in again}
    keys = ["l0", "fvu", "ce_sae", "kl", "ce_zero", "n_tokens_eval"]
    keys += [f"{key}_{hook}" for key in ("fvu", "nats_lost") for hook in hooks]
    for row in rows:
        for key in keys:
            assert by_name[row["name"]][key] == pytest.approx(row[key], rel=1e-4), key
        assert by_name[row["name"]]["kl_random_error"] > 0
    done = run_program(place, "analysis.compare_baselines", "outputs/runs/cross")
    assert done.returncode == 2 and "is a crosscoder" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--architecture", "crosscoder"], "give two or more with --hook-name"),
        (["--target-hook-name", "blocks.0.hook_mlp_out"], "is not computed after --hook-name"),
        (["--target-hook-name", "blocks.1.hook_resid_post"], "is also a --hook-name"),
        (["--target-hook-name", "blocks.9.hook_mlp_out"], "L from 0 to 1"),
        (["--lm", "nowhere/at-all"], "--lm nowhere/at-all cannot be loaded"),
        (["--hook-name", "blocks.1.hook_resid_pots"], "did you mean blocks.1.hook_resid_post?"),
        (["--hook-name", "blocks.2.hook_resid_post"], "L from 0 to 1"),
        (["--architecture", "relu"], "--architecture relu is unknown"),
        (["--text", "missing.jsonl"], "missing.jsonl"),
        (["--text", "broken.jsonl"], "broken.jsonl"),
        (["--context-length", "100000"], "context"),
        (["--n-tokens", "10"], "batch"),
        (["--text", "short.jsonl", "--heldout-fraction", "0.005"], "or its held-out part"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_no_run_folder(place, arguments, message):
    (place / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    short = (json.dumps({"text": f"the red cat {n}"}) + "\n" for n in range(198))
    (place / "short.jsonl").write_text("".join(short))
    done = run(place, "--name", "bad", *arguments)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not (place / "outputs/runs/bad").exists()

"""Does a run that is killed again and again end as one that was left alone?

    python -m benchmarks.faults

Some five minutes on two cores. A run of every architecture on a tiny random language model, once
left alone and once killed with SIGKILL `--n-kills` times and resumed each time, with an activation
cache and again without (streaming). The moments: while it harvests (streaming has no harvest on
disk), while a checkpoint is half written, and after a random time of training, in turns. Then the
weights of all SAEs are compared bit for bit, the metrics log line by line (but for
`tokens_per_second`, which is the clock's), and what is left in the run folder.
"""

import dataclasses
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors.torch import load_file

from sparse_coding.config import as_json, environment
from sparse_coding.errors import report_user_errors_in_one_line
from sparse_coding.sae import ARCHITECTURES
from sparse_coding.settings import Count, OutputFile, Range, Seed, read_settings
from sparse_coding.storage import write_json

ROOT = Path(__file__).parents[1]
MODES = {"cache": (), "streaming": ("--no-cache", "--buffer-tokens", "4096")}


@dataclasses.dataclass(frozen=True)
class Config:
    """How often, and when."""

    n_kills: Annotated[int, Range(1)] = 20
    """Kills of each run."""
    n_tokens: Count = 150_000
    """Activations that are harvested: three shards."""
    seed: Seed = 0
    """Of the random moments."""
    out: OutputFile = Path("benchmarks/results/faults.json")
    """Results file, replaced at the end."""


def tiny_runs() -> Any:
    """The tests' module that makes a tiny language model, a text and the command line."""
    sys.path.append(str(ROOT / "tests"))
    return importlib.import_module("tiny_runs")


def start(place: Path, cfg: Config, mode: str, name: str) -> subprocess.Popen:
    """The entry script at work on a run: begun, or resumed if there is one."""
    folder = place / name / "runs" / name
    arguments = [
        *(
            "--name",
            name,
            "--output",
            name,
            "--architecture",
            *ARCHITECTURES,
            "--n-tokens",
            str(cfg.n_tokens),
        ),
        *("--ratios", "2", "--dead-after-tokens", "2000", "--initial-l0", "4"),
        *("--checkpoint-every", "20", *MODES[mode]),
    ]
    if (folder / "config.json").exists():
        arguments.append("--resume")
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(place / f"{name}.txt", "a") as told:
        return subprocess.Popen(
            tiny_runs().command(*arguments),
            cwd=place,
            env=os.environ | threads,
            stdout=told,
            stderr=told,
        )


def moments(place: Path, name: str, mode: str, draw: random.Random) -> dict[str, Callable]:
    """For every kind of moment a function that says whether it has come."""
    run = place / name / "runs" / name
    begun = run / "metrics.jsonl"
    n_lines_before = begun.stat().st_size if begun.exists() else 0
    seconds, since = draw.uniform(0.0, 2.0), [0.0]

    def trained() -> bool:
        if begun.exists() and begun.stat().st_size > n_lines_before and not since[0]:
            since[0] = time.monotonic()
        return bool(since[0]) and time.monotonic() - since[0] > seconds

    found = {
        "checkpoint": lambda: any((run / "checkpoints").glob(".*tmp*")),
        "training": trained,
    }
    if mode == "cache" and not any((place / name / "cache").glob("*/manifest.json")):
        shards = place / name / "cache"
        n_before = len(list(shards.glob("*/*/shard_*")))
        found["harvest"] = lambda: len(list(shards.glob("*/*/*shard_*"))) > n_before
    return found


def kill_once(place: Path, cfg: Config, mode: str, draw: random.Random, number: int) -> str:
    """Start or resume the run and kill it; in which moment, or "" if it was over before."""
    process = start(place, cfg, mode, f"{mode}_killed")
    found = moments(place, f"{mode}_killed", mode, draw)
    kind = (
        "harvest" if "harvest" in found and number < 2 else ("checkpoint", "training")[number % 2]
    )
    while process.poll() is None and not found[kind]():
        time.sleep(0.0002)
    if process.poll() is not None:
        return ""
    process.send_signal(signal.SIGKILL)
    process.wait()
    return kind


def learnt(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of all SAEs of a run."""
    return {
        f"{path.parent.name}/{name}": tensor
        for path in sorted(run.glob("saes/*/sae_weights.safetensors"))
        for name, tensor in load_file(path).items()
    }


def log_lines(run: Path) -> list[dict[str, Any]]:
    """The metrics log without what the clock has in it."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if key != "tokens_per_second"} for line in lines]


def row_of(place: Path, cfg: Config, mode: str) -> dict[str, Any]:
    """One mode: the unbroken run, the killed one, and how they differ."""
    draw = random.Random(cfg.seed)
    killed_in: list[str] = []
    while len(killed_in) < cfg.n_kills and (
        kind := kill_once(place, cfg, mode, draw, len(killed_in))
    ):
        killed_in.append(kind)
        print(f"{mode}: kill {len(killed_in)} in {kind}", flush=True)
    status = start(place, cfg, mode, f"{mode}_killed").wait()
    whole_status = start(place, cfg, mode, f"{mode}_whole").wait()
    killed, whole = (place / name / "runs" / name for name in (f"{mode}_killed", f"{mode}_whole"))
    one, other = learnt(whole), learnt(killed)
    equal = [name for name in one if name in other and torch.equal(one[name], other[name])]
    logs = log_lines(whole), log_lines(killed)
    return {
        "mode": mode,
        "n_kills": len(killed_in),
        "kills_in": {kind: killed_in.count(kind) for kind in sorted(set(killed_in))},
        "exit_statuses": [whole_status, status],
        "n_architectures": len(ARCHITECTURES),
        "n_tensors": len(one),
        "n_tensors_equal_to_the_bit": len(equal),
        "n_log_lines": len(logs[0]),
        "log_is_equal": logs[0] == logs[1],
        "n_files_unbroken": sum(path.is_file() for path in whole.rglob("*")),
        "n_files_killed": sum(path.is_file() for path in killed.rglob("*")),
    }


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        tiny_runs().save_place(Path(folder), n_documents=1500)
        rows = [row_of(Path(folder), cfg, mode) for mode in MODES]
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    about = environment("cpu") | {"n_threads": 1}
    print(write_json(cfg.out, {"config": as_json(cfg), "environment": about, "rows": rows}))


if __name__ == "__main__":
    main()

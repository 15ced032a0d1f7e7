"""A run's folder: created, replaced or continued, and complete in itself."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

from sparse_coding.config import MAX_NAME_BYTES, RunConfig, as_json, environment
from sparse_coding.errors import UserError
from sparse_coding.processes import ALONE, Processes, job, refuse_unseen
from sparse_coding.storage import (
    atomic_path,
    disk_errors_in_one_line,
    fingerprint,
    make_folder,
    read_object,
    remove_abandoned,
    write_json,
)

# Settings that a resumed run may change: they do not influence what is learnt.
FREE_TO_CHANGE = {
    "preset", "plan", "resume", "overwrite", "output", "log_every", "checkpoint_every",
    "keep_checkpoints", "tensorboard", "wandb", "n_tokens_eval", "n_tokens_ce", "parallel",
    "skip_broken_lines",  # a run that has met a broken line has read nothing behind it
}  # fmt: skip


CONFIG = "config.json"
LOCK = ".lock"


class Run:
    """The folder `outputs/runs/NAME`.

    Made without touching the disk: a folder that stands in the way is refused at once. `start`
    then creates, replaces or continues it, and locks it against other runs. Of several processes
    the first does so for all. A run that torchrun starts again continues by itself.
    """

    def __init__(
        self,
        cfg: RunConfig,
        settings: dict[str, Any],
        device: str,
        processes: Processes = ALONE,
    ) -> None:
        self.cfg, self.settings, self.processes = cfg, settings, processes
        self.environment = environment(device)
        self.folder = run_folder(cfg)
        self.resumes = processes.of_first(cfg.resume or self._was_begun_by_this_job())
        if processes.is_first:
            self._refuse_what_is_in_the_way()

    def _was_begun_by_this_job(self) -> bool:
        """Whether torchrun has started us again after one process had ended."""
        lock = self.folder / LOCK
        return bool(job()) and lock.is_file() and lock.read_text(encoding="utf-8") == job()

    def _refuse_what_is_in_the_way(self) -> None:
        is_run, cfg = (self.folder / CONFIG).is_file(), self.cfg
        is_used = self.folder.exists() and any(
            not path.name.startswith(".") for path in self.folder.iterdir()
        )  # a run that was killed before it wrote its configuration leaves a lock
        if self.resumes and not is_run:
            raise UserError(f"--resume: {self.folder} holds no run; there is nothing to continue")
        if self.resumes:
            self._refuse_other_settings()
        elif is_used and not cfg.overwrite:
            raise UserError(
                f"{self.folder} exists; give --name for another folder, --resume to continue it "
                "or --overwrite to replace it"
            )
        elif is_used and not is_run:
            raise UserError(f"{self.folder} holds no run (no config.json), so it is not replaced")

    def start(self) -> None:
        """Lock the folder; empty it and write config.json unless the run is resumed."""
        if self.processes.is_first:
            self._prepare()
        self.processes.wait()
        refuse_unseen(self.folder / CONFIG, self.processes)

    def _prepare(self) -> None:
        with disk_errors_in_one_line(self.folder):
            make_folder(self.folder)
            self._lock()
        remove_abandoned(self.folder)
        if not self.resumes:
            self._begin_anew()
        self._lock_file.write(job())  # last: from here on the folder holds this job's run
        self._lock_file.flush()

    def _begin_anew(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (LOCK, CONFIG):  # the latter makes it a run, also half emptied
                path.unlink()
        self.write(CONFIG, {"config": self.settings, "environment": self.environment})

    def _other_settings(self) -> dict[str, Any]:
        """Those of the run in the folder that differ from ours, as they are there."""
        before = read_object(self.folder / CONFIG, "config")["config"]
        keys = sorted((before.keys() | self.settings.keys()) - FREE_TO_CHANGE)
        return {k: before.get(k) for k in keys if before.get(k) != self.settings.get(k)}

    def _refuse_other_settings(self) -> None:
        different = self._other_settings()
        for key, value in different.items():
            raise UserError(
                f"--resume: {self.folder} was begun with {key} = {value}, not "
                f"{self.settings.get(key)} ({len(different)} settings differ); repeat its settings"
            )

    def _lock(self) -> None:
        self._lock_file = open(self.folder / LOCK, "a")  # noqa: SIM115 - held while we live
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is in use by another process") from None
        self._lock_file.truncate(0)

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """The log: one line per logged step per SAE."""
        return self.folder / "metrics.jsonl"

    def write(self, name: str, content: Any) -> Path:
        """Write JSON atomically below the folder."""
        return write_json(self.folder / name, content)

    def write_result(self, name: str, rows: list[dict[str, Any]]) -> Path:
        """Write a results file: {"config", "environment", "rows"}."""
        content = {"config": self.settings, "environment": self.environment, "rows": rows}
        return self.write(name, content)

    def log(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append lines to metrics.jsonl; on the disk before any checkpoint of a later moment."""
        if not self.processes.is_first:
            return
        with (
            disk_errors_in_one_line(self.metrics),
            open(self.metrics, "a", encoding="utf-8") as file,
        ):
            file.writelines(json.dumps(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def cut_log(self, n_steps: int) -> None:
        """Remove the lines after a step, and a half-written last one: they will come again."""
        if not (self.processes.is_first and self.metrics.exists()):
            return
        lines = self.metrics.read_bytes().splitlines(keepends=True)
        try:
            kept = [
                line
                for line in lines
                if line.endswith(b"\n") and json.loads(line)["step"] <= n_steps
            ]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.metrics} is damaged ({type(error).__name__}); move it away to go on"
            ) from None
        with atomic_path(self.metrics) as temporary:
            temporary.write_bytes(b"".join(kept))


def check_memory(n_bytes: int, device: torch.device, purpose: str, advice: str) -> None:
    """`UserError` unless so much memory is available on the device (unknown on MPS)."""
    available = available_bytes(device)
    if n_bytes > available:
        raise UserError(
            f"{purpose} needs about {n_bytes / 1e9:.1f} GB of memory and {available / 1e9:.1f} "
            f"GB are available on {device}: {advice}"
        )


def check_disk(n_bytes: int, folder: Path, advice: str) -> None:
    """`UserError` unless so much is free where the folder is or is going to be."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if n_bytes > free:
        raise UserError(
            f"the run needs about {n_bytes / 1e9:.1f} GB of disk and {free / 1e9:.1f} GB are free "
            f"at {folder}: {advice}"
        )


def available_bytes(device: torch.device) -> int | float:
    """Free memory of a device; infinite where it does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available if device.type == "cpu" else math.inf


def run_folder(cfg: RunConfig) -> Path:
    """`outputs/runs/NAME`."""
    return cfg.output / "runs" / (cfg.name or default_name(cfg))


def default_name(cfg: RunConfig) -> str:
    """Model, hooks, preset and seeds: what one changes most often gets a folder of its own.

    What is too long for a folder's name is cut and ends in a fingerprint of the whole.
    """
    lm = cfg.lm.rstrip("/").rsplit("/", 1)[-1].replace("@", "-")
    seeds = "".join(f"_s{seed}" for seed in cfg.seed)
    target = f"-to-{cfg.target_hook_name}" if cfg.target_hook_name else ""
    name = f"{lm}_{'+'.join(cfg.hook_name)}{target}_{cfg.preset}{seeds}"
    whole = os.fsencode(name)
    if len(whole) <= MAX_NAME_BYTES:
        return name
    ending = f"_{fingerprint(whole.hex())}"
    return whole[: MAX_NAME_BYTES - len(ending)].decode(errors="ignore") + ending


def run_settings(cfg: RunConfig, **resolved: Any) -> dict[str, Any]:
    """The configuration plus what it resolved to (identity of the model, of the text ...)."""
    return as_json(cfg) | resolved


def cache_settings(cfg: RunConfig, lm: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    """Exactly what determines the bytes of an activation cache."""
    fields = ("context_length", "bos", "pack", "n_tokens", "cache_dtype")
    settings = {field: as_json(cfg)[field] for field in fields}
    return {"lm": lm, "text": text, "hook_name": list(cfg.harvested_hooks)} | settings

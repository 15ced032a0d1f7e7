"""What a run says while it works: the plan, a live table, optional TensorBoard and wandb."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from sparse_coding.cache import SPARE_BYTES
from sparse_coding.config import RunConfig
from sparse_coding.errors import UserError
from sparse_coding.evaluation import Firing
from sparse_coding.ladder import SAESpec
from sparse_coding.metrics import dead_upper_bound
from sparse_coding.models import LanguageModel
from sparse_coding.planning import Job, check_division, job_of, measure_rates
from sparse_coding.processes import n_processes, n_processes_here
from sparse_coding.runs import Run, check_disk, check_memory, run_folder
from sparse_coding.storage import bytes_below, fingerprint, read_json, write_json
from sparse_coding.text import Card, CardRow, Text, Tokenizer

COLUMNS = {
    "l0": "{:.1f}",
    "fvu": "{:.4f}",
    "l1_coeff": "{:.2f}",
    "dead_fraction": "{:.1%}",
}


class Reporter:
    """Writes every logged step to metrics.jsonl and shows the newest one as a table in place.

    Without a terminal (a pipe, a log file) each logged step is one line instead.
    """

    def __init__(self, run: Run, n_steps: int, first_step: int = 0) -> None:
        self.run, self.n_steps, self.first_step = run, n_steps, first_step
        self.started = time.monotonic()
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, refresh_per_second=4)
        wanted = [make for name, make in SINKS.items() if getattr(run.cfg, name)]
        self.sinks = [make(run) for make in wanted if run.processes.is_first]

    def __enter__(self) -> "Reporter":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()
        for sink in self.sinks:
            sink.close()

    def log(self, rows: list[dict[str, Any]]) -> None:
        """One row per SAE, as `Trainer.metrics` returns them."""
        step = rows[0]["step"]
        seconds = time.monotonic() - self.started
        per_second = (step - self.first_step) / seconds
        tokens_per_second = per_second * rows[0]["n_tokens"] / step
        seconds_left = (self.n_steps - step) / per_second
        self.run.log(row | {"tokens_per_second": round(tokens_per_second, 1)} for row in rows)
        for sink in self.sinks:
            sink.log(rows)
        title = (
            f"step {step:,} / {self.n_steps:,}   {tokens_per_second:,.0f} tokens/s   "
            f"{_duration(seconds_left)} left"
        )
        if self.console.is_terminal:
            self.live.update(metrics_table(title, rows))
        else:
            l0 = " ".join(f"{row['l0']:.0f}" for row in rows)
            fvu = " ".join(f"{row['fvu']:.3f}" for row in rows)
            print(f"{title}   l0 {l0}   fvu {fvu}", file=sys.stderr, flush=True)


def metrics_table(title: str, rows: Iterable[dict[str, Any]]) -> Table:
    """The live table: one line per SAE."""
    table = Table(title=title, title_justify="left")
    table.add_column("SAE")
    for column in COLUMNS:
        table.add_column(column.replace("_fraction", ""), justify="right")
    for row in rows:
        table.add_row(row["name"], *(form.format(row[key]) for key, form in COLUMNS.items()))
    return table


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class TensorBoardSink:
    """Scalars under the run folder's `tensorboard/`."""

    def __init__(self, run: Run) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs its package: pip install tensorboard") from None
        self.writer = SummaryWriter(run.folder / "tensorboard")

    def log(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            for key in COLUMNS:
                self.writer.add_scalar(f"{row['name']}/{key}", row[key], row["step"])

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    """Scalars to a Weights & Biases project."""

    def __init__(self, run: Run) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs its package: pip install wandb") from None
        self.run = wandb.init(project=run.cfg.wandb, name=run.folder.name, config=run.settings)

    def log(self, rows: list[dict[str, Any]]) -> None:
        scalars = {f"{row['name']}/{key}": row[key] for row in rows for key in COLUMNS}
        self.run.log(scalars, step=rows[0]["step"])

    def close(self) -> None:
        self.run.finish()


SINKS = {"tensorboard": TensorBoardSink, "wandb": WandbSink}


def print_features(
    name: str, features: Iterable[int], firings: list[list[Firing]], tokenizer: Tokenizer
) -> None:
    """Of each feature its strongest firings: the activation, and the token in its text."""
    for feature, found in zip(features, firings, strict=True):
        print(f"\nfeature {int(feature)} of {name}")
        for one in found:
            parts = (
                one.tokens[: one.place],
                one.tokens[one.place :][:1],
                one.tokens[one.place + 1 :],
            )
            before, token, after = (tokenizer.decode(part).replace("\n", "⏎") for part in parts)
            print(f"{one.activation:8.2f}  {before}[{token}]{after}")


def print_results(rows: list[dict[str, Any]]) -> None:
    """The held-out results: one line per SAE, and below what was measured on what."""
    table = Table(title="held-out results", title_justify="left")
    for column in ("SAE", "l0", "fvu", "nats lost", "ce recovered", "dead"):
        table.add_column(column, justify="left" if column == "SAE" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['l0']:.1f}",
            f"{row['fvu']:.4f} [{row['fvu_low']:.4f}, {row['fvu_high']:.4f}]",
            f"{row['nats_lost']:.3f} [{row['nats_lost_low']:.3f}, {row['nats_lost_high']:.3f}]",
            f"{row['ce_recovered']:.4f}",
            f"{row['dead_fraction']:.1%}",
        )
    # In a file a number that is cut off is worse than a line that is too long.
    width = max(110, Console(width=10_000).measure(table).maximum)
    console = Console(width=None if sys.stdout.isatty() else width, highlight=False)
    console.print(table)
    n, first = rows[0]["n_tokens_eval"], rows[0]
    console.print(
        f"l0, fvu, dead: {n:,} held-out tokens of {first['n_documents_eval']:,} documents. "
        f"Cross-entropy: {first['n_tokens_ce']:,} tokens; clean {first['ce_clean']:.3f} nats, "
        f"mean-ablated {first['ce_mean']:.3f}, zero-ablated {first['ce_zero']:.3f}.\n"
        "Brackets: 95 % intervals, bootstrap over documents. dead: silent on all of these tokens "
        f"(at 95 % such a feature fires on less than {dead_upper_bound(n):.1e} of all tokens)."
    )


def print_card(text: Text, lm: LanguageModel, folder: Path) -> None:
    """The builtin text by source: documents, bytes, tokens; counted once, then kept."""
    if text.name != "builtin":
        return
    key = fingerprint({"text": text.fingerprint_fields(), "lm": lm.identity})
    path = folder / "text" / f"card_{key}.json"
    if not path.exists():
        print("counting the tokens of the builtin text once ...", file=sys.stderr, flush=True)
        write_json(path, [row._asdict() for row in text.card(lm.tokenizer).rows])
    print(Card([CardRow(**row) for row in read_json(path)]))


def print_plan(cfg: RunConfig, specs: list[SAESpec]) -> None:
    """What is about to happen, before anything is loaded; `UserError` if it does not fit here."""
    job, target = job_of(cfg, specs, n_processes()), cfg.target_hook_name
    check_division(job)
    n_here = n_processes_here() if job.lm.device.type == "cpu" else 1
    lm, gb = job.lm, "{:,.2f} GB".format
    dtype = str(lm.dtype).removeprefix("torch.")
    disk = job.disk_bytes - bytes_below(run_folder(cfg))  # a run is continued or replaced there
    if cfg.cache:  # its activations may be there already, which only their settings tell
        disk += SPARE_BYTES if cfg.plan else -job.cache_bytes
    lines = {
        "model": f"{lm.name} ({lm.n_layers} layers, {dtype} on {lm.device})",
        "hooks": ", ".join(f"{name} (d_in {lm.d_model})" for name in cfg.hook_name),
        **({"target": f"{target} (d_out {lm.d_model})"} if target else {}),
        "text": f"{cfg.text}, contexts of {cfg.context_length} tokens",
        "tokens": f"{cfg.n_tokens:,} x {cfg.n_epochs} = {job.n_steps:,} steps of "
        f"{cfg.batch_tokens:,}",
        "SAEs": f"{len(specs) * job.n_hooks}: {_first_and_last(specs)}, "
        f"{job.n_parameters / 1e6:,.1f}M parameters",
        "memory": f"{gb(job.memory_bytes / 1e9)}: {gb(job.lm_bytes / 1e9)} the language model, "
        f"{gb(job.training_bytes / 1e9)} training, {gb(job.buffer_bytes / 1e9)} activations, "
        f"{gb(job.evaluation_bytes / 1e9)} evaluation",
        "disk": f"{gb(job.disk_bytes / 1e9)}: {gb(job.cache_bytes / 1e9)} of activations, "
        f"{gb(job.checkpoint_bytes / 1e9)} of checkpoints, {gb(job.sae_bytes / 1e9)} of SAEs",
        "output": str(run_folder(cfg)),
    }
    if job.n_processes > 1:
        lines["parallel"] = f"{cfg.parallel}, {job.n_processes} processes of that memory each"
    if cfg.plan:
        lines |= _work(job)
    for key, value in lines.items():
        print(f"{key:>8}  {value}")
    fewer = "train fewer or smaller SAEs at once (--ratios, --target-l0, --seed, --hook-name)"
    check_memory(n_here * job.memory_bytes, lm.device, "the run", fewer)
    check_disk(disk, run_folder(cfg), f"harvest fewer tokens, stream them (--no-cache) or {fewer}")


def _first_and_last(specs: list[SAESpec]) -> str:
    first, last = specs[0].name, specs[-1].name
    return first if len(specs) == 1 else f"{first} ... {last}"


def _work(job: Job) -> dict[str, str]:
    """Operations, traffic and time, at the rates this device shows within a second."""
    rates = measure_rates(job.lm.device, job.lm.dtype)
    harvest, train = (f"{s / 60:.0f} min" if s < 7200 else f"{s / 3600:,.0f} h"
                      for s in job.seconds(rates))  # fmt: skip
    exchanged = f"{job.exchanged_bytes / 1e9:,.2f} GB sent by each process while training"
    return ({} if job.n_processes == 1 else {"traffic": exchanged}) | {
        "work": f"{job.harvest_operations:.2e} operations to harvest, "
        f"{job.training_operations:.2e} to train; {job.read_bytes / 1e9:,.2f} GB read from disk",
        "time": f"about {harvest} to harvest and {train} to train, where products run at "
        f"{rates.operations / 1e12:.2f} T operations/s and copies at {rates.bytes / 1e9:.0f} GB/s "
        "(benchmarks/SCALING.md says how well this foretells)",
    }

"""How well is a run's cost foretold, and what would larger models and dictionaries take?

    python -m benchmarks.scaling

About five minutes on two cores, on an idle machine. Rows of `what`

- "step": seconds of a training step against `planning.Job`, over widths, ratios and batches;
- "harvest": tokens per second of models of random weights against the same;
- "run": peak memory and disk of whole runs, each in a process of its own;
- "fit": the shares of this machine's rates that explain the smaller steps and models (`role`
  fit), from which the constants of `sparse_coding/planning.py` come. The larger ones (`role`
  test) are foretold with those constants, and are not used for them;
- "projection": what `planning.Job` says of models that do not fit here. Of GPUs nothing was
  measured: their rates are the maker's, their shares assumed.

The tables of benchmarks/SCALING.md are written from the rows.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, Gemma2Config, GPTNeoXConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.batches import Case, sparse_sae, still_task
from benchmarks.peers import METHODS
from sparse_coding.config import PRESETS, RunConfig, as_json, environment
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.harvest import Rows, harvest_to_cache
from sparse_coding.ladder import SAESpec, ladder
from sparse_coding.models import EMBEDDED, LMSize, load_lm, size_of_config
from sparse_coding.planning import Job, Rates, job_of, measure_rates
from sparse_coding.settings import Count, OutputFile, read_settings
from sparse_coding.storage import atomic_path, bytes_below, write_json
from sparse_coding.text import contexts, load_text

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
L0 = 40.0
# (d_in, ratio, batch, step): what the constants are fitted to, and what they then foretell
FIT_STEPS = [(d, r, 1024, step) for d in (256, 512) for r in (1, 8, 32)
             for step in ("auto", "reference")]  # fmt: skip
TEST_STEPS = [(768, 4, 2048, "auto"), (768, 32, 2048, "auto"), (1024, 16, 2048, "auto"),
              (2048, 8, 4096, "auto"), (768, 8, 2048, "reference"),
              (1024, 16, 2048, "reference")]  # fmt: skip
# (d_model, blocks) of language models with random weights; None: the embedded one
FIT_MODELS = [(256, 8), (512, 8)]
TEST_MODELS = [None, (1024, 6)]
RUNS = {
    "ratio 4": {"ratios": (4,)},
    "ratio 32": {"ratios": (32,)},
    "ratios 1 to 32": {},
    "ratio 16, autograd, batches of 4096": {
        "ratios": (16,), "step": "reference", "batch_tokens": 4096
    },
    "ratio 8, streamed": {"ratios": (8,), "cache": False},
}  # fmt: skip

# H100 SXM, 80 GB: NVIDIA's data sheet, dense bfloat16 and HBM3
H100 = Rates(989e12, 3.35e12)
H100_BYTES = 80e9
SIZES = {
    "pythia-70m": (GPTNeoXConfig(
        vocab_size=50304, hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
        num_attention_heads=8), 3),
    "Gemma 2 2B": (Gemma2Config(
        vocab_size=256000, hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        num_attention_heads=8, num_key_value_heads=4, head_dim=256), 12),
    "Llama 3 70B": (LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False), 40),
}  # fmt: skip
RATIOS = (1, 2, 4, 8, 16, 32)
MILLION = 2**20
PROJECTED_TOKENS = 10**9


@dataclass(frozen=True)
class Config:
    """Where the results go, and how long is measured."""

    n_steps: Count = 8
    """Timed steps of each size; the median counts."""
    n_tokens: Count = 16_384
    """Activations that each model harvests."""
    out: OutputFile = Path("benchmarks/results/scaling.json")
    """Results file, replaced at the end."""
    page: OutputFile = Path("benchmarks/SCALING.md")
    """The page whose tables are replaced."""


def tiny_job(lm: LMSize, **settings: Any) -> Job:
    """A job of one L1 SAE, unless the settings say otherwise."""
    default = {
        "n_hooks": 1, "last_layer": 0, "specs": [SAESpec("l1", 1, None, L0, 0)], "n_tokens": 1024,
        "n_epochs": 1, "batch_tokens": 1024, "context_length": 128,
        "cache_dtype": torch.bfloat16, "is_fast": True,
    }  # fmt: skip
    return Job(lm, **default | settings)


def step_rows(cfg: Config) -> Iterator[Row]:
    """Seconds of a training step, and the job of exactly one such step."""
    sizes = [(size, "fit") for size in FIT_STEPS] + [(size, "test") for size in TEST_STEPS]
    for (d_in, ratio, batch, step), role in tqdm(sizes, "steps", leave=False):
        rates = measure_rates(CPU, torch.bfloat16 if step == "auto" else torch.float32)
        case = Case("l1", "random", d_in, ratio, batch, L0)
        task, x = still_task(case)
        method = METHODS[step].make(task)
        method.load(sparse_sae(task, x, L0))
        seconds = [method.timed_step(x) for _ in range(cfg.n_steps + 2)][2:]
        job = tiny_job(
            LMSize("", 1, d_in, 0, 0, 0, CPU, torch.float32), batch_tokens=batch, n_tokens=batch,
            specs=[SAESpec("l1", ratio, None, L0, 0)], is_fast=step == "auto",
        )  # fmt: skip
        yield {
            "what": "step", "role": role, "step": step, "d_in": d_in, "ratio": ratio,
            "batch_tokens": batch, "s": median(seconds), "foretold_s": job.seconds(rates)[1],
            "products_s": job.training_operations / rates.operations,
            "memory_s": job.touched_bytes / rates.bytes,
        }  # fmt: skip


def harvest_rows(cfg: Config) -> Iterator[Row]:
    """Seconds to harvest into a cache, tokenising and writing included."""
    tokenizer = AutoTokenizer.from_pretrained(load_lm(EMBEDDED).tokenizer.name_or_path)
    text = load_text("builtin")
    models = [(size, "fit") for size in FIT_MODELS] + [(size, "test") for size in TEST_MODELS]
    for size, role in tqdm(models, "models", leave=False):
        with tempfile.TemporaryDirectory() as folder:
            name = EMBEDDED
            if size is not None:
                name = folder
                d_model, n_layers = size
                config = LlamaConfig(
                    vocab_size=len(tokenizer), hidden_size=d_model, intermediate_size=4 * d_model,
                    num_hidden_layers=n_layers, num_attention_heads=d_model // 64,
                )  # fmt: skip
                LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            yield _harvest_row(cfg, name, role, text, Path(folder))


def _harvest_row(cfg: Config, name: str, role: str, text: Any, folder: Path) -> Row:
    lm = load_lm(name, device="cpu")
    hook_name = f"blocks.{lm.n_layers // 2}.hook_resid_post"
    run = replace(PRESETS["demo"], lm=name, device="cpu", hook_name=(hook_name,),
                  n_tokens=cfg.n_tokens)  # fmt: skip
    job = job_of(run, [SAESpec("l1", 1, None, L0, 0)])
    rates = measure_rates(CPU, lm.dtype)

    def batches() -> Any:
        return contexts(text.documents("train"), lm.tokenizer, context_length=run.context_length)

    rows = Rows(lm, batches, run.hook_name)
    _ = rows.max_norms
    start = time.perf_counter()
    harvest_to_cache(rows, folder / "cache", {}, cfg.n_tokens, "bfloat16")
    seconds = time.perf_counter() - start
    return {
        "what": "harvest", "role": role, "d_model": lm.d_model, "n_layers": lm.n_layers,
        "n_parameters_run": (job.last_layer + 1) * job.lm.n_parameters_per_block,
        "dtype": str(lm.dtype).removeprefix("torch."), "n_tokens": cfg.n_tokens, "s": seconds,
        "foretold_s": job.seconds(rates)[0],
        "products_s": job.harvest_operations / rates.operations,
    }  # fmt: skip


def run_rows() -> Iterator[Row]:
    """Peak memory above what the imports take, and bytes on disk, of whole runs."""
    bare = _peak_bytes("-c", "import sparse_coding.reporting, sparse_coding.kernels.cpu")
    for name, changes in tqdm(RUNS.items(), "runs", leave=False):
        with tempfile.TemporaryDirectory() as folder:
            changes = {"n_tokens": 24_576, "n_tokens_eval": 4096, "n_tokens_ce": 2048} | changes
            cfg = replace(PRESETS["demo"], output=Path(folder), device="cpu", **changes)
            job = _job(cfg)
            peak = _peak_bytes("easy_training_base.py", *_flags(cfg)) - bare
            [checkpoint] = Path(folder).glob("runs/*/checkpoints/*.safetensors")
            row = {
                "what": "run", "name": name, "memory_gb": peak / 1e9,
                "checkpoint_gb": checkpoint.stat().st_size / 1e9,
                "cache_gb": bytes_below(Path(folder) / "cache") / 1e9,
                "saes_gb": bytes_below(next(Path(folder).glob("runs/*/saes"))) / 1e9,
            }  # fmt: skip
        yield row | {
            "foretold_memory_gb": job.memory_bytes / 1e9,
            "foretold_checkpoint_gb": job.checkpoint_bytes / (job.keep_checkpoints + 1) / 1e9,
            "foretold_cache_gb": job.cache_bytes / 1e9, "foretold_saes_gb": job.sae_bytes / 1e9,
        }  # fmt: skip


def _job(cfg: RunConfig) -> Job:
    specs = ladder(cfg.architecture, cfg.ratios, cfg.l1_coeffs, cfg.target_l0, cfg.seed)
    return job_of(cfg, specs)


def _flags(cfg: RunConfig) -> list[str]:
    """The command line of a configuration that differs from the demo's."""
    default, flags = as_json(PRESETS["demo"]), []
    for field, value in as_json(cfg).items():
        if value != default[field]:
            name = field.replace("_", "-")
            values = value if isinstance(value, list) else [value]
            flags += [f"--no-{name}"] if value is False else [f"--{name}", *map(str, values)]
    return flags


def _peak_bytes(*arguments: str) -> int:
    """Peak resident memory of a Python process, by looking five times a second; Linux only."""
    child = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    peak = 0
    while child.poll() is None:
        status = Path(f"/proc/{child.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        peak = max(peak, 1024 * int(found[1])) if found else peak
        time.sleep(0.2)
    if child.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {child.returncode}")
    return peak


def fit_rows(rows: list[Row]) -> Iterator[Row]:
    """Shares of the rates reached, by least squares of the relative error; the rows' own too."""
    for what, step in (("step", "auto"), ("step", "reference"), ("harvest", None)):
        some = [row for row in rows if row["what"] == what and row.get("step") == step]
        fit = [row for row in some if row["role"] == "fit"]
        parts = ("products_s",) if what == "harvest" else ("products_s", "memory_s")
        x = np.array([[row[part] / row["s"] for part in parts] for row in fit])
        inverse = np.linalg.lstsq(x, np.ones(len(fit)), rcond=None)[0]
        errors = [row["foretold_s"] / row["s"] for row in some if row["role"] == "test"]
        yield {
            "what": "fit", "of": what, "step": step, "n_fit": len(fit), "n_test": len(errors),
            "shares": dict(zip(parts, (1 / inverse).tolist(), strict=True)),
            "foretold_over_measured_low": min(errors), "foretold_over_measured_high": max(errors),
        }  # fmt: skip


def projection_rows() -> Iterator[Row]:
    """Every ratio, the whole ladder and a million features, on as few H100 as hold them."""
    gpu = torch.device("meta")
    for model, (config, last_layer) in SIZES.items():
        lm = size_of_config(config, model, gpu, torch.bfloat16)
        ladders = {f"1:{ratio}": (ratio,) for ratio in RATIOS} | {"1:1 to 1:32": RATIOS}
        for name, ratios in ladders.items():
            yield _projection(lm, last_layer, name, ratios, "ladder")
        yield _projection(lm, last_layer, "1M features", (MILLION // lm.d_model,), "features")


def _projection(
    lm: LMSize, last_layer: int, name: str, ratios: tuple[int, ...], parallel: str
) -> Row:
    """One dictionary or ladder on the fewest H100 (1, 2, 4 ... 64) that hold it; none: null."""
    specs = [SAESpec("l1", ratio, None, L0, 0) for ratio in ratios]
    job = tiny_job(
        lm, last_layer=last_layer, specs=specs, n_tokens=PROJECTED_TOKENS, batch_tokens=8192,
        context_length=256, parallel=parallel,
    )  # fmt: skip
    sizes = (replace(job, n_processes=2**i) for i in range(7))
    fits = next((one for one in sizes if one.memory_bytes < H100_BYTES), None)
    harvest, train = (fits or job).seconds(H100)
    n_processes = fits.n_processes if fits else None
    gpu_hours = (fits or job).n_processes / 3600
    return {
        "what": "projection", "model": lm.name, "dictionaries": name, "n_tokens": job.n_tokens,
        "n_parameters": job.n_parameters, "lm_gb": (job.lm_bytes + job.evaluation_bytes) / 1e9,
        "training_gb": (fits or job).training_bytes / 1e9, "n_gpus": n_processes,
        "cache_gb": job.cache_bytes / 1e9, "checkpoint_gb": 12 * job.n_parameters / 1e9,
        "harvest_gpu_hours": harvest * gpu_hours, "train_gpu_hours": train * gpu_hours,
        "cache_gb_per_s": job.cache_bytes / 1e9 / train,
        "exchanged_gb_per_step": (fits or job).exchanged_bytes / job.n_steps / 1e9,
    }  # fmt: skip


COLUMNS = {
    "step": {
        "set": "{role}", "step": "{step}", "d_in": "{d_in}", "ratio": "1:{ratio}",
        "batch": "{batch_tokens:,}", "measured": "{s:.3f} s", "foretold": "{foretold_s:.3f} s",
    },
    "harvest": {
        "set": "{role}", "d_model": "{d_model}", "parameters run": "{n_parameters_run:,}",
        "measured": "{s:.1f} s", "foretold": "{foretold_s:.1f} s",
    },
    "run": {
        "run": "{name}", "memory": "{memory_gb:.2f} of {foretold_memory_gb:.2f} GB",
        "a checkpoint": "{checkpoint_gb:.3f} of {foretold_checkpoint_gb:.3f} GB",
        "cache": "{cache_gb:.3f} of {foretold_cache_gb:.3f} GB",
        "SAEs": "{saes_gb:.3f} of {foretold_saes_gb:.3f} GB",
    },
    "projection": {
        "model": "{model}", "dictionaries": "{dictionaries}", "parameters": "{n_parameters:.2e}",
        "model, evaluation": "{lm_gb:,.1f} GB", "training, per GPU": "{training_gb:,.1f} GB",
        "GPUs": "{n_gpus}", "cache": "{cache_gb:,.0f} GB", "checkpoint": "{checkpoint_gb:,.1f} GB",
        "harvest": "{harvest_gpu_hours:,.2f} GPU h", "train": "{train_gpu_hours:,.2f} GPU h",
        "cache read": "{cache_gb_per_s:.2f} GB/s",
        "exchanged": "{exchanged_gb_per_step:.2f} GB/step",
    },
}  # fmt: skip


def table(rows: list[Row], what: str) -> str:
    """The rows of a kind as a table of Markdown; `-` for null."""
    columns = COLUMNS[what]
    lines = [list(columns), ["---"] * len(columns)]
    for row in rows:
        if row["what"] == what:
            shown = {key: "-" if value is None else value for key, value in row.items()}
            lines.append([form.format(**shown) for form in columns.values()])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_page(path: Path, rows: list[Row]) -> None:
    """Replace what stands between `<!-- KIND -->` and `<!-- end -->`; other text stays."""
    text = path.read_text(encoding="utf-8")
    for what in COLUMNS:
        before, found, rest = text.partition(f"<!-- {what} -->\n")
        if not found:
            raise UserError(f"{path} has no line <!-- {what} -->")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{found}\n{table(rows, what)}\n{end}{after}"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main(cfg: Config) -> None:
    rows = [*step_rows(cfg), *harvest_rows(cfg)]
    rows += [*fit_rows(rows), *run_rows(), *projection_rows()]
    for row in rows:
        if row["what"] == "fit":
            print(row)
    write_json(cfg.out, {"config": as_json(cfg), "environment": environment("cpu"), "rows": rows})
    write_page(cfg.page, rows)


if __name__ == "__main__":
    report_user_errors_in_one_line()
    main(read_settings(Config, description=__doc__))

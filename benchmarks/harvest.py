"""How many activations per second does each library harvest, and where does our time go?

    python -m benchmarks.harvest

About ten minutes on two cores. All run the same language model on the same contexts in the same
dtype up to the same hook, and shuffle: ours over everything on disk, SAELens's ActivationsStore
and dictionary_learning's ActivationBuffer in buffers of 20 and 128 contexts. Rows of `what`
"pipeline":

- forward: `harvest.activations` alone, nothing kept;
- ours: `harvest_to_cache` and one shuffled pass over the cache (disk included);
- sae_lens, dictionary_learning: batches taken from their iterators. Activations that are left in
  a buffer at the end count as harvested. dictionary_learning's tokenising is in its time.

Rows of `what` "stage" divide our pipeline with a ladder of SAEs behind it: tokenise, forward,
filter (which rows count; including the sample that fixes the norm limit), write, read (shuffled
batches from disk), train (`Trainer.step` of all `--ratios`). `share` is of their sum.
"""

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
from tqdm import tqdm

from benchmarks.peers import is_installed, peer_versions
from benchmarks.streams import (
    Clock,
    Reading,
    dictionary_learning_buffer,
    reading,
    sae_lens_activations,
    sae_lens_dataset,
)
from sparse_coding.cache import CachedActivations
from sparse_coding.config import as_json, environment
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.harvest import KeptRows, Rows, Seen, activations, harvest_to_cache
from sparse_coding.hook_sources import AlignedSources, take_sample
from sparse_coding.ladder import ladder
from sparse_coding.models import LanguageModel
from sparse_coding.settings import Count, OutputFile, Positive, Range, Ratio, read_settings
from sparse_coding.storage import write_json
from sparse_coding.training import Trainer, TrainingConfig


@dataclasses.dataclass(frozen=True)
class Config:
    """What is harvested."""

    lm: str = "smollm2-135m"
    """Language model, as in easy_training_base.py."""
    text: str = "builtin"
    """Text, as in easy_training_base.py."""
    hook_name: str = "blocks.12.hook_resid_post"
    """The residual stream after a block."""
    context_length: Annotated[int, Range(2)] = 128
    """Tokens the language model sees at once."""
    n_tokens: Count = 65_536
    """Activations that each pipeline delivers."""
    batch_tokens: Count = 1024
    """Activations in a batch."""
    ratios: tuple[Ratio, ...] = (1, 2, 4, 8, 16, 32)
    """The ladder behind our pipeline, for the stages."""
    target_l0: Positive = 40.0
    """Active features per token to which it is steered."""
    out: OutputFile = Path("benchmarks/results/harvest.json")
    """Results file, replaced at the end."""


class TimedRows(Rows):
    """`Rows` that count the seconds spent in `keep`, the model's not among them."""

    keep_s = 0.0

    def keep(self, seen: Seen) -> KeptRows:
        start = time.perf_counter()
        kept = super().keep(seen)
        self.keep_s += time.perf_counter() - start
        return kept


@contextlib.contextmanager
def timed_forward(lm: LanguageModel) -> Iterator[list[float]]:
    """Collects the seconds of every forward pass of the model."""
    seconds: list[float] = []
    run = lm.model.run_with_hooks

    def timed(*args: Any, **settings: Any) -> Any:
        start = time.perf_counter()
        try:  # the harvest leaves the model by an exception
            return run(*args, **settings)
        finally:
            seconds.append(time.perf_counter() - start)

    lm.model.run_with_hooks = timed
    try:
        yield seconds
    finally:
        del lm.model.run_with_hooks


def forward_alone(cfg: Config, read: Reading) -> tuple[int, float]:
    """Activations made, and seconds."""
    batches = read.batches(cfg.n_tokens)
    start = time.perf_counter()
    for batch in tqdm(batches, desc="forward", leave=False):
        activations(read.lm, batch.tokens, [read.hook_name])
    return sum(int(batch.valid.sum()) for batch in batches), time.perf_counter() - start


def our_stages(cfg: Config, read: Reading) -> tuple[int, dict[str, float]]:
    """Activations made, and seconds by stage from text to training."""
    clock = Clock(read.token_batches("train"))
    rows = TimedRows(read.lm, lambda: clock, [read.hook_name])
    with tempfile.TemporaryDirectory() as folder:
        with timed_forward(read.lm) as forwards:
            start = time.perf_counter()
            cache = harvest_to_cache(rows, Path(folder), as_json(cfg), cfg.n_tokens, "bfloat16")
            harvest_s = time.perf_counter() - start
        source = CachedActivations(cache, read.hook_name, cfg.batch_tokens, seed=0, n_epochs=1)
        read_s, train_s = train_seconds(cfg, AlignedSources({read.hook_name: source}))
    forward_s = sum(forwards[1:])  # the first, of one token, asks for the hook's width
    seconds = {
        "tokenise": clock.seconds,
        "forward": forward_s,
        "filter": rows.keep_s,
        "write": harvest_s - rows.keep_s - forward_s - clock.seconds,
        "read": read_s,
        "train": train_s,
    }
    return rows.n_valid, seconds


def train_seconds(cfg: Config, sources: AlignedSources) -> tuple[float, float]:
    """Seconds of reading shuffled batches and of training the ladder on them."""
    n_steps = cfg.n_tokens // cfg.batch_tokens
    specs = ladder(("l1",), cfg.ratios, (), (cfg.target_l0,), (0,))
    sample = take_sample(sources, min(8192, cfg.n_tokens))[cfg.hook_name]
    trainer = Trainer(specs, TrainingConfig(n_steps, cfg.batch_tokens), sample)
    stream = Clock(sources)
    start = time.perf_counter()
    for batch in tqdm(stream, desc="train", total=n_steps, leave=False):
        trainer.step(batch[cfg.hook_name])
    return stream.seconds, time.perf_counter() - start - stream.seconds


def sae_lens_pipeline(cfg: Config, read: Reading) -> tuple[int, float]:
    """Activations made, and seconds."""
    dataset = sae_lens_dataset(read, cfg.n_tokens + 2**15)
    stream = sae_lens_activations(read, dataset, cfg.batch_tokens)
    seconds = seconds_of_batches(cfg, stream, "sae_lens")
    return stream.n_dataset_processed * (cfg.context_length - 1), seconds


def dictionary_learning_pipeline(cfg: Config, read: Reading) -> tuple[int, float]:
    """Activations made, and seconds."""
    buffer = dictionary_learning_buffer(read, round(1.2 * cfg.n_tokens) + 2**16, cfg.batch_tokens)
    seconds = seconds_of_batches(cfg, buffer, "dictionary_learning")
    n_delivered = cfg.n_tokens // cfg.batch_tokens * cfg.batch_tokens
    return n_delivered + int((~buffer.read).sum()), seconds


def seconds_of_batches(cfg: Config, stream: Iterator[Any], title: str) -> float:
    """Seconds until `n_tokens` have been delivered in whole batches."""
    start = time.perf_counter()
    for _ in tqdm(range(cfg.n_tokens // cfg.batch_tokens), desc=title, leave=False):
        next(stream)
    return time.perf_counter() - start


def pipeline_rows(cfg: Config, read: Reading) -> list[dict[str, Any]]:
    """Every pipeline, then the stages of ours."""
    made = {"forward": forward_alone(cfg, read)}
    n_ours, stages = our_stages(cfg, read)
    # The peers get tokens, so our tokenising does not count here.
    ours_s = sum(stages[stage] for stage in ("forward", "filter", "write", "read"))
    made["ours"] = n_ours, ours_s
    if is_installed("sae_lens"):
        made["sae_lens"] = sae_lens_pipeline(cfg, read)
    if is_installed("dictionary_learning"):
        made["dictionary_learning"] = dictionary_learning_pipeline(cfg, read)
    speeds = {name: n / seconds for name, (n, seconds) in made.items()}
    rows = [
        {
            "what": "pipeline",
            "method": name,
            "n_tokens": n,
            "s": seconds,
            "tokens_per_s": speeds[name],
            "vs_ours": speeds[name] / speeds["ours"],
        }
        for name, (n, seconds) in made.items()
    ]
    total = sum(stages.values())
    return rows + [
        {"what": "stage", "stage": stage, "s": seconds, "share": seconds / total}
        for stage, seconds in stages.items()
    ]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Pipelines, then stages."""
    print(f"\n{'pipeline':<22}{'tokens/s':>10}{'vs ours':>9}")
    for row in (row for row in rows if row["what"] == "pipeline"):
        print(f"{row['method']:<22}{row['tokens_per_s']:>10,.0f}{row['vs_ours']:>8.2f}x")
    print(f"\n{'our stages':<22}{'s':>10}{'share':>9}")
    for row in (row for row in rows if row["what"] == "stage"):
        print(f"{row['stage']:<22}{row['s']:>10.1f}{row['share']:>9.1%}")


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    if not 0 < cfg.batch_tokens <= cfg.n_tokens // 20:
        raise UserError(
            f"--n-tokens {cfg.n_tokens} makes fewer than 20 batches of {cfg.batch_tokens}: give "
            "more tokens or a smaller --batch-tokens"
        )
    read = reading(cfg.lm, cfg.text, cfg.hook_name, cfg.context_length)
    print(f"{cfg.n_tokens:,} activations of {cfg.lm}; warming up")
    # compiles the training step's kernels and touches the model's memory
    our_stages(dataclasses.replace(cfg, n_tokens=4 * cfg.batch_tokens, ratios=(1,)), read)
    rows = pipeline_rows(cfg, read)
    print_table(rows)
    about = environment("cpu") | {"n_threads": torch.get_num_threads(), "peers": peer_versions()}
    print(write_json(cfg.out, {"config": as_json(cfg), "environment": about, "rows": rows}))


if __name__ == "__main__":
    main()

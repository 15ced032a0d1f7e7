"""How long does a whole ladder of SAEs take, from text to dictionaries, here and elsewhere?

    python -m benchmarks.ladder
    python -m benchmarks.ladder --n-tokens 1000000 --ratios 8 --methods ours dictionary_learning

About an hour on two cores with every peer; `--n-tokens 20000` is a first look. Every method reads
the same contexts, runs the same language model in the same dtype up to the same hook, and trains
one untied L1 SAE per ratio with the same number of steps and tokens per step:

- ours: `harvest_to_cache` to disk, then one `Trainer` for the ladder, steered to `--target-l0`;
- sae_lens, sae_lens-bfloat16: its MultiSAETrainingRunner, all SAEs on one stream;
- dictionary_learning: its `trainSAE` with a list of trainers on one ActivationBuffer.

The peers have no controller of L0: they are given the coefficients that ours ended with, so that
all minimise the same losses. A library's own buffer is filled before its first step and not empty
after its last, and ours runs some tokens twice to learn which norms are outliers: that is in
`harvest_s`, and `n_tokens_harvested` says how many activations were made. The peers train on those
outliers too. What is done once (loading the model, tokenising, compiling kernels) is done before
the clocks start; dictionary_learning tokenises again, in its harvest. Rows of `what` "run" hold
the seconds, rows of `what` "sae" the sparsity and fvu reached on the same held-out activations.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.fit import measure_fit
from benchmarks.methods import TENSORS, Task, sae_from
from benchmarks.peers import (
    dictionary_learning_settings,
    dictionary_learning_tensors,
    is_installed,
    peer_versions,
)
from benchmarks.streams import (
    Clock,
    Reading,
    dictionary_learning_buffer,
    reading,
    sae_lens_dataset,
)
from sparse_coding.cache import CachedActivations
from sparse_coding.config import as_json, environment
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.evaluation import take_tokens
from sparse_coding.harvest import Rows, harvest_to_cache
from sparse_coding.hook_sources import AlignedSources, take_sample
from sparse_coding.ladder import ladder
from sparse_coding.sae import SAE
from sparse_coding.settings import Count, OutputFile, Positive, Range, Ratio, read_settings
from sparse_coding.storage import write_json
from sparse_coding.text import special_ids
from sparse_coding.training import Trainer, TrainingConfig

SAMPLE_TOKENS = 8192


@dataclass(frozen=True)
class Config:
    """What is trained."""

    lm: str = "smollm2-135m"
    """Language model, as in easy_training_base.py."""
    text: str = "builtin"
    """Text, as in easy_training_base.py."""
    hook_name: str = "blocks.12.hook_resid_post"
    """Activations to learn from: the residual stream after a block."""
    context_length: Annotated[int, Range(2)] = 128
    """Tokens the language model sees at once."""
    ratios: tuple[Ratio, ...] = (1, 2, 4, 8, 16, 32)
    """Dictionary sizes, as multiples of the layer's width."""
    n_tokens: Count = 100_000
    """Activations to train on."""
    batch_tokens: Count = 1024
    """Activations per step."""
    target_l0: Positive = 40.0
    """Active features per token to which ours are steered."""
    lr: Positive = 1e-3
    """Peak learning rate of Adam, for all."""
    n_tokens_eval: Count = 8_000
    """Held-out activations for l0 and fvu."""
    methods: tuple[str, ...] = ("ours", "sae_lens", "sae_lens-bfloat16", "dictionary_learning")
    """Which methods; ours always runs."""
    out: OutputFile = Path("benchmarks/results/ladder.json")
    """Results file, replaced at the end."""


class Work(NamedTuple):
    """The same for all methods; what ours finds out first is filled in for the others."""

    cfg: Config
    read: Reading
    n_steps: int
    scale: float = 1.0
    """Factor that gives activations a root-mean-square norm of sqrt(d_in)."""
    l1_coeffs: tuple[float, ...] = ()
    """Per ratio."""

    def task(self, ratio: int, l1_coeff: float) -> Task:
        size = (self.read.d_in, ratio * self.read.d_in, self.cfg.batch_tokens)
        empty = torch.empty(0, self.read.d_in)
        return Task("l1", *size, empty, self.n_steps, self.cfg.lr, l1_coeff)

    def with_own(self, trainer: Trainer) -> "Work":
        coefficients = tuple(fact["l1_coeff"] for fact in trainer.facts().values())
        return self._replace(scale=trainer.scales[0], l1_coeffs=coefficients)


class Outcome(NamedTuple):
    """One method's run: seconds by stage, and its SAEs on raw activations, in order of ratios."""

    harvest_s: float
    train_s: float
    n_tokens_harvested: int
    saes: list[SAE]


def run_ours(work: Work) -> tuple[Outcome, Trainer, Rows]:
    """The steps of easy_training_base.py."""
    cfg, read = work.cfg, work.read
    n_tokens = work.n_steps * cfg.batch_tokens
    token_batches = read.batches(2 * n_tokens)  # more than its rule for norms can drop
    rows = Rows(read.lm, lambda: token_batches, [read.hook_name])
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = harvest_to_cache(rows, Path(folder), as_json(cfg), n_tokens, "bfloat16")
        harvest_s = time.perf_counter() - start
        start = time.perf_counter()
        source = CachedActivations(cache, read.hook_name, cfg.batch_tokens, seed=0, n_epochs=1)
        sources = AlignedSources({read.hook_name: source})
        specs = ladder(("l1",), cfg.ratios, (), (cfg.target_l0,), (0,))
        sample = take_sample(sources, min(SAMPLE_TOKENS, n_tokens))[read.hook_name]
        training = TrainingConfig(work.n_steps, cfg.batch_tokens, cfg.lr)
        trainer = Trainer(specs, training, sample)
        for batch in sources:
            trainer.step(batch[read.hook_name])
        saes = list(trainer.finished_saes().values())
        train_s = time.perf_counter() - start
    n_harvested = rows.n_valid
    return Outcome(harvest_s, train_s, n_harvested, saes), trainer, rows


def run_sae_lens(work: Work, autocast: bool) -> Outcome:
    """MultiSAETrainingRunner, its stream timed apart."""
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner

    cfg, read = work.cfg, work.read
    n_tokens = work.n_steps * cfg.batch_tokens
    runner = MultiSAETrainingRunner(
        sae_lens_settings(work, autocast),
        override_dataset=sae_lens_dataset(read, n_tokens + SAMPLE_TOKENS + 2**16),
        override_model=read.lm.model,
    )
    store = runner.activations_store
    stream = Clock(store.get_multi_hook_data_loader())
    store.get_multi_hook_data_loader = lambda: stream
    start = time.perf_counter()
    trained = runner.run()
    train_s = time.perf_counter() - start - stream.seconds
    saes = [sae_from({name: getattr(sae, name) for name in TENSORS}) for sae in trained.values()]
    n_harvested = store.n_dataset_processed * (cfg.context_length - 1)
    return Outcome(stream.seconds, train_s, n_harvested, saes)


def sae_lens_settings(work: Work, autocast: bool) -> Any:
    """SAELens's configuration: its defaults but for what all methods share."""
    from sae_lens.config import LoggingConfig
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAEConfig

    cfg, read, task = work.cfg, work.read, work.task(1, 0.0)
    saes = {
        f"x{ratio:02d}": StandardTrainingSAEConfig(
            d_in=read.d_in,
            d_sae=ratio * read.d_in,
            normalize_activations="expected_average_only_in",
            l1_coefficient=l1_coeff,
            l1_warm_up_steps=task.warmup_steps,
        )
        for ratio, l1_coeff in zip(cfg.ratios, work.l1_coeffs, strict=True)
    }
    return MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names=read.hook_name,
        context_size=cfg.context_length,
        training_tokens=work.n_steps * cfg.batch_tokens,
        prepend_bos=False,  # it is in the tokens
        exclude_special_tokens=sorted(special_ids(read.lm.tokenizer)),
        train_batch_size_tokens=cfg.batch_tokens,
        # of its default of 1000 batches a short run has a tenth
        n_batches_for_norm_estimate=max(1, SAMPLE_TOKENS // cfg.batch_tokens),
        autocast=autocast,
        lr=cfg.lr,
        lr_warm_up_steps=task.warmup_steps,
        lr_decay_steps=task.decay_steps,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
    )


def run_dictionary_learning(work: Work) -> Outcome:
    """trainSAE with one StandardTrainer per ratio, its buffer timed apart."""
    from dictionary_learning.trainers import StandardTrainer
    from dictionary_learning.training import trainSAE

    cfg, read = work.cfg, work.read
    made = []

    def make(**settings: Any) -> StandardTrainer:
        made.append(StandardTrainer(**settings))
        return made[-1]

    configs = [
        dictionary_learning_settings(work.task(ratio, l1_coeff)) | {"trainer": make}
        for ratio, l1_coeff in zip(cfg.ratios, work.l1_coeffs, strict=True)
    ]
    n_tokens = work.n_steps * cfg.batch_tokens
    buffer = dictionary_learning_buffer(read, round(1.2 * n_tokens) + 2**16, cfg.batch_tokens)
    # Its own estimate of the scale takes 100 batches, more than a short run has.
    stream = Clock(work.scale * x.float() for x in buffer)
    start = time.perf_counter()
    trainSAE(stream, configs, work.n_steps, device="cpu")
    train_s = time.perf_counter() - start - stream.seconds
    n_harvested = stream.n_items * cfg.batch_tokens + int((~buffer.read).sum())
    saes = [sae_from(dictionary_learning_tensors(trainer.ae)) for trainer in made]
    for sae in saes:
        sae.fold_scale(work.scale)
    return Outcome(stream.seconds, train_s, n_harvested, saes)


PEERS: dict[str, tuple[str, Callable[[Work], Outcome]]] = {
    "sae_lens": ("sae_lens", partial(run_sae_lens, autocast=False)),
    "sae_lens-bfloat16": ("sae_lens", partial(run_sae_lens, autocast=True)),
    "dictionary_learning": ("dictionary_learning", run_dictionary_learning),
}


def check(cfg: Config) -> None:
    """`UserError` for what cannot be run."""
    for name in cfg.methods:
        if name not in ("ours", *PEERS):
            allowed = ", ".join(("ours", *PEERS))
            raise UserError(f"--methods {name} is unknown; it must be of: {allowed}")
    if not cfg.ratios:
        raise UserError("--ratios needs at least one value")
    if cfg.n_tokens < 20 * cfg.batch_tokens:
        raise UserError(
            f"--n-tokens {cfg.n_tokens} makes fewer than 20 steps of {cfg.batch_tokens}: give "
            f"{20 * cfg.batch_tokens} or more"
        )


def heldout(work: Work, rows: Rows) -> Float[Tensor, "n d_in"]:
    """Held-out activations that the harvest's rule keeps, in float32."""
    batches = take_tokens(work.read.token_batches("heldout"), work.cfg.n_tokens_eval)
    kept = [rows.keep(rows.see(batch)).acts[work.read.hook_name].float() for batch in batches]
    return torch.cat(kept)[: work.cfg.n_tokens_eval]


def result_rows(
    name: str, work: Work, outcome: Outcome, x: Float[Tensor, "n d_in"]
) -> Iterator[dict[str, Any]]:
    """A row of the run and one of each SAE."""
    cfg = work.cfg
    total_s = outcome.harvest_s + outcome.train_s
    n_tokens = work.n_steps * cfg.batch_tokens
    yield {
        "what": "run",
        "method": name,
        "n_saes": len(cfg.ratios),
        "n_tokens": n_tokens,
        "n_steps": work.n_steps,
        "harvest_s": outcome.harvest_s,
        "n_tokens_harvested": outcome.n_tokens_harvested,
        "harvest_tokens_per_s": outcome.n_tokens_harvested / outcome.harvest_s,
        "train_s": outcome.train_s,
        "train_tokens_per_s": n_tokens / outcome.train_s,
        "total_s": total_s,
    }
    for ratio, l1_coeff, sae in zip(cfg.ratios, work.l1_coeffs, outcome.saes, strict=True):
        fit = measure_fit(sae, x, l1_coeff)
        del fit["loss"]  # in raw units it means nothing beside this coefficient
        size = {"ratio": ratio, "d_sae": sae.d_sae, "l1_coeff": l1_coeff}
        yield {"what": "sae", "method": name} | size | fit


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """How many times longer each run took than ours."""
    runs = [row for row in rows if row["what"] == "run"]
    for row in runs:
        for stage in ("train", "total"):
            row[f"{stage}_vs_ours"] = row[f"{stage}_s"] / runs[0][f"{stage}_s"]


def print_table(rows: list[dict[str, Any]]) -> None:
    """Runs, then the SAEs of each."""
    print(f"\n{'method':<22}{'harvest s':>11}{'train s':>10}{'total s':>10}", end="")
    print(f"{'train':>10}{'total':>10}   l0 and fvu by ratio")
    for run in (row for row in rows if row["what"] == "run"):
        saes = [row for row in rows if row["what"] == "sae" and row["method"] == run["method"]]
        reached = "  ".join(f"{row['l0']:.0f} {row['fvu']:.3f}" for row in saes)
        print(
            f"{run['method']:<22}{run['harvest_s']:>11.1f}{run['train_s']:>10.1f}"
            f"{run['total_s']:>10.1f}{run['train_vs_ours']:>9.1f}x{run['total_vs_ours']:>9.1f}x"
            f"   {reached}"
        )


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    check(cfg)
    names = [name for name in PEERS if name in cfg.methods and is_installed(PEERS[name][0])]
    read = reading(cfg.lm, cfg.text, cfg.hook_name, cfg.context_length)
    work = Work(cfg, read, cfg.n_tokens // cfg.batch_tokens)
    print(f"{work.n_steps} steps of {cfg.batch_tokens} tokens, {len(cfg.ratios)} SAEs; warming up")
    with contextlib.redirect_stdout(None):
        run_ours(work._replace(n_steps=4, cfg=cfg))
    outcome, trainer, kept = run_ours(work)
    work = work.with_own(trainer)
    x = heldout(work, kept)
    rows = list(result_rows("ours", work, outcome, x))
    for name in names:
        print(f"{name} ...", flush=True)
        rows += result_rows(name, work, PEERS[name][1](work), x)
    add_ratios(rows)
    print_table(rows)
    about = environment("cpu") | {"n_threads": torch.get_num_threads(), "peers": peer_versions()}
    print(write_json(cfg.out, {"config": as_json(cfg), "environment": about, "rows": rows}))


if __name__ == "__main__":
    main()

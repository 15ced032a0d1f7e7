"""Does training end at the L0 that was asked for, and does the L0 hold on text not trained on?

    python -m benchmarks.l0_targets
    python -m benchmarks.l0_targets --data lm --n-steps 300 --architectures l1 p_anneal gated

Every class is trained towards every target, on the embedded model's
activations (those of the demo: harvested unless it left them) and on toy data of planted features,
for each number of steps. A longer run reads the cache more than once. Written to disk and loaded
again, each dictionary is measured on rows that it was trained on and on held-out ones.

Columns, all active features per row: `l0_last` in training, mean over the last sixth of a run, at
most 50 steps; `l0_train` of what was loaded, on training rows; `l0_heldout` on held-out rows, with
95 % intervals of a bootstrap over documents; `l0_gap` the share by which
`l0_heldout` is above `l0_train`. `fvu` is on the held-out rows.
"""

import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analysis.toy_recovery import in_processes
from sparse_coding.cache import ActivationCache, CachedActivations, open_cache
from sparse_coding.config import RunConfig, as_json, environment
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import report_user_errors_in_one_line
from sparse_coding.formats import load_dictionary
from sparse_coding.formats.saelens import save_saelens
from sparse_coding.harvest import Rows, harvest_to_cache
from sparse_coding.ladder import SAESpec, check_architectures, ladder
from sparse_coding.metrics import bootstrap_weights, columns, interval
from sparse_coding.models import load_lm
from sparse_coding.runs import cache_settings
from sparse_coding.sae import ARCHITECTURES
from sparse_coding.settings import Count, OutputFile, Positive, Processes, Ratio, read_settings
from sparse_coding.storage import write_json
from sparse_coding.text import contexts, load_text
from sparse_coding.toy import ToyActivations, ToySetting, toy_truth
from sparse_coding.training import Trainer, TrainingConfig

RUN = RunConfig(bos="always")  # the demo, whose cache is read
TOY = ToySetting(d_in=64, n_features=512, l0=40.0, zipf=0.5, magnitude_low=0.0, noise=0.05)
N_SAMPLE, N_TRAIN, N_DRAWS = 8192, 16_384, 1000
FRESH = 1_000_000  # seed of toy rows that nothing is trained on


@dataclass(frozen=True)
class Config:
    """What is trained."""

    data: tuple[Literal["toy", "lm"], ...] = ("toy", "lm")
    """What is learnt: planted features, the language model's activations."""
    architectures: tuple[str, ...] = tuple(ARCHITECTURES)
    """Classes."""
    target_l0: tuple[Positive, ...] = (20.0, 40.0, 80.0)
    """Active features per row that are asked for."""
    n_steps: tuple[Count, ...] = (300, 2000)
    """Steps of each training."""
    ratio: Ratio = 1
    """Dictionary size as a multiple of d_in; of the toy's d_in, four times it."""
    batch_tokens: Count = 256
    """Rows per step."""
    lr: Positive = RUN.lr
    """Learning rate."""
    n_heldout: Count = 50_000
    """Held-out tokens."""
    n_processes: Processes = os.cpu_count() or 1
    """Processes, one core each."""
    output: OutputFile = Path("benchmarks/results/l0_targets.json")
    """Results file."""


class Data(NamedTuple):
    """Batches of training, rows of them, and held-out rows with what is independent in them."""

    batches: Iterable[Float[Tensor, "batch d_in"]]
    sample: Float[Tensor, "n d_in"]
    train: Float[Tensor, "n d_in"]
    heldout: Float[Tensor, "n d_in"]
    document: Int[Tensor, " n"]


def harvest(cfg: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings by which the caches of training and of held-out rows are found."""
    lm, text = load_lm(RUN.lm, device=RUN.device, dtype=RUN.dtype), load_text(RUN.text)
    how = {"context_length": RUN.context_length, "bos": RUN.bos, "pack": RUN.pack}
    train = cache_settings(RUN, lm.identity, text.fingerprint_fields())
    heldout = train | {"split": "heldout", "n_tokens": cfg.n_heldout}
    for split, settings in (("train", train), ("heldout", heldout)):

        def batches(split: str = split) -> Iterator[Any]:
            return contexts(text.documents(split), lm.tokenizer, **how)

        rows = Rows(lm, batches, RUN.harvested_hooks)
        n_tokens = settings["n_tokens"]
        harvest_to_cache(rows, RUN.output / "cache", settings, n_tokens, RUN.cache_dtype)
    return train, heldout


def of_model(cfg: Config, n_steps: int, train: dict, heldout: dict) -> Data:
    """The language model's activations, read again as often as the steps need."""
    cache, unseen = (open_cache(RUN.output / "cache", settings) for settings in (train, heldout))
    hook_name = RUN.hook_name[0]
    n_epochs = 1 + n_steps * cfg.batch_tokens // cache.n_tokens
    source = CachedActivations(cache, hook_name, cfg.batch_tokens, RUN.data_seed, n_epochs)
    seen = np.concatenate([source.indices(n) for n in range(min(n_steps, source.n_batches))])
    everywhere = np.arange(unseen.n_tokens)
    return Data(
        itertools.islice(source, n_steps),
        _rows(cache, hook_name, seen[:N_SAMPLE]),
        _rows(cache, hook_name, seen[:: max(1, len(seen) // N_TRAIN)]),
        _rows(unseen, hook_name, everywhere),
        unseen.documents(everywhere).long(),
    )


def _rows(cache: ActivationCache, hook_name: str, indices: np.ndarray) -> Tensor:
    return cache.rows(hook_name, np.sort(indices)).float()


def of_toy(cfg: Config, n_steps: int) -> Data:
    """Planted features; a document is 64 rows."""
    truth = toy_truth(TOY, seed=0)
    source = ToyActivations(truth, cfg.batch_tokens, seed=0)
    heldout, _ = ToyActivations(truth, N_TRAIN, FRESH).batch(0)
    every = max(1, n_steps * cfg.batch_tokens // N_TRAIN)
    return Data(
        itertools.islice(source, n_steps),
        ToyActivations(truth, N_SAMPLE, FRESH).batch(1)[0],
        torch.cat([source.batch(n)[0] for n in range(0, n_steps, every)]),
        heldout,
        torch.arange(N_TRAIN) // 64,
    )


def fit(
    cfg: Config, data_name: str, architecture: str, n_steps: int, caches: tuple[dict, dict]
) -> list[dict[str, Any]]:
    """Every target of one class on one kind of data, trained together."""
    data = of_toy(cfg, n_steps) if data_name == "toy" else of_model(cfg, n_steps, *caches)
    ratio = cfg.ratio * (4 if data_name == "toy" else 1)
    specs = ladder([architecture], [ratio], (), cfg.target_l0, (0,))
    # Autograd: as fast for dictionaries as small as these, and nothing is compiled per process.
    training = TrainingConfig(n_steps, cfg.batch_tokens, cfg.lr, step="reference")
    trainer = Trainer(specs, training, data.sample)
    n_last = max(1, min(50, n_steps // 6))
    for n, x in enumerate(data.batches):
        if n == n_steps - n_last:
            trainer.metrics()  # forgets what came before
        trainer.step(x)
    last = {row["name"]: row["l0"] for row in trainer.metrics()}
    facts = {"data": data_name, "n_steps": n_steps, "batch_tokens": cfg.batch_tokens}
    return [
        facts | _identity(spec) | {"l0_last": last[spec.name]} | measured(sae, data)
        for spec, sae in zip(specs, trainer.finished_saes().values(), strict=True)
    ]


def _identity(spec: SAESpec) -> dict[str, Any]:
    keys = ("architecture", "ratio", "target_l0")
    return {key: getattr(spec, key) for key in keys}


@torch.no_grad()
def measured(sae: Dictionary, data: Data) -> dict[str, Any]:
    """L0 and FVU of what is on disk."""
    with tempfile.TemporaryDirectory() as folder:
        save_saelens(sae, Path(folder) / "sae", metadata={})
        loaded = load_dictionary(Path(folder) / "sae").float()
    l0_train = _l0(loaded, data.train).mean().item()
    per_document = torch.zeros(2, int(data.document.max()) + 1, dtype=torch.float64)
    per_document[0].index_add_(0, data.document, _l0(loaded, data.heldout))
    per_document[1] = data.document.bincount().double()
    weights = bootstrap_weights(per_document[1] > 0, N_DRAWS, torch.Generator().manual_seed(0))
    n_active, n_rows = per_document @ weights.T
    heldout = interval(n_active / n_rows)
    error = (data.heldout - loaded(data.heldout)).square().sum()
    variance = (data.heldout - data.heldout.mean(dim=0)).square().sum()
    return {
        "l0_train": l0_train,
        **columns("l0_heldout", heldout),
        "l0_gap": heldout.value / l0_train - 1,
        "fvu": (error / variance).item(),
        "n_train_rows": len(data.train),
        "n_heldout_rows": len(data.heldout),
        "n_heldout_documents": int((per_document[1] > 0).sum()),
    }


def _l0(dictionary: Dictionary, x: Float[Tensor, "n d_in"]) -> Float[Tensor, " n"]:
    parts = [dictionary.encode(part).count_nonzero(dim=1) for part in x.split(4096)]
    return torch.cat(parts).double()


def main() -> None:
    """Harvest, train, print, write."""
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    check_architectures(cfg.architectures, "--architectures")
    caches = harvest(cfg) if "lm" in cfg.data else ({}, {})
    combinations = itertools.product(cfg.n_steps, cfg.data, cfg.architectures)
    jobs = [(cfg, data, name, n_steps, caches) for n_steps, data, name in combinations]
    rows = in_processes(fit, jobs, cfg.n_processes, "class")
    for row in rows:
        off = "  ".join(
            f"{key} {row[key] / row['target_l0'] - 1:+.1%}"
            for key in ("l0_last", "l0_train", "l0_heldout")
        )
        label = f"{row['data']} {row['n_steps']} {row['architecture']} {row['target_l0']:g}"
        print(f"{label:32s} {off}  gap {row['l0_gap']:+.1%}  fvu {row['fvu']:.3f}")
    result = {"config": as_json(cfg), "environment": environment("cpu"), "rows": rows}
    write_json(cfg.output, result)
    print(cfg.output)


if __name__ == "__main__":
    main()

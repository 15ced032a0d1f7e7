"""The run's configuration: frozen dataclasses whose fields are the command line; presets.

No work happens here beyond reading the command line and asking which devices exist.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from sparse_coding.errors import UserError, without_secrets
from sparse_coding.settings import (
    Count,
    CountOrZero,
    Fraction,
    OpenFraction,
    OutputFolder,
    Positive,
    PositiveOrZero,
    Range,
    Ratio,
    Seed,
    checked,
    flag,
    read_settings,
)

Parallel = Literal["ladder", "data", "features"]
MAX_NAME_BYTES = 200
JOIN = "+"
CENTRED = "centred"
"""What follows the @ of a model whose writing weights are centred."""


def hooks_of(place: str) -> tuple[str, ...]:
    """The hooks of a place: one, or those that a crosscoder joins, as A+B, in that order."""
    return tuple(place.split(JOIN))


@dataclass(frozen=True)
class RunConfig:
    """Train a ladder of sparse autoencoders on the activations of one language model.

    Every combination of architecture, ratio, sparsity and seed is one SAE; all of them learn from
    the same activations in one pass.
    """

    preset: str = "demo"
    """Where the other settings start: demo, offline or pythia-70m."""

    # what is read
    lm: str = "smollm2-135m"
    """Language model: smollm2-135m (embedded), a local Hugging Face folder, or a hub id such as
    gpt2 or EleutherAI/pythia-70m-deduped. Append @random for random weights, @centred for a
    stream without its mean."""
    hook_name: tuple[str, ...] = ("blocks.12.hook_resid_post",)
    """Activations to learn from, e.g. blocks.12.hook_resid_post; several share one harvest."""
    target_hook_name: str | None = None
    """Train transcoders: from each hook_name's activations reconstruct this later hook's, e.g.
    blocks.12.hook_mlp_out from blocks.12.mlp.hook_in."""
    text: str = "builtin"
    """builtin, a local txt, jsonl or parquet file or folder, or a hub dataset id."""
    text_field: str = "text"
    """The field of a jsonl, parquet or hub record that holds the text."""
    skip_broken_lines: bool = False
    """Leave out jsonl lines that cannot be read instead of stopping at the first."""
    heldout_fraction: OpenFraction = 0.05
    """Share of the documents that is kept for evaluation and never trained on."""
    context_length: Annotated[int, Range(3)] = 128
    """Tokens the language model sees at once."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Whether a context begins with the BOS token; auto follows the model's tokenizer."""
    pack: Literal["concat", "document"] = "concat"
    """concat: documents joined by a separator and cut; document: one document a context."""

    # what is learnt
    architecture: tuple[str, ...] = ("l1",)
    """tied_l1, l1 (unit norm, resampling), norm_weighted_l1, p_anneal, gated, topk, batch_topk,
    matryoshka, jumprelu or jumprelu_target (its quadratic penalty); or crosscoder and
    batch_topk_crosscoder, which learn one dictionary of all hook_names together."""
    ratios: tuple[Ratio, ...] = (1, 2, 4, 8, 16, 32)
    """Dictionary sizes as multiples of the layer's width."""
    target_l0: tuple[Positive, ...] = (30.0,)
    """Mean active features per token to steer each SAE to (the k of topk, batch_topk,
    matryoshka, jumprelu_target and batch_topk_crosscoder).
    Ignored where l1_coeffs is given."""
    l1_coeffs: tuple[PositiveOrZero, ...] = ()
    """Fixed coefficients of the sparsity penalty (an L1 norm; jumprelu: L0) instead of target_l0;
    the squared error beside it is summed over d_in."""
    seed: tuple[Seed, ...] = (0,)
    """Seeds of the SAEs' initial weights."""
    data_seed: Seed = 0
    """Seed of the order of the activations, shared by all SAEs."""

    # how
    n_tokens: Count = 300_000
    """Activations to harvest for training."""
    n_epochs: Count = 1
    """Passes over them."""
    batch_tokens: Count = 1024
    """Activations per optimizer step."""
    lr: Positive = 2e-3
    """Peak learning rate of Adam."""
    lr_warmup_fraction: Fraction = 0.05
    """Share of the steps over which the learning rate rises."""
    lr_decay_fraction: Fraction = 0.2
    """Share of the steps at the end over which it falls to zero."""
    sparsity_warmup_fraction: Fraction = 0.05
    """Share of the steps over which a fixed l1_coeff rises from zero."""
    initial_l0: Positive = 60.0
    """Active features per token at the first step (set through the encoder's bias)."""
    n_resamples: CountOrZero = 2
    """How often dead features of the l1 architecture are resampled, in the first half."""
    dead_after_tokens: Count = 100_000
    """During training, a feature silent for this many tokens counts as dead: it is shown as such,
    may be resampled (l1) and learns from AuxK (topk, batch_topk)."""
    step: Literal["auto", "reference"] = "auto"
    """Training step: the fastest exact one for the device, or plain autograd."""
    parallel: Parallel = "ladder"
    """What several processes (torchrun) divide: ladder, each trains some of the SAEs; data, each
    its rows of every batch; features, each holds a part of every SAE. The latter two by autograd.
    """

    # what is measured
    n_tokens_eval: Count = 30_000
    """Held-out activations for l0, fvu, density and dead features."""
    n_tokens_ce: Count = 4_000
    """Held-out tokens for cross-entropy under reconstruction."""

    # where
    name: str = ""
    """Run folder's name; empty: made from the model, the hook and the preset."""
    output: OutputFolder = Path("outputs")
    """Folder for runs and caches."""
    cache: bool = True
    """Keep the activations on disk; --no-cache streams them from the model instead."""
    cache_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of the cached activations."""
    buffer_tokens: Count = 2**18
    """Without a cache: activations held in memory, among which batches are shuffled."""
    device: str = "auto"
    """auto (CUDA, then MPS, then CPU) or a torch device."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Number format of the language model; auto: bfloat16 where the hardware has it."""
    plan: bool = False
    """Say what the run would take (memory, disk, work, time), whether it fits here, and end."""
    resume: bool = False
    """Continue a run that was interrupted from its newest checkpoint."""
    overwrite: bool = False
    """Replace an existing run folder of the same name."""
    log_every: Count = 25
    """Steps between lines of metrics.jsonl and refreshes of the table."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay."""
    tensorboard: bool = False
    """Also log to TensorBoard under the run folder (pip install tensorboard)."""
    wandb: str = ""
    """Also log to this Weights & Biases project (pip install wandb)."""

    @property
    def harvested_hooks(self) -> tuple[str, ...]:
        """Every hook whose activations are needed."""
        target = self.target_hook_name
        return self.hook_name if target is None else (*self.hook_name, target)

    def columns(self, place: str) -> tuple[str, ...]:
        """The hooks that lie side by side in the rows that the SAEs of a place learn from."""
        target = self.target_hook_name
        return hooks_of(place) if target is None else (*hooks_of(place), target)


def _join(values: Any) -> str:
    return " ".join(map(str, values)) if isinstance(values, tuple) else str(values)


def validate(cfg: RunConfig) -> RunConfig:
    """The same configuration; impossible settings are refused before any work starts."""
    checked(cfg)
    for field in ("ratios", "seed", "hook_name", "architecture"):
        values = getattr(cfg, field)
        if not values:
            raise UserError(f"{flag(field)} needs at least one value")
        if len(set(values)) < len(values):
            raise UserError(f"{flag(field)} names a value twice: {_join(values)}")
    if cfg.target_hook_name in cfg.hook_name:
        raise UserError(
            f"--target-hook-name {cfg.target_hook_name} is also a --hook-name; a transcoder's "
            "target must be another hook"
        )
    if not (cfg.l1_coeffs or cfg.target_l0):
        raise UserError("give --target-l0 or --l1-coeffs: neither has a value")
    if cfg.n_tokens * cfg.n_epochs < cfg.batch_tokens:
        raise UserError(
            f"--n-tokens {cfg.n_tokens} x --n-epochs {cfg.n_epochs} do not fill one batch of "
            f"--batch-tokens {cfg.batch_tokens}; use more tokens or a smaller batch"
        )
    if not cfg.cache and cfg.buffer_tokens < cfg.batch_tokens:
        raise UserError(
            f"--buffer-tokens {cfg.buffer_tokens} hold no batch of --batch-tokens "
            f"{cfg.batch_tokens}; use a larger buffer or a smaller batch"
        )
    is_a_name = Path(cfg.name).name == cfg.name != ".."
    if not is_a_name or len(os.fsencode(cfg.name)) > MAX_NAME_BYTES:
        raise UserError(
            f"--name {cfg.name} is not possible; it must be the name of one folder, of at most "
            f"{MAX_NAME_BYTES} bytes"
        )
    for package in ("tensorboard", "wandb"):
        if getattr(cfg, package) and importlib.util.find_spec(package) is None:
            raise UserError(f"--{package} needs its package: pip install {package}")
    if cfg.resume and cfg.overwrite:
        raise UserError("--resume and --overwrite contradict each other; give one")
    return cfg


PRESETS: dict[str, RunConfig] = {
    # about two minutes of work on two CPU cores; with BOS first the attention sink is no word
    "demo": RunConfig(bos="always"),
    # an evening on a laptop
    "offline": RunConfig(
        preset="offline",
        bos="always",
        n_tokens=5_000_000,
        batch_tokens=2048,
        lr=1e-3,
        n_resamples=4,
        n_tokens_eval=200_000,
        n_tokens_ce=20_000,
        log_every=100,
    ),
    # a CUDA box that reaches the hub
    "pythia-70m": RunConfig(
        preset="pythia-70m",
        lm="EleutherAI/pythia-70m-deduped",
        hook_name=("blocks.3.hook_resid_post",),
        text="Elriggs/openwebtext-100k",
        context_length=256,
        target_l0=(20.0, 40.0, 80.0),
        n_tokens=50_000_000,
        batch_tokens=8192,
        lr=1e-3,
        n_resamples=4,
        n_tokens_eval=1_000_000,
        n_tokens_ce=200_000,
        log_every=100,
        checkpoint_every=2000,
    ),
}


def parse_config(arguments: Sequence[str]) -> RunConfig:
    """The configuration of a command line: a preset's values, overridden flag by flag."""
    default = PRESETS[_preset_name(arguments)]
    return validate(
        read_settings(RunConfig, arguments, prog="easy_training_base.py", default=default)
    )


def _preset_name(arguments: Sequence[str]) -> str:
    name = "demo"
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.removeprefix("--preset=")
    if name not in PRESETS:
        raise UserError(f"--preset {name} is unknown; it must be one of: {', '.join(PRESETS)}")
    return name


def read_config() -> RunConfig:
    """The command line's configuration; in a notebook, that of the variable SPARSE_CODING_ARGS."""
    if "ipykernel" in sys.modules:
        return parse_config(shlex.split(os.environ.get("SPARSE_CODING_ARGS", "")))
    return parse_config(sys.argv[1:])


def as_json(cfg: Any) -> dict[str, Any]:
    """A dataclass as JSON values: tuples become lists, paths strings and secrets ***."""
    return {key: _json_value(value) for key, value in dataclasses.asdict(cfg).items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_json_value(part) for part in value]
    return without_secrets(str(value)) if isinstance(value, str | Path) else value


PACKAGES = ("torch", "transformer-lens", "transformers", "datasets", "numpy", "numba")


def environment(device: str) -> dict[str, Any]:
    """What a result was made with: device, versions, git commit, date (UTC)."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": device,
        "machine": platform.machine(),
        "n_cpus": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_commit() -> str | None:
    """The checkout's commit, with `+changes` if files differ from it; None outside a checkout."""
    root = Path(__file__).parents[1]

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", root, *command], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+changes" if git("status", "--porcelain") else "")

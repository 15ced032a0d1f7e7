"""SAEs that a run's own are compared with: untrained, with a frozen decoder, on another model.

They are trained on the run's activations (cached, or harvested again) with the run's settings and
seeds, and kept in RUN/controls/saes/KIND/NAME, where a later program finds them; RUN/controls can
be measured like a run. No measurement happens here.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from analysis.program import SourceConfig
from analysis.subjects import Material, Origin, Subject
from sparse_coding.baselines import frozen_decoder
from sparse_coding.cache import ActivationCache, CachedActivations, open_cache
from sparse_coding.config import RunConfig
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.formats.saelens import load_saelens, save_saelens
from sparse_coding.harvest import Rows, harvest_to_cache
from sparse_coding.hook_sources import AlignedSources, take_sample
from sparse_coding.ladder import SAESpec
from sparse_coding.runs import cache_settings
from sparse_coding.sae import ARCHITECTURES, SAE, UntiedSAE
from sparse_coding.storage import read_object
from sparse_coding.training import Lane, Trainer, training_config

SAMPLE_TOKENS = 8192  # as in easy_training_base.py: the start and the scale depend on it
UNTRAINED, FROZEN = "untrained", "frozen_decoder"
RETRAINED = "sae"  # the SAEs themselves, trained again: what other activations make of them
Settings = TypeVar("Settings", bound=SourceConfig)


def run_of(cfg: SourceConfig, subjects: Sequence[Subject]) -> Path | None:
    """The run whose settings and activations controls are of; None if there is no such run."""
    is_moved = any(getattr(cfg, field.name, None) for field in dataclasses.fields(Origin))
    return None if is_moved else subjects[0].run


def without_trained(cfg: Settings, subjects: Sequence[Subject]) -> Settings:
    """The settings; without a run, those without what only a run can train, which is printed."""
    if run_of(cfg, subjects) is not None:
        return cfg
    lost = [name for name in cfg.families if name in (UNTRAINED, FROZEN)]
    changes = {"families": tuple(name for name in cfg.families if name not in lost)}
    if hasattr(cfg, "random_lms"):
        lost += [f"the model with {how} weights" for how in cfg.random_lms]
        changes["random_lms"] = ()
    if lost:
        print(f"left out, for only a run knows how to train them: {', '.join(lost)}")
    return dataclasses.replace(cfg, **changes)


def run_config(run: Path | None, origin: Origin) -> RunConfig:
    """The configuration that a run was started with, for one of its hooks' origins.

    Without a run: how one would harvest the origin's activations.
    """
    if run is None:
        return RunConfig(**dataclasses.asdict(origin) | {
            "hook_name": (origin.hook_name,), "target_hook_name": None,
        })  # fmt: skip
    saved = read_object(run / "config.json", "config")["config"]
    fields = {field.name for field in dataclasses.fields(RunConfig)} & saved.keys()
    values = {
        name: tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
        for name in fields - {"lm", "text", "output"}
    }
    return RunConfig(**values, lm=origin.lm, text=origin.text, output=run.resolve().parents[1])


class TrainingActivations:
    """A run's training activations of one hook in the run's order, or another model's in theirs.

    Cached ones are used if there are any; else `n_tokens` of them are harvested (0: as many as the
    run's). No more than `n_tokens` are handed out.
    """

    def __init__(self, cfg: RunConfig, material: Material, n_tokens: int = 0) -> None:
        if n_tokens and n_tokens < cfg.batch_tokens:
            raise UserError(
                f"--n-tokens-train {n_tokens} is less than one batch of the run; give "
                f"{cfg.batch_tokens} or more, or 0 for as many as the run's"
            )
        self.cfg, self.material = cfg, material
        self.hook_name = material.origin.hook_name
        self.cache = _cache(cfg, material, n_tokens)
        # The limit that the cache was made with holds for what is measured, too.
        material.training_rows.max_norms = self.cache.extra["max_norms"]
        whole = self.source().n_batches
        self.n_steps = min(whole, n_tokens // cfg.batch_tokens) if n_tokens else whole

    @property
    def n_tokens(self) -> int:
        """Activations in all batches, over all epochs."""
        return self.n_steps * self.cfg.batch_tokens

    def source(self) -> CachedActivations:
        cfg = self.cfg
        return CachedActivations(
            self.cache, self.hook_name, cfg.batch_tokens, cfg.data_seed, cfg.n_epochs,
            self.material.lm.device,
        )  # fmt: skip

    def batches(self) -> itertools.islice:
        """All batches, from the first."""
        return itertools.islice(self.source(), self.n_steps)

    def sample(self, n_tokens: int = SAMPLE_TOKENS) -> Float[Tensor, "n d_in"]:
        """About `n_tokens` rows of the first batches."""
        return take_sample(AlignedSources({"x": self.source()}), n_tokens)["x"]


def _cache(cfg: RunConfig, material: Material, n_tokens: int) -> ActivationCache:
    root = cfg.output / "cache"
    identity, text = material.lm.identity, material.text.fingerprint_fields()
    settings = cache_settings(cfg, identity, text)
    if n_tokens and open_cache(root, settings) is None:
        cfg = dataclasses.replace(cfg, n_tokens=min(n_tokens, cfg.n_tokens))
        settings = cache_settings(cfg, identity, text)
    rows = Rows(material.lm, partial(material.token_batches, "train"), cfg.hook_name)
    return harvest_to_cache(rows, root, settings, cfg.n_tokens, cfg.cache_dtype)


class FrozenDecoderTrainer(Trainer):
    """Trains the same SAEs from the same start, but for their decoders."""

    def _make_lane(self, prefix: str, spec: SAESpec, sample: Float[Tensor, "n d_in"]) -> Lane:
        lane = super()._make_lane(prefix, spec, sample)
        return Lane(lane.name, spec, frozen_decoder(lane.sae), self.cfg)


def controls(
    kind: str,
    run: Path,
    subjects: Sequence[Subject],
    activations: TrainingActivations,
) -> dict[str, Dictionary]:
    """One kind of control by the names of the SAEs they belong to: loaded, else trained.

    `UNTRAINED`: as initialised. `FROZEN`: only the encoder learns; a tied SAE has none of its own
    and is left out. `RETRAINED`: the same from the start, on these activations.
    """
    origin = activations.material.origin
    folders = {
        subject.name: run / "controls/saes" / _folder(kind, subject.origin, origin) / subject.name
        for subject in subjects
        if kind != FROZEN or _can_freeze(subject)
    }
    facts = {"control": kind, "n_tokens_given": activations.n_tokens}
    if not all(_holds(folder, facts) for folder in folders.values()):
        specs = [_spec(subject) for subject in subjects if subject.name in folders]
        saes, trained = _train(kind, specs, activations)
        (run / "controls").mkdir(exist_ok=True)
        shutil.copy(run / "config.json", run / "controls" / "config.json")
        for folder, spec in zip(folders.values(), specs, strict=True):
            metadata = _metadata(origin) | trained[spec.name] | facts
            save_saelens(saes[spec.name], folder, metadata=metadata, overwrite=True)
    device = activations.material.lm.device
    return {
        name: load_saelens(folder, device).float().requires_grad_(False)
        for name, folder in folders.items()
    }


def _folder(kind: str, own: Origin, origin: Origin) -> str:
    return kind if own.lm == origin.lm else f"{kind}@{origin.lm.rpartition('@')[2]}"


def _can_freeze(subject: Subject) -> bool:
    return issubclass(ARCHITECTURES[subject.facts["architecture"]], UntiedSAE)


def _holds(folder: Path, facts: dict[str, int | str]) -> bool:
    if not (folder / "cfg.json").is_file():
        return False
    metadata = read_object(folder / "cfg.json", "metadata")["metadata"]
    return all(metadata.get(key) == value for key, value in facts.items())


def _spec(subject: Subject) -> SAESpec:
    facts = subject.facts
    target = facts.get("target_l0")
    l1_coeff = facts["l1_coeff"] if target is None else None
    return SAESpec(facts["architecture"], facts["ratio"], l1_coeff, target, facts["seed"])


def _train(
    kind: str, specs: list[SAESpec], activations: TrainingActivations
) -> tuple[dict[str, SAE], dict[str, dict]]:
    """The SAEs by their specs' names, and what is known of their training."""
    training = training_config(activations.cfg, activations.n_steps)
    cls = FrozenDecoderTrainer if kind == FROZEN else Trainer
    trainer = cls(specs, training, activations.sample())
    if kind != UNTRAINED:
        steps = activations.batches()
        for x in tqdm(steps, desc=f"training {kind}", total=activations.n_steps, unit="step"):
            trainer.step(x)
    return trainer.finished_saes(), trainer.facts()


def _metadata(origin: Origin) -> dict[str, str | int | bool]:
    metadata: dict[str, str | int | bool] = {
        "model_name": origin.lm,
        "hook_name": origin.hook_name,
        "context_size": origin.context_length,
        "dataset_path": origin.text,
    }
    if origin.bos != "auto":
        metadata["prepend_bos"] = origin.bos == "always"
    return metadata

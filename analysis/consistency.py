"""What makes two dictionaries learn the same features? The study, from nothing, in one command.

    python -m analysis.consistency
    python -m analysis.consistency --lm EleutherAI/pythia-70m-deduped --layers 1 3 5 \\
        --other-lms EleutherAI/pythia-70m EleutherAI/pythia-160m --text Elriggs/openwebtext-100k

Trains the SAEs that are missing (easy_training_base.py; a finished run is never trained again) and
compares them as analysis.compare_dictionaries does, in 24 minutes on two CPU cores, under these
conditions:

- seed: SAEs that differ in the seed of their initial weights alone, at each ratio;
- ratio: of each feature of one ratio the most similar one of another ratio, and of another seed,
  because SAEs of one seed begin with the same directions;
- layer: two layers of the language model; beside it each layer with itself;
- model: two language models; beside it each with itself;
- random: the language model with random weights, with itself and with the trained one: how much
  of the consistency is the text's and the architecture's, not the training's.

Seeds are compared in a ring (0 with 1, 1 with 2, ..., the last with 0), so every SAE stands once
on either side. A condition's interval is Student's t over these pairs; neighbouring pairs share an
SAE, so it is somewhat too narrow. Writes results/consistency.json with a row per pair (`what` is
"pair") and a row per condition ("condition").
"""

import itertools
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from analysis.program import (
    MeasureConfig,
    Row,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.settings import Count, CountOrZero, OutputFolder, Positive, Range, Ratio, flag

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config(MeasureConfig):
    """What is trained and compared."""

    lm: str = "smollm2-135m"
    """The language model whose ratios, seeds and layers are studied."""
    layers: tuple[CountOrZero, ...] = (12, 6, 18, 24)
    """Blocks whose output (hook_resid_post) is studied; ratios are compared at the first."""
    ratios: tuple[Ratio, ...] = (1, 2, 4, 8, 16, 32)
    """Dictionary sizes as multiples of the width, compared at the first layer."""
    ratio: Ratio = 4
    """The ratio that layers and models are compared at."""
    seeds: Annotated[int, Range(2)] = 3
    """SAEs per condition, two or more."""
    other_lms: tuple[str, ...] = ("tiny-a", "tiny-b")
    """Language models that are compared with each other and with the first, at the same depth."""
    target_l0: Positive = 30.0
    """Mean active features per token of every SAE."""
    n_tokens_train: Count = 300_000
    """Activations that each SAE learns from."""
    n_tokens: Count = 100_000
    """Held-out tokens that every SAE encodes for the comparison, or all there are."""
    min_firings: Count = 10
    """A feature takes part if it is active on as many tokens of either half of the documents."""
    runs: OutputFolder = Path("outputs")
    """Holds runs/consistency_*, the trained SAEs."""


@dataclass(frozen=True)
class Training:
    """One run of easy_training_base.py that the study needs."""

    lm: str
    layers: tuple[int, ...]
    ratios: tuple[int, ...]

    @property
    def name(self) -> str:
        """The run's, e.g. consistency_tiny-a_L2_x4."""
        lm = self.lm.rstrip("/").rsplit("/", 1)[-1].replace("@", "-")
        layers, ratios = ("+".join(map(str, x)) for x in (self.layers, self.ratios))
        return f"consistency_{lm}_L{layers}_x{ratios}"


TABLE = {
    "condition": "{}",
    "a": "{}",
    "b": "{}",
    "decoder_cosine": "{:.2f}",
    "decoder_cosine_null": "{:.2f}",
    "decoder_above_0.7": "{:.0%}",
    "correlation": "{:.2f}",
    "correlation_null": "{:.2f}",
    "correlation_above_0.7": "{:.0%}",
    "n_pairs": "{}",
}


def main(cfg: Config) -> None:
    """Train what is missing, compare, print, write."""

    from sparse_coding.errors import UserError

    if not cfg.layers or not cfg.ratios:
        raise UserError("--layers and --ratios need at least one value each")
    check(cfg)
    path = results_path(cfg, "consistency", [])
    depths = relative_layers(cfg)
    trainings = plan(cfg, depths)
    for training in trainings:
        train(training, cfg)
    pairs = compare_all([str(cfg.runs / "runs" / t.name) for t in trainings], depths, cfg)
    summary = summarise(pairs)
    first = pairs[0]
    print_table(
        "Of each feature of a, the most similar of b",
        summary,
        TABLE,
        f"{cfg.n_tokens_train:,} training tokens, L0 {cfg.target_l0:g}; means over pairs of SAEs "
        f"of {cfg.seeds} seeds with t intervals; correlations on {first['n_tokens_correlation']:,}"
        f" held-out tokens of {first['n_documents_correlation']} documents; nothing but "
        "correlations is compared between language models",
    )
    write_results(path, cfg, summary + pairs, cfg.device)


def check(cfg: Config) -> None:
    """`UserError` about what would end a training, before the first begins."""
    from sparse_coding.errors import UserError
    from sparse_coding.models import choose_device, layer_of, size_of
    from sparse_coding.text import load_text

    for name in ("hook_name", "target_hook_name"):
        if getattr(cfg, name):
            raise UserError(
                f"{flag(name)} {getattr(cfg, name)} is not for this study, which reads "
                "hook_resid_post of the blocks that --layers names"
            )
    choose_device(cfg.device)
    lm = size_of(cfg.lm)
    for layer in cfg.layers:
        layer_of(hook(layer), lm)
    load_text(cfg.text or "builtin", text_field=cfg.text_field or "text")


def relative_layers(cfg: Config) -> dict[str, int]:
    """Of the other language models, the layer at the depth of the first layer studied."""
    from sparse_coding.models import size_of

    share = (cfg.layers[0] + 1) / size_of(cfg.lm).n_layers
    return {
        lm: max(0, round(share * size_of(lm).n_layers) - 1) for lm in dict.fromkeys(cfg.other_lms)
    }


def plan(cfg: Config, depths: dict[str, int]) -> list[Training]:
    """The runs that hold every SAE of the study."""
    first, *others = cfg.layers
    trainings = [Training(cfg.lm, (first,), tuple(sorted({*cfg.ratios, cfg.ratio})))]
    if others:
        trainings.append(Training(cfg.lm, tuple(others), (cfg.ratio,)))
    trainings.append(Training(f"{cfg.lm}@random", (first,), (cfg.ratio,)))
    return trainings + [Training(lm, (layer,), (cfg.ratio,)) for lm, layer in depths.items()]


def train(training: Training, cfg: Config) -> None:
    """Run easy_training_base.py unless the run is finished; an interrupted one goes on."""
    from sparse_coding.errors import UserError

    folder = cfg.runs / "runs" / training.name
    settings: dict[str, Any] = {
        "lm": training.lm,
        "hook_name": [hook(layer) for layer in training.layers],
        "ratios": training.ratios,
        "seed": range(cfg.seeds),
        "target_l0": [cfg.target_l0],
        "n_tokens": [cfg.n_tokens_train],
        "n_tokens_eval": [8_000],
        "n_tokens_ce": [1_000],
        "name": [training.name],
        "output": [cfg.runs],
        "device": [cfg.device],
    }
    given = ("text", "text_field", "context_length", "bos", "heldout_fraction", "dtype")
    settings |= {key: [getattr(cfg, key)] for key in given if getattr(cfg, key)}
    words = [sys.executable, str(ROOT / "easy_training_base.py")]
    for key, values in settings.items():
        values = [values] if isinstance(values, str) else values
        words += [flag(key), *map(str, values)]
    if (folder / "summary.json").is_file():
        _check_finished(folder, cfg, training)
        return
    if (folder / "checkpoints").is_dir():
        words.append("--resume")
    print(shlex.join(words[1:]), flush=True)
    if subprocess.run(words).returncode:
        raise UserError(f"the training of {folder} failed, see above; nothing was compared")


def _check_finished(folder: Path, cfg: Config, training: Training) -> None:
    """`UserError` unless the finished run was made with this study's settings."""
    from sparse_coding.errors import UserError
    from sparse_coding.storage import read_object

    found = read_object(folder / "config.json", "config")["config"]
    wanted = {
        "n_tokens": cfg.n_tokens_train,
        "target_l0": [cfg.target_l0],
        "seed": list(range(cfg.seeds)),
        "text": cfg.text or found.get("text"),
    }
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{folder} was trained with {key} {found.get(key)}, but {value} is asked for; "
                "give another --runs or remove that run"
            )


def hook(layer: int) -> str:
    """The residual stream after a block."""
    return f"blocks.{layer}.hook_resid_post"


class Kind(NamedTuple):
    """SAEs that differ in their seed alone."""

    lm: str
    hook_name: str
    ratio: int


class Condition(NamedTuple):
    """Two kinds of SAEs that are compared, and what they are called in the table."""

    name: str
    a: Kind
    b: Kind
    label_a: str
    label_b: str


def conditions(cfg: Config, depths: dict[str, int]) -> Iterator[Condition]:
    """Every comparison of the study, each kind with itself before it meets others."""
    first = hook(cfg.layers[0])
    groups = {
        "ratio": {f"ratio {r}": Kind(cfg.lm, first, r) for r in cfg.ratios},
        "layer": {f"layer {i}": Kind(cfg.lm, hook(i), cfg.ratio) for i in sorted(cfg.layers)},
        "model": {
            cfg.lm: Kind(cfg.lm, first, cfg.ratio),
            **{lm: Kind(lm, hook(layer), cfg.ratio) for lm, layer in depths.items()},
        },
        "random": {
            cfg.lm: Kind(cfg.lm, first, cfg.ratio),
            f"{cfg.lm}@random": Kind(f"{cfg.lm}@random", first, cfg.ratio),
        },
    }
    seen = set()
    for name, kinds in groups.items():
        for label, kind in kinds.items():
            if kind not in seen:
                yield Condition("seed", kind, kind, label, label)
            seen.add(kind)
        for (label_a, a), (label_b, b) in itertools.combinations(kinds.items(), 2):
            yield Condition(name, a, b, label_a, label_b)


def compare_all(folders: list[str], depths: dict[str, int], cfg: Config) -> list[Row]:
    """A row for each pair of SAEs of each condition, in both directions unless it is a seed's."""
    from tqdm import tqdm

    from analysis.similarity import compare, load_sides
    from analysis.subjects import load_subjects

    subjects = load_subjects(folders, MeasureConfig(device=cfg.device))
    sides = {}
    for one in load_sides(subjects, cfg.n_tokens, cfg.min_firings, cfg.device):
        origin, facts = one.subject.origin, one.subject.facts
        kind = Kind(origin.lm, origin.hook_name, facts["ratio"])
        sides[kind, facts["seed"]] = one
    rows = []
    everything = list(itertools.product(conditions(cfg, depths), range(cfg.seeds)))
    for condition, seed in tqdm(everything, desc="comparing", unit="pair"):
        a, b = sides[condition.a, seed], sides[condition.b, (seed + 1) % cfg.seeds]
        there, back = compare(a, b, one_to_one=condition.a == condition.b)
        names = {"what": "pair", "condition": condition.name}
        rows.append(names | {"label_a": condition.label_a, "label_b": condition.label_b} | there)
        if condition.a != condition.b:
            rows.append(
                names | {"label_a": condition.label_b, "label_b": condition.label_a} | back
            )
    return rows


SHARED = (
    "lm_a", "hook_name_a", "ratio_a", "lm_b", "hook_name_b", "ratio_b", "n_tokens",
    "n_tokens_correlation", "n_documents_correlation",
)  # fmt: skip
QUANTITIES = (
    "decoder_cosine", "decoder_cosine_null", "decoder_cosine_null_covariance",
    "decoder_above_0.7", "decoder_above_0.9", "encoder_cosine", "encoder_cosine_null",
    "one_to_one_cosine", "one_to_one_cosine_null", "correlation", "correlation_null",
    "correlation_in_sample", "correlation_null_in_sample", "correlation_above_0.7",
    "correlation_above_0.9", "n_features_a",
)  # fmt: skip


def summarise(pairs: list[Row]) -> list[Row]:
    """One row per condition and direction: means over its pairs with their t intervals."""
    from sparse_coding.metrics import columns, t_interval

    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in pairs:
        key = (row["condition"], row["label_a"], row["label_b"])
        groups.setdefault(key, []).append(row)
    summary = []
    for (condition, a, b), rows in groups.items():
        row: Row = {"what": "condition", "condition": condition, "a": a, "b": b}
        row |= {"n_pairs": len(rows)} | {key: rows[0][key] for key in SHARED}
        for key in QUANTITIES:
            values = [one[key] for one in rows if one.get(key) is not None]
            if len(values) == len(rows):
                row |= columns(key, t_interval(values))
        summary.append(row)
    return summary


if __name__ == "__main__":
    run_program(Config, main)

"""What `interpret_units` measures: the text as units see it, families of units, their scores.

Rules, contexts, intruders and the judge are in `sparse_coding`; here they meet a language model.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from analysis.held_rows import Held, drawn_contexts, kept_activations, make_held
from analysis.program import Row
from analysis.subjects import Material
from analysis.units import choose_units
from sparse_coding.baselines import neuron_basis, random_directions
from sparse_coding.context_clusters import Chance, Clusters, chance, context_clusters
from sparse_coding.descriptions import (
    Description,
    Detection,
    Natural,
    detect,
    find_description,
    natural,
    rule_holds,
    scores,
)
from sparse_coding.dictionary import Dictionary
from sparse_coding.evaluation import take_tokens
from sparse_coding.examples import (
    FIRING,
    KINDS,
    RANDOM,
    Examples,
    Pool,
    contexts_of,
    draw_examples,
    make_pool,
    quiet,
    spread,
)
from sparse_coding.intruders import TextEmbedding, Trial, draw_trials, guesses
from sparse_coding.judge import Shown
from sparse_coding.metrics import Interval, interval
from sparse_coding.polysemanticity import eligible
from sparse_coding.runs import check_memory
from sparse_coding.text import TokenBatch
from sparse_coding.unit_activity import unit_activations

MIN_TOKENS, MIN_GROUPS = 20, 10  # firings in each half below which a unit is not judged
N_EMBEDDED, N_POOL = (
    4000,
    2000,
)  # contexts that the embedding is fitted to, that near misses are of
SILENT = tuple(kind for kind in KINDS if kind != FIRING)
INTRUDERS = ("random", "same_token")
MIN_CLUSTERED, N_CHANCE = 20, 8  # contexts of a unit; draws of as many random ones

Key = TypeVar("Key", int, str)


# --- the units ---------------------------------------------------------------------------------


class Family(NamedTuple):
    """Units of one dictionary on all rows; those of two families are paired in their order."""

    name: str
    unit: Int[np.ndarray, " units"]
    values: Float[np.ndarray, "rows units"]
    threshold: Float[np.ndarray, " units"]
    """inf: the partner does not fire."""

    def fires(self, i: int) -> Bool[np.ndarray, " rows"]:
        return self.values[:, i] > self.threshold[i]


def encode(
    material: Material, batches: Sequence[TokenBatch],
    asked: dict[str, tuple[Dictionary, Int[Tensor, " units"]]],
) -> tuple[dict[str, Float[np.ndarray, "rows units"]], Int[np.ndarray, " rows"]]:  # fmt: skip
    """Activations of the units that are asked for, and the position of each row."""
    n_units = sum(len(units) for _, units in asked.values())
    n_rows = sum(int(batch.valid.sum()) for batch in batches)
    advice = "ask for fewer --n-tokens or --n-units"
    check_memory(8 * n_rows * n_units, torch.device("cpu"), "the units' activations", advice)
    found: dict[str, list[Tensor]] = {name: [] for name in asked}
    position = []
    for x, places in kept_activations(material, batches):
        for name, (dictionary, units) in asked.items():
            found[name] += unit_activations(dictionary, x, units)
        position.append(places)
    values = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    return values, np.concatenate(position)


def read(
    material: Material, asked: dict[str, tuple[Dictionary, Int[Tensor, " units"]]],
    n_tokens: int, n_draws: int, seed: int,
) -> tuple[Held, dict[str, Float[np.ndarray, "rows units"]]]:  # fmt: skip
    """Held-out rows and what the units that are asked for do there."""
    batches, place = drawn_contexts(material, n_tokens, seed)
    values, position = encode(material, batches, asked)
    return make_held(material, batches, place, position, n_draws, seed), values


def controls(
    names: Sequence[str],
    mean: Float[Tensor, " d_in"],
    n_units: int,
    seed: int,
    device: torch.device,
) -> dict[str, tuple[Dictionary, Int[Tensor, " units"]]]:
    """As many units of each control as of each dictionary."""
    found: dict[str, tuple[Dictionary, Int[Tensor, " units"]]] = {}
    if "neuron_basis" in names:
        axes = neuron_basis(mean).to(device)
        found["neuron_basis"] = axes, choose_units(axes.d_sae, n_units, seed)
    if "random_directions" in names:
        generator = torch.Generator().manual_seed(seed)
        drawn = random_directions(mean, n_units, generator).to(device)
        found["random_directions"] = drawn, torch.arange(n_units)
    return found


def matched(
    sae: Family, name: str, unit: Int[np.ndarray, " units"],
    values: Float[np.ndarray, "rows units"], is_finding: Bool[np.ndarray, " rows"],
) -> Family:  # fmt: skip
    """Units that fire as often as their partners do, on the rows for finding."""
    n = [int(sae.fires(i)[is_finding].sum()) for i in range(len(sae.unit))]
    columns = values[is_finding].T[: len(n)]
    found = [threshold_leaving(fired, own) for fired, own in zip(n, columns, strict=False)]
    rest = [math.inf] * (len(unit) - len(found))
    return Family(name, unit, values, np.array(found + rest, dtype=np.float32))


def threshold_leaving(n: int, values: Float[np.ndarray, " rows"]) -> float:
    """The value that about n of `values` are above, as nearly as equal ones allow; inf for 0.

    Neurons of a model in bfloat16 have few different values: exactly n may be impossible.
    """
    if n == 0:
        return math.inf
    levels, counts = np.unique(np.maximum(values, 0), return_counts=True)
    n_above = counts.sum() - counts.cumsum()
    return float(levels[np.abs(n_above - n).argmin()])


def judged(family: Family, held: Held) -> list[int]:
    """Units that fire often enough in both halves."""
    group, n_groups = held.stream.group, held.weights.shape[1]
    found = np.ones(len(family.unit), dtype=bool)
    for half in (held.is_finding, ~held.is_finding):
        active = [
            np.bincount(group[half & family.fires(i)], minlength=n_groups)
            for i in range(len(family.unit))
        ]
        counts = torch.from_numpy(np.stack(active, axis=1)).float()
        found &= eligible(counts, MIN_TOKENS, MIN_GROUPS).numpy()
    return np.flatnonzero(found).tolist()


# --- one unit ----------------------------------------------------------------------------------


class Tools(NamedTuple):
    """What every unit of one origin is measured with."""

    held: Held
    embed: TextEmbedding
    pools: dict[bool, Pool]
    """Near misses of the finding half (True) and of the scoring half."""

    @property
    def size(self) -> Row:
        """How much text is measured."""
        held = self.held
        half = ~held.is_finding
        return {
            "n_tokens_find": int(held.is_finding.sum()),
            "n_tokens_eval": int(half.sum()),
            "n_groups_find": len(np.unique(held.stream.group[held.is_finding])),
            "n_groups_eval": len(np.unique(held.stream.group[half])),
        }


def make_tools(material: Material, held: Held, seed: int) -> Tools:
    """The embedding is fitted to contexts of training documents."""
    generator = np.random.default_rng(seed)
    embed = TextEmbedding(list(training_texts(material)), seed)
    pools = {
        half: make_pool(
            held.stream, np.flatnonzero(held.is_finding == half), N_POOL, embed, generator
        )
        for half in (True, False)
    }
    return Tools(held, embed, pools)


def training_texts(material: Material, width: int = 33) -> Iterator[str]:
    """Texts of as many tokens as a context, from training documents."""
    n = 0
    for batch in take_tokens(material.token_batches("train"), N_EMBEDDED * width):
        for row in batch.tokens:
            for part in row.split(width):
                n += 1
                if n <= N_EMBEDDED:
                    yield material.lm.tokenizer.decode(part.tolist())


class Found(NamedTuple):
    """One unit: what it was found to fire on, and the contexts of the scoring half."""

    index: int
    """In its family."""
    finding: Examples
    scoring: Examples
    description: Description


def find(tools: Tools, family: Family, i: int, n_contexts: int, seed: int) -> Found:
    """Draw contexts of both halves and describe the unit from those of the finding half."""
    held, generator = tools.held, np.random.default_rng([seed, i])
    fires, values = family.fires(i), family.values[:, i]
    drawn = {
        half: draw_examples(
            held.stream, values, fires, held.is_finding == half, tools.pools[half], n_contexts,
            tools.embed, generator,
        )
        for half in (True, False)
    }  # fmt: skip
    finding = drawn[True]
    description = find_description(held.evidence.take(finding.row), finding.kind)
    return Found(i, finding, drawn[False], description)


def detections(held: Held, examples: Examples, description: Description) -> dict[str, Detection]:
    """Scores against each kind of silent contexts of which there are any."""
    shown = {kind: examples.against(kind) for kind in SILENT if examples.of(kind).any()}
    return _detected(held, examples, description, shown)


def decile_detections(
    held: Held, examples: Examples, description: Description
) -> dict[int, Detection]:
    """Scores of the firing contexts of one decile against random ones; 0 is the weakest decile."""
    random = examples.of(RANDOM)
    deciles = np.unique(examples.decile[examples.of(FIRING)]).tolist()
    shown = {decile: random | (examples.decile == decile) for decile in deciles}
    return _detected(held, examples, description, shown)


def _detected(
    held: Held, examples: Examples, description: Description,
    shown: dict[Key, Bool[np.ndarray, " n"]],
) -> dict[Key, Detection]:  # fmt: skip
    score = scores(description, held.evidence.take(examples.row))
    firing, group = examples.of(FIRING), held.stream.group[examples.row]
    return {
        key: detect(score[some], firing[some], held.weights[:, group[some]])
        for key, some in shown.items()
    }


def at_natural_rate(held: Held, family: Family, found: Found) -> Natural:
    """Of the description on every row of the scoring half."""
    rows = np.flatnonzero(~held.is_finding)
    evidence = held.evidence.take(rows)
    holds = np.zeros(len(rows), dtype=bool)
    for rule in found.description.rules:
        holds |= rule_holds(rule, evidence)
    fires = family.fires(found.index)[rows]
    return natural(holds, fires, held.stream.group[rows], held.weights)


class Guessed(NamedTuple):
    """Trials of one unit with one kind of intruder."""

    trials: list[Trial]
    is_right: dict[bool, Bool[np.ndarray, " trials"]]
    """With the tokens it fires on hidden (True), or shown."""


def intrusions(tools: Tools, family: Family, i: int, n: int, seed: int) -> dict[str, Guessed]:
    """Trials of one unit on both halves: nothing about it was fitted."""
    stream, generator = tools.held.stream, np.random.default_rng([seed, i])
    fires = family.fires(i)
    is_quiet = quiet(stream, fires)
    found = {}
    for intruder in INTRUDERS:
        trials = draw_trials(
            stream, family.values[:, i], fires, is_quiet, n, intruder == "same_token", generator
        )
        is_right = {mask: np.zeros(len(trials), dtype=bool) for mask in (False, True)}
        if trials:
            shown = contexts_of(stream, np.concatenate([trial.rows for trial in trials]))
            answers = np.array([trial.answer for trial in trials])
            for mask in is_right:
                texts = [one.masked if mask else one.text for one in shown]
                vectors = tools.embed(texts).astype(np.float64)
                is_right[mask] = guesses(vectors.reshape(len(trials), -1, vectors.shape[1])) == (
                    answers
                )
        found[intruder] = Guessed(trials, is_right)
    return found


class Groups:
    """Whether a unit's contexts fall into groups; the tokens that it fires on are hidden.

    Random contexts, of both halves as the unit's own, are drawn once for each number of them.
    """

    def __init__(self, tools: Tools, n: int, seed: int) -> None:
        self.tools, self.n, self.seed = tools, n, seed
        self.chances: dict[int, Chance] = {}

    def of(self, family: Family, i: int) -> Clusters | None:
        """At most one context of a document or file; None for fewer than `MIN_CLUSTERED`."""
        stream, generator = self.tools.held.stream, np.random.default_rng([self.seed, i])
        rows = spread(np.flatnonzero(family.fires(i)), stream.group, self.n, generator)
        if len(rows) < MIN_CLUSTERED:
            return None
        return context_clusters(self.vectors(rows), self.chance(len(rows)), self.seed)

    def chance(self, n: int) -> Chance:
        if n not in self.chances:
            stream, generator = self.tools.held.stream, np.random.default_rng([self.seed, n])
            every = np.arange(len(stream.group))
            random = [spread(every, stream.group, n, generator) for _ in range(N_CHANCE)]
            self.chances[n] = chance([self.vectors(rows) for rows in random], self.seed)
        return self.chances[n]

    def vectors(self, rows: Int[np.ndarray, " contexts"]) -> Float[np.ndarray, "contexts d"]:
        shown = contexts_of(self.tools.held.stream, rows)
        return self.tools.embed([one.masked for one in shown])


def shown_contexts(
    held: Held, family: Family, i: int, rows: Int[np.ndarray, " contexts"]
) -> list[Shown]:
    """Contexts with the unit's activations, 0 where it is silent or the token is not seen."""
    fires, values = family.fires(i), family.values[:, i]
    found = []
    for context in contexts_of(held.stream, rows):
        seen = context.rows
        active = np.where((seen >= 0) & fires[seen], values[seen], 0.0)
        found.append(Shown(context.pieces, active, context.centre))
    return found


def estimate(draws: Float64[Tensor, " draws"]) -> Interval:
    """Estimate and interval of the draws that are defined; nan if the estimate is not."""
    known = draws[draws.isfinite()]
    if not draws[0].isfinite() or len(known) < 2:
        return Interval(math.nan, math.nan, math.nan)
    return interval(known)

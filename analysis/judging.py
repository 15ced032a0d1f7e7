"""What `interpret_units` asks a judge about units, and what becomes of the answers.

Silent contexts are silent throughout here: the judge is asked about texts, not about one token.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int
from torch import Tensor

from analysis.held_rows import Held
from analysis.interpret_units import PROTOCOLS, Config
from analysis.interpretation import Family, Found, Tools, estimate, shown_contexts
from analysis.program import Row
from sparse_coding.descriptions import detect, in_words
from sparse_coding.examples import FIRING, quiet, spread
from sparse_coding.intruders import draw_trials
from sparse_coding.judge import (
    Judge,
    Shown,
    classify,
    correlation,
    explain,
    find_intruder,
    simulate,
    with_marks_of,
)
from sparse_coding.metrics import columns, share_interval

N_EXPLAINED = 10  # firing contexts that an explanation is made of


class Asked(NamedTuple):
    """Contexts of the scoring half that one unit's descriptions are tried on."""

    rows: Int[np.ndarray, " contexts"]
    shown: list[Shown]
    firing: Bool[np.ndarray, " contexts"]
    weights: Float64[Tensor, "draws contexts"]


def judge_rows(
    cfg: Config, judge: Judge, tools: Tools, family: Family, found: Sequence[Found]
) -> Iterator[Row]:
    """One row for each unit, protocol and description."""
    held = tools.held
    for one in found[: cfg.judge_units]:
        # one for each purpose: leaving a protocol out must not change what others ask
        generators = np.random.default_rng([cfg.seed, one.index]).spawn(6)
        is_quiet = quiet(held.stream, family.fires(one.index))
        asked = contexts_to_ask(held, family, one, is_quiet, cfg.judge_contexts, generators[4])
        descriptions = {
            "judge": explanation(judge, held, family, one, generators[5]),
            "rules": in_words(one.description, held.evidence),
        }
        facts = {"what": "judge", "family": family.name, "unit": int(family.unit[one.index])}
        for protocol in cfg.judge_protocols:
            generator = generators[PROTOCOLS.index(protocol)]
            if protocol == "intruder":
                yield (
                    facts
                    | {"protocol": protocol}
                    | intruder_row(cfg, judge, tools, family, one, is_quiet, generator)
                )
                continue
            for described_by, words in descriptions.items():
                row = facts | {"protocol": protocol, "described_by": described_by}
                row |= {"description": words}
                if words is not None:
                    row |= score_row(judge, protocol, words, asked, generator)
                yield row


def contexts_to_ask(
    held: Held, family: Family, one: Found, is_quiet: Bool[np.ndarray, " rows"], n: int,
    generator: np.random.Generator,
) -> Asked:  # fmt: skip
    """Half firing ones, a quarter silent at random, a quarter silent with one of their tokens."""
    stream = held.stream
    firing = spread(one.scoring.row[one.scoring.of(FIRING)], stream.group, n // 2, generator)
    token = stream.token[stream.position]
    silent = is_quiet & ~held.is_finding
    same = np.flatnonzero(silent & np.isin(token, token[firing]))
    same = spread(same, stream.group, n // 4, generator)
    others = np.setdiff1d(np.flatnonzero(silent), same)
    others = spread(others, stream.group, n // 2 - len(same), generator)
    rows = np.concatenate([firing, same, others])
    weights = held.weights[:, stream.group[rows]]
    shown = shown_contexts(held, family, one.index, rows)
    return Asked(rows, shown, np.arange(len(rows)) < len(firing), weights)


def explanation(
    judge: Judge, held: Held, family: Family, one: Found, generator: np.random.Generator
) -> str | None:
    """The judge's sentence about firing contexts of the finding half, of all deciles."""
    rows = one.finding.row[one.finding.of(FIRING)]
    chosen = spread(rows, held.stream.group, N_EXPLAINED, generator)
    return explain(judge, shown_contexts(held, family, one.index, chosen))


def score_row(
    judge: Judge, protocol: str, words: str, asked: Asked, generator: np.random.Generator
) -> Row:
    """Balanced accuracy (detection, fuzzing) or correlation (simulation) of one description."""
    if protocol == "simulation":
        return simulation_row(judge, words, asked)
    texts = [one.text for one in asked.shown]
    if protocol == "fuzzing":
        texts = marked_texts(asked, generator)
    answers = classify(judge, protocol, words, texts, generator)
    known = np.array([answer is not None for answer in answers], dtype=bool)
    row: Row = {"n": int(known.sum()), "n_unparsable": int((~known).sum())}
    if not known.any():
        return row
    score = np.array([answer for answer in answers if answer is not None], dtype=np.float64)
    found = detect(score, asked.firing[known], asked.weights[:, torch.from_numpy(known)])
    for name in ("balanced_accuracy", "precision", "recall"):
        row |= columns(name, estimate(getattr(found, name)))
    return row


def marked_texts(asked: Asked, generator: np.random.Generator) -> list[str]:
    """Firing contexts with their own marks, silent ones with those of a firing one."""
    right = [one for one, fires in zip(asked.shown, asked.firing, strict=True) if fires]
    return [
        one.marked
        if fires
        else with_marks_of(one, right[int(generator.integers(len(right)))]).marked
        for one, fires in zip(asked.shown, asked.firing, strict=True)
    ]


def simulation_row(judge: Judge, words: str, asked: Asked) -> Row:
    answers = [simulate(judge, words, one.pieces) for one in asked.shown]
    known = [i for i, answer in enumerate(answers) if answer is not None]
    row: Row = {"n": len(known), "n_unparsable": len(answers) - len(known)}
    if not known:
        return row
    true = [asked.shown[i].activations.astype(np.float64) for i in known]
    r = correlation([answers[i] for i in known], true, asked.weights[:, known])
    return row | columns("correlation", estimate(r))


def intruder_row(
    cfg: Config, judge: Judge, tools: Tools, family: Family, one: Found,
    is_quiet: Bool[np.ndarray, " rows"], generator: np.random.Generator,
) -> Row:  # fmt: skip
    """Accuracy of the judge on one trial of each decile; intruders are silent at random."""
    held = tools.held
    fires, values = family.fires(one.index), family.values[:, one.index]
    trials = draw_trials(held.stream, values, fires, is_quiet, 1, False, generator)
    answers = []
    for trial in trials:
        shown = shown_contexts(held, family, one.index, trial.rows)
        other = shown[trial.answer - 1]  # any of the four; -1 is the last
        shown[trial.answer] = with_marks_of(shown[trial.answer], other)
        answers.append(find_intruder(judge, [context.marked for context in shown]))
    right = [trial.answer == answer for trial, answer in zip(trials, answers, strict=True)]
    n = sum(answer is not None for answer in answers)
    row: Row = {"n": n, "n_unparsable": len(answers) - n}
    return row | columns("accuracy", share_interval(sum(right), n))

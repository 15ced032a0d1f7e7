"""Two dictionaries side by side: cosines of directions and correlations on text, with their nulls.

Features that hardly fire have no meaning to compare: a feature takes part if it is active on
enough tokens of both halves of the held-out documents. The others are counted.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.encoded import Encoded, Places, by_reading, encode, one_text, pair_tokens
from analysis.program import Row
from analysis.subjects import Subject
from sparse_coding.consistency import (
    Codes,
    Correlation,
    bootstrap_mean,
    correlation_of_pairs,
    matched_cosine,
    max_cosine,
    random_directions,
    shift,
)
from sparse_coding.errors import UserError
from sparse_coding.metrics import columns
from sparse_coding.runs import check_memory

SHARES = (0.7, 0.9)
MAX_GROUPS = 100  # of whole documents, which the jackknife leaves out; bounds its memory
NULL_SEEDS = 1_000_003  # apart from the seeds of runs, which began with such directions too


class Side(NamedTuple):
    """The features of one dictionary that take part."""

    subject: Subject
    encoded: Encoded
    codes: Codes
    decoder: Float[Tensor, "features d_in"]
    encoder: Float[Tensor, "features d_in"] | None
    """None where the dictionary has no matrix of encoder directions."""


def load_sides(
    subjects: Sequence[Subject], n_tokens: int, min_firings: int, device: str
) -> list[Side]:
    """All dictionaries encoded on the same held-out text, language model by language model.

    `UserError` if the text differs, if nothing of a dictionary takes part, or if the largest pair
    would not fit into memory.
    """
    one_text(subjects)
    sides = []
    for group in by_reading(subjects):
        encoded = encode(group, n_tokens, device)
        sides += [side(subject, encoded, min_firings) for subject in group]
    for one in sides:
        if len(one.decoder) == 0:
            raise UserError(
                f"{one.subject.name} has no feature that fires on {min_firings} tokens of either "
                "half of the documents; give more --n-tokens or a smaller --min-firings"
            )
    needed = max(memory(a, b) for a, b in itertools.product(sides, repeat=2))
    advice = "name fewer or smaller dictionaries, or raise --min-firings"
    check_memory(needed, torch.device("cpu"), "comparing", advice)
    return sides


def side(subject: Subject, encoded: Encoded, min_firings: int) -> Side:
    """The features that are active on at least `min_firings` tokens of either half."""
    codes, dictionary = encoded.codes[subject.name], subject.dictionary
    kept = firing(codes, encoded.document, dictionary.d_sae, min_firings)
    chosen = torch.from_numpy(kept)
    W_enc = getattr(dictionary, "W_enc", None)
    return Side(
        subject,
        encoded,
        codes.keep(kept),
        dictionary.W_dec.detach().float().cpu()[chosen],
        None if W_enc is None else W_enc.detach().float().cpu().T[chosen],
    )


def firing(
    codes: Codes, document: Places, d_sae: int, min_firings: int
) -> Bool[np.ndarray, " d_sae"]:
    """Features active on `min_firings` tokens of even documents and on as many of odd ones."""
    half = np.repeat(document % 2, np.diff(codes.starts))
    counts = [np.bincount(codes.features[half == h], minlength=d_sae) for h in (0, 1)]
    return np.minimum(*counts) >= min_firings


def compare(a: Side, b: Side, one_to_one: bool = True, seed: int = 0) -> tuple[Row, Row]:
    """What is like `b` in `a`, and what is like `a` in `b`: one row each.

    Directions are compared only within one language model and one width; another model's basis
    is another one. `seed` is of the random directions.
    """
    rows = _identity(a, b), _identity(b, a)
    same_space = a.subject.origin.lm == b.subject.origin.lm
    if same_space and a.decoder.shape[1] == b.decoder.shape[1]:
        for what in ("decoder", "encoder"):
            x, y = getattr(a, what), getattr(b, what)
            if x is not None and y is not None:
                _add_cosines(rows, what, x, y, seed)
        if one_to_one:
            _add_matched(rows, a.decoder, b.decoder, seed)
    _add_correlations(rows, a, b)
    return rows


def _identity(a: Side, b: Side) -> Row:
    row: Row = {"a": a.subject.name, "b": b.subject.name}
    for end, one in (("a", a), ("b", b)):
        origin = one.subject.origin
        row |= {f"lm_{end}": origin.lm, f"hook_name_{end}": origin.hook_name}
        for fact in ("architecture", "ratio", "seed", "d_sae"):
            row[f"{fact}_{end}"] = one.subject.facts.get(fact)
        row[f"n_features_{end}"] = len(one.decoder)
    return row


def _add_cosines(
    rows: tuple[Row, Row],
    what: str,
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "m d"],
    seed: int,
) -> None:
    found = max_cosine(a, b)
    generator = torch.Generator().manual_seed(NULL_SEEDS + seed)
    for row, best, from_, to in zip(rows, found, (a, b), (b, a), strict=True):
        row |= columns(f"{what}_cosine", bootstrap_mean(best.value)) | shares(what, best.value)
        null, _ = max_cosine(from_, random_directions(to, generator))
        row |= columns(f"{what}_cosine_null", bootstrap_mean(null.value))
        if what == "decoder":
            null, _ = max_cosine(from_, random_directions(to, generator, keep_covariance=True))
            row |= columns("decoder_cosine_null_covariance", bootstrap_mean(null.value))


def _add_matched(
    rows: tuple[Row, Row], a: Float[Tensor, "n d"], b: Float[Tensor, "m d"], seed: int
) -> None:
    values = matched_cosine(a, b).numpy()
    null = matched_cosine(
        a, random_directions(b, torch.Generator().manual_seed(NULL_SEEDS + seed))
    ).numpy()
    for row in rows:
        row |= columns("one_to_one_cosine", bootstrap_mean(values))
        row |= columns("one_to_one_cosine_null", bootstrap_mean(null))
        row["one_to_one_n"] = len(values)


def _add_correlations(rows: tuple[Row, Row], a: Side, b: Side) -> None:
    in_a, in_b = pair_tokens(a.encoded, b.encoded)
    document = a.encoded.document[in_a]
    halves = [np.flatnonzero(document % 2 == half) for half in (0, 1)]
    chosen_on, measured_on = (
        (a.codes.take(in_a[half]), b.codes.take(in_b[half])) for half in halves
    )
    _, group = np.unique(document[halves[1]], return_inverse=True)
    reading = {
        "n_tokens": len(document),
        "n_tokens_correlation": len(halves[1]),
        "n_documents_correlation": int(group.max()) + 1,
    }
    for row in rows:
        row |= reading
    n_features, group = (len(a.decoder), len(b.decoder)), group % MAX_GROUPS
    _add_correlation(rows, "correlation", n_features, chosen_on, measured_on, group)
    shifted = [(x, shift(y, y.n_tokens // 2)) for x, y in (chosen_on, measured_on)]
    _add_correlation(rows, "correlation_null", n_features, *shifted, group)


def _add_correlation(
    rows: tuple[Row, Row],
    what: str,
    n_features: tuple[int, int],
    chosen_on: tuple[Codes, Codes],
    measured_on: tuple[Codes, Codes],
    group: Places,
) -> None:
    """Partners by the largest correlation on one half; their correlation on the other half."""
    correlation = Correlation(*n_features)
    correlation.add(*chosen_on)
    found = correlation.best()
    for row, best, (a, b) in zip(rows, found, (measured_on, measured_on[::-1]), strict=True):
        held_out = correlation_of_pairs(a, b, best.partner, group)
        row |= columns(what, held_out.mean) | shares(what, held_out.value)
        row |= columns(f"{what}_in_sample", bootstrap_mean(best.value))


def shares(what: str, values: Float[np.ndarray, " n"]) -> Row:
    """Of the features, the share whose partner is at least so similar; one without is not."""
    return {f"{what}_above_{level}": float((values >= level).mean()) for level in SHARES}


def memory(a: Side, b: Side) -> int:
    """Bytes that `compare` needs at once, about."""
    n_a, n_b = len(a.decoder), len(b.decoder)
    matched = 12 * n_a * n_b  # the cosines in float32, and scipy's copy in float64
    pairs = 8 * 7 * MAX_GROUPS * max(n_a, n_b)
    return max(Correlation.n_bytes(n_a, n_b) + pairs, matched)

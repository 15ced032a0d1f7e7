"""What the dashboard shows of each feature: its activity by concept, its contexts, its kin.

`collect_dashboard` reads the text and the concept corpus once; here are blocks of features and
single ones. Everything that is chosen (concepts, thresholds, neurons, descriptions) is chosen on
one half and measured on the other.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor

from analysis.interpretation import Family, threshold_leaving
from analysis.live_features import readable_pieces
from analysis.program import Row, finite
from analysis.unit_scores import UNITS_AT_ONCE
from analysis.units import ConceptReading, Split
from sparse_coding.consistency import Codes
from sparse_coding.examples import Stream, contexts_of, groups_first, spread
from sparse_coding.metrics import interval
from sparse_coding.polysemanticity import (
    choose_concept,
    concept_shares,
    detection,
    effective_number,
    eligible,
    entropy,
    lifts,
)
from sparse_coding.probing import weighted_scores
from sparse_coding.text import Tokenizer
from sparse_coding.unit_activity import Activity, unit_activity

N_BINS, N_INTERVALS = 30, 5
NEURONS_AT_ONCE = 256


class ByFeature:
    """Codes of some rows, feature by feature."""

    def __init__(self, codes: Codes, d_sae: int) -> None:
        shape = (codes.n_tokens, d_sae)
        by_row = csr_matrix((codes.values, codes.features, codes.starts), shape=shape)
        self.columns: csc_matrix = by_row.tocsc()

    def dense(self, features: Int[Tensor, " some"]) -> Float32[np.ndarray, "rows some"]:
        """Activations of these features on every row."""
        return self.columns[:, features.numpy()].toarray()


# --- concepts ----------------------------------------------------------------------------------


def activity(
    values: Float32[np.ndarray, "rows units"], split: Split, thresholds: Float[Tensor, " units"]
) -> Activity:
    """Sums over the documents of one half of the concept corpus, of one threshold per unit."""
    n = len(split.labels.concept)
    seen = unit_activity([torch.from_numpy(values)], split.document, n, thresholds[None])
    return Activity(seen.active[0], seen.mass[0], seen.largest)


def judge_concepts(
    a: Activity, b: Activity, reading: ConceptReading, weights: Float64[Tensor, "draws documents"]
) -> dict[int, Row]:
    """Chosen on sources A, measured on B; units too rare to be judged have no row."""
    labels = reading.heldout.labels
    places = (eligible(a.active) & eligible(b.active)).nonzero()[:, 0]
    if len(places) == 0:
        return {}
    concept = choose_concept(a.largest[:, places], reading.choosing.labels)
    found = detection(
        a.largest[:, places], reading.choosing.labels, b.largest[:, places], labels, concept
    )
    n_eff = effective_number(b.mass[:, places], labels)
    bars = concept_bars(b, places, reading, weights)
    rows: dict[int, Row] = {}
    for j, place in enumerate(places.tolist()):
        c = int(concept[j])
        scored = weighted_scores(b.largest[:, place], labels.concept == c, weights).auroc
        auroc, spread_of = interval(scored), bars.n_eff_draws[:, j]
        shift = n_eff[j] - spread_of.mean()  # draws of a biased estimate are biased twice
        low, high = (spread_of + shift).quantile(torch.tensor([0.025, 0.975]).double()).tolist()
        rows[place] = {
            "n_eff": n_eff[j].item(), "n_eff_low": max(low, 1.0), "n_eff_high": high,
            "concept": reading.corpus.concepts[c].name,
            "auroc": auroc.value, "auroc_low": auroc.low, "auroc_high": auroc.high,
            "average_precision": found.average_precision[j].item(),
            "precision": found.precision[j].item(), "recall": found.recall[j].item(),
            "f1": found.f1[j].item(), "concepts": bars.rows[j],
        }  # fmt: skip
    return rows


class Bars(NamedTuple):
    """Shares of concepts of some units."""

    rows: list[list[Row]]
    """Of each unit, the largest share first."""
    n_eff_draws: Float64[Tensor, "draws units"]
    """Without the jackknife's correction."""


def concept_bars(
    seen: Activity, places: Int[Tensor, " some"], reading: ConceptReading,
    weights: Float64[Tensor, "draws documents"],
) -> Bars:  # fmt: skip
    """q_c of the mass with intervals over documents, and lifts with a one-sided 95 % bound."""
    labels, names = reading.heldout.labels, [c.name for c in reading.corpus.concepts]
    rows, draws = [], []
    for some in places.split(UNITS_AT_ONCE):
        shares = concept_shares(seen.mass[:, some], labels, weights)
        draws.append(entropy(shares[1:]).exp())
        low, high = shares[1:].nanquantile(torch.tensor([0.025, 0.975]).double(), dim=0)
        lifted = lifts(seen.active[:, some], labels, weights)
        for j in range(len(some)):
            bars = [
                {"concept": name, "share": shares[0, c, j].item(), "share_low": low[c, j].item(),
                 "share_high": high[c, j].item(), "lift": finite(lifted.value[c, j].item()),
                 "lift_low": finite(lifted.low[c, j].item())}
                for c, name in enumerate(names)
            ]  # fmt: skip
            rows.append(sorted(bars, key=lambda bar: -bar["share"]))
    return Bars(rows, torch.cat(draws, dim=1))


def beside(
    values_a: Float32[np.ndarray, "rows_a units"], values_b: Float32[np.ndarray, "rows_b units"],
    n_firings: Int[np.ndarray, " units"], reading: ConceptReading, shown: "Shown",
    weights: Float64[Tensor, "draws documents"], n_contexts: int,
) -> list[Row]:  # fmt: skip
    """Units cut so that each is active as often as its partner: contexts, n_eff, concepts.

    `n_firings` are the partners' on sources A, where the thresholds are found. The last two are
    None where a unit is too rare to be judged.
    """
    cuts = [threshold_leaving(int(n), x) for n, x in zip(n_firings, values_a.T, strict=True)]
    thresholds = torch.tensor(cuts, dtype=torch.float32)
    halves = [
        activity(values, split, thresholds)
        for values, split in ((values_a, reading.choosing), (values_b, reading.heldout))
    ]
    labels = reading.heldout.labels
    places = (eligible(halves[0].active) & eligible(halves[1].active)).nonzero()[:, 0]
    n_eff = effective_number(halves[1].mass[:, places], labels).tolist()
    bars = concept_bars(halves[1], places, reading, weights).rows if len(places) else []
    judged = dict(zip(places.tolist(), zip(n_eff, bars, strict=True), strict=True))
    rows = []
    for j, cut in enumerate(cuts):
        column = np.where(values_b[:, j] > cut, values_b[:, j], 0)
        mean, concepts = judged.get(j, (None, None))
        contexts = shown.strongest(column, n_contexts)
        rows.append({"contexts": contexts, "n_eff": mean, "concepts": concepts})
    return rows


# --- contexts ----------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A text whose contexts are shown, with what each row is called."""

    stream: Stream
    tokenizer: Tokenizer
    ids: Int[np.ndarray, " pieces"]
    """The tokenizer's number of each of the stream's pieces."""
    source: Sequence[str | None]
    """Of each row."""
    concept: Sequence[str | None]

    def contexts(
        self, column: Float32[np.ndarray, " rows"], rows: Int[np.ndarray, " some"]
    ) -> list[Row]:
        """Contexts of these rows with a unit's activations, 0 where it is silent or not seen."""
        found, stream = [], self.stream
        for row, context in zip(rows.tolist(), contexts_of(stream, rows), strict=True):
            seen = np.where(context.rows >= 0, column[context.rows], 0)
            begin = stream.position[row] - context.centre
            ids = self.ids[stream.token[begin : begin + len(context.pieces)]].tolist()
            found.append({
                "tokens": readable_pieces(ids, self.tokenizer),
                "acts": [significant(v) for v in seen.tolist()],
                "focus": context.centre, "document": int(stream.group[row]),
                "source": self.source[row], "concept": self.concept[row],
            })  # fmt: skip
        return found

    def strongest(self, column: Float32[np.ndarray, " rows"], n: int) -> list[Row]:
        """Its n strongest firings, of as many documents as there are."""
        firing = np.flatnonzero(column > 0)
        firing = firing[np.argsort(-column[firing], kind="stable")]
        chosen = groups_first(firing, self.stream.group)[:n]
        return self.contexts(column, chosen[np.argsort(-column[chosen], kind="stable")])

    def intervals(
        self, column: Float32[np.ndarray, " rows"], n: int, generator: np.random.Generator
    ) -> list[Row]:
        """n firings drawn from each of `N_INTERVALS` equal widths of activation, strongest
        first."""
        edges = np.linspace(0, column.max(), N_INTERVALS + 1)
        found = []
        for low, high in reversed(list(zip(edges[:-1], edges[1:], strict=True))):
            inside = np.flatnonzero((column > low) & (column <= high))
            rows = spread(inside, self.stream.group, n, generator)
            contexts = self.contexts(column, rows)
            found.append({"low": significant(low), "high": significant(high),
                          "n_firings": len(inside), "contexts": contexts})  # fmt: skip
        return found

    def top_token(self, column: Float32[np.ndarray, " rows"], n: int = 50) -> str | None:
        """The commonest token among the n strongest firings."""
        firing = np.flatnonzero(column > 0)
        if len(firing) == 0:
            return None
        rows = firing[np.argsort(-column[firing], kind="stable")][:n]
        tokens = self.stream.token[self.stream.position[rows]]
        return self.stream.pieces[np.bincount(tokens).argmax()]


def concept_stream(reading: ConceptReading) -> Shown:
    """Sources B of the concept corpus."""
    split, corpus = reading.heldout, reading.corpus
    tokens = reading.contexts_of(split.documents).tokens
    ids, token = np.unique(tokens.flatten().numpy(), return_inverse=True)
    pieces = [reading.lm.tokenizer.decode([i]) for i in ids.tolist()]
    document = split.document.numpy()
    width = tokens.shape[1]
    position = document * width + split.position.numpy() + reading.n_before
    stream = Stream(token, pieces, np.arange(len(token)) // width, position, document)
    of_row = [corpus.documents[i] for i in split.documents.tolist()]
    source = [of_row[i].parent for i in document.tolist()]
    concept = [of_row[i].concept for i in document.tolist()]
    return Shown(stream, reading.lm.tokenizer, ids, source, concept)


# --- single numbers ----------------------------------------------------------------------------


def significant(value: float) -> float:
    """Rounded to four digits; files of thousands of contexts need no more."""
    return float(f"{value:.4g}")


def histogram(
    heldout: Float32[np.ndarray, " rows"] | None, column_b: Float32[np.ndarray, " rows_b"],
    concept: Int[np.ndarray, " rows_b"], names: Sequence[str],
) -> Row:  # fmt: skip
    """Counts of firings in equal widths of activation; `concept` is of each row of sources B."""
    largest = max(column_b.max(initial=0), 0 if heldout is None else heldout.max(initial=0))
    edges = np.linspace(0, largest or 1.0, N_BINS + 1)

    def counts(values: Float32[np.ndarray, " n"]) -> list[int]:
        return np.histogram(values[values > 0], edges)[0].tolist()

    found: dict[str, Any] = {"edges": [significant(edge) for edge in edges]}
    if heldout is not None:
        found["counts"] = counts(heldout)
    firing = np.flatnonzero(column_b > 0)
    values, concept = column_b[firing], concept[firing]
    by_concept = {name: counts(values[concept == c]) for c, name in enumerate(names)}
    return found | {"by_concept": {name: n for name, n in by_concept.items() if any(n)}}


def one_unit(feature: int, column: Float32[np.ndarray, " rows"]) -> Family:
    """A feature as it fires, for the rules and scores of `interpretation`."""
    zero = np.zeros(1, dtype=np.float32)
    return Family("sae", np.array([feature]), column[:, None], zero)


class Neurons(NamedTuple):
    """For every feature the neuron nearest to it."""

    hook_name: str
    best: Int[np.ndarray, " d_sae"]
    correlation: Float64[np.ndarray, " d_sae"]
    """Signed: the neuron's negative half goes with the feature where it is below 0."""

    def halves(
        self, split: Split, features: Int[Tensor, " some"]
    ) -> Float32[np.ndarray, "rows some"]:
        """Of each feature's neuron the half that goes with it."""
        places = features.numpy()
        sign = torch.from_numpy(np.where(self.correlation[places] < 0, -1.0, 1.0)).float()
        x = split.acts[self.hook_name][:, torch.from_numpy(self.best[places])].float()
        return torch.relu(x * sign).numpy()

    def about(self, feature: int) -> Row:
        correlation = significant(float(self.correlation[feature]))
        return {"hook_name": self.hook_name, "neuron": int(self.best[feature]),
                "correlation": correlation}  # fmt: skip


def best_neurons(
    features: csc_matrix, neurons: Float[Tensor, "rows neurons"]
) -> tuple[Int[np.ndarray, " d_sae"], Float64[np.ndarray, " d_sae"]]:
    """For each feature the neuron of the largest Pearson correlation, whatever its sign; and that.

    A feature or neuron that does not vary correlates with nothing: 0.
    """
    n, d_sae = features.shape
    by_feature = features.T.tocsr()
    means = np.asarray(features.mean(axis=0)).ravel()
    squares = np.asarray(features.multiply(features).mean(axis=0)).ravel()
    deviation = np.sqrt(np.maximum(squares - means**2, 0))
    best, value = np.zeros(d_sae, dtype=np.int64), np.zeros(d_sae)
    for first, part in zip(
        range(0, neurons.shape[1], NEURONS_AT_ONCE),
        neurons.split(NEURONS_AT_ONCE, dim=1),
        strict=True,
    ):
        x = part.float().numpy()
        x = x - x.mean(axis=0)  # features need not be centred then
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (by_feature @ x) / n / deviation[:, None] / x.std(axis=0)
        found = np.nan_to_num(found, nan=0.0, posinf=0.0, neginf=0.0)
        here = np.abs(found).argmax(axis=1)
        of_here = found[np.arange(d_sae), here]
        better = np.abs(of_here) > np.abs(value)
        best[better], value[better] = first + here[better], of_here[better]
    return best, value

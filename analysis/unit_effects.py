"""What a unit does to the language model: its output is taken away where it fires, by concept.

A unit may fire for two things and matter for one. Units and thresholds are chosen elsewhere.
"""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int
from torch import Tensor
from tqdm import tqdm

from analysis.program import Row, finite
from analysis.unit_scores import Concentration
from analysis.units import Family, Observed
from sparse_coding.metrics import columns, t_interval
from sparse_coding.polysemanticity import entropy
from sparse_coding.splice import cross_entropies

DOCUMENTS_PER_CONCEPT = 2


class Effect(NamedTuple):
    """Of taking one unit's output away: sums over firing tokens, by concept."""

    kl: Float64[Tensor, " concepts"]
    """KL(clean || without the unit) of the next token's distribution, nats."""
    kl_random: Float64[Tensor, " concepts"]
    """The same with as much taken away along a random direction."""
    n_firings: Float64[Tensor, " concepts"]
    """Tokens that were looked at."""

    @property
    def shares(self) -> Float64[Tensor, " concepts"]:
        """Each concept's share of the effect, every concept with the mean of its firings."""
        mean = torch.where(self.n_firings > 0, self.kl / self.n_firings.clamp_min(1), 0.0)
        return mean / mean.sum()


def family_effects(
    family: Family, seen: Observed, found: Concentration, condition: int, n: int, seed: int
) -> list[Row]:
    """Rows of at most n eligible units, drawn without a look at them."""
    generator = torch.Generator().manual_seed(seed)
    chosen = found.units[torch.randperm(len(found.units), generator=generator)[:n]].tolist()
    rows = []
    for j in tqdm(chosen, desc=f"effects, {family.name}", unit="unit"):
        threshold = seen.thresholds[condition, j].item()
        fired = seen.activations[:, j] > threshold
        one = effect(family, int(seen.units[j]), threshold, fired, generator)
        n_firings = one.n_firings.sum()
        kl, random = (sums.sum() / n_firings for sums in (one.kl, one.kl_random))
        rows.append(
            {
                "family": family.name,
                **family.facts,
                "unit": int(seen.units[j]),
                "n_firings": int(n_firings),
                "n_concepts_fired": int((one.n_firings > 0).sum()),
                "kl": finite(kl.item()),
                "kl_random": finite(random.item()),
                "n_eff_effect": finite(entropy(one.shares[:, None]).exp().item()),
            }
        )
    return rows


def effect(
    family: Family, unit: int, threshold: float, fired: Tensor, generator: torch.Generator
) -> Effect:
    """Both ablations in a few documents of each concept in which the unit fires, of source B.

    What is taken away at a firing token is what the unit writes: activation times decoder row.
    """
    reading, dictionary = family.reading, family.dictionary
    b = reading.heldout
    documents = some_documents(b.document[fired], b.labels.concept, generator)
    row = dictionary.W_dec[unit].float()
    other = torch.randn(len(row), generator=generator).to(row.device)
    other *= row.norm() / other.norm()

    def without(direction: Tensor) -> Callable[[Tensor], Tensor]:
        def replace(x: Tensor) -> Tensor:
            a = dictionary.encode(x)[:, unit]
            return x - torch.where(a > threshold, a, 0.0)[:, None] * direction

        return replace

    replacements = {"clean": None, "unit": without(row), "random": without(other)}
    limit = reading.max_norm if family.hook_name == reading.hooks[0] else float("inf")
    batch = reading.contexts_of(b.documents[documents])
    losses = cross_entropies(reading.lm, batch, family.hook_name, replacements, max_norm=limit)
    context, position, concept = places(family, fired, documents)
    sums = torch.zeros(3, b.labels.n_concepts, dtype=torch.float64)
    kl = [losses.kl[name].cpu()[context, position].double() for name in ("unit", "random")]
    for into, values in zip(sums, (*kl, torch.ones_like(kl[0])), strict=True):
        into.index_add_(0, concept, values)
    return Effect(*sums)


def places(
    family: Family, fired: Tensor, documents: Int[Tensor, " documents"]
) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Context, position and concept of the firings in these documents.

    Not of a document's last token: what follows it is not known.
    """
    reading, b = family.reading, family.reading.heldout
    context = torch.full((len(b.labels.concept),), -1)
    context[documents] = torch.arange(len(documents))
    is_known = b.position < reading.n_tokens - 1
    here = fired & is_known & (context[b.document] >= 0)
    document = b.document[here]
    return context[document], b.position[here] + reading.n_before, b.labels.concept[document]


def some_documents(
    fired: Int[Tensor, " firings"], concept: Int[Tensor, " documents"], generator: torch.Generator
) -> Int[Tensor, " documents"]:
    """Of the documents in which the unit fires at most `DOCUMENTS_PER_CONCEPT` of each concept."""
    documents = fired.unique()
    documents = documents[torch.randperm(len(documents), generator=generator)]
    chosen = [
        documents[concept[documents] == c][:DOCUMENTS_PER_CONCEPT]
        for c in concept[documents].unique()
    ]
    return torch.cat(chosen).sort().values


def effect_row(rows: list[Row]) -> Row:
    """Means over a family's units; Student's t over units."""
    known = [row for row in rows if row["n_eff_effect"] is not None]
    if len(known) < 2:
        return {"n_units": len(known)}
    summary: Row = {"n_units": len(known)}
    for name in ("kl", "kl_random", "n_eff_effect"):
        summary |= columns(name, t_interval([row[name] for row in known]))
    fired = statistics.fmean(row["n_concepts_fired"] for row in known)
    return summary | {"n_concepts_fired": fired}

"""Families of units on the concept corpus: neurons, directions, SAEs and their controls.

A family is a dictionary with the activations it reads; a unit is one of its features. The corpus
is read once per language model; families are sampled with a seed and measured one at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from analysis.program import Row
from analysis.subjects import Material
from sparse_coding.baselines import PerTokenTopK
from sparse_coding.concepts import ConceptCorpus, superclasses
from sparse_coding.dictionary import Dictionary
from sparse_coding.harvest import activations, hook_width, kept_rows
from sparse_coding.polysemanticity import Labelled
from sparse_coding.runs import check_memory
from sparse_coding.text import TokenBatch, special_ids, starts_with_bos, valid_positions
from sparse_coding.unit_activity import ROWS_AT_ONCE, Activity, rate_thresholds, unit_activity

SKIPPED = 4  # positions of a document that hardly have a context
BATCH_CONTEXTS = 32


def concept_contexts(
    corpus: ConceptCorpus, tokenizer, bos: str, n_skipped: int = SKIPPED
) -> TokenBatch:
    """Each document is one context, after BOS where the model wants one.

    Valid are the positions that SAEs see, without the first `n_skipped` of the document.
    """
    tokens = corpus.tokens
    n_tokens = tokens.shape[1]
    index = torch.arange(len(tokens))[:, None].expand_as(tokens)
    if starts_with_bos(tokenizer, bos):
        first = torch.full((len(tokens), 1), tokenizer.bos_token_id)
        tokens = torch.cat([first, tokens], dim=1)
        index = torch.cat([torch.full_like(first, -1), index], dim=1)
    valid = valid_positions(tokens, special_ids(tokenizer))
    valid[:, : tokens.shape[1] - n_tokens + n_skipped] = False
    return TokenBatch(tokens, index, valid)


class Split(NamedTuple):
    """Rows of one half of the corpus. `document` counts from 0 within the half."""

    acts: dict[str, Float[Tensor, "rows _"]]
    document: Int[Tensor, " rows"]
    token: Int[Tensor, " rows"]
    position: Int[Tensor, " rows"]
    """Of the token in its document."""
    labels: Labelled
    documents: Int[Tensor, " documents"]
    """Indices into the corpus."""


class ConceptReading:
    """What one language model makes of the concept corpus at some hooks.

    `choosing` is source A, `heldout` source B. The first hook's norms decide which rows count, as
    in training. Keeps all rows in memory, in the model's dtype.
    """

    def __init__(
        self, material: Material, corpus: ConceptCorpus, hooks: Sequence[str],
        n_skipped: int = SKIPPED,
    ) -> None:  # fmt: skip
        self.lm, self.corpus, self.hooks = material.lm, corpus, list(hooks)
        self.contexts = concept_contexts(corpus, self.lm.tokenizer, material.origin.bos, n_skipped)
        width = sum(hook_width(self.lm, hook) for hook in self.hooks)
        n_bytes = int(self.contexts.valid.sum()) * width * self.lm.dtype.itemsize
        advice = "ask for fewer --n-documents or --n-tokens"
        check_memory(n_bytes, torch.device("cpu"), "the concept corpus's activations", advice)
        self.max_norm = material.max_norm
        self.choosing = self._read(~corpus.heldout, "A")
        self.heldout = self._read(corpus.heldout, "B")

    @property
    def n_tokens(self) -> int:
        """Of a document, without BOS."""
        return len(self.corpus.documents[0].tokens)

    @property
    def n_before(self) -> int:
        """Tokens before a document in its context: 1 for BOS, or none."""
        return self.contexts.tokens.shape[1] - self.n_tokens

    def contexts_of(self, documents: Int[Tensor, " documents"]) -> TokenBatch:
        """Contexts of these documents of the corpus."""
        return TokenBatch(*(part[documents] for part in self.contexts))

    def _read(self, chosen: Bool[Tensor, " documents"], source: str) -> Split:
        documents = chosen.nonzero()[:, 0]
        contexts = self.contexts_of(documents)
        kept = torch.zeros_like(contexts.valid)
        n_rows, start = int(contexts.valid.sum()), 0
        acts = {
            hook: torch.empty(n_rows, hook_width(self.lm, hook), dtype=self.lm.dtype)
            for hook in self.hooks
        }
        batches = torch.arange(len(documents)).split(BATCH_CONTEXTS)
        for some in tqdm(batches, desc=f"concepts {source}, {self.lm.name}", unit="batch"):
            seen = activations(self.lm, contexts.tokens[some], self.hooks)
            first = seen[self.hooks[0]]
            keep = kept_rows(first, contexts.valid[some].to(first.device), self.max_norm)
            n = int(keep.sum())
            for hook, x in seen.items():
                acts[hook][start : start + n] = x[keep]
            kept[some], start = keep.cpu(), start + n
        document, place = kept.nonzero(as_tuple=True)
        n_tokens = document.bincount(minlength=len(documents)).double()
        return Split(
            {hook: x[:start] for hook, x in acts.items()},
            document,
            contexts.tokens[kept],
            place - self.n_before,
            Labelled(self.corpus.concept[chosen], n_tokens, superclasses(self.corpus.concepts)),
            documents,
        )


class Family(NamedTuple):
    """Units of one dictionary."""

    name: str
    """sae, mlp_neurons, pca ..."""
    hook_name: str
    dictionary: Dictionary
    facts: Row
    """ratio, seed and what else tells families of one name apart."""
    reading: ConceptReading
    k: int
    """Features per token at the SAE's L0, for the condition "topk"."""


def choose_units(d_sae: int, n: int, seed: int) -> Int[Tensor, " units"]:
    """At most `n` features, drawn without a look at them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(d_sae, generator=generator)[:n].sort().values


class Conditions(NamedTuple):
    """Names of what is counted side by side, in the order of `Activity`'s first axis."""

    rates: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        """A rate as `0.003`, then native (as it fires) and topk (k per token, the SAE's L0)."""
        return [*map(str, self.rates), "native", "topk"]


class Observed(NamedTuple):
    """A family's sampled units on both halves of the corpus, thresholds from source A."""

    units: Int[Tensor, " units"]
    thresholds: Float[Tensor, "rates_plus_1 units"]
    choosing: Activity
    heldout: Activity
    activations: Float[Tensor, "rows units"]
    """Of source B."""


def observe(family: Family, units: Int[Tensor, " units"], conditions: Conditions) -> Observed:
    """Encode both sources once and count; holds rows x units numbers of one source, twice."""
    a, b = family.reading.choosing, family.reading.heldout
    plain, cut = _activations(family, a, units)
    of_rates = rate_thresholds([plain], len(plain), conditions.rates)
    thresholds = torch.cat([of_rates, torch.zeros(1, len(units))])
    choosing = _activity(plain, cut, a, thresholds)
    plain, cut = _activations(family, b, units)
    return Observed(units, thresholds, choosing, _activity(plain, cut, b, thresholds), plain)


def _activations(
    family: Family, split: Split, units: Int[Tensor, " units"]
) -> tuple[Float[Tensor, "rows units"], Float[Tensor, "rows units"]]:
    """Of the sampled units: as they are, and with k features per token of the whole dictionary."""
    cutter = PerTokenTopK(family.dictionary, family.k)
    column = torch.full((family.dictionary.d_sae,), len(units))  # of all others, thrown away
    column[units] = torch.arange(len(units))
    column = column.to(cutter.W_dec.device)
    plain, cut = [], []
    for rows in split.acts[family.hook_name].split(ROWS_AT_ONCE):
        f = family.dictionary.encode(rows.to(cutter.W_dec.device).float())
        plain.append(f[:, units].cpu())
        largest = cutter.largest(f)
        sampled = f.new_zeros(len(f), len(units) + 1)
        sampled.scatter_(1, column[largest], f.gather(1, largest))
        cut.append(sampled[:, :-1].cpu())
    return torch.cat(plain), torch.cat(cut)


def _activity(
    plain: Float[Tensor, "rows units"], cut: Float[Tensor, "rows units"], split: Split,
    thresholds: Float[Tensor, "rates units"],
) -> Activity:  # fmt: skip
    n = len(split.labels.concept)
    with_rates = unit_activity([plain], split.document, n, thresholds)
    topk = unit_activity([cut], split.document, n, torch.zeros(1, plain.shape[1]))
    return Activity(
        torch.cat([with_rates.active, topk.active]),
        torch.cat([with_rates.mass, topk.mass]),
        with_rates.largest,
    )

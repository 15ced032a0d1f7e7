"""What becomes of concepts' features: all families in turn, splitting, children, absorption.

Of SAEs, trained or not, the features that a concept needs are followed from the smallest ratio
upward, and what carries the concept where they are silent is measured token by token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from analysis.concept_probes import (
    TRUE,
    Averages,
    Probed,
    Ranked,
    Scored,
    Task,
    averages,
    probe,
    probe_rows,
    rank,
    rows_of_concepts,
    rows_over_seeds,
    with_whole_axes,
)
from analysis.program import Row
from analysis.units import ConceptReading, Split
from sparse_coding.dictionary import Dictionary
from sparse_coding.probing import (
    MAX_FEATURES,
    Probe,
    absorbed,
    coverage,
    covering_features,
    f1_by_number,
    n_needed,
)
from sparse_coding.unit_activity import ROWS_AT_ONCE

MIN_CHILD_COSINE, N_CHILDREN = 0.5, 3
KIN = ("family", "architecture", "target_l0", "l1_coeff")  # but for ratio and seed


class Study:
    """Adds up what is found on one hook; SAEs are to be added from the smallest ratio upward."""

    def __init__(
        self, reading: ConceptReading, hook_name: str, tasks: Sequence[Task], ks: Sequence[int]
    ) -> None:
        self.reading, self.tasks, self.ks = reading, tasks, ks
        self.names = [concept.name for concept in reading.corpus.concepts]
        self.parents: dict[tuple, list[Parents]] = {}
        self.found: list[Row] = []
        x = averages(lambda rows: rows, reading, hook_name)
        facts = {"family": "dense", "ratio": None, "seed": None, "k": x.a.shape[1]}
        dense = [probe(task, facts, x) for task in tasks]
        self.scored: list[Scored] = [scored for scored, _ in dense]
        self.dense: list[list[Probe]] = [probes for _, probes in dense]

    def add(self, family: Probed) -> None:
        """Probe one family, and look into it if it is an SAE."""
        dictionary = family.make()
        found = averages(dictionary.encode, self.reading, family.hook_name)
        if family.is_basis:
            found = with_whole_axes(found)
        for task, dense in zip(self.tasks, self.dense, strict=True):
            ranked = rank(task, found.a, max(MAX_FEATURES, *self.ks))
            for k in self.ks:
                if k <= found.a.shape[1]:
                    chosen = [of_concept.whole[:k] for of_concept in ranked]
                    self.scored.append(probe(task, family.facts | {"k": k}, found, chosen)[0])
            if family.is_sae:
                self._look_into(task, dense, family, dictionary, found, ranked)

    def _look_into(
        self, task: Task, dense: list[Probe], family: Probed, dictionary: Dictionary,
        found: Averages, ranked: list[Ranked],
    ) -> None:  # fmt: skip
        facts = {"labels": task.labels} | family.facts
        rows, main = splitting(task, found.a, ranked)
        self._keep("splitting", facts, {}, rows)
        split = self.reading.heldout
        self._keep(
            "absorption", facts,
            *absorption(task, dictionary, split, family.hook_name, dense, main),
        )  # fmt: skip
        if task.labels != TRUE:
            return
        kin = self.parents.setdefault(tuple(facts.get(name) for name in KIN), [])
        if not kin or kin[0].ratio == facts["ratio"]:
            kin.append(parents_of(facts, dictionary, found, main))
            return
        for parents in chosen_parents(kin, facts["seed"]):
            about = facts | {
                "from_ratio": parents.ratio, "from_seed": parents.seed,
                "shares_start": parents.seed == facts["seed"],
            }  # fmt: skip
            self._keep("children", about, *children(task, dictionary, found, parents))

    def _keep(self, kind: str, facts: Row, values: dict[str, Tensor], more: Sequence[Row]) -> None:
        self.found += rows_of_concepts({"kind": kind} | facts, self.names, values, more)

    def rows(self) -> list[Row]:
        """All rows; those of probes need the families that they are compared with."""
        rows = probe_rows(self.scored, self.names) + self.found
        return rows + rows_over_seeds(rows)


# --- splitting ---------------------------------------------------------------------------------


def splitting(
    task: Task, a: Float[Tensor, "documents_a features"], ranked: list[Ranked]
) -> tuple[list[Row], list[Tensor]]:
    """Rows without the concepts' names, and each concept's features."""
    rows, main = [], []
    for c, (whole, in_folds) in enumerate(ranked):
        chosen = in_folds[:, :MAX_FEATURES]
        f1 = f1_by_number(a, task.a.concept == c, task.folds[c], chosen)
        n = n_needed(f1)
        main.append(whole[:n])
        rows.append({
            "n_needed": float(n), "f1_of_one": f1[0], "f1_of_needed": f1[n - 1],
            "features": whole[:n].tolist(),
        } | task.facts[c])  # fmt: skip
    return rows, main


class Parents(NamedTuple):
    """The best feature of every concept in one of the smallest dictionaries."""

    ratio: int
    seed: int
    rows: Float[Tensor, "concepts d_in"]
    fires_a: Bool[Tensor, "documents_a concepts"]
    fires_b: Bool[Tensor, "documents_b concepts"]


def parents_of(facts: Row, dictionary: Dictionary, found: Averages, main: list[Tensor]) -> Parents:
    best = torch.stack([some[0] for some in main])
    rows = dictionary.W_dec.detach().cpu()[best]
    return Parents(facts["ratio"], facts["seed"], rows, found.a[:, best] > 0, found.b[:, best] > 0)


def chosen_parents(kin: list[Parents], seed: int) -> list[Parents]:
    """Those of the same seed, and those of the next one.

    A seed's larger dictionary starts with the rows of its smaller one: likeness to parents of the
    same seed may be no more than that. Another seed's is found again.
    """
    seeds = [parents.seed for parents in kin]
    if seed not in seeds:
        return kin[:1]
    place = seeds.index(seed)
    return list({id(p): p for p in (kin[place], kin[(place + 1) % len(kin)])}.values())


def children(
    task: Task, dictionary: Dictionary, found: Averages, parents: Parents
) -> tuple[dict[str, Tensor], list[Row]]:
    """What became of the parents, for each concept: values with draws, and counts."""
    W_dec = torch.nn.functional.normalize(dictionary.W_dec.detach().cpu(), dim=1)
    fires_a, fires_b = found.a > 0, found.b > 0
    shares: dict[str, list[Tensor]] = {}
    rows = []
    for c, direction in enumerate(parents.rows):
        cosine = W_dec @ torch.nn.functional.normalize(direction, dim=0)
        near = (cosine >= MIN_CHILD_COSINE).nonzero()[:, 0]
        best = covering_features(parents.fires_a[:, c], fires_a, N_CHILDREN)
        for name, some in (("near", near), ("best", best[:1]), ("top", best)):
            part = coverage(parents.fires_b[:, c], fires_b[:, some], task.weights)
            shares.setdefault(f"{name}_covers", []).append(part.firing)
            shares.setdefault(f"{name}_covers_silent", []).append(part.silent)
        rows.append({
            "n_cosine": float(len(near)), "best_cosine": cosine.max().item(),
            "n_top": float(len(best)), "top": best, "near": near.tolist(),
            "n_positive": int(parents.fires_b[:, c].sum()), "n_documents": len(fires_b),
        })  # fmt: skip
    return {key: torch.stack(value) for key, value in shares.items()}, rows


# --- absorption --------------------------------------------------------------------------------


@torch.no_grad()
def absorption(
    task: Task, dictionary: Dictionary, split: Split, hook_name: str,
    dense: list[Probe], main: list[Tensor],
) -> tuple[dict[str, Tensor], list[Row]]:  # fmt: skip
    """Shares with draws, and counts, for each concept.

    A token's projection is that of x - decode(0), which is what features are there to write.
    """
    W_dec = dictionary.W_dec.detach()
    centre = dictionary.decode(W_dec.new_zeros(1, dictionary.d_sae))[0].double().cpu()
    values: dict[str, list[Tensor]] = {"absorption": [], "main_silent": []}
    rows = []
    for c, fitted in enumerate(dense):
        of_concept = (task.b.concept[split.document] == c).nonzero()[:, 0]
        x = split.acts[hook_name][of_concept].float()
        total = (x.double() - centre) @ (fitted.weight / fitted.weight.norm())
        taken = (fitted.score(x) > 0) & (total > 0)
        x, total, document = x[taken], total[taken], split.document[of_concept[taken]]
        sums = torch.zeros(3, len(task.b.concept), dtype=torch.float64)
        for rows_x, rows_total, where in zip(
            *(part.split(ROWS_AT_ONCE) for part in (x, total, document)), strict=True
        ):
            f = dictionary.encode(rows_x.to(W_dec.device)).cpu()
            one = absorbed(f, W_dec.cpu(), fitted.weight, main[c], rows_total)
            found = torch.stack([one.share, one.is_silent.double(), torch.ones_like(one.share)])
            sums.index_add_(1, where, found)
        share, silent, n = sums @ task.weights.T
        values["absorption"].append(share / n)
        values["main_silent"].append(silent / n)
        rows.append({
            "n_main": float(len(main[c])), "share_taken": taken.double().mean().item(),
            "n_tokens": len(x), "n_positive": int((task.b.concept == c).sum()),
        })  # fmt: skip
    return {key: torch.stack(value) for key, value in values.items()}, rows

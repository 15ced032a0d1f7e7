"""Held-out numbers of SAEs on one hook: reconstruction, and what the model loses with them.

All intervals are 95 % percentile intervals of a bootstrap over documents, the same draws for every
SAE: differences between SAEs are paired.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.harvest import activations, kept_rows
from sparse_coding.metrics import (
    ActivationSums,
    Interval,
    ReconstructionSums,
    bootstrap_weights,
    fvu,
    interval,
    mean_per_row,
)
from sparse_coding.models import LanguageModel
from sparse_coding.splice import cross_entropies
from sparse_coding.text import TokenBatch

N_DRAWS = 1000
ROWS_AT_ONCE = 1024  # bounds the (rows, d_sae) tensors


def take_tokens(batches: Iterable[TokenBatch], n_tokens: int) -> list[TokenBatch]:
    """The first batches that together hold at least `n_tokens` valid positions, or all."""
    taken, n = [], 0
    for batch in batches:
        taken.append(batch)
        n += int(batch.valid.sum())
        if n >= n_tokens:
            break
    if not n:
        raise UserError("the held-out text has no full context; give more text or a larger share")
    return taken


class Evaluation:
    """One hook's held-out batches; measures any number of SAEs in one pass over them.

    The same rows count everywhere: `valid` positions (no first position, no special token) whose
    norm is at most `max_norm`, the harvest's own rule.
    """

    def __init__(
        self, lm: LanguageModel, hook_name: str, batches: list[TokenBatch], max_norm: float
    ) -> None:
        self.lm, self.hook_name, self.batches, self.max_norm = lm, hook_name, batches, max_norm
        self.n_documents = 1 + max(int(batch.document.max()) for batch in batches)

    def reconstruction(
        self, saes: dict[str, Dictionary]
    ) -> tuple[ActivationSums, dict[str, ReconstructionSums]]:
        """Sums over all batches for fvu, l0 and firing counts."""
        d_in = next(iter(saes.values())).d_in
        inputs = ActivationSums(d_in, self.n_documents)
        sums = {name: ReconstructionSums(sae, self.n_documents) for name, sae in saes.items()}
        for batch in tqdm(self.batches, desc="reconstruction", unit="batch"):
            x, document = self._rows(batch)
            inputs.add(x, document)
            for one in sums.values():
                for part in range(0, len(x), ROWS_AT_ONCE):
                    rows = slice(part, part + ROWS_AT_ONCE)
                    one.add(x[rows], document[rows])
        return inputs, sums

    def _rows(self, batch: TokenBatch) -> tuple[Float[Tensor, "rows d_in"], Int[Tensor, " rows"]]:
        acts = activations(self.lm, batch.tokens, [self.hook_name])[self.hook_name]
        keep = kept_rows(acts, batch.valid.to(acts.device), self.max_norm)
        return acts[keep].float(), batch.document.to(acts.device)[keep]

    def cross_entropy(
        self, saes: dict[str, Dictionary], mean: Float[Tensor, " d_in"], n_tokens: int
    ) -> tuple[Float[Tensor, " documents"], dict[str, Float[Tensor, " documents"]]]:
        """Per document: targets counted, and summed losses (nats) clean, ablated and per SAE.

        "zero" and "mean" replace the hook's rows by 0 and by the training mean.
        """
        mean = mean.to(self.lm.device)
        replacements = {
            "clean": None,
            "zero": torch.zeros_like,
            "mean": lambda x: mean.to(x.dtype).expand_as(x),
            **saes,
        }
        n = torch.zeros(self.n_documents, dtype=torch.float64)
        sums = {name: torch.zeros_like(n) for name in replacements}
        batches = take_tokens(self.batches, n_tokens)
        for batch in tqdm(batches, desc="cross-entropy", unit="batch"):
            losses, counted = cross_entropies(
                self.lm, batch, self.hook_name, replacements, max_norm=self.max_norm
            )
            counted = counted.cpu()
            document = batch.document[:, :-1][counted]
            n.index_add_(0, document, torch.ones_like(document, dtype=torch.float64))
            for name, loss in losses.items():
                sums[name].index_add_(0, document, loss.cpu()[counted].double())
        return n, sums


class Measured(NamedTuple):
    """What was measured of one SAE."""

    row: dict[str, Any]
    """Flat numbers for summary.json."""
    n_firings: Int[Tensor, " d_sae"]
    """On how many of the `row["n_tokens_eval"]` rows each feature fired."""


def evaluate(
    evaluation: Evaluation,
    saes: dict[str, Dictionary],
    mean: Float[Tensor, " d_in"],
    n_tokens_ce: int,
) -> dict[str, Measured]:
    """Held-out numbers of SAEs on raw activations, by name.

    `mean` (d_in) is what mean-ablation writes; it comes from training tokens.
    """
    inputs, sums = evaluation.reconstruction(saes)
    n_rows = int(inputs.n.sum())
    n_targets, losses = evaluation.cross_entropy(saes, mean, n_tokens_ce)
    weights = bootstrap_weights(inputs.n > 0, N_DRAWS, torch.Generator().manual_seed(0))
    weights_ce = bootstrap_weights(n_targets > 0, N_DRAWS, torch.Generator().manual_seed(0))
    measured = {}
    for name, one in sums.items():
        row = {
            "n_tokens_eval": n_rows,
            "n_documents_eval": int((inputs.n > 0).sum()),
            **_spread("l0", mean_per_row(one.n_active, inputs.n, weights)),
            **_spread("fvu", fvu(one.squared_error, inputs, weights)),
            "mse": one.squared_error.sum().item() / n_rows,
            "dead_fraction": (one.n_firings == 0).float().mean().item(),
            "n_tokens_dead": n_rows,
        }
        row |= _cross_entropy_row(losses, name, n_targets, weights_ce)
        measured[name] = Measured(row, one.n_firings)
    return measured


def _spread(name: str, estimate: Interval) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _cross_entropy_row(
    losses: dict[str, Float[Tensor, " documents"]],
    name: str,
    n_targets: Float[Tensor, " documents"],
    weights: Float[Tensor, "draws documents"],
) -> dict[str, Any]:
    draws = {key: (weights @ value) / (weights @ n_targets) for key, value in losses.items()}
    lost = draws[name] - draws["clean"]
    values = {key: draws[key][0].item() for key in ("clean", "zero", "mean")}
    row = {f"ce_{key}": value for key, value in values.items()}
    row |= {"ce_sae": draws[name][0].item(), "n_tokens_ce": int(n_targets.sum())}
    row |= _spread("nats_lost", interval(lost))
    row |= _spread("ce_recovered", interval(1 - lost / (draws["zero"] - draws["clean"])))
    row["ce_recovered_mean"] = 1 - lost[0].item() / (values["mean"] - values["clean"])
    return row


def density_histogram(
    n_firings: Int[Tensor, " d_sae"], n_rows: int, bin_width: float = 0.25
) -> list[dict[str, Any]]:
    """Histogram of log10(firing rate) in long form; edges of None count the silent features."""
    n_bins = math.ceil(math.log10(n_rows) / bin_width)
    edges = [-(n_bins - i) * bin_width for i in range(n_bins + 1)]
    rates = (n_firings[n_firings > 0].cpu().double() / n_rows).log10()
    # a rate of exactly 1 belongs to the last bin
    bins = ((rates - edges[0]) / bin_width).long().clamp(0, n_bins - 1)
    counts = torch.bincount(bins, minlength=n_bins).tolist()
    edges_and_counts = [(None, None, int((n_firings == 0).sum()))]
    edges_and_counts += zip(edges[:-1], edges[1:], counts, strict=True)
    return [
        {"log10_density_low": low, "log10_density_high": high, "n_features": count,
         "n_tokens": n_rows}
        for low, high, count in edges_and_counts
    ]  # fmt: skip

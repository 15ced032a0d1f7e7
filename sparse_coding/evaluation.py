"""Held-out numbers of SAEs on one hook: reconstruction, and what the model loses with them.

All intervals are 95 % percentile intervals of a bootstrap over documents, the same draws for every
SAE: differences between SAEs are paired.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from sparse_coding.config import hooks_of
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.harvest import NormLimit, activations, kept_rows
from sparse_coding.metrics import (
    ActivationSums,
    ReconstructionSums,
    bootstrap_weights,
    columns,
    dead_upper_bound,
    fvu,
    interval,
    mean_per_row,
)
from sparse_coding.models import LanguageModel
from sparse_coding.processes import ALONE, Processes
from sparse_coding.splice import Alone, Replacement, Target, cross_entropies
from sparse_coding.text import TokenBatch

N_DRAWS = 1000
ROWS_AT_ONCE = 1024  # bounds the (rows, d_sae) tensors
KINDS = ("fvu", "fvu_without_outliers", "fvu_standardised")
DENSE = 0.1  # a feature that fires on more than this share of rows is called dense


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


class Reconstructions(NamedTuple):
    """Sums over one hook's held-out rows."""

    weightings: tuple[str, ...]
    """What the rows of the sums' `dimension_weights` are called as FVUs."""
    inputs: ActivationSums
    kept: dict[str, ReconstructionSums]
    """By dictionary, over the rows that count."""
    excluded_inputs: ActivationSums
    excluded: dict[str, ReconstructionSums]
    """Over the other rows (first positions, special tokens, sinks), all as one document."""


class Losses(NamedTuple):
    """Sums over a document's counted targets, one entry a document."""

    n: Float[Tensor, " documents"]
    cross_entropy: dict[str, Float[Tensor, " documents"]]
    kl: dict[str, Float[Tensor, " documents"]]


class Firing(NamedTuple):
    """A feature's activation on a token, and the tokens of its document around it."""

    activation: float
    tokens: list[int]
    place: int
    """Of the token that it fires on among `tokens`."""


class Evaluation:
    """One hook's held-out batches; measures any number of dictionaries in one pass over them.

    The same rows count everywhere: `valid` positions (no first position, no special token) whose
    norm is at most `max_norm`, the harvest's own rule. `variance` (d_in), per dimension and from
    training rows, adds two kinds of FVU: without the two dimensions of the largest variance, and
    with every dimension divided by its variance. With a `target` the dictionaries are transcoders
    from the hook to it: rows count that count at both, and all numbers but L0 are the target's.

    Of crosscoders `hook_name` is all their hooks, joined; rows count that count at all of them.
    `fvu` and `mse` are in the units of training, in which the hooks count alike; each hook has an
    FVU of its own as well. The other numbers are of the joined raw rows.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hook_name: str,
        batches: list[TokenBatch],
        max_norm: float | Sequence[NormLimit],
        variance: Float[Tensor, " d_out"] | None = None,
        target: Target | None = None,
    ) -> None:
        self.target = target
        self.lm, self.hook_name, self.batches, self.max_norm = lm, hook_name, batches, max_norm
        self.n_documents = 1 + max(int(batch.document.max()) for batch in batches)
        self.variance = variance

    def reconstruction(self, dictionaries: dict[str, Dictionary]) -> Reconstructions:
        """Sums over all batches for everything but cross-entropies."""
        self._refuse_what_decodes_elsewhere(dictionaries)
        d_out = next(iter(dictionaries.values())).d_out
        named = self._weightings(dictionaries)
        weights = torch.stack(list(named.values()))
        sums = Reconstructions(
            tuple(named),
            ActivationSums(d_out, self.n_documents, weights),
            {k: ReconstructionSums(d, self.n_documents, weights) for k, d in dictionaries.items()},
            ActivationSums(d_out, 1),
            {k: ReconstructionSums(d, 1) for k, d in dictionaries.items()},
        )
        for batch in tqdm(self.batches, desc="reconstruction", unit="batch"):
            x, target, keep = self._rows(batch)
            document = batch.document.to(x.device)[keep]
            _count(x[keep], target[keep], document, sums.inputs, sums.kept)
            others = torch.zeros_like(document[:1]).expand(int((~keep).sum()))
            _count(x[~keep], target[~keep], others, sums.excluded_inputs, sums.excluded)
        return sums

    def _weightings(
        self, dictionaries: dict[str, Dictionary]
    ) -> dict[str, Float[Tensor, " d_out"]]:
        """Names of FVUs, and how much each dimension counts in them."""
        first = next(iter(dictionaries.values()))
        ones = torch.ones(first.d_out)
        if first.joins_hooks:
            of_hooks = torch.block_diag(*ones.split(first.widths))
            names = [f"fvu_{name}" for name in hooks_of(self.hook_name)]
            joint = first.scales.cpu().square() @ of_hooks
            return {"fvu": joint} | dict(zip(names, of_hooks, strict=True))
        if self.variance is None:
            return {"fvu": ones}
        return dict(zip(KINDS, _dimension_weights(self.variance), strict=True))

    def _rows(
        self, batch: TokenBatch
    ) -> tuple[
        Float[Tensor, "contexts position d_in"],
        Float[Tensor, "contexts position d_out"],
        Bool[Tensor, "contexts position"],
    ]:
        """What is encoded, what should be decoded, and which rows count."""
        names = [self.hook_name, *([self.target.hook_name] if self.target else [])]
        acts = activations(self.lm, batch.tokens, names)
        x, target = acts[names[0]].float(), acts[names[-1]].float()
        keep = kept_rows(x, batch.valid.to(x.device), self.max_norm)
        if self.target:
            keep = keep & kept_rows(target, keep, self.target.max_norm)
        return x, target, keep

    def _refuse_what_decodes_elsewhere(self, dictionaries: dict[str, Dictionary]) -> None:
        for name, dictionary in dictionaries.items():
            if dictionary.is_transcoder != (self.target is not None):
                raise UserError(
                    f"{name} is a transcoder: what it decodes does not belong to "
                    f"{self.hook_name}, which it encodes; name its target hook"
                    if dictionary.is_transcoder
                    else f"{name} is no transcoder; it cannot be measured at another hook"
                )

    def strongest(
        self, dictionary: Dictionary, features: Int[Tensor, " features"], n: int, radius: int = 8
    ) -> list[list["Firing"]]:
        """Of each feature its strongest firings, each in another document, at most n.

        Keeps rows x features numbers.
        """
        f, place, document = [], [], []
        for i, batch in enumerate(tqdm(self.batches, desc="contexts", unit="batch")):
            acts = activations(self.lm, batch.tokens, [self.hook_name])[self.hook_name]
            keep = kept_rows(acts, batch.valid.to(acts.device), self.max_norm)
            for part in acts[keep].float().split(ROWS_AT_ONCE):
                f.append(dictionary.encode(part)[:, features.to(part.device)].cpu())
            keep = keep.cpu()
            place += [(i, *where) for where in keep.nonzero().tolist()]
            document.append(batch.document[keep])
        values, of = torch.cat(f), torch.cat(document).numpy()
        found: list[list[Firing]] = []
        for column in values.T:
            order = column.argsort(descending=True, stable=True)
            _, first = np.unique(of[order], return_index=True)
            rows = order[np.sort(first)[:n]].tolist()
            found.append(
                [self._firing(*place[row], column[row].item(), radius) for row in rows
                 if column[row] > 0]
            )  # fmt: skip
        return found

    def _firing(
        self, batch: int, context: int, position: int, activation: float, radius: int
    ) -> "Firing":
        tokens, document, _ = (part[context] for part in self.batches[batch])
        begin = max(0, position - radius)
        around = slice(begin, position + radius + 1)
        same = document[around] == document[position]
        return Firing(
            activation, tokens[around][same].tolist(), int(same[: position - begin].sum())
        )

    def losses(
        self,
        dictionaries: dict[str, Dictionary],
        mean: Float[Tensor, " d_out"],
        n_tokens: int,
        random_error: bool = False,
    ) -> Losses:
        """Cross-entropies and divergences, clean, ablated and per dictionary.

        "zero" and "mean" replace the hook's rows by 0 and by `mean`. With `random_error`,
        "NAME/random error" is the control: rows plus an error of a random direction whose norm is
        that of the dictionary's own error on the row; of transcoders there is no such control. Of
        joined hooks, "NAME alone at HOOK" replaces one.
        """
        self._refuse_what_decodes_elsewhere(dictionaries)
        replacements = _ablations(mean.to(self.lm.device)) | dictionaries
        replacements |= self._parts(dictionaries)
        if random_error and self.target is None:
            replacements |= {_control(k): RandomError(d) for k, d in dictionaries.items()}
        sums = Losses(torch.zeros(self.n_documents, dtype=torch.float64), {}, {})
        batches = take_tokens(self.batches, n_tokens)
        for batch in tqdm(batches, desc="cross-entropy", unit="batch"):
            found = cross_entropies(
                self.lm,
                batch,
                self.hook_name,
                replacements,
                max_norm=self.max_norm,
                target=self.target,
            )
            counted = found.counted.cpu()
            document = batch.document[:, :-1][counted]
            sums.n.index_add_(0, document, torch.ones_like(document, dtype=torch.float64))
            pairs = ((sums.cross_entropy, found.cross_entropy), (sums.kl, found.kl))
            for total, new in pairs:
                for name, values in new.items():
                    into = total.setdefault(name, torch.zeros_like(sums.n))
                    into.index_add_(0, document, values.cpu()[counted].double())
        return sums

    def _parts(self, dictionaries: dict[str, Dictionary]) -> dict[str, Alone]:
        """Of joined hooks each alone."""
        names = hooks_of(self.hook_name)
        return {
            _alone(k, name): Alone(d, name)
            for name in (names if len(names) > 1 else ())
            for k, d in dictionaries.items()
        }


def _ablations(mean: Float[Tensor, " d_out"]) -> dict[str, Replacement | Alone | None]:
    return {
        "clean": None,
        "zero": lambda x: torch.zeros_like(mean, dtype=x.dtype).expand(len(x), -1),
        "mean": lambda x: mean.to(x.dtype).expand(len(x), -1),
    }


def _dimension_weights(variance: Float[Tensor, " d_in"]) -> Float[Tensor, "3 d_in"]:
    """All dimensions alike; without the two of the largest variance; divided by the variance."""
    ones = torch.ones_like(variance)
    without = ones.scatter(0, variance.topk(min(2, len(variance))).indices, 0.0)
    return torch.stack([ones, without, 1 / variance.clamp_min(torch.finfo(variance.dtype).tiny)])


def _count(
    x: Float[Tensor, "rows d_in"],
    target: Float[Tensor, "rows d_out"],
    document: Int[Tensor, " rows"],
    inputs: ActivationSums,
    sums: dict[str, ReconstructionSums],
) -> None:
    inputs.add(target, document)
    parts = [rows.split(ROWS_AT_ONCE) for rows in (x, document, target)]
    for one in sums.values():
        for part in zip(*parts, strict=True):
            one.add(*part)


def _control(name: str) -> str:
    return f"{name}/random error"


def _alone(name: str, hook_name: str) -> str:
    return f"{name} alone at {hook_name}"


class RandomError:
    """x plus noise of a uniformly random direction and of the norm of the dictionary's error.

    Of a crosscoder at each hook.
    """

    def __init__(self, dictionary: Dictionary) -> None:
        self.dictionary = dictionary
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        widths = self.dictionary.widths if self.dictionary.joins_hooks else [x.shape[1]]
        noise = torch.randn(x.shape, generator=self.generator).to(x)
        errors = [part.split(widths, dim=1) for part in (x - self.dictionary(x), noise)]
        norms = [[one.norm(dim=1, keepdim=True) for one in parts] for parts in errors]
        scaled = [n * (to / of) for n, to, of in zip(errors[1], *norms, strict=True)]
        return x + torch.cat(scaled, dim=1)


class Measured(NamedTuple):
    """What was measured of one SAE."""

    row: dict[str, Any]
    """Flat numbers for summary.json."""
    n_firings: Int[Tensor, " d_sae"]
    """On how many of the `row["n_tokens_eval"]` rows each feature fired."""


def evaluate(
    evaluation: Evaluation,
    dictionaries: dict[str, Dictionary],
    mean: Float[Tensor, " d_out"],
    n_tokens_ce: int,
    random_error: bool = False,
    processes: Processes = ALONE,
) -> dict[str, Measured]:
    """Held-out numbers of dictionaries of raw activations, by name.

    `mean` (d_out) is what mean-ablation writes; it comes from training tokens. `random_error` adds
    the control of the same name. Each process measures some of the dictionaries and gets all
    results.
    """
    own = dict(list(dictionaries.items())[processes.rank :: processes.size])
    measured = _measured(evaluation, own, mean, n_tokens_ce, random_error) if own else {}
    everybodys = {k: v for one in processes.gathered(measured) for k, v in one.items()}
    return {name: everybodys[name] for name in dictionaries}


def _measured(
    evaluation: Evaluation,
    dictionaries: dict[str, Dictionary],
    mean: Float[Tensor, " d_out"],
    n_tokens_ce: int,
    random_error: bool,
) -> dict[str, Measured]:
    sums = evaluation.reconstruction(dictionaries)
    losses = evaluation.losses(dictionaries, mean, n_tokens_ce, random_error)
    weights, weights_ce = (
        bootstrap_weights(n > 0, N_DRAWS, torch.Generator().manual_seed(0))
        for n in (sums.inputs.n, losses.n)
    )
    return {
        name: Measured(
            _reconstruction_row(sums, name, weights) | _loss_row(losses, name, weights_ce),
            sums.kept[name].n_firings,
        )
        for name in dictionaries
    }


def _reconstruction_row(
    sums: Reconstructions, name: str, weights: Float[Tensor, "draws documents"]
) -> dict[str, Any]:
    inputs, one, other = sums.inputs, sums.kept[name], sums.excluded[name]
    n_rows, n_excluded = int(inputs.n.sum()), int(sums.excluded_inputs.n.sum())
    n_documents = int((inputs.n > 0).sum())
    row = {"n_tokens_eval": n_rows, "n_documents_eval": n_documents}
    row |= columns("l0", mean_per_row(one.rows["n_active"], inputs.n, weights))
    row |= {f"l0_p{q:02d}": _quantile(one.l0_counts, q / 100) for q in (5, 25, 50, 75, 95)}
    for weighting, kind in enumerate(sums.weightings):
        row |= columns(kind, fvu(one, inputs, weights, weighting))
    squared_error = one.squared_error[0].sum().item()
    row |= {"mse": squared_error / n_rows, "mse_per_dimension": squared_error / n_rows / one.d_in}
    for key in ("l1", "cosine", "l2_ratio"):
        row |= columns(key, mean_per_row(one.rows[key], inputs.n, weights))
    bias = (weights @ one.rows["x_hat_square"]) / (weights @ one.rows["x_dot_x_hat"])
    row |= columns("reconstruction_bias", interval(bias))
    rate = one.n_firings / n_rows
    return row | {
        "dead_fraction": (one.n_firings == 0).float().mean().item(),
        "n_tokens_dead": n_rows,
        "dead_rate_below": dead_upper_bound(n_rows),
        "dense_fraction": (rate > DENSE).float().mean().item(),
        "n_tokens_excluded": n_excluded,
        "l0_excluded": other.rows["n_active"].sum().item() / max(n_excluded, 1),
        "relative_error_excluded": _ratio(other.squared_error[0], sums.excluded_inputs.square[0]),
    }


def _loss_row(
    losses: Losses, name: str, weights: Float[Tensor, "draws documents"]
) -> dict[str, Any]:
    n = weights @ losses.n
    ce = {key: (weights @ value) / n for key, value in losses.cross_entropy.items()}
    lost = ce[name] - ce["clean"]
    row = {f"ce_{key}": ce[key][0].item() for key in ("clean", "zero", "mean")}
    row |= {"ce_sae": ce[name][0].item(), "n_tokens_ce": int(losses.n.sum())}
    row |= columns("nats_lost", interval(lost))
    row |= columns("kl", interval((weights @ losses.kl[name]) / n))
    row |= columns("ce_recovered", interval(1 - lost / (ce["zero"] - ce["clean"])))
    row |= columns("ce_recovered_mean", interval(1 - lost / (ce["mean"] - ce["clean"])))
    for key in ce:
        before, _, hook_name = key.partition(_alone("", ""))
        if before == name and hook_name:
            row |= columns(f"nats_lost_{hook_name}", interval(ce[key] - ce["clean"]))
    control = _control(name)
    if control in ce:
        row |= columns("nats_lost_random_error", interval(ce[control] - ce["clean"]))
        row |= columns("kl_random_error", interval((weights @ losses.kl[control]) / n))
    return row


def _quantile(counts: Int[Tensor, " values"], q: float) -> int:
    """Smallest value that at least a share q of the counted are at or below."""
    below = counts.cumsum(0)
    return int((below < q * below[-1]).sum())


def _ratio(over: Float[Tensor, " n"], under: Float[Tensor, " n"]) -> float | None:
    total = under.sum().item()
    return over.sum().item() / total if total else None

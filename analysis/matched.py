"""Dictionaries at an SAE's sparsity: fitted to training rows, cut to k per token, measured.

Everything is measured on the same held-out rows, and intervals of differences come from the same
draws of documents. No SAE is trained here.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from analysis.controls import TrainingActivations
from sparse_coding.baselines import (
    PerTokenTopK,
    covariance,
    ica,
    least_squares_gain,
    neuron_basis,
    pca,
    random_directions,
    random_rotation,
    whitened_random_directions,
)
from sparse_coding.dictionary import Dictionary
from sparse_coding.evaluation import (
    N_DRAWS,
    Evaluation,
    Losses,
    Reconstructions,
    evaluate,
    take_tokens,
)
from sparse_coding.metrics import bootstrap_weights, columns, interval
from sparse_coding.text import TokenBatch

Row = dict[str, Any]
REACH = 16  # contexts are drawn from so many times the text that is measured
BATCH_CONTEXTS = 16


def scattered(
    batches: Iterable[TokenBatch], n_tokens: int, generator: torch.Generator
) -> list[TokenBatch]:
    """Contexts with at least `n_tokens` valid positions, drawn from 16 times as much text.

    Documents are what a bootstrap draws: as many tokens in a row are of far fewer of them.
    """
    read = take_tokens(batches, REACH * n_tokens)
    whole = TokenBatch(*(torch.cat(parts) for parts in zip(*read, strict=True)))
    order = torch.randperm(len(whole.tokens), generator=generator)
    drawn = [TokenBatch(*(part[i] for part in whole)) for i in order.split(BATCH_CONTEXTS)]
    return take_tokens(drawn, n_tokens)


class Families:
    """What needs no SAE, fitted to one model's training activations, at any number k per token."""

    def __init__(
        self,
        activations: TrainingActivations,
        names: Sequence[str],
        n_tokens_ica: int,
        ica_iterations: int,
        seed: int,
    ) -> None:
        self.names, self.seed = names, seed
        self.device = activations.material.lm.device
        self.x = activations.sample()
        n_distinct = min(activations.n_tokens, activations.cache.n_tokens)
        self.data = covariance(activations.batches(), n_distinct)
        self.facts: dict[str, Row] = {name: {"n_tokens_fit": self.data.n} for name in names}
        if "ica" in names:
            rows = activations.sample(n_tokens_ica)[:n_tokens_ica]
            self.ica = ica(rows, seed, ica_iterations, shows_progress=True)
            self.facts["ica"] = {
                "n_tokens_fit": len(rows),
                "n_iterations_fit": self.ica.n_iterations,
                "has_converged": self.ica.has_converged,
            }

    def of_size(
        self, d_sae: int, k: int, seed: int | None = None, names: Sequence[str] = ()
    ) -> dict[str, Dictionary]:
        """The families by name, or some of them; with another `seed` random ones are others.

        Bases are as wide as x. Random directions are as many as an SAE of `d_sae` features has
        signed ones; `pca_leading` is the k axes of the largest variance for all tokens.
        """
        data, n = self.data, d_sae // 2

        def draw() -> torch.Generator:
            return torch.Generator().manual_seed(self.seed if seed is None else seed)

        make: dict[str, Callable[[], Dictionary]] = {
            "pca": lambda: pca(data),
            "pca_leading": lambda: pca(data, k),
            "ica": lambda: self.ica.dictionary,
            "neuron_basis": lambda: neuron_basis(data.mean),
            "random_rotation": lambda: random_rotation(data.mean, draw()),
            "random_directions": lambda: random_directions(data.mean, n, draw()),
            "whitened_random": lambda: whitened_random_directions(data, n, draw()),
        }
        return {name: make[name]().to(self.device) for name in names or self.names}


class Entry(NamedTuple):
    """One dictionary that is set against one SAE."""

    key: str
    """Equal keys are equal dictionaries: measured once."""
    reference: str
    """The SAE's key."""
    dictionary: Dictionary
    facts: Row


def entries(name: str, k: int, own: dict[str, Dictionary], families: Families) -> Iterator[Entry]:
    """An SAE as it is; then it, its controls and the families with k features per token.

    `own` holds the SAE as "sae" and its controls. They have tokens with fewer than k active
    features and are left with a smaller L0, which is reported.
    """
    reference = f"sae/{name}"
    yield Entry(reference, reference, own["sae"], {"family": "sae", "k": None, "gain": None})
    fitted = families.of_size(own["sae"].d_sae, k)
    compared = {f"{family}/{name}": dictionary for family, dictionary in own.items()}
    compared |= {f"{family}/{one.d_sae}": one for family, one in fitted.items()}
    for key, dictionary in compared.items():
        family = key.partition("/")[0]
        gain = least_squares_gain(PerTokenTopK(dictionary, k), families.x)
        facts = {"family": family, "k": k, "gain": gain} | families.facts.get(family, {})
        yield Entry(f"{key}/k{k}", reference, PerTokenTopK(dictionary, k, gain), facts)


class PairedEvaluation(Evaluation):
    """Keeps its sums, so that differences between what was measured have intervals too."""

    def reconstruction(self, dictionaries: dict[str, Dictionary]) -> Reconstructions:
        self.sums = super().reconstruction(dictionaries)
        return self.sums

    def losses(self, *args: Any, **kwargs: Any) -> Losses:
        self.loss_sums = super().losses(*args, **kwargs)
        return self.loss_sums

    def l0(self, saes: dict[str, Dictionary]) -> dict[str, float]:
        """Mean active features per row."""
        sums = super().reconstruction(saes)
        n = sums.inputs.n.sum()
        return {name: (kept.rows["n_active"].sum() / n).item() for name, kept in sums.kept.items()}

    def difference(self, key: str, reference: str) -> Row:
        """FVU and nats lost of one dictionary minus those of another, documents drawn alike."""
        sums, losses = self.sums, self.loss_sums
        error = sums.kept[key].squared_error[0] - sums.kept[reference].squared_error[0]
        lost = losses.cross_entropy[key] - losses.cross_entropy[reference]
        weights, weights_ce = _draws(sums.inputs.n), _draws(losses.n)
        fvu = (weights @ error) / sums.inputs.total_variance(weights)
        nats = (weights_ce @ lost) / (weights_ce @ losses.n)
        return columns("fvu_minus_sae", interval(fvu)) | columns(
            "nats_lost_minus_sae", interval(nats)
        )


def _draws(n: Float[Tensor, " documents"]) -> Float[Tensor, "draws documents"]:
    return bootstrap_weights(n > 0, N_DRAWS, torch.Generator().manual_seed(0))


def measure(
    evaluation: PairedEvaluation,
    compared: Sequence[Entry],
    mean: Float[Tensor, " d_in"],
    n_tokens_ce: int,
) -> list[Row]:
    """One row per entry: `evaluate`'s numbers, and the differences from its SAE."""
    dictionaries = {entry.key: entry.dictionary for entry in compared}
    measured = evaluate(evaluation, dictionaries, mean, n_tokens_ce)
    n_documents_ce = int((evaluation.loss_sums.n > 0).sum())
    return [
        entry.facts
        | {"d_sae": entry.dictionary.d_sae, "split": "heldout"}
        | measured[entry.key].row
        | {"n_documents_ce": n_documents_ce}
        | evaluation.difference(entry.key, entry.reference)
        for entry in compared
    ]

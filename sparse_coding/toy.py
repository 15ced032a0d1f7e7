"""Toy activations with known features, scores against that truth, and a model that superposes.

Rows are `x = sum_i a_i direction_i + noise` with more directions than dimensions and few non-zero
a_i. No dictionary is trained and no file is read here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.stats import norm, rankdata
from torch import Tensor, nn

from sparse_coding.consistency import matched_cosine, max_cosine, one_to_one, unit_rows
from sparse_coding.errors import UserError
from sparse_coding.sources import ActivationSource

N_FACTORS = 4  # causes that correlated features share; few, so that some pairs agree strongly
RECOVERED, FALSE = 0.9, 0.5  # cosines: above, a feature is found; below, it is none of the truth's


@dataclass(frozen=True)
class ToySetting:
    """What toy activations are like, after Sharkey, Braun and Millidge (2022).

    "Taking features out of superposition with sparse autoencoders", section on toy data; also
    Cunningham et al. (2023), arXiv 2309.08600. Differences: frequencies fall as a power (theirs
    geometrically); correlated features fire by a Gaussian copula anew in every row, so that the
    frequencies hold exactly; rows without any feature stay.
    """

    d_in: int = 32
    n_features: int = 64
    """True directions, uniform on the unit sphere."""
    l0: float = 3.0
    """Mean true features per row."""
    zipf: float = 0.0
    """Exponent s of the frequencies: the i-th commonest feature fires (i + 1)^-s as often."""
    correlation: float = 0.0
    """Share of what decides a firing that is common to features, in [0, 1)."""
    n_children: int = 0
    """Children per parent: features that fire only where their parent does; 0: no hierarchy."""
    child_rate: float = 0.3
    """How often a child fires where its parent does."""
    magnitude_low: float = 0.5
    magnitude_high: float = 1.5
    """Activations a_i of firing features are uniform between the two."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise per dimension."""

    def __post_init__(self) -> None:
        for name in ("d_in", "n_features", "l0", "magnitude_high"):
            self._refuse_unless(getattr(self, name) > 0, name, "more than 0")
        for name in ("zipf", "n_children", "noise", "magnitude_low"):
            self._refuse_unless(getattr(self, name) >= 0, name, "0 or more")
        self._refuse_unless(0 <= self.correlation < 1, "correlation", "in [0, 1)")
        self._refuse_unless(0 < self.child_rate <= 1, "child_rate", "in (0, 1]")
        family = 1 + self.n_children
        divides = self.n_features % family == 0
        self._refuse_unless(divides, "n_features", f"a multiple of 1 + n_children = {family}")
        highest = float(self.frequencies().max())
        limit = f"at most {self.l0 / highest:.3g}, or a feature would fire in over 100 % of rows"
        self._refuse_unless(highest <= 1, "l0", limit)

    def _refuse_unless(self, condition: bool, field: str, allowed: str) -> None:
        if not condition:
            given = getattr(self, field)
            raise UserError(f"toy data: {field} {given} is not possible; it must be {allowed}")

    @property
    def n_roots(self) -> int:
        """Features without a parent; feature i >= n_roots is a child of feature i % n_roots."""
        return self.n_features // (1 + self.n_children)

    def frequencies(self) -> Float[np.ndarray, " n_features"]:
        """Share of rows in which each feature fires; they sum to l0."""
        feature = np.arange(self.n_features)
        weights = (1.0 + feature % self.n_roots) ** -self.zipf
        weights[self.n_roots :] *= self.child_rate
        return self.l0 * weights / weights.sum()


class ToyTruth(NamedTuple):
    """The features behind a stream of toy activations."""

    setting: ToySetting
    directions: Float[Tensor, "n_features d_in"]
    """What a feature writes per unit of its activation; unit rows unless replaced."""
    loadings: Float[np.ndarray, "n_features factors"]
    """Unit rows: how a feature answers to the common causes of correlated firing."""


def toy_truth(setting: ToySetting, seed: int) -> ToyTruth:
    """Random directions, and random causes whose covariance is that of the firing."""
    rng = _random(0, seed)
    directions, loadings = (
        rng.standard_normal((setting.n_features, width)) for width in (setting.d_in, N_FACTORS)
    )
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    loadings /= np.linalg.norm(loadings, axis=1, keepdims=True)
    return ToyTruth(setting, torch.from_numpy(directions).float(), loadings.astype(np.float32))


def _random(number: int, seed: int) -> np.random.Generator:
    """Independent generators per (number, seed); torch's on a CPU reads only 32 bits of a seed."""
    return np.random.default_rng((number, seed))


class ToyActivations(ActivationSource):
    """Endless batches of toy activations; batch number n is a function of (truth, seed, n).

    Nothing is kept: the position is one integer. Streams of different seeds over the same truth
    are fresh data for each other.
    """

    def __init__(self, truth: ToyTruth, batch_tokens: int, seed: int) -> None:
        self.truth, self.batch_tokens, self.seed = truth, batch_tokens, seed
        self.d_in = truth.setting.d_in
        self.n_delivered = 0
        setting = truth.setting
        rates = setting.frequencies()
        rates[setting.n_roots :] = setting.child_rate  # given that the parent fires
        self._thresholds = norm.isf(rates).astype(np.float32)

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        while True:
            x, _ = self.batch(self.n_delivered)
            self.n_delivered += 1  # before the batch is used: its user may save
            yield x

    def batch(
        self, number: int
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch n_features"]]:
        """Batch `number`, counted from 0, and the true features' activations a in it."""
        setting = self.truth.setting
        rng = _random(1 + number, self.seed)
        on = self._firing(rng)
        low, high = setting.magnitude_low, setting.magnitude_high
        a = torch.from_numpy(on * (low + (high - low) * rng.random(on.shape, dtype=np.float32)))
        a = a.to(self.truth.directions.device)
        x = a @ self.truth.directions
        if setting.noise:
            noise = rng.standard_normal(x.shape, dtype=np.float32)
            x += setting.noise * torch.from_numpy(noise).to(x.device)
        return x, a

    def _firing(self, rng: np.random.Generator) -> Bool[np.ndarray, "batch n_features"]:
        """Where normal variables exceed the thresholds that give each feature its frequency.

        Roots share causes: z = sqrt(1 - c) own + sqrt(c) common, with correlations c L L^T off the
        diagonal for loadings L. Children have only their own, so that they too fire at their rate.
        """
        setting = self.truth.setting
        n_rows, n_roots, c = self.batch_tokens, setting.n_roots, setting.correlation
        z = rng.standard_normal((n_rows, setting.n_features), dtype=np.float32)
        if c:
            causes = rng.standard_normal((n_rows, N_FACTORS), dtype=np.float32)
            common = causes @ self.truth.loadings[:n_roots].T
            z[:, :n_roots] = (1 - c) ** 0.5 * z[:, :n_roots] + c**0.5 * common
        on = z > self._thresholds
        on[:, n_roots:] &= np.tile(on[:, :n_roots], setting.n_children)
        return on

    def state_dict(self) -> dict[str, int]:
        return {"n_delivered": self.n_delivered, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.n_delivered, self.seed = state["n_delivered"], state["seed"]


class Match(NamedTuple):
    """How directions of a dictionary agree with true ones; every cosine is signed."""

    mmcs_truth: float
    """Mean over true features of the largest cosine to a dictionary feature."""
    mmcs_dictionary: float
    """Mean over dictionary features of the largest cosine to a true one."""
    recovered_70: float
    recovered_90: float
    """Share of true features with a cosine above 0.7, 0.9 to some dictionary feature."""
    n_false: int
    """Dictionary features whose largest cosine to a true one is below 0.5."""
    hungarian: float
    """Mean cosine of the best one-to-one assignment, 0 for true features left without partner."""


def match_truth(
    truth: Float[Tensor, "n_features d_in"], rows: Float[Tensor, "n_rows d_in"]
) -> Match:
    """Scores of a dictionary's decoder rows; all 1 (no false ones) iff they are the truth.

    Pass the rows of features that fire at all: a dead feature finds nothing. For what chance
    gives, pass random rows.
    """
    if len(rows) == 0:
        return Match(0.0, 0.0, 0.0, 0.0, 0, 0.0)
    of_truth, of_rows = (best.value for best in max_cosine(truth.double(), rows.double()))
    return Match(
        float(of_truth.mean()),
        float(of_rows.mean()),
        float((of_truth > 0.7).mean()),
        float((of_truth > RECOVERED).mean()),
        int((of_rows < FALSE).sum()),
        matched_cosine(truth.double(), rows.double()).sum().item() / len(truth),
    )


def assignment(
    truth: Float[Tensor, "n_features d_in"], rows: Float[Tensor, "n_rows d_in"]
) -> tuple[np.ndarray, np.ndarray]:
    """The one-to-one pairs (true feature, row) with the largest sum of cosines."""
    return one_to_one((unit_rows(truth) @ unit_rows(rows).T).numpy())


class Detection(NamedTuple):
    """How well features' activations tell when true features fire; means over true features."""

    f1: float
    """Harmonic mean of precision and recall of f > 0."""
    auroc: float
    """Chance that f is larger where the true feature fires than where not; ties count half."""


def detection(f: Float[Tensor, "rows n"], a: Float[Tensor, "rows n"]) -> Detection:
    """Scores of column i of f as a detector of a_i > 0; a column of zeros has F1 0, AUROC 0.5.

    True features that fire in all rows or in none are left out; `UserError` if that leaves none.
    """
    on = a.cpu().numpy() > 0
    tested = on.any(axis=0) & ~on.all(axis=0)
    if not tested.any():
        raise UserError(
            f"in {len(on)} rows every true feature fires always or never, so that its detection "
            "cannot be scored; give more rows or another l0"
        )
    on, f = on[:, tested], f.detach().cpu().numpy()[:, tested]
    n_on = on.sum(axis=0)
    f1 = 2 * (on & (f > 0)).sum(axis=0) / (n_on + (f > 0).sum(axis=0))
    n_above = (rankdata(f, axis=0) * on).sum(axis=0) - n_on * (n_on + 1) / 2
    auroc = n_above / (n_on * (len(on) - n_on))
    return Detection(float(f1.mean()), float(auroc.mean()))


class SuperpositionModels(nn.Module):
    """Elhage et al. (2022), arXiv 2209.10652, section 2: several toy models side by side.

    h = x W,   x_hat = relu(h W^T + b),   loss = mean_batch( sum_i importance_i (x_i - x_hat_i)^2 )

    Row i of a model's W (n_features, d_hidden) is where it puts feature i (the paper's column).
    """

    def __init__(
        self, n_models: int, n_features: int, d_hidden: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        W = torch.randn(n_models, n_features, d_hidden, generator=generator)
        self.W = nn.Parameter(W / n_features**0.5)
        self.b = nn.Parameter(torch.zeros(n_models, 1, n_features))

    def forward(
        self, x: Float[Tensor, "n_models batch n_features"]
    ) -> Float[Tensor, "n_models batch n_features"]:
        return torch.relu(torch.baddbmm(self.b, x @ self.W, self.W.mT))

    def loss(
        self,
        x: Float[Tensor, "n_models batch n_features"],
        importance: Float[Tensor, " n_features"],
    ) -> Float[Tensor, " n_models"]:
        """Each model's loss on its own batch."""
        return (importance * (x - self(x)).square()).sum(dim=2).mean(dim=1)


def feature_dimensionality(
    W: Float[Tensor, "*models n_features d_hidden"],
) -> Float[Tensor, "*models n_features"]:
    """D_i = ||W_i||^2 / sum_j (W_i / ||W_i|| . W_j)^2: feature i's share of a dimension.

    Elhage et al. (2022), section "The geometry of superposition". In [0, 1]: 1 alone in its
    direction, 1/2 in an antipodal pair, 0 for a feature that is not represented (W_i = 0).
    """
    gram = (W @ W.mT).double()
    square = gram.diagonal(dim1=-2, dim2=-1)
    interference = gram.square().sum(dim=-1)
    return torch.where(square > 0, square.square() / interference, 0.0).to(W.dtype)

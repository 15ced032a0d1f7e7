"""Dictionaries that SAEs are compared with: bases, decompositions, random directions, controls.

A signed direction is two features, its positive and its negative half. What is fitted is fitted
to raw activations, on the CPU in float64, from one pass over a stream or from a sample of it.
Nothing here knows where activations come from, and no training happens here.
"""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from scipy.optimize import nnls
from torch import Tensor, nn
from tqdm import tqdm

from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.sae import SAE

MIN_EIGENVALUE = 1e-10  # of the largest; below it a direction of the data is rounding error
ROWS_AT_ONCE = 1024  # bounds the (rows, d_sae) tensors


class SplitDirections(Dictionary):
    """Signed directions, each as two half-rectified features (HoagyC's IdentityPositive).

    encode: f = relu([a, -a]),   a = (x - mean) W_enc
    decode: x_hat = (f_positive - f_negative) W_dec + mean,   ||W_dec[i]|| = 1

    Features i and d_sae / 2 + i are the halves of direction i; at most one of them is active. Rows
    are scaled to unit norm and their encoders inversely, so that |f| is what a feature writes.
    """

    def __init__(
        self,
        encoder: Float[Tensor, "d_in n"],
        decoder: Float[Tensor, "n d_in"],
        mean: Float[Tensor, " d_in"],
    ) -> None:
        super().__init__()
        self.d_sae, self.d_in = 2 * len(decoder), decoder.shape[1]
        norms = decoder.norm(dim=1)
        encoder, decoder = encoder * norms, decoder / norms[:, None]
        self.register_buffer("W_enc", torch.cat([encoder, -encoder], dim=1).float())
        self.register_buffer("W_dec", torch.cat([decoder, -decoder]).float())
        self.register_buffer("mean", mean.float())

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        a = (x - self.mean) @ self.W_enc[:, : self.d_sae // 2]
        return torch.relu(torch.cat([a, -a], dim=-1))

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        positive, negative = f.chunk(2, dim=-1)
        return (positive - negative) @ self.W_dec[: self.d_sae // 2] + self.mean


class PerTokenTopK(Dictionary):
    """Another dictionary of which each token keeps the k features that write most.

    encode: gain * f of the k largest |f_i| * ||W_dec[i]||, 0 elsewhere.   decode: as the other's.

    The matched-sparsity form of HoagyC's `to_topk_dict`: L0 is k wherever k features are active,
    and less where fewer are. On orthonormal directions it is the best choice of k of them.
    """

    def __init__(self, dictionary: Dictionary, k: int, gain: float = 1.0) -> None:
        super().__init__()
        if k < 1:
            raise UserError(f"k is {k}; it must be 1 or more")
        self.d_in, self.d_sae = dictionary.d_in, dictionary.d_sae
        self.dictionary, self.k, self.gain = dictionary, min(k, dictionary.d_sae), gain

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.dictionary.W_dec

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        f = self.dictionary.encode(x)
        largest = self.largest(f)
        return torch.zeros_like(f).scatter(-1, largest, self.gain * f.gather(-1, largest))

    def largest(self, f: Float[Tensor, "*batch d_sae"]) -> Int[Tensor, "*batch k"]:
        """The k features of each row that write most of what the other dictionary encoded as f."""
        return (f * self.W_dec.norm(dim=1)).abs_().topk(self.k, dim=-1).indices

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return self.dictionary.decode(f)


@torch.no_grad()
def least_squares_gain(dictionary: Dictionary, x: Float[Tensor, "n d_in"]) -> float:
    """The number that features are best multiplied by to write x, with decode(0) as the centre c.

    gain = sum (x - c) . (x_hat - c) / sum ||x_hat - c||^2

    What several oblique directions read of the same thing adds up: random ones write too much, and
    an L1 penalty makes an SAE write too little. Orthonormal directions have gain 1.
    """
    centre = dictionary.decode(dictionary.encode(x[:1]) * 0)
    dot = square = 0.0
    for rows in x.split(ROWS_AT_ONCE):
        written = dictionary(rows) - centre
        dot += ((rows - centre) * written).sum().item()
        square += written.square().sum().item()
    return dot / square if square else 1.0


class Covariance(NamedTuple):
    """Of n rows, with their mean; divided by n."""

    n: int
    mean: Float64[Tensor, " d_in"]
    matrix: Float64[Tensor, "d_in d_in"]


@torch.no_grad()
def covariance(batches: Iterable[Float[Tensor, "batch d_in"]], n_tokens: int) -> Covariance:
    """Covariance of the first `n_tokens` rows, or of all there are, in one pass.

    Sums are of differences from the first batch's mean: a stream's mean may be much larger than
    its spread, and squares of it would cancel.
    """
    n, shift = 0, None
    for batch in batches:
        x = batch[: n_tokens - n].cpu().double()
        if shift is None:
            shift = x.mean(dim=0)
            total, products = torch.zeros_like(shift), torch.zeros(2 * shift.shape).double()
        x = x - shift
        total += x.sum(dim=0)
        products.addmm_(x.T, x)
        n += len(x)
        if n == n_tokens:
            break
    if n < 2:
        raise UserError(f"{n} activations have no covariance; give 2 or more")
    offset = total / n
    return Covariance(n, shift + offset, products / n - torch.outer(offset, offset))


def neuron_basis(mean: Float[Tensor, " d_in"]) -> SplitDirections:
    """The coordinate axes of the activations around `mean` (0: the raw values' two halves)."""
    axes = torch.eye(len(mean), dtype=torch.float64)
    return SplitDirections(axes, axes, mean)


def random_rotation(mean: Float[Tensor, " d_in"], generator: torch.Generator) -> SplitDirections:
    """The axes of a rotation that is uniform over all rotations (QR of a Gaussian matrix).

    Reflections included; the signs of R's diagonal make QR's answer uniform (Mezzadri 2007,
    math-ph/0609050).
    """
    gaussian = torch.randn(len(mean), len(mean), dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    q *= r.diagonal().sign()
    return SplitDirections(q.T, q, mean)


def random_directions(
    mean: Float[Tensor, " d_in"], n: int, generator: torch.Generator
) -> SplitDirections:
    """n directions, uniform on the sphere, that read and write the same (HoagyC's RandomDict).

    They are not orthogonal: see `least_squares_gain`.
    """
    rows = torch.randn(n, len(mean), dtype=torch.float64, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    return SplitDirections(rows.T, rows, mean)


def whitened_random_directions(
    data: Covariance, n: int, generator: torch.Generator
) -> SplitDirections:
    """n directions, uniform on the sphere of the whitened data.

    With covariance U diag(s) U^T and z = diag(s)^(-1/2) U^T (x - mean), direction g reads g z and
    writes U diag(s)^(1/2) g: rows point where the data have variance.
    """
    s, u = _principal_axes(data)
    rows = torch.randn(n, len(s), dtype=torch.float64, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    return SplitDirections(u @ (rows / s.sqrt()).T, (rows * s.sqrt()) @ u.T, data.mean)


def pca(data: Covariance, n: int | None = None) -> SplitDirections:
    """The principal axes, largest variance first; the leading n if n is given."""
    u = torch.linalg.eigh(data.matrix).eigenvectors.flip(1)[:, :n]
    return SplitDirections(u, u.T, data.mean)


def _principal_axes(
    data: Covariance,
) -> tuple[Float64[Tensor, " rank"], Float64[Tensor, "d_in rank"]]:
    """Variances and axes, without those that are rounding error."""
    variances, axes = torch.linalg.eigh(data.matrix)
    kept = variances > MIN_EIGENVALUE * variances[-1]
    return variances[kept], axes[:, kept]


class ICA(NamedTuple):
    """What FastICA found, and whether it was done."""

    dictionary: SplitDirections
    n_iterations: int
    has_converged: bool


def ica(
    x: Float[Tensor, "n d_in"],
    seed: int,
    max_iter: int = 200,
    tol: float = 1e-4,
    shows_progress: bool = False,
) -> ICA:
    """Independent components of a sample: FastICA, all at once (Hyvarinen 1999, IEEE TNN 10(3)).

    On white z, with rotation W and g = tanh, repeat  W <- nearest rotation to
    E[g(W z) z^T] - diag(E[g'(W z)]) W  until no row turns by more than 1 - |cos| = `tol`.

    As many components as the sample has directions of non-zero variance. A component reads its
    source and writes that source's mixing direction. scikit-learn's FastICA does the same, but it
    then has LAPACK find the SVD of W, whose singular values are all 1: that fails now and then.
    """
    if len(x) <= x.shape[1]:
        raise UserError(f"{len(x)} activations are too few for ICA in {x.shape[1]} dimensions")
    data = covariance([x], len(x))
    variances, axes = _principal_axes(data)
    to_white = axes / variances.sqrt()
    z = (x.cpu().double() - data.mean) @ to_white
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(z.shape[1], z.shape[1], dtype=torch.float64, generator=generator)
    w = _nearest_rotation(w)
    n_iterations, change = 0, float("inf")
    with tqdm(total=max_iter, desc="ICA", unit="step", disable=not shows_progress) as progress:
        while change >= tol and n_iterations < max_iter:
            y = torch.tanh(z @ w.T)
            turned = y.T @ z / len(z) - (1 - y.square()).mean(dim=0)[:, None] * w
            turned = _nearest_rotation(turned)
            change = (1 - (turned * w).sum(dim=1).abs()).max().item()
            w, n_iterations = turned, n_iterations + 1
            progress.update()
    decoder = w @ (axes * variances.sqrt()).T
    return ICA(SplitDirections(to_white @ w.T, decoder, data.mean), n_iterations, change < tol)


def _nearest_rotation(w: Float64[Tensor, "n n"]) -> Float64[Tensor, "n n"]:
    """(W W^T)^(-1/2) W, reflections included."""
    s, u = torch.linalg.eigh(w @ w.T)
    s = s.clamp_min(torch.finfo(s.dtype).eps * s[-1])  # rounding may make them negative
    return (u / s.sqrt()) @ u.T @ w


class NonNegative(Dictionary):
    """Sums of non-negative parts above a floor, as non-negative matrix factorisation finds them.

    encode: f = argmin ||x - floor - f W_dec||^2 over f >= 0, each row exactly (Lawson and Hanson)
    decode: x_hat = f W_dec + floor
    """

    def __init__(self, W_dec: Float[Tensor, "d_sae d_in"], floor: Float[Tensor, " d_in"]) -> None:
        super().__init__()
        self.d_sae, self.d_in = W_dec.shape
        self.register_buffer("W_dec", W_dec.float())
        self.register_buffer("floor", floor.float())

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        parts = self.W_dec.T.double().cpu().numpy()
        rows = (x - self.floor).reshape(-1, self.d_in).double().cpu().numpy()
        f = np.array([nnls(parts, row)[0] for row in rows]).reshape(-1, self.d_sae)
        return torch.from_numpy(f).to(x).view(*x.shape[:-1], self.d_sae)

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return f @ self.W_dec + self.floor


def nmf(x: Float[Tensor, "n d_in"], n: int, seed: int, max_iter: int = 500) -> NonNegative:
    """Non-negative matrix factorisation of x above each dimension's smallest value, into n parts.

    Activations have both signs and the method does not: it sees x - min(x), as in HoagyC's
    comparisons, so that directions with negative entries are beyond it.
    """
    from sklearn.decomposition import NMF  # slow to import

    floor = x.min(dim=0).values
    fitted = NMF(n, random_state=seed, max_iter=max_iter, tol=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Maximum number of iterations")
        fitted.fit((x - floor).double().cpu().numpy())
    return NonNegative(torch.from_numpy(fitted.components_), floor.cpu())


class FrozenDecoder:
    """Mixin that trains an SAE's encoder and biases alone, its decoder staying as it began.

    Korznikov et al. (2026), arXiv 2602.14111: with random unit rows this is the control for what a
    learnt dictionary adds to a learnt encoder. Dead features are not resampled: that would teach
    the decoder.
    """

    resamples_dead = False
    has_unit_norm_rows = False  # rows do not move: no gradient to project, nothing to renormalise
    W_dec: nn.Parameter


def frozen_decoder(sae: SAE) -> SAE:
    """The same SAE with a decoder that does not learn; `UserError` if the encoder is the decoder.

    It trains in autograd's step: no fast one knows its class.
    """
    if not isinstance(getattr(sae, "W_enc", None), nn.Parameter):
        raise UserError(f"{sae.name} has no encoder of its own that could learn alone")
    cls = type(f"FrozenDecoder{type(sae).__name__}", (FrozenDecoder, type(sae)), {})
    frozen = cls(sae.d_in, sae.d_sae, torch.Generator(), **sae.settings)
    frozen.load_state_dict(sae.state_dict())
    frozen.W_dec.requires_grad_(False)
    return frozen.to(sae.W_dec.device, sae.W_dec.dtype)

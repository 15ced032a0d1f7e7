"""Sparse autoencoders, one class per paper: the reference mathematics as plain autograd PyTorch.

Notation: activations x (batch, d_in), features f (batch, d_sae), reconstruction x_hat. Row i of
`W_dec` (d_sae, d_in) and column i of `W_enc` (d_in, d_sae) belong to feature i.

All losses share one convention, so that one `l1_coeff` means the same in every class:

    loss = mean_batch( sum_d (x - x_hat)^2  +  l1_coeff * sum_i f_i * ||W_dec[i]|| )

on activations whose root-mean-square norm is sqrt(d_in). During training an SAE lives in those
scaled units; `fold_scale` then rewrites it for raw activations. Papers and libraries that average
the squared error over d_in instead have coefficients that are d_in times smaller.

No optimizer, no schedule and no device choice here: see `training`.
"""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_coding.dictionary import Dictionary


class Loss(NamedTuple):
    """What one batch costs: `total = mse + l1_coeff * l1`."""

    total: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    """Squared error, summed over d_in, mean over the batch."""
    l1: Float[Tensor, ""]
    """Sum over features of f_i * ||W_dec[i]||, mean over the batch."""
    f: Float[Tensor, "batch d_sae"]


class SAE(Dictionary):
    """A trainable ReLU dictionary; subclasses state their paper's encoder, loss and constraint.

    W_enc is stored feature-major (its transpose is contiguous): everything that treats one
    feature at a time then reads consecutive memory, in the encoder as in the decoder.
    """

    name: ClassVar[str]
    subtracts_b_dec: ClassVar[bool] = True
    has_unit_norm_rows: ClassVar[bool] = True
    resamples_dead: ClassVar[bool] = False

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        rows = torch.randn(d_sae, d_in, generator=generator)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """What the ReLU sees; linear in x."""
        centred = x - self.b_dec if self.subtracts_b_dec else x
        return centred @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(self.pre_activations(x))

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return f @ self.W_dec + self.b_dec

    def loss(self, x: Float[Tensor, "batch d_in"], l1_coeff: Float[Tensor, ""] | float) -> Loss:
        """The training loss of a batch of scaled activations."""
        f = self.encode(x)
        mse = (x - self.decode(f)).square().sum(dim=1).mean()
        l1 = self.sparsity(f).mean()
        return Loss(mse + l1_coeff * l1, mse, l1, f)

    def sparsity(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " batch"]:
        """The L1 penalty per row; decoder rows have unit norm unless a subclass says otherwise."""
        return f.sum(dim=1)

    @torch.no_grad()
    def initialise_centre(self, mean: Float[Tensor, " d_in"]) -> None:
        """Start from the data's mean (scaled units), so that x - mean is what gets encoded."""
        self.b_dec.copy_(mean)

    @torch.no_grad()
    def initialise_sparsity(
        self,
        x: Float[Tensor, "batch d_in"],
        l0: float,
        features: Int[Tensor, " chosen"] | None = None,
    ) -> None:
        """Lower the biases until each feature fires on a share l0 / d_sae of the rows of x.

        With zero biases a ReLU dictionary starts by firing half of its features on every token:
        at ratio 32 its first reconstruction is many times too large, and a run of a few hundred
        steps never recovers. None of the three papers does this. Biases are never raised, so
        l0 >= d_sae / 2 or so changes nothing. A feature is left at least one row: one that is
        silent on all of them would have no gradient. `features` restricts it (all by default).
        """
        if features is None:
            features = torch.arange(self.d_sae, device=x.device)
        n_firing = max(1, round(len(x) * l0 / self.d_sae))
        if n_firing >= len(x):
            return
        for chunk in features.split(1024):
            centred = x - self.b_dec if self.subtracts_b_dec else x
            pre = centred @ self.W_enc[:, chunk] + self.b_enc[chunk]
            highest_silent = pre.kthvalue(len(x) - n_firing, dim=0).values
            self.b_enc[chunk] -= highest_silent.clamp(min=0)

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from the decoder's gradient what would change a row's norm."""
        if self.has_unit_norm_rows:
            parallel = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
            self.W_dec.grad -= parallel * self.W_dec

    @torch.no_grad()
    def normalise(self) -> None:
        """Set every decoder row back to norm 1 (after the optimizer's step)."""
        if self.has_unit_norm_rows:
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Rewrite an SAE of `scale * x` as one of x: `decode(encode(x))` is in raw units.

        The ReLU is positively homogeneous, relu(s z) = s relu(z), so dividing the biases by the
        scale suffices: the directions, unit norms and ties stay as trained, and a feature's
        activation becomes f / scale, in the units of x. `fold_scale(1 / scale)` undoes it.
        """
        self.b_enc /= scale
        self.b_dec /= scale


class TiedL1SAE(SAE):
    """Cunningham, Ewart, Riggs, Huben, Sharkey (2023), arXiv 2309.08600, section 2.

    encode: f = relu(M (x - b_dec) + b_enc),   M = W_dec with unit-norm rows
    decode: x_hat = M^T f + b_dec
    loss:   ||x - x_hat||^2 + l1_coeff * ||f||_1

    Differences from the paper: it has no centre b_dec (its code offers a fixed one), which half
    of a residual stream's energy needs; the rows are kept at unit norm by projection instead of
    being normalised in every forward pass; its code's squared error is a mean over d_in.
    """

    name = "tied_l1"

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        return self.W_dec.T


class UntiedSAE(SAE):
    """Adds an encoder matrix of its own, started at the decoder's transpose."""

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator | None = None) -> None:
        super().__init__(d_in, d_sae, generator)
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)


class L1SAE(UntiedSAE):
    """Bricken et al. (2023), Towards Monosemanticity, transformer-circuits.pub, appendix.

    encode: f = relu((x - b_dec) W_enc + b_enc)
    decode: x_hat = f W_dec + b_dec,   ||W_dec[i]|| = 1
    loss:   ||x - x_hat||^2 + l1_coeff * ||f||_1

    Dead features are resampled towards badly reconstructed inputs (`training.resample_dead`).
    Differences: b_dec starts at the mean, not the geometric median; W_enc = W_dec^T at the start.
    """

    name = "l1"
    resamples_dead = True


class NormWeightedL1SAE(UntiedSAE):
    """Conerly, Templeton, Bricken, Marcus, Henighan (April 2024), transformer-circuits.pub.

    encode: f = relu(x W_enc + b_enc)
    decode: x_hat = f W_dec + b_dec
    loss:   ||x - x_hat||^2 + l1_coeff * sum_i f_i * ||W_dec[i]||

    Rows are free: the penalty cannot be dodged by growing the decoder. No resampling. Differences:
    the update starts with zero biases; here b_dec starts at the mean and b_enc at -mean W_enc,
    which encodes x - mean at the start as the other classes do.
    """

    name = "norm_weighted_l1"
    subtracts_b_dec = False
    has_unit_norm_rows = False

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator | None = None) -> None:
        super().__init__(d_in, d_sae, generator)
        with torch.no_grad():
            self.W_dec *= 0.1  # the update's initial norm; W_enc = W_dec^T shares it
            self.W_enc *= 0.1

    def sparsity(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " batch"]:
        return f @ self.W_dec.norm(dim=1)

    @torch.no_grad()
    def initialise_centre(self, mean: Float[Tensor, " d_in"]) -> None:
        super().initialise_centre(mean)
        self.b_enc.copy_(-mean @ self.W_enc)


ARCHITECTURES: dict[str, type[SAE]] = {
    cls.name: cls for cls in (TiedL1SAE, L1SAE, NormWeightedL1SAE)
}

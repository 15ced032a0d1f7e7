"""Sparse autoencoders, one class per paper: the reference mathematics as plain autograd PyTorch.

Notation: activations x (batch, d_in), features f (batch, d_sae), reconstruction x_hat. Row i of
`W_dec` (d_sae, d_in) and column i of `W_enc` (d_in, d_sae) belong to feature i.

All losses share one convention, so that one `l1_coeff` means the same in every class of the L1
family (JumpReLU's multiplies an L0, TopK has none):

    loss = mean_batch( sum_d (x - x_hat)^2  +  l1_coeff * sum_i f_i * ||W_dec[i]|| )

on activations whose root-mean-square norm is sqrt(d_in). During training an SAE lives in those
scaled units; `fold_scale` then rewrites it for raw activations. Papers and libraries that average
the squared error over d_in instead have coefficients that are d_in times smaller.

No optimizer, no schedule and no device choice here: see `training`.
"""

from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparse_coding.dictionary import Dictionary


class Loss(NamedTuple):
    """What one batch costs: `total = mse + coefficient * penalty`."""

    total: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    """Squared error, summed over d_in, mean over the batch."""
    penalty: Float[Tensor, ""]
    """Mean over the batch of sum_i f_i * ||W_dec[i]||, or of what the class has instead."""
    f: Float[Tensor, "batch d_sae"]


class SAE(Dictionary):
    """A trainable dictionary, here with a ReLU; subclasses state their paper's formulas.

    W_enc is stored feature-major (its transpose is contiguous): everything that treats one
    feature at a time then reads consecutive memory, in the encoder as in the decoder.
    """

    name: ClassVar[str]
    subtracts_b_dec: ClassVar[bool] = True
    has_unit_norm_rows: ClassVar[bool] = True
    resamples_dead: ClassVar[bool] = False
    sparsity_is_chosen: ClassVar[bool] = False
    """Whether L0 is a number `k` of the class instead of what a coefficient leads to."""
    lr_factors: ClassVar[dict[str, float]] = {}
    """Parameters that learn at a multiple of the learning rate."""

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

    def loss(
        self,
        x: Float[Tensor, "batch d_in"],
        l1_coeff: Float[Tensor, ""] | float,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """The training loss of a batch of scaled activations.

        `dead`: features that have been silent for long, for classes that revive them by the loss.
        """
        f = self.encode(x)
        mse = (x - self.decode(f)).square().sum(dim=1).mean()
        penalty = self.sparsity(f).mean()
        return Loss(mse + l1_coeff * penalty, mse, penalty, f)

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
        centred = x - self.b_dec if self.subtracts_b_dec else x
        for chunk in features.split(1024):
            # One feature a row: selecting down columns takes ten times as long.
            pre = self.W_enc.T[chunk] @ centred.T + self.b_enc[chunk, None]
            # Between the last row to fire and the first not to: rounding moves neither across.
            edge = pre.topk(n_firing + 1, dim=1).values[:, -2:].mean(dim=1)
            self._silence(chunk, edge)

    def _silence(self, features: Int[Tensor, " chosen"], pre: Float[Tensor, " chosen"]) -> None:
        """Make features silent up to these pre-activations; never make one fire more."""
        self.b_enc[features] -= pre.clamp(min=0)

    def observe(self, f: Float[Tensor, "..."]) -> None:
        """Learn from a step's activations other than by gradient; zeros may be missing."""

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


class TopKSAE(UntiedSAE):
    """Gao et al. (2024), arXiv 2406.04093, section 2.3 and appendices A.1 and A.2.

    encode: f = relu(top_k((x - b_dec) W_enc + b_enc))
    decode: x_hat = f W_dec + b_dec,   ||W_dec[i]|| = 1
    loss:   ||x - x_hat||^2 + aux_coeff * ||e - e_hat||^2   (AuxK; 0 while no feature is dead)

    e = x - x_hat without gradient; e_hat decodes the d_in / 2 largest pre-activations among the
    dead features. Differences: b_dec starts at the mean, not the geometric median; the paper
    calls a feature dead after 10M silent tokens (here `dead_after_tokens`).
    """

    name = "topk"
    sparsity_is_chosen = True
    aux_coeff = 1 / 32

    def __init__(
        self, d_in: int, d_sae: int, generator: torch.Generator | None = None, k: int = 32
    ) -> None:
        super().__init__(d_in, d_sae, generator)
        self.k = min(k, d_sae)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return keep_largest(self.pre_activations(x), self.k)

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Which activations a training step keeps."""
        return keep_largest(pre, self.k)

    def loss(
        self,
        x: Float[Tensor, "batch d_in"],
        l1_coeff: Float[Tensor, ""] | float = 0.0,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """As in `SAE`, but for the penalty, which is AuxK's error; `l1_coeff` is not used."""
        pre = self.pre_activations(x)
        f = self.select(pre)
        error = x - self.decode(f)
        mse, aux = error.square().sum(dim=1).mean(), torch.zeros_like(error[0, 0])
        if dead is not None:
            f_dead = keep_largest(pre.masked_fill(~dead, -torch.inf), self.n_aux)
            aux = (error.detach() - f_dead @ self.W_dec).square().sum(dim=1).mean() * dead.any()
        return Loss(mse + self.aux_coeff * aux, mse, aux, f)

    @property
    def n_aux(self) -> int:
        """How many dead features AuxK may use per token: d_in / 2 (appendix A.2)."""
        return min(max(1, self.d_in // 2), self.d_sae)

    def initialise_sparsity(
        self,
        x: Float[Tensor, "batch d_in"],
        l0: float,
        features: Int[Tensor, " chosen"] | None = None,
    ) -> None:
        """Nothing: it has `k` active features from the start."""


class BatchTopKSAE(TopKSAE):
    """Bussmann, Leask, Nanda (2024), arXiv 2412.06410, section 3.

    training: f keeps the k * batch largest of relu((x - b_dec) W_enc + b_enc) in the whole batch
    encode:   f = pre * (pre > threshold),   threshold = running mean of a batch's smallest f > 0
    loss:     TopK's, with AuxK

    The running mean gives a batch the weight 0.1 (SAELens: 0.01, dictionary_learning: 0.001): the
    smallest of so many hardly varies, and a short run moves on.
    """

    name = "batch_topk"

    def __init__(
        self, d_in: int, d_sae: int, generator: torch.Generator | None = None, k: int = 32
    ) -> None:
        super().__init__(d_in, d_sae, generator, k)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = self.pre_activations(x)
        return pre * (pre > self.threshold)

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Which activations a training step keeps."""
        return keep_largest(pre.flatten(), self.k * len(pre)).view_as(pre)

    @torch.no_grad()
    def observe(self, f: Float[Tensor, "..."]) -> None:
        if f.numel() == 0:
            return
        smallest = torch.where(f > 0, f, torch.inf).min()
        later = torch.where(self.threshold > 0, self.threshold.lerp(smallest, 0.1), smallest)
        self.threshold.copy_(torch.where(smallest.isfinite(), later, self.threshold))

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.threshold /= scale


class JumpReLUSAE(UntiedSAE):
    """Rajamanoharan et al. (2024), arXiv 2407.14435, sections 3 and 4.

    encode: f = pre * (pre > threshold),   pre = x W_enc + b_enc
    decode: x_hat = f W_dec + b_dec,   ||W_dec[i]|| = 1
    loss:   ||x - x_hat||^2 + l1_coeff * ||f||_0

    Straight-through gradients (equations 11 and 12) let the threshold learn from entries within
    bandwidth / 2 of it. Differences: it is learnt itself, not its logarithm, and kept at 0 or
    above. The others are for runs of hundreds of steps instead of the paper's hundred thousands:
    a threshold starts where its feature fires on its share of a sample (`initialise_sparsity`; the
    paper's 0.001 lets half of all features fire), learns twenty times faster than the weights, and
    from a bandwidth of 1 (the paper's 0.001 is 0.05 in these units at d_in 2304). With the paper's
    bandwidth and one learning rate, 280 steps towards an L0 of 30 on SmolLM2's layer 12 ended at
    12 and an FVU of 0.27 at ratio 8; with these at 29 and 0.21.
    """

    name = "jumprelu"
    subtracts_b_dec = False
    bandwidth = 1.0
    lr_factors = {"threshold": 20.0}  # noqa: RUF012 - annotated in SAE

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator | None = None) -> None:
        super().__init__(d_in, d_sae, generator)
        # The paper's start, in units in which activations have norm sqrt(d_in).
        self.threshold = nn.Parameter(torch.full((d_sae,), 0.001 * d_in**0.5))

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return JumpReLU.apply(self.pre_activations(x), self.threshold, self.bandwidth)[0]

    def loss(
        self,
        x: Float[Tensor, "batch d_in"],
        l1_coeff: Float[Tensor, ""] | float,
        dead: Bool[Tensor, " d_sae"] | None = None,
    ) -> Loss:
        """As in `SAE`, with the mean L0 as penalty."""
        f, is_active = JumpReLU.apply(self.pre_activations(x), self.threshold, self.bandwidth)
        mse = (x - self.decode(f)).square().sum(dim=1).mean()
        l0 = is_active.sum(dim=1).mean()
        return Loss(mse + l1_coeff * l0, mse, l0, f)

    @torch.no_grad()
    def initialise_centre(self, mean: Float[Tensor, " d_in"]) -> None:
        super().initialise_centre(mean)
        self.b_enc.copy_(-mean @ self.W_enc)

    def _silence(self, features: Int[Tensor, " chosen"], pre: Float[Tensor, " chosen"]) -> None:
        self.threshold[features] = torch.maximum(pre, self.threshold[features])

    @torch.no_grad()
    def normalise(self) -> None:
        super().normalise()
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        self.threshold /= scale


class JumpReLU(torch.autograd.Function):
    """f = pre * (pre > threshold) and the step (pre > threshold), with 2407.14435's gradients.

    With the rectangle K(u) = (|u| < 1/2), u = (pre - threshold) / bandwidth, and for incoming
    gradients g_f and g_step,

        d / d pre       = g_f * (pre > threshold)
        d / d threshold = -(threshold * g_f + g_step) * K(u) / bandwidth
    """

    @staticmethod
    def forward(ctx, pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        is_active = (pre > threshold).to(pre.dtype)
        return pre * is_active, is_active

    @staticmethod
    def backward(ctx, f_gradient: Tensor, step_gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        is_near = (pre - threshold).abs() < ctx.bandwidth / 2
        slope = -(threshold * f_gradient + step_gradient) / ctx.bandwidth * is_near
        return f_gradient * (pre > threshold), slope.flatten(end_dim=-2).sum(dim=0), None


def keep_largest(pre: Float[Tensor, "*batch n"], k: int) -> Float[Tensor, "*batch n"]:
    """relu(pre) at the k largest entries of each row, 0 elsewhere."""
    largest = pre.topk(k, dim=-1)
    kept = torch.zeros_like(pre)
    return kept.scatter(-1, largest.indices, torch.relu(largest.values))


ARCHITECTURES: dict[str, type[SAE]] = {
    cls.name: cls
    for cls in (TiedL1SAE, L1SAE, NormWeightedL1SAE, TopKSAE, BatchTopKSAE, JumpReLUSAE)
}

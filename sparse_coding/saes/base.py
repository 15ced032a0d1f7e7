"""What every sparse autoencoder has: parameters, loss, start, constraint, units."""

from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparse_coding.dictionary import Dictionary
from sparse_coding.processes import ALONE, Processes


class Loss(NamedTuple):
    """What one batch costs: `total = mse + coefficient * penalty`, and what a class adds."""

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
    subtracts_b_dec: bool = True
    can_transcode: ClassVar[bool] = True
    """Whether `retarget` is possible."""
    has_unit_norm_rows: ClassVar[bool] = True
    resamples_dead: ClassVar[bool] = False
    revives_dead: ClassVar[bool] = False
    """Whether `loss` has a term for features that have been silent for long."""
    sparsity_is_chosen: ClassVar[bool] = False
    """Whether L0 is a number `k` of the class instead of what a coefficient leads to."""
    lr_factors: ClassVar[dict[str, float]] = {}
    """Parameters that learn at a multiple of the learning rate."""
    rows: Processes = ALONE
    """Those that train this SAE on the other rows of each batch."""
    features: Processes = ALONE
    """Those that hold its other features (`keep_share`)."""

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
        centred = x - self.features.shared(self.b_dec) if self.subtracts_b_dec else x
        return centred @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(self.pre_activations(x))

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        return self.features.total(f @ self.W_dec) + self.b_dec

    def retarget(self, d_out: int, generator: torch.Generator | None = None) -> None:
        """Become a transcoder: what is decoded is not x but `target`, activations elsewhere.

        Dunefsky, Chlenski, Nanda (2024), arXiv 2406.11944, section 3: of an MLP's input x, its
        output. Nothing else of the class's loss changes,

            encode: f = the class's, of x W_enc + b_enc
            decode: target_hat = f W_dec + b_dec,   ||W_dec[i]|| = 1 where the class says so
            loss:   the class's, with ||target - target_hat||^2

        and dead features are treated as the class treats them. Differences: the sparsity may be
        any class's (Gemma Scope's transcoders are JumpReLU's), and `initialise_decoder`.
        """
        assert self.can_transcode, f"{type(self).__name__} has no transcoder"
        rows = torch.randn(self.d_sae, d_out, generator=generator).to(self.W_dec)
        self.W_dec = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))
        self.b_dec = nn.Parameter(self.b_dec.new_zeros(d_out))
        self.is_transcoder, self.subtracts_b_dec = True, False

    @property
    def n_columns(self) -> int:
        """Width of a training row."""
        return self.d_in + self.d_out if self.is_transcoder else self.d_in

    def split(
        self, rows: Float[Tensor, "*batch columns"]
    ) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch d_out"]]:
        """Training rows as what is encoded and what should be decoded.

        The same, but for a transcoder: in its rows the target's columns follow those of x.
        """
        if not self.is_transcoder:
            return rows, rows
        x, target = rows.split([self.d_in, self.d_out], dim=-1)
        return x, target

    def loss(
        self,
        rows: Float[Tensor, "batch columns"],
        l1_coeff: Float[Tensor, ""] | float,
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> Loss:
        """The training loss of a batch of scaled activations (`split` says of which).

        `dead`: features that have been silent for long, where the loss revives them.
        """
        x, target = self.split(rows)
        f = self.encode(x)
        mse = (target - self.decode(f)).square().sum(dim=1).mean()
        penalty = self.sparsity(f).mean()
        return Loss(mse + l1_coeff * penalty, mse, penalty, f)

    def sparsity(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " batch"]:
        """The L1 penalty per row; decoder rows have unit norm unless a subclass says otherwise."""
        return self.features.total(f.sum(dim=1))

    @torch.no_grad()
    def initialise_decoder(self, rows: Float[Tensor, "batch columns"]) -> None:
        """Of a transcoder: start each row where the target goes with what its feature reads.

        W_dec[i] is parallel to the covariance of the target with x W_enc[:, i]. From random rows a
        short run never recovers: on 40 planted pairs in 32 dimensions JumpReLU's 1000 steps end
        with 55 % silent features and an FVU of 0.31, from here with 14 % and 0.08. A feature that
        goes with nothing of the target keeps its row.
        """
        x, target = (part - part.mean(dim=0) for part in self.split(rows))
        written = self.W_enc.T @ (x.T @ target)
        norms = written.norm(dim=1, keepdim=True)
        self.W_dec.copy_(torch.where(norms > 0, written / norms, self.W_dec))

    @torch.no_grad()
    def initialise_centre(self, mean: Float[Tensor, " columns"]) -> None:
        """Start from the rows' mean (scaled units), so that x - mean is what gets encoded."""
        x, target = self.split(mean)
        self.b_dec.copy_(target)
        if not self.subtracts_b_dec:
            self.b_enc.copy_(-x @ self.W_enc)

    @torch.no_grad()
    def initialise_sparsity(
        self,
        rows: Float[Tensor, "batch columns"],
        l0: float,
        features: Int[Tensor, " chosen"] | None = None,
    ) -> None:
        """Lower the biases until each feature fires on a share l0 / d_sae of the rows.

        With zero biases a ReLU dictionary starts by firing half of its features on every token:
        at ratio 32 its first reconstruction is many times too large, and a run of a few hundred
        steps never recovers. None of the three papers does this. Biases are never raised, so
        l0 >= d_sae / 2 or so changes nothing. A feature is left at least one row: one that is
        silent on all of them would have no gradient. `features` restricts it (all by default).
        """
        x, _ = self.split(rows)
        if features is None:
            features = torch.arange(self.d_sae, device=x.device)
        n_firing = max(1, round(len(x) * l0 / (self.d_sae * self.features.size)))
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

    @torch.no_grad()
    def keep_share(self, processes: Processes) -> None:
        """Keep this process's part of the features, whole as they are; the others keep theirs.

        From here on `encode` gives the features held here, `decode` and `loss` what all make up
        together; all call them alike.
        """
        self.features, own = processes, processes.share(self.d_sae)
        for name, parameter in self.named_parameters():
            dim = feature_dimension(name)
            if dim is not None:
                part = parameter[:, own].T.clone().T if dim else parameter[own].clone()
                setattr(self, name, nn.Parameter(part))
        self.d_sae = own.stop - own.start

    @property
    def settings(self) -> dict[str, Any]:
        """What the class was made with besides its size, by the constructor's names."""
        return {}

    def anneal(self, n_steps_done: int, n_steps: int) -> None:
        """Take the place in a schedule of the class's own; called before each training step."""

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

    @torch.no_grad()
    def fold_scales(self, scale: float, target_scale: float) -> None:
        """`fold_scale` of a transcoder of `scale * x` to `target_scale * target`.

        A feature's activation is then in the units of the target.
        """
        self.W_enc *= scale / target_scale
        self.fold_scale(target_scale)


def feature_dimension(name: str) -> int | None:
    """Along which dimension a parameter has one entry per feature; None: it is not theirs."""
    return {"b_dec": None, "scales": None, "W_enc": 1}.get(name, 0)


class UntiedSAE(SAE):
    """Adds an encoder matrix of its own, started at the decoder's transpose."""

    def __init__(self, d_in: int, d_sae: int, generator: torch.Generator | None = None) -> None:
        super().__init__(d_in, d_sae, generator)
        self.W_enc = nn.Parameter(self.W_dec.detach().clone().T)

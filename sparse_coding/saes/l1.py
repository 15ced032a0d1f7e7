"""ReLU dictionaries under an L1 penalty."""

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.saes.base import SAE, UntiedSAE


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

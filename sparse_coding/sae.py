"""Sparse autoencoders, one class per paper: the reference mathematics as plain autograd PyTorch.

Notation: activations x (batch, d_in), features f (batch, d_sae), reconstruction x_hat. Row i of
`W_dec` (d_sae, d_in) and column i of `W_enc` (d_in, d_sae) belong to feature i.

All losses share one convention, so that one `l1_coeff` means the same in every class of the L1
family (JumpReLU's multiplies an L0, Gated's its gates' L1, p-anneal's a sum of f^p; TopK has
none):

    loss = mean_batch( sum_d (x - x_hat)^2  +  l1_coeff * sum_i f_i * ||W_dec[i]|| )

on activations whose root-mean-square norm is sqrt(d_in). During training an SAE lives in those
scaled units; `fold_scale` then rewrites it for raw activations. Papers and libraries that average
the squared error over d_in instead have coefficients that are d_in times smaller.

No optimizer, no schedule and no device choice here: see `training`.
"""

from sparse_coding.saes.base import SAE, Loss, UntiedSAE
from sparse_coding.saes.crosscoder import BatchTopKCrosscoderSAE, CrosscoderSAE
from sparse_coding.saes.gated import GatedSAE
from sparse_coding.saes.jumprelu import JumpReLU, JumpReLUSAE, TargetJumpReLUSAE
from sparse_coding.saes.l1 import L1SAE, NormWeightedL1SAE, PAnnealSAE, TiedL1SAE
from sparse_coding.saes.matryoshka import MatryoshkaSAE
from sparse_coding.saes.topk import BatchTopKSAE, TopKSAE, keep_largest

__all__ = [
    "ARCHITECTURES",
    "CROSSCODERS",
    "SAE",
    "TRAINABLE",
    "BatchTopKCrosscoderSAE",
    "BatchTopKSAE",
    "CrosscoderSAE",
    "GatedSAE",
    "JumpReLU",
    "JumpReLUSAE",
    "L1SAE",
    "Loss",
    "MatryoshkaSAE",
    "NormWeightedL1SAE",
    "PAnnealSAE",
    "TargetJumpReLUSAE",
    "TiedL1SAE",
    "TopKSAE",
    "UntiedSAE",
    "keep_largest",
]

ARCHITECTURES: dict[str, type[SAE]] = {
    cls.name: cls
    for cls in (
        TiedL1SAE,
        L1SAE,
        NormWeightedL1SAE,
        PAnnealSAE,
        GatedSAE,
        TopKSAE,
        BatchTopKSAE,
        MatryoshkaSAE,
        JumpReLUSAE,
        TargetJumpReLUSAE,
    )
}

CROSSCODERS: dict[str, type[SAE]] = {
    cls.name: cls for cls in (CrosscoderSAE, BatchTopKCrosscoderSAE)
}
"""What learns from several hooks at once; all others learn from each hook by itself."""

TRAINABLE = ARCHITECTURES | CROSSCODERS

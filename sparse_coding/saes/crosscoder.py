"""Dictionaries of several hooks at once: one activation, a decoder row at each hook."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.saes.base import SAE, UntiedSAE
from sparse_coding.saes.topk import BatchTopKSAE


class _JoinsHooks(SAE):
    """What crosscoders share: rows of several hooks side by side, each hook with its own scale."""

    subtracts_b_dec = False
    has_unit_norm_rows = False
    joins_hooks = True
    can_transcode = False  # it decodes several places already

    def _join(self, widths: Sequence[int]) -> None:
        """`widths` of the hooks, in the order of the columns; by default one hook of d_in."""
        self.widths = tuple(widths) or (self.d_in,)
        assert sum(self.widths) == self.d_in, f"widths {self.widths} of d_in {self.d_in}"
        self.register_buffer("scales", torch.ones(len(self.widths)))

    def norms(self) -> Float[Tensor, "hooks d_sae"]:
        """||W_dec,h[i]||, in units in which the rows of each hook h have norm sqrt(width).

        So also of a finished crosscoder, whose rows are in the hooks' raw units. What share of
        a feature's norms one hook has says whether the feature is shared or the hook's own.
        """
        parts = zip(self.W_dec.split(self.widths, dim=1), self.scales, strict=True)
        return torch.stack([scale * rows.norm(dim=1) for rows, scale in parts])

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"widths": self.widths}

    @torch.no_grad()
    def fold_scale(self, *scales: float) -> None:
        """Rewrite a crosscoder of `scale_h * x_h` as one of the raw x_h; f stays as it is.

        The hooks have no unit in common that an activation could be in.
        """
        assert len(scales) == len(self.widths), f"{len(scales)} scales, {len(self.widths)} hooks"
        given = self.scales.new_tensor(scales)
        columns = given.repeat_interleave(torch.tensor(self.widths, device=given.device))
        self.W_enc *= columns[:, None]
        self.W_dec /= columns
        self.b_dec /= columns
        self.scales *= given


class CrosscoderSAE(_JoinsHooks, UntiedSAE):
    """Lindsey, Templeton, Marcus, Conerly, Batson, Olah (October 2024), transformer-circuits.pub.

    encode: f = relu(sum_h x_h W_enc,h + b_enc)
    decode: x_hat_h = f W_dec,h + b_dec,h
    loss:   sum_h ||x_h - x_hat_h||^2 + l1_coeff * sum_i f_i * sum_h ||W_dec,h[i]||

    over hooks h. The sum of norms, not the norm of the joined row, lets a feature leave hooks out.
    With one hook it is `NormWeightedL1SAE`; as there, dead features are not treated, and the start
    differs from the paper's (a joined row starts at norm 1).
    """

    name = "crosscoder"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        generator: torch.Generator | None = None,
        widths: Sequence[int] = (),
    ) -> None:
        super().__init__(d_in, d_sae, generator)
        self._join(widths)

    def sparsity(self, f: Float[Tensor, "batch d_sae"]) -> Float[Tensor, " batch"]:
        return self.features.total(f @ self.norms().sum(dim=0))


class BatchTopKCrosscoderSAE(_JoinsHooks, BatchTopKSAE):
    """Minder, Dumas, Juang, Chughtai, Nanda (2025), arXiv 2504.02922, section 2.

    training: f keeps relu(pre_i) at the k * batch largest v_i = relu(pre_i) * sum_h ||W_dec,h[i]||
    encode:   f = pre * (v > threshold),   threshold = running mean of a batch's smallest v kept
    loss:     sum_h ||x_h - x_hat_h||^2, with AuxK (of the largest pre_i of dead features)

    pre, decode and start as in `CrosscoderSAE`; k, AuxK and the running mean as in `BatchTopKSAE`.
    Without a penalty on norms no hook's row is shrunk away from a feature that the hooks share.
    """

    name = "batch_topk_crosscoder"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        generator: torch.Generator | None = None,
        k: int = 32,
        widths: Sequence[int] = (),
    ) -> None:
        super().__init__(d_in, d_sae, generator, k)
        self._join(widths)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        pre = self.pre_activations(x)
        return pre * (pre * self.norms().sum(dim=0) > self.threshold)

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """Which activations a training step keeps."""
        with torch.no_grad():
            is_kept = super().select(pre * self.norms().sum(dim=0)) > 0
        return pre * is_kept

    @torch.no_grad()
    def observe(self, f: Float[Tensor, "..."]) -> None:
        super().observe(f * self.norms().sum(dim=0))

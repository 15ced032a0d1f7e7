"""Dictionaries whose beginnings are dictionaries too."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.processes import Processes
from sparse_coding.saes.topk import BatchTopKSAE


class MatryoshkaSAE(BatchTopKSAE):
    """Bussmann, Nabeshima, Karvonen, Nanda (2025), arXiv 2503.17547, section 3.

    encode: BatchTopK's, over all features at once
    loss:   mean over m in prefixes of ||x - (f[:m] W_dec[:m] + b_dec)||^2,   AuxK added

    so that the first features must do without the later ones and stay general. `prefixes`: sizes
    of the nested dictionaries, ascending to d_sae; by default the authors' five, which end at
    1/32, 3/32, 7/32, 15/32 and all of d_sae.
    """

    name = "matryoshka"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        generator: torch.Generator | None = None,
        k: int = 32,
        prefixes: Sequence[int] = (),
    ) -> None:
        super().__init__(d_in, d_sae, generator, k)
        default = sorted({max(1, d_sae * share // 32) for share in (1, 3, 7, 15, 32)})
        self.prefixes = tuple(prefixes) or tuple(default)
        is_ascending = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes, strict=False))
        assert is_ascending and self.prefixes[-1] == d_sae, f"prefixes {self.prefixes} of {d_sae}"

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"prefixes": self.prefixes}

    def keep_share(self, processes: Processes) -> None:
        first, last = processes.share(self.d_sae).start, processes.share(self.d_sae).stop
        super().keep_share(processes)
        self.prefixes = tuple(min(max(m, first), last) - first for m in self.prefixes)

    def errors(
        self, target: Float[Tensor, "batch d_out"], f: Float[Tensor, "batch d_sae"]
    ) -> list[Float[Tensor, "batch d_out"]]:
        """Of each prefix."""
        errors = [target - self.b_dec]
        for first, last in zip((0, *self.prefixes), self.prefixes, strict=False):
            part = f[:, first:last] @ self.W_dec[first:last]
            errors.append(errors[-1] - self.features.total(part))
        return errors[1:]

"""Dictionary: anything that encodes activations into features and decodes them back.

Trained SAEs, PCA, random directions, the neuron basis and imported SAEs are all this, so every
measurement runs on all of them. No training and no file formats here.
"""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class Dictionary(nn.Module, ABC):
    """Features of a `d_in`-dimensional activation space: `x_hat = decode(encode(x))`.

    The contract, which `tests/test_contract.py` runs over every subclass:

    - `encode` returns one tensor, the feature activations after the non-linearity; it works row
      by row (`encode(x)[:5] == encode(x[:5])`) and has no side effects;
    - `x` is the raw activation of the language model: any scale is part of the weights;
    - row i of `W_dec` is the direction that feature i writes.
    """

    d_in: int
    d_sae: int
    W_dec: Float[Tensor, "d_sae d_out"]
    """Decoder directions, one feature a row; a parameter or a property."""
    is_transcoder: bool = False
    """Whether `decode` gives activations of another place than `encode` reads."""
    joins_hooks: bool = False
    """Whether it is a crosscoder: its rows are those of several hooks, side by side."""

    @property
    def d_out(self) -> int:
        """Width of what `decode` gives: `d_in`, but for a transcoder that of its target."""
        return self.W_dec.shape[1]

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations f of raw activations x."""

    @abstractmethod
    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction x_hat from feature activations f."""

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """`decode(encode(x))`."""
        return self.decode(self.encode(x))

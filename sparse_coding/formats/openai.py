"""OpenAI's dictionaries on GPT-2 small: one .pt file, a state dict.

    ReLU (v1):            f = relu((x - pre_bias) W_enc + latent_bias),  x_hat = f W_dec + pre_bias
    TopK (v4, v5):        the same with top_k, on z = (x - mean) / (std + 1e-5) of each token's own
                          mean and standard deviation (ddof 1), and x_hat = std * z_hat + mean

The nn.Linear weights `encoder.weight` and `decoder.weight` are transposes of ours. A TopK of ours
cannot be written: theirs always standardises. One that was read from their file can.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.formats.formulas import refuse_what_cannot_be_said
from sparse_coding.formats.tensors import check_tensors
from sparse_coding.formats.unpickle import contents, read_checkpoint, write_state_dict
from sparse_coding.sae import L1SAE, SAE, TiedL1SAE, TopKSAE

NAMES = {
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "latent_bias": "b_enc",
    "pre_bias": "b_dec",
}
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
ACTIVATION, SETTINGS = "activation", "activation_state_dict"
REPEATED = ("activation.k", "activation.postact_fn")  # their module writes the settings twice
EPS = 1e-5


class StandardisedDictionary(Dictionary):
    """A dictionary of tokens that are first standardised, each by itself.

    What it undoes at the end depends on the token, and `decode` sees features alone. So two more
    features, the last ones, carry what is needed: the token's mean (written along ones, it may be
    negative) and its standard deviation (written along the bias). All others are in raw units,
    std * f. An L0 of it is by 2 too large; `encode(x)[..., :-2]` leaves them out.
    """

    def __init__(self, inner: TopKSAE) -> None:
        super().__init__()
        self.inner = inner
        self.d_in, self.d_sae = inner.d_in, inner.d_sae + 2

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        bias = self.inner.b_dec
        return torch.cat([self.inner.W_dec, torch.stack([torch.ones_like(bias), bias])])

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
        f = self.inner.encode((x - mean) / (std + EPS))
        return torch.cat([std * f, mean, std], dim=-1)

    def decode(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        return f @ self.W_dec


def recognises(path: Path) -> bool:
    """Whether it is a .pt file that names OpenAI's tensors."""
    if not path.is_file() or path.suffix != ".pt":
        return False
    try:
        return {"pre_bias", "latent_bias"} <= contents(path).strings
    except UserError:
        return False


def load_openai(path: str | Path, device: torch.device | str = "cpu") -> Dictionary:
    """The dictionary in a .pt file of openai/sparse_autoencoder: an `L1SAE`, or a TopK of
    standardised tokens (`StandardisedDictionary`).

    `UserError` for another activation, a missing or damaged file, NaN or infinity, names or shapes
    that disagree.
    """
    path = Path(path)
    state = read_checkpoint(path)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} is not a state dict")
    passed_over = {*STATISTICS, *REPEATED, ACTIVATION, SETTINGS}
    tensors = {name: value for name, value in state.items() if name not in passed_over}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {name!r} is {_plain(value)!r}; it must be a tensor")
    encoder = tensors.get("encoder.weight", torch.empty(0))
    d_sae, d_in = encoder.shape if encoder.ndim == 2 else (0, 0)
    shapes = {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae)}
    check_tensors(
        path, tensors, shapes | {"latent_bias": (d_sae,), "pre_bias": (d_in,)}, "one of OpenAI's"
    )
    cls, options = _class(path, state, d_sae)
    # A generator of its own: loading must not advance the global random stream.
    sae = cls(d_in, d_sae, torch.Generator(), **options).to(encoder.dtype)
    sae.load_state_dict({ours: _turned(theirs, tensors[theirs]) for theirs, ours in NAMES.items()})
    return (StandardisedDictionary(sae) if cls is TopKSAE else sae).to(device)


def save_openai(
    sae: SAE | StandardisedDictionary, path: str | Path, *, overwrite: bool = False
) -> Path:
    """Write an `L1SAE` (or tied) of raw activations, or a `StandardisedDictionary`, as a .pt file.

    It is whole or absent. The layout has no place for metadata. `UserError` for a class with
    another formula, or if the file exists and `overwrite` is not set.
    """
    settings: dict[str, Any] = {}
    if isinstance(sae, StandardisedDictionary):
        sae = sae.inner
        refuse_what_cannot_be_said(sae, (TopKSAE,), "OpenAI's layout")
        of_topk = {"k": sae.k, "postact_fn": "ReLU"}
        settings = {ACTIVATION: "TopK", SETTINGS: of_topk}
        settings |= dict(zip(REPEATED, of_topk.values(), strict=True))
    else:
        refuse_what_cannot_be_said(sae, (L1SAE, TiedL1SAE), "OpenAI's layout")
    path = Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; choose another name or allow overwriting")
    tensors = {theirs: _turned(theirs, getattr(sae, ours)) for theirs, ours in NAMES.items()}
    silent = torch.zeros(sae.d_sae)  # their statistics of a training, which is not known here
    return write_state_dict(path, tensors | dict.fromkeys(STATISTICS, silent), settings)


def _turned(name: str, tensor: Tensor) -> Tensor:
    return tensor.T if name.endswith(".weight") else tensor


def _class(
    path: Path, state: dict[str, Any], d_sae: int
) -> tuple[type[L1SAE] | type[TopKSAE], dict[str, int]]:
    activation, settings = _plain(state.get(ACTIVATION, "ReLU")), state.get(SETTINGS)
    if activation == "ReLU":
        return L1SAE, {}
    settings = settings if isinstance(settings, dict) else {}
    k, after = _plain(settings.get("k")), _plain(settings.get("postact_fn", "ReLU"))
    if (activation, after) != ("TopK", "ReLU"):
        raise UserError(f"{path}: activation is {activation!r} ({after!r}); supported: ReLU, TopK")
    if type(k) is not int or not 0 < k <= d_sae:
        raise UserError(f"{path}: k is {k!r}; it must be an integer between 1 and d_sae {d_sae}")
    return TopKSAE, {"k": k}


def _plain(value: Any) -> str | int | None:
    """A text or a number as it is; of anything else its type, which fits one line."""
    return value if value is None or isinstance(value, str | int) else type(value).__name__

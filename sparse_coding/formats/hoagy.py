"""The pickled dictionaries of HoagyC/sparse_coding and loganriggs/sparse_coding: read only.

HoagyC's sweeps leave `learned_dicts.pt`, a list of (dictionary, hyper-parameters); loganriggs's
`easy_training_base.py` leaves one dictionary a file. Both are objects of the classes below, with
encoder E and decoder D (d_sae, d_in), encoder_bias b; rows(D) is D with its rows divided by their
norms:

    UntiedSAE        c = relu(E x + b),             x_hat = rows(D)^T c
    AnthropicSAE     c = relu(E (x - shift) + b),   x_hat = rows(D)^T c + shift
    TransferSAE      c = relu(E (x - shift) + b),   x_hat = rows(D)^T (scale * c) + decoder_bias
    TiedSAE          c = relu(M y + b),             y_hat = rows(E)^T c,
                     M = rows(E) with `norm_encoder`, else E,
                     y = center_scale * (center_rot (x - center_trans)), undone on y_hat
    TopKLearnedDict  c = relu(top_k(D x)),          x_hat = D^T c,   k = `sparsity`

TiedSAE also is the name of the nn.Module in loganriggs's scripts: not normalised in the encoder,
never centred. Their `encode` wants y; ours centres by itself. Their squared error is a mean over
d_in, so their l1_alpha is d_in times smaller than our l1_coeff.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.formats.unpickle import Inert, contents, read_checkpoint
from sparse_coding.sae import L1SAE, SAE, TiedL1SAE, TopKSAE

FILE = "learned_dicts.pt"
MIN_NORM = 1e-8  # theirs; a row of zeros stays one


class LearnedDict(NamedTuple):
    """One dictionary of a file and what it was trained with (l1_alpha, dict_size ...)."""

    sae: SAE
    hyperparameters: dict[str, Any]


class Folded(NamedTuple):
    """One of theirs in our terms, float64: f = relu((x - b_dec) W_enc + b_enc)."""

    cls: type[SAE]
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    k: int | None = None


class Attributes:
    """The tensors of one object, in float64 and of the shape their names demand."""

    def __init__(self, path: Path, found: Inert) -> None:
        self.path, self.name = path, type(found).foreign_name
        parameters = vars(found).get("_parameters")  # of an nn.Module
        self.values = vars(found) | (parameters if isinstance(parameters, dict) else {})
        encoder = self.values.get("encoder", self.values.get("dict"))
        if not isinstance(encoder, Tensor) or encoder.ndim != 2:
            raise UserError(f"{path}: {self.name} must have an encoder of two axes")
        (self.d_sae, self.d_in), self.dtype = encoder.shape, encoder.dtype

    def tensor(self, name: str, *shape: int, default: Tensor | None = None) -> Tensor:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else "no tensor"
            raise UserError(f"{self.path}: {name} of {self.name} is {given}; it must be {shape}")
        if not value.is_floating_point() or not value.isfinite().all():
            raise UserError(f"{self.path}: {name} must hold finite floating-point numbers only")
        return value.detach().double()

    def matrix(self, name: str) -> Tensor:
        return self.tensor(name, self.d_sae, self.d_in)

    def per_feature(self, name: str, default: float | None = None) -> Tensor:
        return self.tensor(name, self.d_sae, default=self.constant(self.d_sae, default))

    def per_dimension(self, name: str, default: float | None = None) -> Tensor:
        return self.tensor(name, self.d_in, default=self.constant(self.d_in, default))

    @staticmethod
    def constant(size: int, value: float | None) -> Tensor | None:
        return None if value is None else torch.full((size,), value, dtype=torch.double)


def recognises(path: str | Path) -> bool:
    """Whether a .pt file, or a folder's learned_dicts.pt, mentions one of their classes."""
    path = _file(path)
    if path.suffix != ".pt" or not path.is_file():
        return False
    try:
        return not contents(path).names.isdisjoint(CLASSES)
    except UserError:
        return False


def load_hoagy(
    path: str | Path, device: torch.device | str = "cpu", index: int | None = None
) -> SAE:
    """The SAE in a file of theirs; `index` chooses, counted from 0, where there are several."""
    found = load_learned_dicts(path, device)
    if index is None and len(found) > 1:
        first, last = (found[i].hyperparameters for i in (0, -1))
        raise UserError(
            f"{path} holds {len(found)} dictionaries, from {first} to {last}; choose one with an "
            f"index from 0 to {len(found) - 1}"
        )
    if not 0 <= (index or 0) < len(found):
        raise UserError(f"{path} holds {len(found)} dictionaries; there is no index {index}")
    return found[index or 0].sae


def load_learned_dicts(path: str | Path, device: torch.device | str = "cpu") -> list[LearnedDict]:
    """All dictionaries of a file of theirs (or of a folder's learned_dicts.pt), in its order.

    A TiedSAE becomes a `TiedL1SAE` where its encoder is normalised and its scale is 1, a
    TopKLearnedDict a `TopKSAE`, anything else an `L1SAE`; centring, scales and norms are folded
    into the weights in float64 and rounded to the file's dtype. `UserError` for a damaged file,
    any other class, shapes that disagree, NaN or infinity.
    """
    path = _file(path)
    content = read_checkpoint(path, CLASSES)
    content = content if isinstance(content, list) else [(content, {})]
    if not content or not all(map(_is_entry, content)):
        raise UserError(
            f"{path} must hold one of {', '.join(CLASSES)}, or a list of pairs of such a one and "
            "its hyper-parameters"
        )
    return [LearnedDict(_sae(path, found, device), {**values}) for found, values in content]


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path / FILE if path.is_dir() else path


def _is_entry(entry: Any) -> bool:
    is_pair = isinstance(entry, tuple) and len(entry) == 2
    return is_pair and isinstance(entry[0], Inert) and isinstance(entry[1], dict)


def _sae(path: Path, found: Inert, device: torch.device | str) -> SAE:
    attributes = Attributes(path, found)
    folded = CLASSES[attributes.name](attributes)
    k = {} if folded.k is None else {"k": folded.k}
    # A generator of its own: loading must not advance the global random stream.
    sae = folded.cls(attributes.d_in, attributes.d_sae, torch.Generator(), **k)
    sae = sae.to(attributes.dtype)
    sae.load_state_dict({name: getattr(folded, name) for name in sae.state_dict()})
    return sae.to(device)


def _rows(matrix: Tensor) -> Tensor:
    return matrix / matrix.norm(dim=1, keepdim=True).clamp(min=MIN_NORM)


def _untied(its: Attributes) -> Folded:
    """UntiedSAE, AnthropicSAE and TransferSAE: what a class lacks is 0, a scale 1."""
    W_enc, shift = its.matrix("encoder").T, its.per_dimension("shift_bias", default=0.0)
    b_dec = (
        its.per_dimension("decoder_bias", default=0.0) if "decoder_bias" in its.values else shift
    )
    b_enc = its.per_feature("encoder_bias") + (b_dec - shift) @ W_enc
    W_dec = _rows(its.matrix("decoder")) * its.per_feature("scale", default=1.0)[:, None]
    return Folded(L1SAE, W_enc, b_enc, W_dec, b_dec)


def _tied(its: Attributes) -> Folded:
    encoder = its.matrix("encoder")
    directions = _rows(encoder)
    is_normalised = its.values.get("norm_encoder", False) is True
    scale = its.per_dimension("center_scale", default=1.0)
    rotation = its.tensor(
        "center_rot", its.d_in, its.d_in, default=torch.eye(its.d_in, dtype=torch.double)
    )
    if (scale == 0).any():
        raise UserError(
            f"{its.path}: center_scale of {its.name} holds a 0, which cannot be undone"
        )
    return Folded(
        TiedL1SAE if is_normalised and (scale == 1).all() else L1SAE,
        (((directions if is_normalised else encoder) * scale) @ rotation).T,
        its.per_feature("encoder_bias"),
        (directions / scale) @ rotation,
        its.per_dimension("center_trans", default=0.0),
    )


def _topk(its: Attributes) -> Folded:
    W_dec, k = its.matrix("dict"), its.values.get("sparsity")
    if type(k) is not int or not 0 < k <= its.d_sae:
        raise UserError(f"{its.path}: sparsity is {k!r}; it must be from 1 to {its.d_sae}")
    b_enc, b_dec = its.constant(its.d_sae, 0.0), its.constant(its.d_in, 0.0)
    return Folded(TopKSAE, W_dec.T, b_enc, W_dec, b_dec, k)


CLASSES: dict[str, Callable[[Attributes], Folded]] = {
    "autoencoders.learned_dict.TiedSAE": _tied,
    "autoencoders.learned_dict.UntiedSAE": _untied,
    "autoencoders.learned_dict.AnthropicSAE": _untied,
    "autoencoders.learned_dict.TransferSAE": _untied,
    "autoencoders.topk_encoder.TopKLearnedDict": _topk,
    "__main__.TiedSAE": _tied,
}

"""saprmarks/dictionary_learning: a folder of ae.pt, a state dict, and config.json.

Written so that `dictionary_learning.utils.load_dictionary` reads it as it is. Their classes:

    AutoEncoder             f = relu((x - b_dec) W_enc + b_enc)
    AutoEncoderNew          f = relu(x W_enc + b_enc)
    GatedAutoEncoder        f = (g + b_enc > 0) * relu(exp(r_mag) * g + b_mag),
                            g = (x - b_dec) W_enc
    AutoEncoderTopK         f = top_k(relu((x - b_dec) W_enc + b_enc)), k per token
    BatchTopKSAE            f = pre * (pre > threshold), pre = relu((x - b_dec) W_enc + b_enc)
    MatryoshkaBatchTopKSAE  the same
    JumpReluAutoEncoder     f = relu(pre * (pre > threshold)), pre = x W_enc + b_enc

and x_hat = f W_dec + b_dec. What they call `*.weight` is an nn.Linear's: the transpose of ours.
The saprmarks dictionaries of December 2023 (`10_32768`) are AutoEncoders whose config.json does
not say so. Activations divided by a `norm_factor` in training are no concern: the biases and
thresholds of ae.pt, and of their checkpoints, are multiplied by it before they are saved.

Their loss takes the squared error as a sum over d_in, as ours does (December 2023: as a mean), of
activations of root-mean-square norm 1 with `normalize_activations`, else of any.
"""

import re
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.formats.formulas import formulas, refuse_what_cannot_be_said
from sparse_coding.formats.hooks import hook_of
from sparse_coding.formats.unpickle import contents, read_checkpoint, write_state_dict
from sparse_coding.sae import (
    ARCHITECTURES,
    L1SAE,
    SAE,
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    MatryoshkaSAE,
    NormWeightedL1SAE,
    TiedL1SAE,
    TopKSAE,
)
from sparse_coding.storage import read_json, whole_folder, write_json

WEIGHTS, CONFIG = "ae.pt", "config.json"
OURS = "sparse_coding"  # key of config.json's trainer under which our own facts travel
UNSET = torch.tensor(-1.0)  # a threshold of theirs before it is learnt


class Layout(NamedTuple):
    """What one of their classes keeps in ae.pt, and which class of ours encodes alike."""

    cls: type[SAE]
    tensors: dict[str, str]
    """Their names: ours."""
    numbers: tuple[str, ...] = ()
    """Buffers that are no tensors of ours."""
    dispensable: tuple[str, ...] = ()
    """Those of them that older files lack."""


AXES = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_in"), "b_dec": ("d_in",)}
PER_FEATURE = ("d_sae",)  # any other
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
GATED = {
    "encoder.weight": "W_enc",
    "decoder.weight": "W_dec",
    "decoder_bias": "b_dec",
    "gate_bias": "b_enc",
    "mag_bias": "b_mag",
    "r_mag": "r_mag",
}
TOPK = LINEAR | {"b_dec": "b_dec"}
LAYOUTS = {
    "AutoEncoder": Layout(L1SAE, LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": Layout(NormWeightedL1SAE, LINEAR | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": Layout(GatedSAE, GATED),
    "AutoEncoderTopK": Layout(TopKSAE, TOPK, ("k", "threshold"), ("k", "threshold")),
    "BatchTopKSAE": Layout(BatchTopKSAE, TOPK, ("k", "threshold"), ("k",)),
    "MatryoshkaBatchTopKSAE": Layout(
        MatryoshkaSAE, PLAIN, ("k", "threshold", "group_sizes"), ("k",)
    ),
    "JumpReluAutoEncoder": Layout(JumpReLUSAE, PLAIN | {"threshold": "threshold"}),
}
# The first that a class descends from has its formulas.
WRITTEN_AS: dict[type[SAE], str] = {
    MatryoshkaSAE: "MatryoshkaBatchTopKSAE",
    BatchTopKSAE: "BatchTopKSAE",
    TopKSAE: "AutoEncoderTopK",
    JumpReLUSAE: "JumpReluAutoEncoder",
    GatedSAE: "GatedAutoEncoder",
    SAE: "AutoEncoder",
}


def recognises(path: str | Path) -> bool:
    """Whether a folder or a .pt file is one of theirs, by names alone."""
    path = Path(path)
    if path.is_dir():
        return (path / WEIGHTS).is_file()
    if path.suffix != ".pt" or not path.is_file():
        return False
    if re.fullmatch(r"ae(_\d+)?\.pt", path.name):
        return True
    try:
        strings = contents(path).strings
    except UserError:
        return False
    return any(set(layout.tensors) <= strings for layout in LAYOUTS.values())


def load_dictionary_learning(path: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a dictionary_learning folder, or in an ae.pt or a checkpoint of theirs by itself.

    It encodes as what their `load_dictionary` returns does by default, in the dtype of the file:
    `AutoEncoder` becomes `L1SAE` with its decoder normalised (features times row norms, unless
    those are 1 up to 1e-5 or the dtype's own rounding), `AutoEncoderNew` `NormWeightedL1SAE`, the
    others their namesakes. `AutoEncoderTopK` keeps k per token and loses its threshold, which is
    only used on demand there. A threshold below 0 (theirs before it is learnt) becomes 0, which
    changes nothing after a ReLU. Ours comes back as the class it was, bit by bit.

    `UserError` for a transcoder, a missing or damaged file, tensors that belong to no class or to
    another than config.json says, NaN or infinity, shapes or a k that disagree. A TopK and a
    BatchTopK keep the same tensors: without a config.json they cannot be told apart.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() or not path.suffix else path
    state, trainer = _read_state(path), _read_trainer(path)
    name = _their_class(path, set(state), trainer)
    weights = _our_tensors(path, state, LAYOUTS[name].tensors, trainer)
    (d_sae, d_in), dtype = weights["W_dec"].shape, weights["W_dec"].dtype
    if name == "AutoEncoder" and not _has_unit_rows(weights["W_dec"]):
        weights |= _with_unit_rows(weights)
    cls = _our_class(name, weights, trainer)
    options = _read_numbers(path, state, trainer, d_sae) if cls.sparsity_is_chosen else {}
    # A generator of its own: loading must not advance the global random stream.
    sae = cls(d_in, d_sae, torch.Generator(), **options).to(dtype)
    if hasattr(sae, "threshold"):
        weights["threshold"] = _finite(path, state, "threshold").clamp(min=0)
    sae.load_state_dict({name: weights[name] for name in sae.state_dict()})
    return sae.to(device)


def training_facts(path: Path) -> dict[str, Any]:
    """What config.json says of the training, if there is one."""
    path = path / WEIGHTS if path.is_dir() else path
    trainer, buffer = _read_config(path)
    module = trainer.get("submodule_name")
    return {
        "lm": trainer.get("lm_name"),
        "hook_name": hook_of(trainer.get("hook_name", module)),
        "module": module,
        "context_length": buffer.get("ctx_len"),
        "architecture": trainer.get("dict_class"),
        "seed": trainer.get("seed"),
    }


def save_dictionary_learning(
    sae: SAE, folder: str | Path, *, metadata: dict[str, Any], overwrite: bool = False
) -> Path:
    """Write an SAE of raw activations; the folder appears whole or not at all.

    `metadata` joins their keys under "trainer" (lm_name, layer, submodule_name, steps ...). A tied
    encoder is written out as W_dec^T. A plain ReLU SAE whose rows have other norms than 1 is
    written as an AutoEncoderNew, b_dec folded into b_enc where it is subtracted: an AutoEncoder's
    features would be rescaled on loading. Of a TopK, no threshold is known: theirs stays unset.

    `UserError` if the SAE encodes or decodes by a formula of its own or has thresholds below 0, or
    if the folder exists and `overwrite` is not set.
    """
    name = _written_class(sae)
    with whole_folder(folder, WEIGHTS, overwrite=overwrite) as temporary:
        write_state_dict(temporary / WEIGHTS, _their_tensors(sae, LAYOUTS[name]))
        trainer = metadata | {
            "dict_class": name,
            "activation_dim": sae.d_in,
            "dict_size": sae.d_sae,
            **({"k": sae.k} if sae.sparsity_is_chosen else {}),
            OURS: {"class": sae.name},
        }
        write_json(temporary / CONFIG, {"trainer": trainer})
    return Path(folder)


def _read_state(path: Path) -> dict[str, Tensor]:
    state = read_checkpoint(path)
    is_state = isinstance(state, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not is_state:
        raise UserError(f"{path} is not a state dict: it must map names to tensors")
    return state


def _read_trainer(path: Path) -> dict[str, Any]:
    """What config.json says of the training; nothing in the layout of December 2023."""
    trainer, buffer = _read_config(path)
    if buffer.get("io") == "in_and_out":
        raise UserError(
            f"{path.parent} holds a transcoder, whose output is no reconstruction; SAEs only"
        )
    return trainer


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json says of the trainer, and of the buffer."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    parts = (config.get(key) if isinstance(config, dict) else {} for key in ("trainer", "buffer"))
    trainer, buffer = (part if isinstance(part, dict) else {} for part in parts)
    return trainer, buffer


def _their_class(path: Path, keys: set[str], trainer: dict[str, Any]) -> str:
    candidates = [
        name
        for name, layout in LAYOUTS.items()
        if {*layout.tensors, *layout.numbers} - {*layout.dispensable} <= keys
        and keys <= {*layout.tensors, *layout.numbers}
    ]
    stated = trainer.get("dict_class")
    if not candidates:
        raise UserError(
            f"{path} holds {', '.join(sorted(keys)) or 'nothing'}, as no SAE of "
            "dictionary_learning does"
        )
    if stated is None and len(candidates) == 1:
        return candidates[0]
    if stated not in candidates:
        raise UserError(
            f"{path} holds the tensors of {' or '.join(candidates)}; {CONFIG} states "
            f"{'no dict_class' if stated is None else f'dict_class {stated!r}'}"
        )
    return stated


def _our_tensors(
    path: Path, state: dict[str, Tensor], names: dict[str, str], trainer: dict[str, Any]
) -> dict[str, Tensor]:
    """In our names and orientation, of agreeing shapes, finite."""
    weights = {}
    for theirs, ours in names.items():
        tensor = _finite(path, state, theirs)
        is_linear = theirs.endswith(".weight") and tensor.ndim == 2
        weights[ours] = tensor.T if is_linear else tensor
    if weights["W_dec"].ndim != 2:
        raise UserError(f"{path}: the decoder has {weights['W_dec'].ndim} axes; it must have 2")
    sizes = dict(zip(AXES["W_dec"], weights["W_dec"].shape, strict=True))
    for theirs, ours in names.items():
        shape = tuple(sizes[axis] for axis in AXES.get(ours, PER_FEATURE))
        if tuple(weights[ours].shape) != shape:
            raise UserError(
                f"{path}: {theirs} is {tuple(state[theirs].shape)}, which does not fit a decoder "
                f"of {sizes['d_sae']} features in {sizes['d_in']} dimensions"
            )
    for axis, key in (("d_in", "activation_dim"), ("d_sae", "dict_size")):
        if trainer.get(key, sizes[axis]) != sizes[axis]:
            raise UserError(
                f"{path}: {CONFIG} says {key} {trainer[key]}, the tensors {sizes[axis]}"
            )
    return weights


def _finite(path: Path, state: dict[str, Tensor], name: str) -> Tensor:
    tensor = state[name].detach()
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        raise UserError(f"{path}: {name} must hold finite floating-point numbers only")
    return tensor


def _has_unit_rows(W_dec: Tensor) -> bool:
    norms = W_dec.double().norm(dim=1)
    return bool(((norms - 1).abs() <= max(1e-5, torch.finfo(W_dec.dtype).eps)).all())


def _with_unit_rows(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same reconstruction from features that carry their row's norm."""
    norms = weights["W_dec"].double().norm(dim=1)
    return {
        "W_dec": weights["W_dec"] / norms.where(norms > 0, 1.0)[:, None],
        "W_enc": weights["W_enc"] * norms,
        "b_enc": weights["b_enc"] * norms,
    }


def _read_numbers(
    path: Path, state: dict[str, Tensor], trainer: dict[str, Any], d_sae: int
) -> dict[str, Any]:
    """`k`, and a Matryoshka's `prefixes`; older files have k in config.json only."""
    stated = [state["k"].tolist()] if "k" in state else []
    stated += [trainer["k"]] if "k" in trainer else []
    k = stated[0] if stated else None
    if any(other != k for other in stated) or type(k) is not int or not 0 < k <= d_sae:
        raise UserError(
            f"{path}: k is {' and '.join(map(str, stated)) or 'missing'}; the file and {CONFIG} "
            f"must agree on an integer between 1 and d_sae {d_sae}"
        )
    if "group_sizes" not in state:
        return {"k": k}
    sizes = state["group_sizes"].tolist()
    if not isinstance(sizes, list) or not all(type(n) is int and n > 0 for n in sizes):
        raise UserError(f"{path}: group_sizes must be a list of positive integers")
    if sum(sizes) != d_sae:
        raise UserError(f"{path}: group_sizes add up to {sum(sizes)}; d_sae is {d_sae}")
    return {"k": k, "prefixes": tuple(accumulate(sizes))}


def _our_class(name: str, weights: dict[str, Tensor], trainer: dict[str, Any]) -> type[SAE]:
    """What an SAE of ours was, if it still can be that; else what encodes alike."""
    cls, ours = LAYOUTS[name].cls, trainer.get(OURS)
    claimed = ARCHITECTURES.get(str(ours.get("class")) if isinstance(ours, dict) else "")
    if claimed is None or formulas(claimed, WRITTEN_AS) is not formulas(cls, WRITTEN_AS):
        return cls
    is_tied = torch.equal(weights["W_enc"], weights["W_dec"].T)
    if claimed.subtracts_b_dec != cls.subtracts_b_dec or (
        issubclass(claimed, TiedL1SAE) and not is_tied
    ):
        return cls
    return claimed


def _written_class(sae: SAE) -> str:
    refuse_what_cannot_be_said(sae, WRITTEN_AS, "dictionary_learning")
    expected = formulas(type(sae), WRITTEN_AS)
    if expected is SAE and not (sae.subtracts_b_dec and _has_unit_rows(sae.W_dec)):
        return "AutoEncoderNew"
    return WRITTEN_AS[expected]


def _their_tensors(sae: SAE, layout: Layout) -> dict[str, Tensor]:
    ours = {name: getattr(sae, name).detach() for name in layout.tensors.values()}
    if sae.subtracts_b_dec != layout.cls.subtracts_b_dec:
        shift = ours["b_dec"].double() @ ours["W_enc"].double()
        sign = -1 if sae.subtracts_b_dec else 1
        ours["b_enc"] = (ours["b_enc"].double() + sign * shift).to(sae.b_enc.dtype)
    tensors = {
        theirs: ours[name].T if theirs.endswith(".weight") else ours[name]
        for theirs, name in layout.tensors.items()
    }
    if "k" in layout.numbers:
        tensors["k"] = torch.tensor(sae.k, dtype=torch.int)
    if "threshold" in layout.numbers:
        tensors["threshold"] = getattr(sae, "threshold", UNSET)
    if "group_sizes" in layout.numbers:
        tensors["group_sizes"] = torch.tensor([0, *sae.prefixes]).diff()
    return tensors

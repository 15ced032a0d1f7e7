"""Tensors in safetensors files: read with one line for what is wrong, written whole."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.storage import atomic_path

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # not float8: no arithmetic


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds; `UserError` if it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, views among them as what they show; the file is whole or absent."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary)


def check_tensors(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """`UserError` unless there are exactly the expected names, shapes and finite numbers."""
    if set(tensors) != set(expected):
        names = (name if name.isprintable() else repr(name) for name in sorted(tensors))
        raise UserError(
            f"{path} holds {', '.join(names) or 'nothing'}; {what} holds {', '.join(expected)}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(f"{path}: {name} is {tuple(tensors[name].shape)}; it must be {shape}")
        if tensors[name].dtype not in DTYPES or not tensors[name].isfinite().all():
            raise UserError(f"{path}: {name} must hold finite floating-point numbers only")

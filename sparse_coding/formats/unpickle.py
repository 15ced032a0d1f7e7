"""PyTorch's .pt files: others' read without running what is in them, plain ones of ours written.

A .pt file is a pickle, a program that names what it wants imported and called. This is the one
file that touches such programs. `read_checkpoint` lists a program's instructions first, without
following them, and refuses any name that tensors do not need; torch's restricted reader
(`weights_only`), which knows neither import nor eval, then follows what is left. Objects of
foreign classes come back as `Inert` ones: attributes without behaviour.

Nothing here knows what a dictionary is.
"""

import io
import pickletools
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.storage import atomic_path

MAX_BYTES = 64 * 2**30  # of a file: four times the largest dictionary published
MAX_PROGRAM_BYTES = 16 * 2**20  # of its pickle, which holds no numbers of the tensors'
# About 200 belong to one object of five tensors. Also bounds how deep tuples nest: hashing one
# that is 131,072 deep overflows the stack.
MAX_INSTRUCTIONS = 50_000
PROTOCOL = 2  # torch.save's
DTYPES = ("Float", "Double", "Half", "BFloat16", "Char", "Byte", "Short", "Int", "Long", "Bool")
NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "__builtin__.set",  # nn.Module's record of buffers; protocol 2 spells Python 2's module
    *(f"torch.{dtype}Storage" for dtype in DTYPES),
}


class Inert:
    """Stands in for an object of a foreign class: its attributes (`vars`), no behaviour."""

    foreign_name = "module.Class"


class Contents(NamedTuple):
    """What the program of a .pt file mentions."""

    names: set[str]
    """Dotted names of what it wants imported."""
    strings: set[str]
    """Keys of dictionaries, names of attributes, and other texts."""


def contents(path: str | Path) -> Contents:
    """What a .pt file mentions, read without loading a tensor; `UserError` if it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with _damage_in_one_line(path):
        _check_size(path)
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            # The older form begins with five programs; the last two are the object and its order.
            programs = (
                [_program(path)] if is_zip else [io.BytesIO(file.read(MAX_PROGRAM_BYTES))] * 5
            )
        found = [_listed(path, program) for program in programs]
        return Contents(*(set.union(*parts) for parts in zip(*found, strict=True)))


def read_checkpoint(path: str | Path, classes: Iterable[str] = ()) -> Any:
    """What `torch.save` wrote, tensors on the CPU; both its zip form and the one before 1.6.

    `classes`: dotted names of classes whose objects may be in it, as `Inert` ones. `UserError` if
    the file is missing, damaged, compressed, larger than it says or asks for any other name.
    """
    path, classes = Path(path), tuple(classes)
    unknown = sorted(contents(path).names - NAMES - set(classes))
    if unknown:
        raise UserError(
            f"{path} asks to run {unknown[0]}, which no dictionary needs; nothing of it was run"
        )
    stand_ins = [
        (type(name.rpartition(".")[2], (Inert,), {"foreign_name": name}), name) for name in classes
    ]
    with _damage_in_one_line(path), torch.serialization.safe_globals(stand_ins):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    _check_tensors(path, content)
    return content


def write_state_dict(
    path: str | Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None
) -> Path:
    """Write tensors as a state dict that `torch.load` reads; the file is whole or absent.

    `settings`: texts, numbers and dictionaries of them that stand beside the tensors.
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(plain | dict(settings or {}), file)
    return Path(path)


@contextmanager
def _damage_in_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # three parsers read a hostile file, and each raises what it likes
        kind = type(error).__name__
        raise UserError(f"{path} is damaged or no PyTorch checkpoint ({kind})") from None


def _check_size(path: Path) -> None:
    n_bytes = path.stat().st_size
    if n_bytes > MAX_BYTES:
        raise UserError(f"{path} has {n_bytes} bytes; at most {MAX_BYTES} are read")


def _program(path: Path) -> io.BytesIO:
    """The pickle in a zip file, once it is clear that unpacking cannot outgrow the file."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError(f"{path} is compressed, which torch.save never does; save it again")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path} unpacks to more bytes than it has")
        if len({entry.filename for entry in entries}) < len(entries):
            raise UserError(f"{path} holds two files of one name")
        (program,) = (entry for entry in entries if entry.filename.endswith("/data.pkl"))
        if program.file_size > MAX_PROGRAM_BYTES:
            raise UserError(f"{path} has a pickle of {program.file_size} bytes")
        return io.BytesIO(archive.read(program))


def _listed(path: Path, program: io.BytesIO) -> Contents:
    """What one pickle mentions; follows no instruction, and leaves the stream after its last.

    A tuple that is used twice may contain itself doubled, and again: fifty instructions that take
    2^50 steps to hash. No state dict uses one twice.
    """
    found, tuples, latest = Contents(set(), set()), set(), ""
    for n, (opcode, argument, _) in enumerate(pickletools.genops(program)):
        if n == MAX_INSTRUCTIONS:
            raise UserError(f"{path} has a pickle of more than {MAX_INSTRUCTIONS} instructions")
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            if latest.startswith("TUPLE"):
                tuples.add(argument)
            continue
        latest = opcode.name
        if latest in ("BINGET", "LONG_BINGET") and argument in tuples:
            raise UserError(f"{path} uses a tuple twice, as no checkpoint of tensors does")
        if latest == "PROTO" and argument != PROTOCOL:
            raise UserError(f"{path} is a pickle of protocol {argument}; only {PROTOCOL} is read")
        if latest == "GLOBAL":
            found.names.add(argument.replace(" ", "."))
        elif "UNICODE" in latest:
            found.strings.add(argument)
    return found


def _check_tensors(path: Path, content: Any) -> None:
    """Refuse tensors that repeat their own numbers: bytes in the file, terabytes when copied."""
    waiting, seen = [content], set()
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.numel() * item.element_size() > item.untyped_storage().nbytes():
                raise UserError(
                    f"{path} holds a tensor of shape {tuple(item.shape)} without its data"
                )
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, Inert):
            waiting.append(vars(item))

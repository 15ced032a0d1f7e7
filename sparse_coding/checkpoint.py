"""Checkpoints of a training run, and the signals that ask for a last one.

A checkpoint is one safetensors file, written atomically, with a checksum of its tensors; the
newest few are kept, and one of a diverged SAE is never written, so that it pushes out no good one.

None is kept as the best, for it would have no use and no fair measure. A run goes on exactly from
its newest checkpoint; from an older one it would repeat what followed. A result is never taken
from the middle of a run, where the learning rate has not fallen to zero. The loop measures nothing
on held-out text; the training FVU is lowest where L0 happens to be above its target, and a file
holds a whole ladder, whose SAEs would be best at different steps.
"""

import hashlib
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.processes import ALONE, Processes
from sparse_coding.storage import atomic_path, disk_errors_in_one_line, make_folder

_PATTERN = re.compile(r"step_(\d{9})\.safetensors")


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], keep: int) -> Path:
    """Write `folder/step_000000123.safetensors` whole or not at all; `keep` files stay.

    Those of later steps go too: a run that comes by here again has found them damaged.
    """
    path = folder / f"step_{step:09d}.safetensors"
    # Tied storage and transposed views are written as the plain tensors they stand for.
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    needed = sum(tensor.nbytes for tensor in plain.values())
    with disk_errors_in_one_line(folder):
        make_folder(folder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space for a checkpoint in {folder}: it needs {needed / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free; older checkpoints are untouched"
        )
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"sha256": _checksum(plain)})
    checkpoints = _checkpoints(folder)
    n_until_here = checkpoints.index(path) + 1
    for other in checkpoints[: max(0, n_until_here - keep)] + checkpoints[n_until_here:]:
        other.unlink()
    return path


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes; about 2 GB/s where the processor helps.

    safetensors itself has none: a flipped bit of a tensor would be loaded without a word.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.safetensors") if _PATTERN.fullmatch(path.name))


def load_newest_checkpoint(folder: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Step and tensors of the newest readable checkpoint; None if the folder has none.

    A damaged file is passed over in favour of the one before it, and named on the terminal.
    """
    damaged = []
    for path in reversed(_checkpoints(folder)):
        try:
            tensors = _load(path)
        except (SafetensorError, OSError, ValueError) as error:
            damaged.append(path.name)
            print(f"{path} is damaged ({error}); trying the one before it")
            continue
        return int(_PATTERN.fullmatch(path.name)[1]), tensors
    if damaged:
        raise UserError(
            f"every checkpoint in {folder} is damaged: {', '.join(damaged)}; give --overwrite to "
            "train from the start (cached activations stay)"
        )
    return None


def _load(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        expected = (file.metadata() or {}).get("sha256")
    if _checksum(tensors) != expected:
        raise ValueError("its tensors do not have the checksum they were written with")
    return tensors


@runtime_checkable
class Stateful(Protocol):
    """A trainer or a source: its state is named tensors or integers."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_run(
    folder: Path,
    step: int,
    parts: dict[str, Stateful],
    keep: int,
    processes: Processes = ALONE,
) -> Path | None:
    """One checkpoint of several parts (trainers, the source), each under its own name.

    All processes give their parts' states, the first one writes.
    """
    tensors = {
        f"{part}|{key}": torch.as_tensor(value)
        for part, stateful in parts.items()
        for key, value in stateful.state_dict().items()
    }
    path = save_checkpoint(folder, step, tensors, keep) if processes.is_first else None
    processes.wait()  # torchrun terminates all when one has ended; none may while this is written
    return path


def load_run(folder: Path, parts: dict[str, Stateful], processes: Processes = ALONE) -> int:
    """Put every part back into its state of the newest checkpoint; its step, 0 without one.

    All processes read the same file, and every part takes what it needs.
    """
    newest = load_newest_checkpoint(folder)
    step, tensors = newest or (0, {})
    if len(set(processes.gathered(step))) > 1:
        raise UserError(
            f"the processes do not see the same checkpoints in {folder}: --output must name a "
            "folder that all machines share"
        )
    if newest is None:
        return 0
    for part, stateful in parts.items():
        prefix = f"{part}|"
        state = {
            key.removeprefix(prefix): _integer_or_tensor(value)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        stateful.load_state_dict(state)
    return step


def _integer_or_tensor(value: Tensor) -> int | Tensor:
    is_integer = value.ndim == 0 and not value.is_floating_point()
    return int(value) if is_integer else value


def saved_at_an_error(
    batches: Iterable[Any], save: Callable[[], object], processes: Processes = ALONE
) -> Iterator[Any]:
    """The same batches; if they break off with an error, all that was learnt is saved first.

    Of several processes none saves: to collect what they hold all must have met the error.
    """
    try:
        yield from batches
    except UserError:
        if processes.is_alone:
            save()
        raise


class StopSignal:
    """SIGINT and SIGTERM end the program with a line; a second one kills.

    While the signal is awaited it only sets `name`, so that a step is finished and saved. Under
    torchrun a second one changes nothing: torchrun passes on a signal that its processes may have
    got themselves, and itself kills what has not ended 30 seconds later.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.name, self._processes = "", processes
        self._is_awaited = False
        self._before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if self._processes.is_alone:
            self.restore()
        if not self._is_awaited:
            self._end()

    def agreed(self) -> str:
        """The signal that some process has received, "" if none has: the same for all of them.

        Each calls it once a step, so that all stop at the same one.
        """
        if self._processes.count(int(bool(self.name))) == 0:
            return ""
        return next(filter(None, self._processes.gathered(self.name)))

    def _end(self) -> None:
        sys.exit(f"stopped by {self.name}; go on with --resume")

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Within, who asks for `agreed` ends the program; one who did not ends with the block."""
        self._is_awaited = True
        yield
        self._is_awaited = False
        if self.name:
            self._end()

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

"""The processes among which one run is divided, as torchrun started them, and what they exchange.

`ALONE`, without torchrun, does nothing and costs nothing: every exchange gives back what it was
given. Nothing here knows what is exchanged.
"""

import atexit
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sparse_coding.errors import LostProcessError, UserError, discard_what_is_held

PATIENCE = timedelta(hours=24)
"""Of a process that waits while the first one verifies, evaluates or saves; of one that died its
neighbours learn at once."""

SECONDS_TO_PART = 0.5
"""In which a process that ends leaves Python's lock to its threads."""

Value = TypeVar("Value")


class Processes:
    """This process's place among `size` others, and collective calls: all make the same ones.

    Tensors on a GPU go by NCCL, those of the CPU by gloo; sums have the same bits everywhere. When
    a process dies, those that wait for it end with one `UserError`.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def is_alone(self) -> bool:
        return self.size == 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes, prints and measures."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        self.gathered(None)

    def of_first(self, value: Value) -> Value:
        """The first process's value."""
        return self.gathered(value)[0]

    def gathered(self, value: Value) -> list[Value]:
        """The (small) values of all, in order of rank."""
        if self.is_alone:
            return [value]
        values: list[Any] = [None] * self.size
        with lost_process_in_one_line():
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first runs the block, then all others do: what it keeps on disk is made once."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def share(self, n: int) -> slice:
        """This process's of n things in a row; n is divisible by `size`."""
        assert n % self.size == 0, f"{n} things among {self.size} processes"
        own = n // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def sent(self, tensor: Tensor, owner: int) -> Tensor:
        """The owner's tensor; others give an empty one of the same kind."""
        if not self.is_alone:
            tensor = tensor.contiguous()
            with lost_process_in_one_line():
                dist.broadcast(_bytes(tensor), owner)
        return tensor

    def joined(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Equally shaped tensors of all, in order of rank, behind each other; no gradient."""
        if self.is_alone:
            return tensor
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with lost_process_in_one_line():
            dist.all_gather([_bytes(part) for part in parts], _bytes(tensor))
        return torch.cat(parts, dim=dim)

    def reduced(self, tensor: Tensor, operation: str = "sum") -> Tensor:
        """The sum (or "min") over all, elementwise; no gradient."""
        if self.is_alone:
            return tensor
        tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
        with lost_process_in_one_line():
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation.upper()))
        return tensor

    def count(self, n: int) -> int:
        """The sum of a number that the host knows."""
        return n if self.is_alone else int(self.reduced(torch.tensor(n)))

    def total(self, part: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The sum over all; everybody's part gets the gradient of the whole.

        (Megatron's g, Shoeybi et al. 2019, arXiv 1909.08053, section 3: what follows is computed
        alike by all, so its gradient is not to be summed again.)
        """
        return part if self.is_alone else _Total.apply(part, self)

    def mean(self, part: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """`total` / size; everybody's part gets the whole's gradient.

        That is right where gradients are averaged over all afterwards.
        """
        return part if self.is_alone else _Mean.apply(part, self)

    def shared(self, parameter: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """A parameter that all have alike and that each uses for its own part of the work.

        Its gradient is the sum of everybody's (Megatron's f).
        """
        return parameter if self.is_alone else _Shared.apply(parameter, self)

    def collected(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """On the first process everybody's tensors, on the CPU; on the others their own."""
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
        kinds = self.gathered({name: (t.dtype, tuple(t.shape)) for name, t in own.items()})
        for owner in range(1, self.size):
            for name, (dtype, shape) in kinds[owner].items():
                with lost_process_in_one_line():
                    if self.is_first:
                        own[name] = torch.empty(shape, dtype=dtype)
                        dist.recv(own[name], owner)
                    elif self.rank == owner:
                        dist.send(own[name], 0)
        return own


ALONE = Processes()


def _bytes(tensor: Tensor) -> Tensor:
    """A view of a contiguous tensor; not every backend knows every number format."""
    return tensor.reshape(-1).view(torch.uint8)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, processes: Processes) -> Tensor:
        return processes.reduced(part)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, part: Tensor, processes: Processes) -> Tensor:
        return processes.reduced(part) / processes.size

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.processes.reduced(gradient), None


@contextmanager
def lost_process_in_one_line() -> Iterator[None]:
    """What torch says when another process is gone, as a `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(
            "another process of this run has ended, so this one does too; the last checkpoint is "
            f"good: start again with --resume ({_first_sentence(str(error))})"
        ) from None


def _first_sentence(text: str) -> str:
    """Of what torch says, without the place in its source."""
    return re.sub(r"^\[[^]]*\] ", "", text).partition("\n")[0].partition(". ")[0]


def n_processes() -> int:
    """How many torchrun started; 1 without it. Asks nobody."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def n_processes_here() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def job() -> str:
    """What names the torchrun that started this process, also when it starts it again; or ""."""
    identity = os.environ.get("TORCHELASTIC_RUN_ID")
    return "" if identity is None else f"torchrun {identity} of process {os.getppid()}"


def open_processes(device: str = "auto") -> Processes:
    """Meet the processes that torchrun started; `ALONE` without it.

    On GPUs each takes the one of its LOCAL_RANK as its current device.
    """
    if n_processes() == 1:
        return ALONE
    is_cuda = torch.cuda.is_available() and device.split(":")[0] in ("auto", "cuda")
    if is_cuda:
        _take_gpu(device)
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    before = sys.excepthook  # torch puts one of its own in the place
    with lost_process_in_one_line():
        store, rank, size = next(dist.rendezvous("env://"))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps the store when it starts processes again: the dead ones' addresses
            # are still in it. (Of several machines each counts its own restarts.)
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    sys.excepthook = before
    if not is_cuda:  # after an error NCCL might wait for whoever has gone
        atexit.register(_part)
    discard_what_is_held()
    return Processes(rank, size)


def leave_to_first(processes: Processes) -> None:
    """End the others here: the first goes on alone. Nothing can be exchanged after it."""
    processes.wait()
    _part()
    if not processes.is_first:
        sys.exit()


def _part() -> None:
    """Let gloo's threads put down the last tensors, for which they need Python's lock: one that
    still waits for it when Python ends aborts the process, and torchrun then ends all others
    (github.com/pytorch/pytorch/pull/179291)."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(SECONDS_TO_PART)


def _take_gpu(device: str) -> None:
    n_gpus = torch.cuda.device_count()
    if ":" in device:
        raise UserError(
            f"--device {device} is not possible with several processes: each takes a GPU of its "
            "own; give cuda, and choose among GPUs by CUDA_VISIBLE_DEVICES"
        )
    if n_processes_here() > n_gpus:
        raise UserError(
            f"{n_processes_here()} processes were started and there are {n_gpus} GPUs here; give "
            f"torchrun --nproc-per-node={n_gpus}, or --device cpu"
        )
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def refuse_unseen(path: "os.PathLike[str]", processes: Processes) -> None:
    """`UserError` from a process that does not see what the first one wrote."""
    if not os.path.exists(path):
        raise UserError(
            f"process {processes.rank} on {socket.gethostname()} does not see {path}, which "
            "process 0 wrote: --output must name a folder that all machines share"
        )

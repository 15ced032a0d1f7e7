"""Trainers of several processes on planted data, for test_distributed: torchrun runs this file.

    torchrun --nproc-per-node=N tests/shared_training.py FOLDER FIRST LAST

trains steps FIRST to LAST in float64 in each division of the work, from the state that FOLDER has
of another one if FIRST is not 0, and leaves states, log and finished SAEs there.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_coding.config import RunConfig
from sparse_coding.distributed import make_trainer, share_of_batches
from sparse_coding.ladder import ladder
from sparse_coding.processes import Processes, leave_to_first, open_processes
from sparse_coding.sae import ARCHITECTURES, CROSSCODERS
from sparse_coding.sources import TensorActivations
from sparse_coding.training import Trainer, TrainingConfig

D_IN, D_OUT, BATCH, N_STEPS = 12, 7, 32, 60
MODES = ("data", "features", "ladder")
BEFORE = {"data": "features", "features": "ladder", "ladder": "data"}
"""Whose state another division goes on from."""
# Few enough tokens that features die: AuxK and resampling have work to do.
TRAINING = TrainingConfig(
    N_STEPS, BATCH, lr=3e-3, initial_l0=4.0, n_resamples=6, dead_after_tokens=64, step="reference"
)


class Ladder(NamedTuple):
    """One trainer of the test."""

    names: tuple[str, ...]
    target_width: int = 0
    hook_widths: tuple[int, ...] = ()

    @property
    def n_columns(self) -> int:
        return sum(self.hook_widths) or D_IN + self.target_width


LADDERS = {
    "saes": Ladder(tuple(ARCHITECTURES)),
    "transcoders": Ladder(("l1", "batch_topk", "jumprelu", "matryoshka"), D_OUT),
    "crosscoders": Ladder(tuple(CROSSCODERS), hook_widths=(D_IN, 4)),
}


def rows() -> Tensor:
    """Sparse sums of planted directions, some of them rare."""
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(30, D_IN + D_OUT, generator=generator)
    rates = torch.linspace(0.005, 0.25, 30)
    is_on = torch.rand(6000, 30, generator=generator) < rates
    strength = 1 + torch.rand(6000, 30, generator=generator)
    noise = 0.05 * torch.randn(6000, D_IN + D_OUT, generator=generator)
    return (is_on * strength) @ directions + noise + 0.5


def columns(x: Tensor, name: str) -> Tensor:
    return x[:, : LADDERS[name].n_columns]


def begin(processes: Processes, parallel: str, x: Tensor) -> dict[str, Trainer]:
    trainers = {}
    for name, (architectures, width, hook_widths) in LADDERS.items():
        grid = architectures, (4,), (), (3.0,), (0,)
        specs = ladder(*grid, are_transcoders=bool(width), n_hooks=len(hook_widths) or 1)
        fit = specs, TRAINING, columns(x[:512], name)
        trainers[name] = make_trainer(
            processes, parallel, *fit, target_width=width, hook_widths=hook_widths
        )
    return trainers


class Batches(TensorActivations):
    """In float64, which the sources of real runs do not know."""

    def load(self, numbers):
        for number in numbers:
            yield self.x[torch.from_numpy(self.indices(number))]


def train(trainers: dict[str, Trainer], x: Tensor, part: slice, steps: range) -> list[dict]:
    """The log: after every tenth step."""
    log, source = [], Batches(x, BATCH, seed=3)
    source.load_state_dict(source.state_dict() | {"n_delivered": steps.start})
    source.part = part
    for step, batch in zip(steps, source, strict=False):
        for name, trainer in trainers.items():
            trainer.step(columns(batch, name))
        if step % 10 == 9:
            log += [row for trainer in trainers.values() for row in trainer.metrics()]
    return log


def state_of(trainers: dict[str, Trainer]) -> dict[str, Tensor]:
    return {
        f"{name}|{key}": value.contiguous()
        for name, trainer in trainers.items()
        for key, value in trainer.state_dict().items()
    }


def weights_of(trainers: dict[str, Trainer]) -> dict[str, Tensor]:
    return {
        f"{name}|{sae_name}|{key}": value.contiguous()
        for name, trainer in trainers.items()
        for sae_name, sae in trainer.finished_saes().items()
        for key, value in sae.state_dict().items()
    }


def restore(trainers: dict[str, Trainer], state: dict[str, Tensor]) -> None:
    for name, trainer in trainers.items():
        prefix = f"{name}|"
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        trainer.load_state_dict({k: int(v) if k.startswith("n_") else v for k, v in own.items()})


def facts_of(trainers: dict[str, Trainer]) -> dict[str, Any]:
    return {name: trainer.facts() for name, trainer in trainers.items()}


def main(folder: Path, first: int, last: int) -> None:
    torch.set_default_dtype(torch.float64)
    processes, x = open_processes("cpu"), rows()
    for parallel in MODES:
        trainers = begin(processes, parallel, x)
        if first:
            restore(trainers, load_file(folder / f"{BEFORE[parallel]}_{first}.safetensors"))
        cfg = RunConfig(parallel=parallel, batch_tokens=BATCH)
        log = train(trainers, x, share_of_batches(processes, cfg), range(first, last))
        state, weights, facts = state_of(trainers), weights_of(trainers), facts_of(trainers)
        if processes.is_first:
            save_file(state, folder / f"{parallel}_{last}.safetensors")
            save_file(weights, folder / f"{parallel}_{last}_finished.safetensors")
            (folder / f"{parallel}_{last}.json").write_text(json.dumps([log, facts]))
    leave_to_first(processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

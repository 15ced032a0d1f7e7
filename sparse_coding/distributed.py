"""One run's training divided among processes, to the result of one process.

    ladder    each process trains some of the SAEs, on the same batches
    data      each trains all of them on its rows of every batch; gradients are averaged
    features  each holds a share of every SAE's features and sees whole batches

What is logged, saved and measured is whole everywhere, so a run may go on with another number of
processes, or divided otherwise. Nothing here knows of files.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_coding.config import Parallel, RunConfig
from sparse_coding.errors import UserError
from sparse_coding.ladder import SAESpec, shares
from sparse_coding.processes import ALONE, Processes
from sparse_coding.sae import SAE
from sparse_coding.saes.base import feature_dimension
from sparse_coding.training import Trainer, TrainingConfig

State = dict[str, Any]


def make_trainer(
    processes: Processes,
    parallel: Parallel,
    specs: list[SAESpec],
    cfg: TrainingConfig,
    sample: Tensor,
    prefix: str = "",
    target_width: int = 0,
    hook_widths: Sequence[int] = (),
) -> Trainer:
    """The `Trainer` of one process, or this one's part in one that several make up."""
    if processes.is_alone:
        return Trainer(specs, cfg, sample, prefix, target_width, hook_widths)
    return TRAINERS[parallel](processes, specs, cfg, sample, prefix, target_width, hook_widths)


def share_of_batches(processes: Processes, cfg: RunConfig) -> slice:
    """Which rows of every batch this process trains on."""
    return processes.share(cfg.batch_tokens) if cfg.parallel == "data" else slice(None)


class SharedTrainer(Trainer):
    """What several processes make up; every method is called by all of them alike."""

    def __init__(
        self,
        processes: Processes,
        specs: list[SAESpec],
        cfg: TrainingConfig,
        sample: Tensor,
        prefix: str,
        target_width: int,
        hook_widths: Sequence[int],
    ) -> None:
        self.processes = processes
        self.specs = {prefix + spec.name: spec for spec in specs}
        super().__init__(specs, cfg, sample, prefix, target_width, hook_widths)


class LadderTrainer(SharedTrainer):
    """Other SAEs in every process; nothing is exchanged between the lines of the log.

    Each SAE ends with the same bits as in one process with the same number of threads.
    """

    def own(self, specs: Sequence[SAESpec]) -> list[SAESpec]:
        return shares(specs, self.processes.size)[self.processes.rank]

    @property
    def _owners(self) -> dict[str, int]:
        """Which process has the SAE of that name."""
        names = {spec: name for name, spec in self.specs.items()}
        parts = shares(list(self.specs.values()), self.processes.size)
        owners = {names[spec]: rank for rank, part in enumerate(parts) for spec in part}
        return {name: owners[name] for name in self.specs}

    def metrics(self) -> list[dict[str, Any]]:
        everybodys = [row for rows in self.processes.gathered(super().metrics()) for row in rows]
        by_name = {row["name"]: row for row in everybodys}
        return [by_name[name] for name in self.specs]

    def facts(self) -> dict[str, dict[str, Any]]:
        everybodys = {
            k: v for one in self.processes.gathered(super().facts()) for k, v in one.items()
        }
        return {name: everybodys[name] for name in self.specs}

    def finished_saes(self) -> dict[str, SAE]:
        own, saes = super().finished_saes(), {}
        for name, owner in self._owners.items():
            sae = own.get(name)
            sae = self._make_sae(self.specs[name]) if sae is None else sae
            for tensor in (*sae.parameters(), *sae.buffers()):
                tensor.data.copy_(self.processes.sent(tensor.data, owner))
            saes[name] = sae
        return saes

    def state_dict(self) -> State:
        own = self.own_state()
        if not self.processes.is_first:
            own = {key: value for key, value in own.items() if "/" in key}
        return self.processes.collected(own)

    def load_state_dict(self, state: State) -> None:
        own = {lane.name for lane in self.lanes}
        others = self.specs.keys() - own
        super().load_state_dict(
            {key: v for key, v in state.items() if key.rpartition("/")[0] not in others}
        )


class DataTrainer(SharedTrainer):
    """The same SAEs in every process, each with its rows of a batch (`share_of_batches`).

    A step is that of the joined batch up to the rounding of sums: gradients are averaged, and
    what a class decides over a batch is decided over the joined one.
    """

    def __init__(self, processes: Processes, *arguments: Any) -> None:
        self.rows = processes
        super().__init__(processes, *arguments)

    def divide(self, sae: SAE) -> None:
        sae.rows = self.processes

    def finished_saes(self) -> dict[str, SAE]:
        saes = super().finished_saes()
        for sae in saes.values():
            sae.rows = ALONE
        return saes


class FeaturesTrainer(SharedTrainer):
    """A share of every SAE's features in each process, all on the same whole batches.

    Tensor parallel, after Megatron (Shoeybi et al. 2019, arXiv 1909.08053, section 3): a step
    exchanges each batch's reconstruction, and the largest activations where a class ranks them.
    An SAE is begun whole, then cut: for a moment each process holds the weights of one.
    """

    def divide(self, sae: SAE) -> None:
        if sae.d_sae % self.processes.size:
            raise UserError(
                f"{sae.d_sae} features cannot be divided among {self.processes.size} processes "
                "(--parallel features); give a number of processes that divides them"
            )
        sae.keep_share(self.processes)

    def finished_saes(self) -> dict[str, SAE]:
        saes = {}
        for lane in self.lanes:
            sae = self._make_sae(lane.spec)
            tensors = dict(lane.sae.named_parameters()) | dict(lane.sae.named_buffers())
            whole = dict(sae.named_parameters()) | dict(sae.named_buffers())
            for name, tensor in tensors.items():
                whole[name].data.copy_(self._whole(f"{lane.name}/{name}", tensor.data))
            saes[lane.name] = self.folded(sae)
        return saes

    def state_dict(self) -> State:
        state = {}
        for key, value in self.own_state().items():
            whole = self._whole(key, value)  # one at a time: none but the first keeps it
            if self.processes.is_first:
                state[key] = whole.cpu()
        return state

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict({key: self._part(key, value) for key, value in state.items()})

    def _whole(self, key: str, tensor: Tensor) -> Tensor:
        dim = _feature_dimension(key, tensor)
        return tensor if dim is None else self.processes.joined(tensor, dim)

    def _part(self, key: str, value: Any) -> Any:
        dim = _feature_dimension(key, torch.as_tensor(value))
        if dim is None or value.shape[dim] % self.processes.size:
            return value
        own = self.processes.share(value.shape[dim])
        return value.narrow(dim, own.start, own.stop - own.start)


def _feature_dimension(key: str, tensor: Tensor) -> int | None:
    """Along which dimension a tensor of a trainer's state has one entry per feature."""
    lane, _, name = key.rpartition("/")
    is_whole = not lane or tensor.ndim == 0 or name == "sums"
    return None if is_whole else feature_dimension(name.rpartition(".")[2])


TRAINERS = {"ladder": LadderTrainer, "data": DataTrainer, "features": FeaturesTrainer}

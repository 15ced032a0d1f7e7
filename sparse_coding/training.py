"""Training state for a whole ladder of SAEs on one stream of activations; the loop is elsewhere.

`Trainer.step(x)` gives every SAE the same batch, so each ends as it would have ended alone with
the same seed and the same data. Nothing here knows about language models, files or terminals, and
nothing in `step` waits for the device.
"""

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.config import RunConfig
from sparse_coding.dead_features import DeadFeatures
from sparse_coding.errors import UserError
from sparse_coding.kernels import StepStatistics, make_adam, make_step, set_lr
from sparse_coding.l0_controller import L0Controller
from sparse_coding.ladder import SAESpec
from sparse_coding.processes import ALONE, Processes
from sparse_coding.sae import SAE, TRAINABLE


@dataclass(frozen=True)
class TrainingConfig:
    """How to fit: everything but the data and the SAEs' own hyper-parameters."""

    n_steps: int
    batch_tokens: int = 2048
    lr: float = 1e-3
    lr_warmup_fraction: float = 0.05
    lr_decay_fraction: float = 0.2
    sparsity_warmup_fraction: float = 0.05
    initial_l0: float = 60.0
    n_resamples: int = 2
    dead_after_tokens: int = 100_000
    step: str = "auto"

    def lr_at(self, step: int) -> float:
        """Linear warmup, constant, linear to zero over the last `lr_decay_fraction` of steps."""
        warmup = max(1.0, self.lr_warmup_fraction * self.n_steps)
        decay = max(1.0, self.lr_decay_fraction * self.n_steps)
        return self.lr * min(1.0, (step + 1) / warmup, (self.n_steps - step) / decay)

    def sparsity_at(self, step: int) -> float:
        """Factor on `l1_coeff`: linear from 0 to 1 over `sparsity_warmup_fraction` of steps."""
        return min(1.0, (step + 1) / max(1.0, self.sparsity_warmup_fraction * self.n_steps))

    @property
    def resample_interval(self) -> int:
        """Steps between resamplings, all of which fall in the first half of training."""
        return self.n_steps // (2 * self.n_resamples) if self.n_resamples else 0


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """What sums are kept in: float64, but float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class Lane:
    """One SAE with its optimizer, its coefficient and its counters."""

    def __init__(self, name: str, spec: SAESpec, sae: SAE, cfg: TrainingConfig) -> None:
        device = sae.W_dec.device
        self.name, self.spec, self.sae, self.cfg = name, spec, sae, cfg
        self.optimizer = make_adam(sae, cfg.lr)
        self.run_step = make_step(sae, self.optimizer, cfg.step)
        self.tokens_since_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
        silence = self.tokens_since_fired, cfg.dead_after_tokens
        self.dead = DeadFeatures(*silence) if sae.revives_dead else None
        dtype = accumulator_dtype(device)
        self.sums = torch.zeros(3, dtype=dtype, device=device)  # mse, penalty, l0
        self.controller = (
            None
            if spec.target_l0 is None or sae.sparsity_is_chosen
            else L0Controller(spec.target_l0, cfg.n_steps, device)
        )

    def l1_coeff(self, sparsity: float) -> Float[Tensor, ""]:
        if self.controller is not None:
            return self.controller.l1_coeff()
        fixed = (self.spec.l1_coeff or 0.0) * sparsity
        return torch.full((), fixed, device=self.sae.W_dec.device)  # waits for no copy

    def step(self, x: Float[Tensor, "batch d_in"], n_steps_done: int) -> None:
        set_lr(self.optimizer, self.cfg.lr_at(n_steps_done))
        self.sae.anneal(n_steps_done, self.cfg.n_steps)
        dead = None if self.dead is None else self.dead.at(n_steps_done)
        l1_coeff = self.l1_coeff(self.cfg.sparsity_at(n_steps_done))
        statistics = self.run_step(x, l1_coeff, dead)
        self._count(statistics, len(x) * self.sae.rows.size)

    def _count(self, statistics: StepStatistics, batch_tokens: int) -> None:
        l0 = self.sae.features.reduced(statistics.n_active.sum()) / batch_tokens
        if self.controller is not None:
            self.controller.update(l0)
        self.sums += torch.stack([statistics.mse, statistics.penalty, l0])
        self.tokens_since_fired += batch_tokens
        self.tokens_since_fired.masked_fill_(statistics.n_active > 0, 0)

    @torch.no_grad()
    def resample_dead(self, pool: Float[Tensor, "n d_in"], step: int) -> None:
        """Point silent features at badly reconstructed inputs (Towards Monosemanticity, appendix).

        Silent: no activation over the last half of a resampling interval, and for at least
        `dead_after_tokens`. Inputs are drawn from
        `pool` with probability proportional to their squared loss; the decoder row becomes the
        input's unit direction, the encoder the same at 0.2 of the mean norm of the living, and
        their Adam state is forgotten. Differences: the direction is that of x - b_dec, and the
        bias makes the feature fire on its share of the pool (paper: 0, i.e. on about half). A
        transcoder's decoder row gets the direction of target - b_dec, its encoder of x - mean.
        """
        silent_tokens = self.cfg.resample_interval // 2 * self.cfg.batch_tokens
        # In a short run half an interval is too few tokens to call a rare feature dead.
        dead = self.tokens_since_fired >= max(silent_tokens, self.cfg.dead_after_tokens)
        sae, features = self.sae, dead.nonzero().flatten()
        everywhere = sae.features.joined(dead)
        n_dead = int(everywhere.sum())
        if n_dead == 0 or n_dead == len(everywhere):
            return
        x, target = sae.split(pool)
        parts = zip(x.split(1024), target.split(1024), strict=True)
        loss = torch.cat([(y - sae(x)).square().sum(dim=1) for x, y in parts])
        generator = torch.Generator().manual_seed(1_000_003 * self.spec.seed + step)
        repeats = n_dead > len(pool)
        chosen = torch.multinomial(
            loss.square().cpu(), n_dead, replacement=repeats, generator=generator
        )
        n_before = int(everywhere[: sae.features.rank * sae.d_sae].sum())
        chosen = chosen[n_before:][: len(features)].to(pool.device)
        centre = x.mean(dim=0) if sae.is_transcoder else sae.b_dec
        read, written = _unit_rows(x[chosen] - centre), _unit_rows(target[chosen] - sae.b_dec)
        alive_norms = sae.features.reduced(sae.W_enc.norm(dim=0)[~dead].sum())
        alive_norm = alive_norms / (len(everywhere) - n_dead)
        sae.W_dec[features] = written
        sae.W_enc[:, features] = 0.2 * alive_norm * read.T
        sae.b_enc[features] = -centre @ sae.W_enc[:, features] if sae.is_transcoder else 0.0
        sae.initialise_sparsity(pool, self.cfg.initial_l0, features)
        self._forget_moments(features)
        self.tokens_since_fired[features] = 0

    def _forget_moments(self, features: Int[Tensor, " chosen"]) -> None:
        state = self.optimizer.state
        for key in ("exp_avg", "exp_avg_sq"):
            state[self.sae.W_dec][key][features] = 0.0
            state[self.sae.W_enc][key][:, features] = 0.0
            state[self.sae.b_enc][key][features] = 0.0

    def metrics(self, n_steps: int, variance: float, step: int) -> dict[str, Any]:
        """Means over `n_steps` in scaled units, and a reset of the sums. Waits for the device."""
        mse, penalty, l0 = (self.sums / n_steps).tolist()
        self.sums.zero_()
        dead = self.tokens_since_fired >= min(
            self.cfg.dead_after_tokens, step * self.cfg.batch_tokens
        )
        return {
            "step": step,
            "n_tokens": step * self.cfg.batch_tokens,
            "name": self.name,
            "l0": l0,
            "fvu": mse / variance if variance else float("nan"),
            "mse": mse,
            "penalty": penalty,
            "l1_coeff": self.l1_coeff(self.cfg.sparsity_at(step - 1)).item(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "dead_fraction": self.sae.features.joined(dead).float().mean().item(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        named = {f"parameter.{name}": p.data for name, p in self.sae.named_parameters()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                named[f"adam.{key}.{name}"] = value
        named |= {f"buffer.{name}": value for name, value in self.sae.named_buffers()}
        named |= {"tokens_since_fired": self.tokens_since_fired, "sums": self.sums}
        if self.controller is not None:
            named |= self.controller.tensors()
        if self.dead is not None:
            named |= self.dead.tensors()
        return named


def _unit_rows(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    return x / x.norm(dim=1, keepdim=True)


class Trainer:
    """A ladder of SAEs fitted to the same batches of raw activations.

    `sample` (n, d_in) of raw activations fixes the units and the start: x is scaled so that the
    sample's root-mean-square norm is sqrt(d_in), and every SAE starts centred on its mean, with
    `cfg.initial_l0` active features per row. `prefix` goes before every SAE's name. With a
    `target_width` the SAEs are transcoders (`SAE.retarget`): the last so many columns of all rows
    are the target, with a scale of its own. Crosscoders are told the `hook_widths` of the hooks
    whose columns make up d_in; each hook then has a scale of its own.
    """

    pool_tokens = 16_384  # inputs among which resampling looks for badly reconstructed ones
    rows: Processes = ALONE
    """Those that train the same SAEs on the other rows of each batch."""

    def __init__(
        self,
        specs: list[SAESpec],
        cfg: TrainingConfig,
        sample: Tensor,
        prefix: str = "",
        target_width: int = 0,
        hook_widths: Sequence[int] = (),
    ) -> None:
        if sample.ndim != 2 or not sample.is_floating_point():
            raise UserError(
                f"activations of shape {tuple(sample.shape)} and {sample.dtype} cannot be learnt "
                "from; they must be (n, d_in) floating-point numbers"
            )
        self.cfg, self.target_width = cfg, target_width
        self.d_in = sample.shape[1] - target_width
        self.hook_widths = tuple(hook_widths) or (self.d_in,)
        self.widths = [*self.hook_widths, *([target_width] if target_width else [])]
        self._set_scales([_scale(part) for part in sample.split(self.widths, dim=1)], sample)
        sample = sample * self.column_scales
        self.mean = sample.mean(dim=0)
        self.resamples = any(TRAINABLE[spec.architecture].resamples_dead for spec in specs)
        self.lanes = [self._make_lane(prefix, spec, sample) for spec in self.own(specs)]
        self.n_steps_done = 0
        dtype = accumulator_dtype(sample.device)
        self.variance_sum = torch.zeros((), dtype=dtype, device=sample.device)
        self.n_steps_summed = 0
        self.first_bad = torch.full((2,), -1, dtype=torch.int64, device=sample.device)
        self.pool: list[Tensor] = []

    def _set_scales(self, scales: Sequence[float], like: Tensor) -> None:
        """Of each part of the rows: x, hook by hook, then the target if there is one."""
        self.scales = list(scales)
        parts = [like.new_full((w,), s) for w, s in zip(self.widths, scales, strict=True)]
        self.column_scales = torch.cat(parts)

    def own(self, specs: list[SAESpec]) -> list[SAESpec]:
        """Those of the SAEs that this process trains."""
        return specs

    def divide(self, sae: SAE) -> None:
        """Leave to other processes what is theirs of a new SAE."""

    def _make_sae(self, spec: SAESpec) -> SAE:
        generator = torch.Generator().manual_seed(spec.seed)
        cls = TRAINABLE[spec.architecture]
        own: dict[str, Any] = {"k": round(spec.target_l0)} if cls.sparsity_is_chosen else {}
        own |= {"widths": self.hook_widths} if cls.joins_hooks else {}
        sae = cls(self.d_in, spec.ratio * self.d_in, generator, **own)
        if self.target_width:
            sae.retarget(self.target_width, generator)
        return sae.to(self.column_scales.device)

    def _make_lane(self, prefix: str, spec: SAESpec, sample: Float[Tensor, "n columns"]) -> Lane:
        sae = self._make_sae(spec)
        if self.target_width:
            sae.initialise_decoder(sample)
        sae.initialise_centre(self.mean)
        sae.initialise_sparsity(sample, self.cfg.initial_l0)
        self.divide(sae)
        return Lane(prefix + spec.name, spec, sae, self.cfg)

    def step(self, x: Float[Tensor, "batch columns"]) -> None:
        """One optimizer step of every SAE on raw activations; a target's columns come last.

        `UserError` if they hold NaN or infinity: on a CPU before any SAE has learnt from them, on
        a GPU with the next `metrics()` or `state_dict()`, so that no checkpoint is spoilt.
        """
        x = x * self.column_scales
        square = (x - self.mean).square()
        self._note_bad_rows(square.sum(dim=1))
        for lane in self.lanes:
            lane.step(x, self.n_steps_done)
        self.variance_sum += self.rows.mean(self._target(square).sum(dim=1).mean())
        self.n_steps_summed += 1
        self.n_steps_done += 1
        self._resample_when_due(x)

    def _note_bad_rows(self, square_norm: Float[Tensor, " batch"]) -> None:
        is_bad = ~square_norm.isfinite()
        row = is_bad.int().argmax() + self.rows.rank * len(is_bad)
        here = torch.stack([torch.full_like(row, self.n_steps_done), row])
        is_first = is_bad.any() & (self.first_bad[0] < 0)
        self.first_bad.copy_(torch.where(is_first, here, self.first_bad))
        if square_norm.device.type == "cpu":
            self._refuse_bad_rows()

    def _refuse_bad_rows(self) -> None:
        step, row = self.first_bad.tolist()
        if step >= 0:
            position = step * self.cfg.batch_tokens + row
            raise UserError(
                f"step {step + 1}: row {row} of the batch (activation {position:,} in the order "
                "of training) holds NaN or infinity; look at the model, its dtype and the cache. "
                "The last checkpoint is good"
            )

    def _resample_when_due(self, x: Float[Tensor, "batch d_in"]) -> None:
        interval = self.cfg.resample_interval
        lanes = [lane for lane in self.lanes if lane.sae.resamples_dead]
        is_over = self.n_steps_done > self.cfg.n_resamples * interval
        if not self.resamples or not interval or is_over:
            return
        n_until_due = -self.n_steps_done % interval
        if n_until_due * self.cfg.batch_tokens < self.pool_tokens:
            self.pool.append(self.rows.joined(x))
        if n_until_due == 0:
            pool = torch.cat(self.pool)
            self.pool.clear()
            for lane in lanes:
                lane.resample_dead(pool, self.n_steps_done)

    def metrics(self) -> list[dict[str, Any]]:
        """One row per SAE, averaged over the steps since the last call. Waits for the device."""
        self._refuse_bad_rows()
        n = max(1, self.n_steps_summed)
        variance = self.variance_sum.item() / n
        self._refuse_divergence()
        rows = [lane.metrics(n, variance, self.n_steps_done) for lane in self.lanes]
        self.variance_sum.zero_()
        self.n_steps_summed = 0
        return rows

    def _refuse_divergence(self, in_weights: bool = False) -> None:
        """`UserError` rather than a line of the log or a checkpoint without numbers."""
        for lane in self.lanes:
            seen = [lane.sums, *lane.sae.parameters()] if in_weights else [lane.sums]
            if not all(tensor.isfinite().all() for tensor in seen):
                raise UserError(
                    f"{lane.name} diverged before step {self.n_steps_done}: its squared error or "
                    "its weights are not finite; lower --lr (the last checkpoint is whole)"
                )

    def facts(self) -> dict[str, dict[str, Any]]:
        """What each SAE is and was trained with, by name. Waits for the device."""
        return {
            lane.name: {
                "architecture": lane.spec.architecture,
                "ratio": lane.spec.ratio,
                "d_in": lane.sae.d_in,
                "d_sae": lane.sae.d_sae * lane.sae.features.size,
                "l1_coeff": lane.l1_coeff(1.0).item(),
                "target_l0": lane.spec.target_l0,
                "seed": lane.spec.seed,
                "n_tokens_trained": self.n_steps_done * self.cfg.batch_tokens,
            }
            for lane in self.lanes
        }

    def _target(self, rows: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch d_out"]:
        """The columns that are reconstructed."""
        return rows[..., -(self.target_width or self.d_in) :]

    def raw_mean(self) -> Float[Tensor, " d_out"]:
        """The sample's mean of what is reconstructed, in the units of raw activations."""
        return self._target(self.mean / self.column_scales)

    @torch.no_grad()
    def finished_saes(self) -> dict[str, SAE]:
        """Copies of the SAEs for raw activations (`SAE.fold_scale`), by name."""
        return {lane.name: self.folded(copy.deepcopy(lane.sae)) for lane in self.lanes}

    def folded(self, sae: SAE) -> SAE:
        """The same SAE, rewritten to take raw activations."""
        (sae.fold_scales if self.target_width else sae.fold_scale)(*self.scales)
        return sae

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the rest of the run depends on, as named tensors."""
        return self.own_state()

    def own_state(self) -> dict[str, Tensor]:
        """What this process holds of it."""
        self._refuse_bad_rows()
        self._refuse_divergence(in_weights=True)
        state = {
            "n_steps_done": torch.tensor(self.n_steps_done),
            "scale": torch.tensor(self.scales, dtype=torch.float64),
            "mean": self.mean,
            "variance_sum": self.variance_sum,
            "n_steps_summed": torch.tensor(self.n_steps_summed),
        }
        for lane in self.lanes:
            state |= {f"{lane.name}/{key}": value for key, value in lane.tensors().items()}
        if self.pool:
            state["pool"] = torch.cat(self.pool)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, int | Tensor]) -> None:
        """Continue from `state_dict()` of a trainer with the same SAEs and configuration."""
        own = _kinds(self.own_state() | {"pool": self.mean[None]})
        given = _kinds({"pool": self.mean[None]} | state)
        different = sorted(key for key in own | given if own.get(key) != given.get(key))
        for key in different[:1]:
            raise UserError(
                f"the checkpoint belongs to other SAEs: {key} is {given.get(key)}, not "
                f"{own.get(key)}; resume with the settings that the run began with"
            )
        self.n_steps_done = int(state["n_steps_done"])
        self._set_scales(state["scale"].flatten().tolist(), self.mean)
        self.mean.copy_(state["mean"])
        self.variance_sum.copy_(state["variance_sum"])
        self.n_steps_summed = int(state["n_steps_summed"])
        for lane in self.lanes:
            for key, value in lane.tensors().items():
                value.copy_(state[f"{lane.name}/{key}"])
            if lane.dead is not None:
                lane.dead.restored()
        pool = state.get("pool")
        self.pool = [] if pool is None else [pool.to(self.mean.device)]


def _kinds(state: dict[str, Any]) -> dict[str, Any]:
    """Number format and shape of each part; the pool may have any number of rows."""
    parts = ((key, torch.as_tensor(value)) for key, value in state.items())
    return {key: (part.dtype, tuple(part.shape[key == "pool" :])) for key, part in parts}


def _scale(sample: Float[Tensor, "n d"]) -> float:
    """What makes the sample's root-mean-square norm sqrt(d)."""
    mean_square_norm = sample.square().sum(dim=1).mean().item()
    if not 0 < mean_square_norm < float("inf"):
        raise UserError(
            f"the activations' mean square norm is {mean_square_norm}; it must be positive "
            "and finite: look at the model, its dtype and the hook"
        )
    return (sample.shape[1] / mean_square_norm) ** 0.5


def training_config(cfg: RunConfig, n_steps: int) -> TrainingConfig:
    """The part of a run's configuration that the trainer needs."""
    names = {field.name for field in dataclasses.fields(TrainingConfig)} - {"n_steps"}
    return TrainingConfig(n_steps, **{name: getattr(cfg, name) for name in names})

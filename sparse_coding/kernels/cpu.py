"""The training step on a CPU: sparse after the non-linearity, gradients by hand, Adam fused in.

Once trained, a few dozen of d_sae features are active per token, so after the encoder's product
only active entries are worth touching. A step is

1. screen:  x W_enc in chunks of tokens, in bfloat16 where the processor multiplies it; whatever
            rounding could have hidden is passed on (`cpu_screen`);
2. decide:  the pre-activation of each passed entry at full precision, and which of them are
            active: ReLU's, JumpReLU's, each token's k largest or the batch's (`cpu_tokens`);
3. decode:  residual, loss and the gradient by each active entry; AuxK, where features are dead;
4. update:  each feature's gradient from its own tokens, projection, Adam for every feature
            (inactive ones too, as in dense Adam), renormalisation (`cpu_features`).

Active entries and their values are those of the full-precision dot product, so the result is the
reference's up to the rounding of sums. If the screen passes too much to be worth it (early in
training), the step runs on dense products instead. The choice looks only at the batch's first
chunk: a step is a function of parameters, Adam's state and batch, and carries nothing over. (So
there is nothing for a hysteresis to damp: a wrong choice costs one chunk's product.)
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.kernels import (
    FAST_CLASSES,
    StepStatistics,
    cpu_features,
    cpu_screen,
    cpu_tokens,
)
from sparse_coding.kernels import cpu_loops as loops
from sparse_coding.kernels.auxiliary import auxiliary_gradients
from sparse_coding.kernels.cpu_dense import dense_gradients
from sparse_coding.kernels.cpu_screen import Encoder, Memory, multiplies_bfloat16
from sparse_coding.kernels.reference import ReferenceStep
from sparse_coding.sae import (
    L1SAE,
    SAE,
    BatchTopKSAE,
    JumpReLUSAE,
    NormWeightedL1SAE,
    TiedL1SAE,
    TopKSAE,
)

MAX_SCREENED_DENSITY = 0.2
"""Above it a step is dense. At d_in 512, dense wins from 0.5 at ratio 1 and 0.22 at ratio 32."""
L1_FAMILY = (TiedL1SAE, L1SAE, NormWeightedL1SAE)


def supports(sae: SAE) -> bool:
    """Whether `CPUStep` can train this SAE: exactly one of the classes it knows, on a CPU."""
    return (
        type(sae) in FAST_CLASSES
        and sae.W_dec.device.type == "cpu"
        and sae.W_dec.dtype in (torch.float32, torch.float64)
        and sae.d_out == sae.d_in
    )


class _Active(NamedTuple):
    """The entries of a batch, token by token."""

    by_token: loops.Entries
    n_entries: np.ndarray


class CPUStep:
    """Same arguments and result as `ReferenceStep`; see the module for the method.

    `screen_dtype` is the encoder product's: bfloat16, or the parameters' own (by default the
    faster one on this processor); it changes the time, not the result.
    """

    def __init__(
        self, sae: SAE, optimizer: torch.optim.Adam, screen_dtype: torch.dtype | None = None
    ) -> None:
        assert supports(sae), f"{type(sae).__name__} on {sae.W_dec.device} has no CPU step"
        assert sae.W_enc.T.is_contiguous(), "W_enc must be stored feature-major"
        self.sae, self.optimizer = sae, optimizer
        dtype = sae.W_dec.dtype
        can_round = dtype == torch.float32 and multiplies_bfloat16()
        self.screen_dtype = screen_dtype or (torch.bfloat16 if can_round else dtype)
        self._memory = Memory()
        self._reference = ReferenceStep(sae, optimizer)
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

    def __call__(
        self,
        x: Float[Tensor, "batch d_in"],
        l1_coeff: Float[Tensor, ""],
        dead: Int[Tensor, " n_dead"] | None = None,
    ) -> StepStatistics:
        if x.ndim != 2 or x.shape[1] != self.sae.n_columns:
            raise UserError(
                f"activations of shape {tuple(x.shape)} do not fit an SAE of d_in "
                f"{self.sae.d_in}: give (batch, {self.sae.n_columns})"
            )
        with torch.no_grad():
            batch, model = self._batch(x, float(l1_coeff)), self._model()
            active = self._encode(batch, model)
            if active is not None:
                return self._sparse_step(batch, model, active, dead)
            if isinstance(self.sae, L1_FAMILY):
                return self._dense_step(batch, model)
        return self._reference(x, l1_coeff, dead)

    def _batch(self, x: Tensor, l1_coeff: float) -> loops.Batch:
        sae = self.sae
        x, target = (part.contiguous() for part in sae.split(x.to(sae.W_dec.dtype)))
        centred = x - sae.b_dec if sae.subtracts_b_dec else x
        has_unit_norm = sae.has_unit_norm_rows
        penalty = torch.ones_like(sae.b_enc) if has_unit_norm else sae.W_dec.norm(dim=1)
        arrays = target.numpy(), centred.numpy(), penalty.numpy()
        scalar = arrays[0].dtype.type
        coefficients = [scalar(0), scalar(0)]
        if not sae.sparsity_is_chosen:
            coefficients[isinstance(sae, JumpReLUSAE)] = scalar(l1_coeff / len(x))
        return loops.Batch(*arrays, scalar(2 / len(x)), *coefficients)

    def _model(self) -> loops.Model:
        sae = self.sae
        threshold, bandwidth = torch.zeros_like(sae.b_enc), 0.0
        if isinstance(sae, JumpReLUSAE):
            threshold, bandwidth = sae.threshold, sae.bandwidth
        tensors = sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec, threshold
        arrays = [tensor.detach().numpy() for tensor in tensors]
        bandwidth = arrays[0].dtype.type(bandwidth)
        return loops.Model(*arrays, bandwidth, isinstance(sae, TiedL1SAE), sae.has_unit_norm_rows)

    def _moments(self) -> loops.Moments:
        sae, state = self.sae, self.optimizer.state
        keys = ("exp_avg", "exp_avg_sq")
        decoder = [state[sae.W_dec][key].numpy() for key in keys]
        is_tied = isinstance(sae, TiedL1SAE)
        encoder = decoder if is_tied else [state[sae.W_enc][key].T.numpy() for key in keys]
        return loops.Moments(*encoder, *decoder)

    def _floor(self, batch: loops.Batch, model: loops.Model) -> np.ndarray:
        """Pre-activations (d_sae) up to which an entry cannot matter."""
        floor = model.threshold - model.bandwidth / 2
        if isinstance(self.sae, BatchTopKSAE):
            # What twice as many entries exceed on 16 tokens from all over the batch; if it proves
            # too high, the step is dense.
            x = torch.from_numpy(batch.centred[:: -(-len(batch.x) // 16)])
            pre = (x @ self.sae.W_enc + self.sae.b_enc).flatten()
            n = min(2 * self.sae.k * len(x), len(pre))
            floor += max(0.0, pre.topk(n).values[-1].item())
        return floor

    def _encode(self, batch: loops.Batch, model: loops.Model) -> _Active | None:
        """None if the first chunk says that dense products are faster."""
        memory, dtype, sae = self._memory, batch.x.dtype, self.sae
        n_entries, end = np.empty(len(batch.x), np.int64), 0
        floor = self._floor(batch, model)
        k = sae.k if type(sae) is TopKSAE else 0
        encoder = Encoder(batch, model, floor, k, self.screen_dtype, memory)
        for chunk, product in encoder.products():
            n_in_chunk = n_entries[chunk]
            if chunk.start == 0:
                cpu_tokens.count_candidates(product, encoder.screen, model.b_enc, n_in_chunk)
                if n_in_chunk.sum() > MAX_SCREENED_DENSITY * product.size:
                    return None
            entries = memory.take_entries("chunk", product.shape, dtype)
            cpu_tokens.activate(
                chunk.start, product, encoder.screen, batch, model, entries, n_in_chunk
            )
            by_token = memory.take_entries("by_token", (end + int(n_in_chunk.sum()),), dtype)
            end = cpu_tokens.append_entries(entries, n_in_chunk, end, by_token)
        if isinstance(sae, BatchTopKSAE):
            n_kept = sae.k * len(batch.x)
            if end < n_kept and floor.any():
                return None
            if end > n_kept:
                level = np.partition(by_token.f, end - n_kept)[end - n_kept]
                end = cpu_tokens.drop_below(level, by_token, n_entries)
        return _Active(loops.Entries(*(array[:end] for array in by_token)), n_entries)

    def _sparse_step(
        self, batch: loops.Batch, model: loops.Model, active: _Active, dead: Tensor | None
    ) -> StepStatistics:
        n_tokens, d_in = batch.x.shape
        dtype = batch.x.dtype
        results = cpu_tokens.TokenResults(
            active.n_entries,
            self._memory.take("residual", (n_tokens, d_in), dtype),
            np.empty(n_tokens, dtype),
            np.empty(n_tokens, dtype),
        )
        starts = np.concatenate([[0], np.cumsum(active.n_entries)])
        cpu_tokens.decode(starts, active.by_token, batch, model, results)
        penalty_sum = results.penalty.sum(dtype=np.float64)
        extra, aux_sum = cpu_features.no_extra(dtype), 0.0
        if self.sae.revives_dead:
            if dead is not None and len(dead):
                extra, aux_sum = self._auxiliary(batch, results.residual, dead)
            penalty_sum = aux_sum
        n_active = self._update_sparsely(batch, model, results.residual, active, extra)
        if isinstance(self.sae, JumpReLUSAE):
            penalty_sum = float(n_active.sum())
        self.sae.observe(torch.from_numpy(active.by_token.f))
        return _statistics(batch, results.square.sum(dtype=np.float64), penalty_sum, n_active)

    def _auxiliary(
        self, batch: loops.Batch, residual: np.ndarray, dead: Tensor
    ) -> tuple[cpu_features.Extra, float]:
        gradients = auxiliary_gradients(
            self.sae,
            torch.from_numpy(batch.centred),
            torch.from_numpy(residual),
            dead,
            cpu_screen.times_transposed,
            cpu_screen.CHUNK_BYTES,
        )
        row = torch.full((self.sae.d_sae,), -1, dtype=torch.int64)
        row[dead] = torch.arange(len(dead))
        arrays = (row, gradients.W_enc, gradients.W_dec, gradients.b_enc)
        extra = cpu_features.Extra(*(array.numpy() for array in arrays))
        return extra, gradients.square.item()

    def _update_sparsely(
        self,
        batch: loops.Batch,
        model: loops.Model,
        residual: np.ndarray,
        active: _Active,
        extra: cpu_features.Extra,
    ) -> np.ndarray:
        """Update all parameters; returns how many tokens each feature was active on."""
        dtype, by_token = batch.x.dtype, active.by_token
        d_sae, d_in = model.W_dec.shape
        n_per_feature = np.bincount(by_token.index, minlength=d_sae)
        starts = np.concatenate([[0], np.cumsum(n_per_feature)])
        parts = _equal_parts(starts, numba.get_num_threads())
        by_feature = self._memory.take_entries("by_feature", by_token.f.shape, dtype)
        cpu_features.group_by_feature(parts, by_token, active.n_entries, starts, by_feature)
        results = cpu_features.no_results(d_sae, d_in, dtype)
        scalars, moments = self._advance_adam(dtype), self._moments()
        entries = cpu_features.FeatureEntries(parts, starts, *by_feature)
        cpu_features.update_features(
            entries, batch, residual, model, moments, scalars, extra, results
        )
        sums = residual.sum(axis=0), results.centre.sum(axis=0)
        self._update_biases(batch, scalars, results.b_enc_gradient, *sums)
        if isinstance(self.sae, JumpReLUSAE):
            own = self._adam_scalars(self.optimizer.param_groups[1], dtype)
            self._adam(self.sae.threshold, results.threshold_gradient, own)
            self.sae.threshold.clamp_(min=0)
        return results.n_active

    def _dense_step(self, batch: loops.Batch, model: loops.Model) -> StepStatistics:
        dense = dense_gradients(self.sae, batch)
        scalars = self._advance_adam(batch.x.dtype)
        centre_gradient = dense.b_enc @ model.W_enc
        cpu_features.update_features_densely(
            dense.W_dec, dense.W_enc, dense.f_sum, batch, model, self._moments(), scalars
        )
        self._update_biases(batch, scalars, dense.b_enc, dense.residual_sum, centre_gradient)
        penalty_sum = np.dot(dense.f_sum.astype(np.float64), batch.penalty)
        return _statistics(batch, dense.square_sum, penalty_sum, dense.n_active)

    def _update_biases(
        self,
        batch: loops.Batch,
        scalars: loops.AdamScalars,
        b_enc_gradient: np.ndarray,
        residual_sum: np.ndarray,
        centre_gradient: np.ndarray,
    ) -> None:
        """centre_gradient = W_enc b_enc_gradient: what reaches b_dec, negated, if it centres x."""
        b_dec_gradient = batch.error_scale * residual_sum
        if self.sae.subtracts_b_dec:
            b_dec_gradient -= centre_gradient
        self._adam(self.sae.b_enc, b_enc_gradient, scalars)
        self._adam(self.sae.b_dec, b_dec_gradient, scalars)

    def _adam(self, vector: Tensor, gradient: np.ndarray, scalars: loops.AdamScalars) -> None:
        state = self.optimizer.state[vector]
        arrays = vector.detach(), state["exp_avg"], state["exp_avg_sq"]
        loops.adam(*(array.numpy() for array in arrays), gradient, scalars)

    def _advance_adam(self, dtype: np.dtype) -> loops.AdamScalars:
        """Count one step in the optimizer's state; most parameters' constants for this step."""
        for parameter in self.sae.parameters():
            self.optimizer.state[parameter]["step"] += 1
        return self._adam_scalars(self.optimizer.param_groups[0], dtype)

    def _adam_scalars(self, group: dict[str, Any], dtype: np.dtype) -> loops.AdamScalars:
        n_steps = self.optimizer.state[self.sae.W_dec]["step"].item()
        beta1, beta2 = group["betas"]
        return loops.AdamScalars(
            step_size=dtype.type(group["lr"] / (1 - beta1**n_steps)),
            root_correction=dtype.type((1 - beta2**n_steps) ** 0.5),
            beta1_complement=dtype.type(1 - beta1),
            beta2_complement=dtype.type(1 - beta2),
            eps=dtype.type(group["eps"]),
        )


def _equal_parts(starts: np.ndarray, n_parts: int) -> np.ndarray:
    """Boundaries between stretches of features of about equal work, in whole blocks."""
    d_sae = len(starts) - 1
    boundaries = np.append(np.arange(0, d_sae, loops.FEATURE_BLOCK), d_sae)
    # A feature's own update moves as many bytes as about six of its entries.
    work = starts[boundaries] + 6 * boundaries
    targets = work[-1] * np.arange(1, n_parts) / n_parts
    return np.concatenate([[0], boundaries[np.searchsorted(work, targets)], [d_sae]])


def _statistics(
    batch: loops.Batch, square_sum: float, penalty_sum: float, n_active: np.ndarray
) -> StepStatistics:
    means = np.array([square_sum, penalty_sum]) / len(batch.x)
    mse, penalty = torch.from_numpy(means.astype(batch.x.dtype))
    return StepStatistics(mse, penalty, torch.from_numpy(n_active))

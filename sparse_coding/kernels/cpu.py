"""The L1 family's training step on a CPU: sparse after the ReLU, gradients by hand, Adam fused in.

Once trained, a few dozen of d_sae features are active per token, so after the encoder's product
only active entries are worth touching. A step is

1. screen:  x W_enc in chunks of tokens, in bfloat16 where the processor multiplies it; whatever
            rounding could have hidden is passed on (`cpu_screen`);
2. decide:  the pre-activation of each passed entry at full precision; residual, loss, gradients;
3. update:  each feature's gradient from its own tokens, projection, Adam for every feature
            (inactive ones too, as in dense Adam), renormalisation.

Active entries and their values are those of the full-precision dot product, so the result is the
reference's up to the rounding of sums. If the screen passes too much to be worth it (early in
training), the step runs on dense products instead. The choice looks only at the batch's first
chunk: a step is a function of parameters, Adam's state and batch, and carries nothing over.
"""

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.kernels import StepStatistics
from sparse_coding.kernels import cpu_loops as loops
from sparse_coding.kernels.cpu_screen import (
    CHUNK_BYTES,
    Encoder,
    Memory,
    chunks,
    multiplies_bfloat16,
)
from sparse_coding.sae import L1SAE, SAE, NormWeightedL1SAE, TiedL1SAE

MAX_SCREENED_DENSITY = 0.2
"""Above it a step is dense. At d_in 512, dense wins from 0.5 at ratio 1 and 0.22 at ratio 32."""


def supports(sae: SAE) -> bool:
    """Whether `CPUStep` can train this SAE: exactly one of the three L1 classes, on a CPU."""
    return (
        type(sae) in (TiedL1SAE, L1SAE, NormWeightedL1SAE)
        and sae.W_dec.device.type == "cpu"
        and sae.W_dec.dtype in (torch.float32, torch.float64)
    )


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
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "batch d_in"], l1_coeff: Float[Tensor, ""]
    ) -> StepStatistics:
        if x.ndim != 2 or x.shape[1] != self.sae.d_in:
            raise UserError(
                f"activations of shape {tuple(x.shape)} do not fit an SAE of d_in "
                f"{self.sae.d_in}: give (batch, {self.sae.d_in})"
            )
        batch, model = self._batch(x, float(l1_coeff)), self._model()
        return self._sparse_step(batch, model) or self._dense_step(batch, model)

    def _batch(self, x: Tensor, l1_coeff: float) -> loops.Batch:
        sae = self.sae
        x = x.to(sae.W_dec.dtype).contiguous()
        centred = x - sae.b_dec if sae.subtracts_b_dec else x
        has_unit_norm = sae.has_unit_norm_rows
        penalty = torch.ones_like(sae.b_enc) if has_unit_norm else sae.W_dec.norm(dim=1)
        arrays = x.numpy(), centred.numpy(), penalty.numpy()
        scalar = arrays[0].dtype.type
        return loops.Batch(*arrays, scalar(2 / len(x)), scalar(l1_coeff / len(x)))

    def _model(self) -> loops.Model:
        sae = self.sae
        tensors = sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec
        arrays = (tensor.detach().numpy() for tensor in tensors)
        return loops.Model(*arrays, isinstance(sae, TiedL1SAE), sae.has_unit_norm_rows)

    def _moments(self) -> loops.Moments:
        sae, state = self.sae, self.optimizer.state
        keys = ("exp_avg", "exp_avg_sq")
        decoder = [state[sae.W_dec][key].numpy() for key in keys]
        is_tied = isinstance(sae, TiedL1SAE)
        encoder = decoder if is_tied else [state[sae.W_enc][key].T.numpy() for key in keys]
        return loops.Moments(*encoder, *decoder)

    def _sparse_step(self, batch: loops.Batch, model: loops.Model) -> StepStatistics | None:
        """None, with nothing changed, if the first chunk says that dense is faster."""
        memory, dtype = self._memory, batch.x.dtype
        n_tokens, d_in = batch.x.shape
        results = loops.TokenResults(
            np.empty(n_tokens, np.int64),
            memory.take("residual", (n_tokens, d_in), dtype),
            np.empty(n_tokens, dtype),
            np.empty(n_tokens, dtype),
        )
        n_per_feature = np.zeros(self.sae.d_sae, np.int64)
        n_entries = 0
        encoder = Encoder(batch, model, self.screen_dtype, memory)
        for chunk, product in encoder.products():
            n_active = results.n_active[chunk]
            if chunk.start == 0:
                loops.count_candidates(product, encoder.screen, n_active)
                if n_active.sum() > MAX_SCREENED_DENSITY * product.size:
                    return None
            entries = memory.take_entries("chunk", product.shape, dtype)
            loops.activate_and_decode(
                chunk.start, product, encoder.screen, batch, model, entries, results
            )
            by_token = memory.take_entries("by_token", (n_entries + int(n_active.sum()),), dtype)
            n_entries = loops.append_entries(entries, n_active, n_entries, by_token, n_per_feature)
        self._update_sparsely(batch, model, results, by_token, n_per_feature)
        sums = results.square.sum(dtype=np.float64), results.penalty.sum(dtype=np.float64)
        return _statistics(batch, *sums, n_per_feature)

    def _update_sparsely(
        self,
        batch: loops.Batch,
        model: loops.Model,
        results: loops.TokenResults,
        by_token: loops.Entries,
        n_per_feature: np.ndarray,
    ) -> None:
        dtype = batch.x.dtype
        d_sae, d_in = model.W_dec.shape
        starts = np.concatenate([[0], np.cumsum(n_per_feature)])
        parts = _equal_parts(starts, numba.get_num_threads())
        by_feature = self._memory.take_entries("by_feature", by_token.f.shape, dtype)
        loops.group_by_feature(parts, by_token, results.n_active, starts, by_feature)
        b_enc_gradient = np.empty(d_sae, dtype)
        centre = np.zeros((-(-d_sae // loops.FEATURE_BLOCK), d_in), dtype)
        scalars = self._advance_adam(dtype)
        loops.update_features(
            parts,
            starts,
            by_feature,
            batch,
            results.residual,
            model,
            self._moments(),
            scalars,
            b_enc_gradient,
            centre,
        )
        sums = results.residual.sum(axis=0), centre.sum(axis=0)
        self._update_biases(batch, scalars, b_enc_gradient, *sums)

    def _dense_step(self, batch: loops.Batch, model: loops.Model) -> StepStatistics:
        """The same mathematics on whole matrices, chunk by chunk, without an autograd graph."""
        sae, scale = self.sae, float(batch.error_scale)
        x, centred = torch.from_numpy(batch.x), torch.from_numpy(batch.centred)
        gradients = torch.zeros_like(sae.W_dec), torch.zeros_like(sae.W_dec)
        f_sum, b_enc_gradient = torch.zeros(2, sae.d_sae, dtype=x.dtype)
        residual_sum, square_sum = torch.zeros_like(sae.b_dec), 0.0
        n_per_feature = np.zeros(sae.d_sae, np.int64)
        sums = f_sum.numpy(), b_enc_gradient.numpy(), n_per_feature
        # Four times the sparse chunk: the gradients' products need the long inner dimension.
        for chunk in chunks(len(x), 4 * CHUNK_BYTES // (sae.d_sae * x.element_size())):
            f = torch.addmm(sae.b_enc, centred[chunk], sae.W_enc).relu_()
            residual = torch.addmm(sae.b_dec, f, sae.W_dec) - x[chunk]
            f_gradient = residual @ sae.W_dec.T
            loops.gate_gradient(f.numpy(), f_gradient.numpy(), batch, *sums)
            gradients[0].addmm_(f.T, residual, alpha=scale)
            gradients[1].addmm_(f_gradient.T, centred[chunk])
            residual_sum += residual.sum(dim=0)
            square_sum += residual.square().sum(dtype=torch.float64).item()
        penalty_sum = np.dot(sums[0].astype(np.float64), batch.penalty)
        centre_gradient = b_enc_gradient @ sae.W_enc.T
        scalars = self._advance_adam(batch.x.dtype)
        arrays = (gradient.numpy() for gradient in gradients)
        loops.update_features_densely(
            *arrays, f_sum.numpy(), batch, model, self._moments(), scalars
        )
        self._update_biases(batch, scalars, sums[1], residual_sum.numpy(), centre_gradient.numpy())
        return _statistics(batch, square_sum, penalty_sum, n_per_feature)

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
        for bias, gradient in (
            (self.sae.b_enc, b_enc_gradient),
            (self.sae.b_dec, b_dec_gradient),
        ):
            state = self.optimizer.state[bias]
            arrays = bias.detach(), state["exp_avg"], state["exp_avg_sq"]
            loops.adam(*(array.numpy() for array in arrays), gradient, scalars)

    def _advance_adam(self, dtype: np.dtype) -> loops.AdamScalars:
        """Count one step in the optimizer's state; its constants for this step."""
        for parameter in self.sae.parameters():
            self.optimizer.state[parameter]["step"] += 1
        group = self.optimizer.param_groups[0]
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
    batch: loops.Batch, square_sum: float, penalty_sum: float, n_per_feature: np.ndarray
) -> StepStatistics:
    means = np.array([square_sum, penalty_sum]) / len(batch.x)
    mse, l1 = torch.from_numpy(means.astype(batch.x.dtype))
    return StepStatistics(mse, l1, torch.from_numpy(n_per_feature))

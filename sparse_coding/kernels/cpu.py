"""The L1 family's training step on a CPU: sparse after the ReLU, gradients by hand, Adam fused in.

Once trained, a few dozen of d_sae features are active per token, so after the encoder's product
only active entries are worth touching. A step is

1. screen:  x W_enc in chunks of tokens, in bfloat16 where the processor multiplies it; whatever
            rounding could have hidden is passed on (see `_Screen`);
2. decide:  the pre-activation of each passed entry at full precision; residual, loss, gradients;
3. update:  each feature's gradient from its own tokens, projection, Adam for every feature
            (inactive ones too, as in dense Adam), renormalisation.

Active entries and their values are those of the full-precision dot product, so the result is the
reference's up to the rounding of sums. If the screen passes too much to be worth it (early in
training), the step runs on dense products instead. The choice looks only at the batch's first
chunk: a step is a function of parameters, Adam's state and batch, and carries nothing over.
"""

from collections.abc import Iterator
from typing import NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.kernels import StepStatistics
from sparse_coding.kernels import cpu_loops as loops
from sparse_coding.sae import L1SAE, SAE, NormWeightedL1SAE, TiedL1SAE

_CHUNK_BYTES = 8 * 2**20  # stays in the last-level cache between the product and the screen
_MAX_SCREENED_DENSITY = 0.2  # d_in 512: dense wins above 0.5 at ratio 1, 0.22 at ratio 32


def supports(sae: SAE) -> bool:
    """Whether `CPUStep` can train this SAE: exactly one of the three L1 classes, on a CPU."""
    return (
        type(sae) in (TiedL1SAE, L1SAE, NormWeightedL1SAE)
        and sae.W_dec.device.type == "cpu"
        and sae.W_dec.dtype in (torch.float32, torch.float64)
    )


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    features = llvm.get_host_cpu_features()
    return any(features.get(name, False) for name in ("avx512bf16", "amx-bf16"))


class _Memory:
    """Named buffers that grow and are reused from step to step."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}
        self._flat: dict[str, loops.Entries] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        size = int(np.prod(shape))
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size or buffer.dtype != dtype:
            buffer = self._buffers[name] = np.empty(size, dtype)
        return buffer[:size].reshape(shape)

    def grown_entries(self, name: str, n_entries: int, dtype: np.dtype) -> loops.Entries:
        """At least `n_entries` long; what was written before stays."""
        old = self._flat.get(name)
        if old is not None and len(old.f) >= n_entries and old.f.dtype == dtype:
            return old
        new = loops.Entries(
            np.empty(n_entries * 3 // 2, np.int32),
            np.empty(n_entries * 3 // 2, dtype),
            np.empty(n_entries * 3 // 2, dtype),
        )
        if old is not None:
            for source, target in zip(old, new, strict=True):
                target[: len(source)] = source
        self._flat[name] = new
        return new

    def entries(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> loops.Entries:
        return loops.Entries(
            self.take(f"{name}.index", shape, np.int32),
            self.take(f"{name}.f", shape, dtype),
            self.take(f"{name}.gradient", shape, dtype),
        )


class _Screen(NamedTuple):
    """A cheap product, and the bound on its error that lets no active entry be missed.

    With x' and w' the rounded vectors, |x.w - x'.w'| <= |x - x'| |w| + |x'| |w - w'| by
    Cauchy-Schwarz, with the rounding errors as they are, not as they might be; sums of d_in terms
    in the accumulator's precision add d_in eps |x| |w|, once here and once in the decision, and
    rounding the product to bfloat16 moves what lies at the threshold -b_enc by at most 2^-8 of
    it. So an entry is passed on if
    `product[token, feature] >= lowest[feature] - margin[token] * norm[feature]`.
    """

    x: Tensor
    W_enc: Tensor
    lowest: np.ndarray
    norm: np.ndarray
    margin: np.ndarray

    def products(self, memory: _Memory) -> Iterator[tuple[slice, np.ndarray]]:
        """Chunks of tokens and x W_enc for each (bfloat16 as its bits); one buffer, reused."""
        d_sae, dtype = self.W_enc.shape[1], self.x.dtype
        in_numpy = np.uint16 if dtype == torch.bfloat16 else self.lowest.dtype
        for chunk in _chunks(len(self.x), d_sae * dtype.itemsize):
            shape = (chunk.stop - chunk.start, d_sae)
            product = memory.take("product", shape, in_numpy)
            torch.mm(self.x[chunk], self.W_enc, out=torch.from_numpy(product).view(dtype))
            yield chunk, product


class _Batch(NamedTuple):
    """What both ways of computing a step need; arrays in the parameters' dtype."""

    x: np.ndarray
    centred: np.ndarray
    """What the encoder multiplies: x, or x - b_dec."""
    penalty: np.ndarray
    """What one unit of each feature costs, ||W_dec[i]||; before the coefficient."""
    error_scale: np.floating
    """2 / batch: the squared error's gradient by the reconstruction is this times the residual."""
    penalty_scale: np.floating
    """l1_coeff / batch"""


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
        self._memory = _Memory()
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "batch d_in"], l1_coeff: Float[Tensor, ""]
    ) -> StepStatistics:
        sae = self.sae
        x = x.contiguous()
        centred = x - sae.b_dec if sae.subtracts_b_dec else x
        has_unit_norm = sae.has_unit_norm_rows
        penalty = torch.ones_like(sae.b_enc) if has_unit_norm else sae.W_dec.norm(dim=1)
        scalar = x.numpy().dtype.type
        batch = _Batch(
            x.numpy(),
            centred.numpy(),
            penalty.numpy(),
            scalar(2 / len(x)),
            scalar(float(l1_coeff) / len(x)),
        )
        return self._sparse_step(batch) or self._dense_step(batch)

    def _sparse_step(self, batch: _Batch) -> StepStatistics | None:
        """None, with nothing changed, if the first chunk says that dense is faster."""
        sae, memory = self.sae, self._memory
        dtype, n_tokens = batch.x.dtype, len(batch.x)
        screen = _make_screen(sae, batch.centred, self.screen_dtype, memory)
        residual = memory.take("residual", batch.x.shape, dtype)
        mse, l1 = np.empty(n_tokens, dtype), np.empty(n_tokens, dtype)
        n_active = np.empty(n_tokens, np.int64)
        n_per_feature = np.zeros(sae.d_sae, np.int64)
        n_entries = 0
        for chunk, product in screen.products(memory):
            bounds = (screen.lowest, screen.norm, screen.margin[chunk])
            if chunk.start == 0:
                loops.count_candidates(product, bounds, n_active[chunk])
                if n_active[chunk].sum() > _MAX_SCREENED_DENSITY * product.size:
                    return None
            entries = memory.entries("chunk", product.shape, dtype)
            loops.activate_and_decode(
                product,
                bounds,
                (batch.x[chunk], batch.centred[chunk]),
                (_rows(sae.W_enc.T), _rows(sae.b_enc)),
                (_rows(sae.W_dec), _rows(sae.b_dec)),
                batch.penalty,
                (batch.error_scale, batch.penalty_scale),
                entries,
                n_active[chunk],
                (residual[chunk], mse[chunk], l1[chunk]),
            )
            n_needed = n_entries + int(n_active[chunk].sum())
            by_token = memory.grown_entries("by_token", n_needed, dtype)
            n_entries = loops.append_entries(
                entries, n_active[chunk], n_entries, by_token, n_per_feature
            )
        self._update_sparsely(batch, residual, by_token, n_active, n_per_feature)
        sums = mse.sum(dtype=np.float64), l1.sum(dtype=np.float64)
        return _statistics(*sums, torch.from_numpy(n_per_feature), torch.from_numpy(batch.x))

    def _update_sparsely(
        self,
        batch: _Batch,
        residual: np.ndarray,
        by_token: loops.Entries,
        n_active: np.ndarray,
        n_per_feature: np.ndarray,
    ) -> None:
        sae, dtype = self.sae, batch.x.dtype
        starts = np.concatenate([[0], np.cumsum(n_per_feature)])
        parts = _equal_parts(starts, numba.get_num_threads())
        by_feature = self._memory.grown_entries("by_feature", int(starts[-1]), dtype)
        block_parts = parts * loops.FEATURE_BLOCK
        block_parts[-1] = sae.d_sae
        loops.group_by_feature(by_token, n_active, starts, block_parts, by_feature)
        b_enc_gradient = np.empty(sae.d_sae, dtype)
        scalars = self._advance_adam(dtype)
        centre = np.zeros((-(-sae.d_sae // loops.FEATURE_BLOCK), sae.d_in), dtype)
        loops.update_features(
            parts,
            starts,
            by_feature,
            (residual, batch.centred),
            self._weights(sae.W_dec),
            self._encoder_weights(),
            (self._is_tied, sae.has_unit_norm_rows),
            (batch.error_scale, batch.penalty_scale),
            scalars,
            b_enc_gradient,
            centre,
        )
        sums = residual.sum(axis=0), centre.sum(axis=0)
        self._update_biases(batch, *sums, b_enc_gradient, scalars)

    def _update_biases(
        self,
        batch: _Batch,
        residual_sum: np.ndarray,
        centre_gradient: np.ndarray,
        b_enc_gradient: np.ndarray,
        scalars: loops.AdamScalars,
    ) -> None:
        """centre_gradient = W_enc b_enc_gradient: what reaches b_dec, negated, if it centres x."""
        b_dec_gradient = batch.error_scale * residual_sum
        if self.sae.subtracts_b_dec:
            b_dec_gradient -= centre_gradient
        loops.adam(*self._weights(self.sae.b_enc), b_enc_gradient, scalars)
        loops.adam(*self._weights(self.sae.b_dec), b_dec_gradient, scalars)

    def _dense_step(self, batch: _Batch) -> StepStatistics:
        """The same mathematics on whole matrices, chunk by chunk, without an autograd graph."""
        sae, memory = self.sae, self._memory
        x, centred, penalty = map(torch.from_numpy, (batch.x, batch.centred, batch.penalty))
        decoder_gradient, encoder_gradient = (
            torch.zeros_like(sae.W_dec),
            torch.zeros_like(sae.W_dec),
        )
        f_sum, b_enc_gradient = torch.zeros_like(sae.b_enc), torch.zeros_like(sae.b_enc)
        residual_sum = torch.zeros_like(sae.b_dec)
        n_per_feature = torch.zeros(sae.d_sae, dtype=torch.int64)
        square_sum = 0.0
        for chunk in _chunks(len(x), sae.d_sae * x.element_size() // 4):
            shape = (chunk.stop - chunk.start, sae.d_sae)
            f = torch.from_numpy(memory.take("f", shape, batch.x.dtype))
            gradient = torch.from_numpy(memory.take("gradient", shape, batch.x.dtype))
            torch.addmm(sae.b_enc, centred[chunk], sae.W_enc, out=f).relu_()
            residual = torch.addmm(sae.b_dec, f, sae.W_dec) - x[chunk]
            torch.mm(residual, sae.W_dec.T, out=gradient)
            loops.gate_gradient(
                f.numpy(),
                gradient.numpy(),
                batch.penalty,
                (batch.error_scale, batch.penalty_scale),
                (f_sum.numpy(), b_enc_gradient.numpy(), n_per_feature.numpy()),
            )
            decoder_gradient.addmm_(f.T, residual, alpha=float(batch.error_scale))
            encoder_gradient.addmm_(gradient.T, centred[chunk])
            residual_sum += residual.sum(dim=0)
            square_sum += residual.square().sum(dtype=torch.float64).item()
        if not sae.has_unit_norm_rows:
            # The norm's gradient is the direction; zero at a zero row, as in autograd.
            directions = sae.W_dec / penalty.clamp(min=torch.finfo(x.dtype).tiny)[:, None]
            decoder_gradient += float(batch.penalty_scale) * f_sum[:, None] * directions
        centre_gradient = b_enc_gradient @ sae.W_enc.T
        scalars = self._advance_adam(batch.x.dtype)
        loops.update_features_densely(
            decoder_gradient.numpy(),
            encoder_gradient.numpy(),
            self._weights(sae.W_dec),
            self._encoder_weights(),
            (self._is_tied, sae.has_unit_norm_rows),
            scalars,
        )
        gradients = (g.numpy() for g in (residual_sum, centre_gradient, b_enc_gradient))
        self._update_biases(batch, *gradients, scalars)
        l1_sum = (f_sum.double() @ penalty.double()).item()
        return _statistics(square_sum, l1_sum, n_per_feature, x)

    @property
    def _is_tied(self) -> bool:
        return isinstance(self.sae, TiedL1SAE)

    def _weights(self, parameter: Tensor) -> loops.Weights:
        state = self.optimizer.state[parameter]
        return loops.Weights(_rows(parameter), _rows(state["exp_avg"]), _rows(state["exp_avg_sq"]))

    def _encoder_weights(self) -> loops.Weights:
        """Feature-major; the decoder's again if they are tied."""
        if self._is_tied:
            return self._weights(self.sae.W_dec)
        return loops.Weights(*(array.T for array in self._weights(self.sae.W_enc)))

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


def _make_screen(sae: SAE, centred: np.ndarray, dtype: torch.dtype, memory: _Memory) -> _Screen:
    rows = _rows(sae.W_enc.T)
    x, x_norm, x_error = _rounded("x", centred, dtype, memory)
    W, norm, error = _rounded("W", rows, dtype, memory)
    precision = np.finfo(centred.dtype).eps
    # Relative to norms, which are themselves rounded: hence the last factor.
    norm += error
    w_error = np.max(error / np.maximum(norm, np.finfo(norm.dtype).tiny))
    sums = 2 * (sae.d_in + 8) * precision
    margin = (x_error + (w_error + sums) * (x_norm + x_error)) * norm.dtype.type(1.01)
    threshold = -_rows(sae.b_enc)
    product_rounding = 1.02 * 2**-8 if dtype == torch.bfloat16 else 4 * precision
    lowest = threshold - norm.dtype.type(product_rounding) * np.abs(threshold)
    return _Screen(x, W.T, lowest, norm, margin.astype(norm.dtype))


def _rounded(
    name: str, rows: np.ndarray, dtype: torch.dtype, memory: _Memory
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The rows in the screen's dtype, their norms, and the norms of their rounding errors."""
    norm, error = np.empty(len(rows), rows.dtype), np.zeros(len(rows), rows.dtype)
    if dtype != torch.bfloat16:
        exact = torch.from_numpy(rows)
        torch.linalg.vector_norm(exact, dim=1, out=torch.from_numpy(norm))
        return exact, norm, error
    bits = memory.take(name, rows.shape, np.uint16)
    loops.round_rows(rows, rows.view(np.uint32), bits, norm, error)
    return torch.from_numpy(bits).view(torch.bfloat16), norm, error


def _chunks(n_tokens: int, bytes_per_token: int) -> Iterator[slice]:
    size = max(64, _CHUNK_BYTES // bytes_per_token)
    for start in range(0, n_tokens, size):
        yield slice(start, min(start + size, n_tokens))


def _equal_parts(starts: np.ndarray, n_parts: int) -> np.ndarray:
    """Boundaries, in blocks of features, between stretches of about equal work."""
    blocks = np.append(starts[: -1 : loops.FEATURE_BLOCK], starts[-1])
    # A feature's own update moves as many bytes as about six of its entries.
    work = blocks + 6 * loops.FEATURE_BLOCK * np.arange(len(blocks))
    targets = work[-1] * np.arange(1, n_parts) / n_parts
    return np.concatenate([[0], np.searchsorted(work, targets), [len(blocks) - 1]])


def _rows(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _statistics(
    square_sum: float, l1_sum: float, n_per_feature: Tensor, x: Tensor
) -> StepStatistics:
    means = [torch.tensor(float(part) / len(x), dtype=x.dtype) for part in (square_sum, l1_sum)]
    return StepStatistics(*means, n_per_feature)

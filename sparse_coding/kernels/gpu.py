"""The training step on a GPU: sparse after the non-linearity, gradients by hand, Adam fused in.

A step is, for as many tokens at a time as fit `ENTRY_BYTES`,

1. screen: x W_enc in bfloat16, tile by tile; the tile itself is dropped, one bit per entry says
           whether it may be active, whatever rounding may have hidden included;
2. decode: the pre-activation of each such entry at full precision, TopK's choice among them,
           residual, loss, and the gradient by each active entry; AuxK, where features are dead;
3. gather: each feature's gradient from its own tokens;

and at the end projection, Adam for every feature (inactive ones too, as in dense Adam) and
renormalisation in one pass. Active entries and their values are those of the full-precision dot
product, so the result is the reference's up to the rounding of sums. Where too many entries are
active for this to pay, whole matrix products replace 1 to 3.

No step waits for the device: which way to take follows from how many entries were active eight
steps before. All sums have a fixed order, so a run repeats itself; but a resumed one takes its
first eight steps densely (TopK's density is known beforehand), and may differ from the unbroken
one in their rounding.
"""

import functools
import importlib.util
import itertools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.kernels import FAST_CLASSES, StepStatistics, gpu_screen, make_adam
from sparse_coding.kernels.auxiliary import auxiliary_gradients
from sparse_coding.kernels.gpu_screen import Listed, Screen, ceil_div, power_of_two
from sparse_coding.kernels.reference import ReferenceStep
from sparse_coding.sae import (
    SAE,
    BatchTopKSAE,
    JumpReLUSAE,
    NormWeightedL1SAE,
    TiedL1SAE,
    TopKSAE,
    keep_largest,
)

ENTRY_BYTES = 2**30
"""Memory for what is kept per entry (token, feature), even if all of them were active."""
AUXILIARY_BYTES = 2**28
"""Memory for AuxK's pre-activations, of which four arrays are held."""
DENSE_ABOVE, SPARSE_BELOW = 0.04, 0.03
"""Densities at which a step becomes dense, and sparse again.

An estimate, not measured on a GPU: a dense step multiplies 10 d_in times per entry, a sparse one
moves 20 d_in bytes per active entry, and at 60 TFLOP/s of float32 and 4.3 TB/s (H200) both take
the same time at a density of 0.036.
"""
ROWS_SIZE = 2048
"""Numbers held at a time of rows of width d_in: 16 per thread, where d_in is up to 1024."""
KEYS_SIZE = 256
"""Candidates of one token among which TopK chooses at a time: rarely more than 2 k."""
LAG = 8
"""Steps after which a count is read: by then the device has long written it."""


def supports_gpu(sae: SAE) -> bool:
    """Whether `GPUStep` can train this SAE: a class it knows, on CUDA, with Triton installed."""
    return _is_known(sae) and sae.W_dec.is_cuda and importlib.util.find_spec("triton") is not None


@functools.cache
def agrees_with_reference(device: torch.device) -> bool:
    """Whether a sparse and a dense step give autograd's gradients here; tried once, warns if not.

    Compilers and devices differ, so the kernels are trusted only where they were seen to work.
    """
    trials = itertools.product((False, True), (NormWeightedL1SAE, TopKSAE))
    reason = next(filter(None, (_failure(device, cls, is_low) for is_low, cls in trials)), "")
    if reason:
        line = f"training by autograd: the fast step failed on {device} ({reason})"
        warnings.warn(line, stacklevel=3)
    return not reason


def _failure(device: torch.device, architecture: type[SAE], is_low: bool) -> str:
    """Why this step is not to be trusted; "" if it is."""
    try:
        difference = _difference(device, architecture, is_low)
    except Exception as error:  # whatever Triton or the driver raises: the reference still runs
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "" if difference < 1e-4 else f"gradients differ by {difference:.1e}"


def _difference(device: torch.device, architecture: type[SAE], is_low: bool) -> float:
    """Relative, between the first Adam moments of this step and of the reference's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator)
    moments = []
    for cls in (ReferenceStep, GPUStep):
        sae = architecture(12, 70, torch.Generator().manual_seed(1))
        sae.initialise_sparsity(x, 5.0)
        sae = sae.to(device)
        optimizer = make_adam(sae, 1e-3)
        step = cls(sae, optimizer)
        if isinstance(step, GPUStep):
            step._density = PastDensity(torch.device(device), is_low)
        step(x.to(device), torch.tensor(0.5, device=device))
        moments.append([optimizer.state[p]["exp_avg"] for p in sae.parameters()])
    pairs = zip(*moments, strict=True)
    return max(((a - b).norm() / a.norm()).item() for a, b in pairs)


def _is_known(sae: SAE) -> bool:
    is_exact = sae.W_dec.dtype in (torch.float32, torch.float64)
    return type(sae) in FAST_CLASSES and is_exact and sae.d_out == sae.d_in


def _learns_threshold(sae: SAE) -> bool:
    return isinstance(sae, JumpReLUSAE)


class _Batch(NamedTuple):
    """What a step reads besides the parameters."""

    x: Tensor
    """What is to be decoded: of a transcoder, its target."""
    centred: Tensor
    """What the encoder multiplies: the SAE's input, or that - b_dec."""
    penalty: Tensor
    """What one unit of each feature costs, ||W_dec[i]||; before the coefficient."""
    threshold: Tensor
    """Above which a feature is active (d_sae)."""
    scalars: Tensor
    """Constants of the step, in the order of `gpu_triton`; a row per group of the optimizer."""


class _Sums(NamedTuple):
    """What a step adds up over the tokens of its batch; by feature, but for the last three."""

    W_dec: Tensor
    """The squared error's gradient by W_dec, without the penalty's."""
    W_enc: Tensor
    f: Tensor
    b_enc: Tensor
    """Gradients by b_enc, as W_enc's are by W_enc (feature-major)."""
    threshold: Tensor
    n_active: Tensor
    residual: Tensor
    square: Tensor
    auxiliary: Tensor
    """AuxK's squared error."""


class PastDensity:
    """The density of active entries `LAG` steps ago, copied to the host without waiting for it."""

    def __init__(self, device: torch.device, is_low: bool = False) -> None:
        is_cuda = device.type != "cpu"
        self._n_active = torch.zeros(LAG, dtype=torch.int64, pin_memory=is_cuda)
        self._n_entries = [0] * LAG
        self._copied = [torch.cuda.Event() if is_cuda else None for _ in range(LAG)]
        self._slot = 0
        self._is_low = is_low

    def is_low(self) -> bool:
        """Whether sparse is faster; as told at the start in the first steps, which is no."""
        n_entries, copied = self._n_entries[self._slot], self._copied[self._slot]
        if n_entries:
            if copied is not None:
                copied.synchronize()  # the host never runs further ahead of the device than this
            density = self._n_active.numpy()[self._slot] / n_entries
            self._is_low = bool(density < (DENSE_ABOVE if self._is_low else SPARSE_BELOW))
        return self._is_low

    def record(self, n_active: Tensor, n_entries: int) -> None:
        self._n_active[self._slot].copy_(n_active, non_blocking=True)
        self._n_entries[self._slot] = n_entries
        if self._copied[self._slot] is not None:
            self._copied[self._slot].record()
        self._slot = (self._slot + 1) % LAG


class GPUStep:
    """Same arguments and result as `ReferenceStep`; see the module for the method."""

    def __init__(self, sae: SAE, optimizer: torch.optim.Adam) -> None:
        assert _is_known(sae), f"{type(sae).__name__} has no GPU step"
        assert sae.W_enc.T.is_contiguous(), "W_enc must be stored feature-major"
        from sparse_coding.kernels import gpu_triton  # needs triton

        self.sae, self.optimizer = sae, optimizer
        self._kernels = gpu_triton
        is_low = isinstance(sae, TopKSAE) and sae.k < SPARSE_BELOW * sae.d_sae
        self._density = PastDensity(sae.W_dec.device, is_low)
        block = power_of_two(sae.d_in)
        self._row = {"BLOCK": block, "num_warps": min(16, max(4, block // 256))}
        self._rows = {"ROWS": max(1, ROWS_SIZE // block), **self._row}
        group = optimizer.param_groups[0]
        like = {"dtype": torch.float64, "device": sae.W_dec.device}
        self._betas = torch.tensor(group["betas"], **like)
        self._adam_constants = torch.tensor(
            [1 - b for b in group["betas"]] + [group["eps"]], **like
        )

    @torch.no_grad()
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
        with torch.cuda.device_of(x):  # where Triton launches
            batch, sums = self._batch(x, l1_coeff), self._no_sums()
            screen = self._screen(batch) if self._density.is_low() else None
            if isinstance(self.sae, BatchTopKSAE):
                batch = self._with_batch_threshold(batch, screen)
            for tokens in self._sub_batches(len(x)):
                if screen is None:
                    residual = self._add_densely(batch, tokens, sums)
                else:
                    residual = self._add_sparsely(batch, tokens, screen, sums)
                if self.sae.revives_dead and dead is not None and len(dead):
                    self._add_auxiliary(batch, tokens, residual, dead, sums)
            self._update(batch, sums)
            self._density.record(sums.n_active.sum(), len(x) * self.sae.d_sae)
            return self._statistics(batch, sums)

    def _batch(self, x: Tensor, l1_coeff: Tensor) -> _Batch:
        sae = self.sae
        x, target = (part.contiguous() for part in sae.split(x.to(sae.W_dec.dtype)))
        centred = x - sae.b_dec if sae.subtracts_b_dec else x
        penalty = torch.ones_like(sae.b_enc) if sae.has_unit_norm_rows else sae.W_dec.norm(dim=1)
        threshold = sae.threshold if _learns_threshold(sae) else torch.zeros_like(sae.b_enc)
        return _Batch(target, centred, penalty, threshold, self._scalars(l1_coeff, len(x)))

    def _scalars(self, l1_coeff: Tensor, n_tokens: int) -> Tensor:
        """Count a step in Adam's state; this step's constants, none of them read by the host."""
        sae, groups = self.sae, self.optimizer.param_groups
        steps = [self.optimizer.state[parameter]["step"] for parameter in sae.parameters()]
        torch._foreach_add_(steps, 1)
        corrections = 1 - self._betas ** steps[0].double()
        scales = torch.zeros(4, dtype=corrections.dtype, device=corrections.device)
        scales[0].fill_(2 / n_tokens)
        if not sae.sparsity_is_chosen:
            scales[1 + _learns_threshold(sae)].copy_(l1_coeff / n_tokens)
        if _learns_threshold(sae):
            scales[3].fill_(sae.bandwidth)
        step_sizes = [group["lr"] / corrections[:1] for group in groups]
        others = [corrections[1:].sqrt(), self._adam_constants, scales]
        rows = [torch.cat([step_size, *others]) for step_size in step_sizes]
        return torch.stack(rows).to(sae.W_dec.dtype)

    def _no_sums(self) -> _Sums:
        W_dec, features = self.sae.W_dec, torch.zeros_like(self.sae.b_enc)
        by_feature = (torch.zeros_like(features) for _ in range(3))
        return _Sums(
            torch.zeros_like(W_dec),
            torch.zeros_like(W_dec),
            *by_feature,
            torch.zeros_like(features, dtype=torch.int64),
            torch.zeros_like(self.sae.b_dec),
            *torch.zeros(2, dtype=torch.float64, device=W_dec.device),
        )

    def _sub_batches(self, n_tokens: int) -> Iterator[slice]:
        """Consecutive slices whose entries fit `ENTRY_BYTES` whatever is active."""
        entry_bytes = 8 + 2 * self.sae.W_dec.element_size()
        n_tiles = ENTRY_BYTES // (entry_bytes * self.sae.d_sae * gpu_screen.TILE_TOKENS)
        size = max(1, n_tiles) * gpu_screen.TILE_TOKENS
        for start in range(0, n_tokens, size):
            yield slice(start, min(start + size, n_tokens))

    def _add_auxiliary(
        self, batch: _Batch, tokens: slice, residual: Tensor, dead: Tensor, sums: _Sums
    ) -> None:
        centred = batch.centred[tokens]
        gradients = auxiliary_gradients(
            self.sae, centred, residual, dead, lambda a, b: a @ b.T, AUXILIARY_BYTES
        )
        share = len(centred) / len(batch.x)
        for total, rows in zip((sums.W_enc, sums.W_dec, sums.b_enc), gradients[:3], strict=True):
            total.index_add_(0, dead, rows, alpha=share)
        sums.auxiliary.add_(gradients.square)

    def _with_batch_threshold(self, batch: _Batch, screen: Screen | None) -> _Batch:
        """A batch whose threshold lets the k * batch largest pass; BatchTopK's own one learns.

        Equal pre-activations at the edge pass all of them.
        """
        sae, largest = self.sae, batch.x.new_empty(0)
        n_kept = sae.k * len(batch.x)
        for tokens in self._sub_batches(len(batch.x)):
            if screen is None:
                pre = torch.addmm(sae.b_enc, batch.centred[tokens], sae.W_enc)
            else:
                pre = batch.x.new_full((tokens.stop - tokens.start, sae.d_sae), -torch.inf)
                self._pre_activate(batch, tokens, screen.entries(tokens).by_token, pre)
            largest = torch.cat([largest, pre.flatten().topk(min(n_kept, pre.numel())).values])
            largest = largest.topk(min(n_kept, len(largest)), sorted=False).values
        sae.observe(largest.relu())
        below = largest.amin().nextafter(largest.new_full((), -torch.inf))
        return batch._replace(threshold=below.clamp(min=0).expand(sae.d_sae).contiguous())

    # ---- sparse ----------------------------------------------------------------------------

    def _screen(self, batch: _Batch) -> Screen:
        sae = self.sae
        floor = batch.threshold - sae.bandwidth / 2 if _learns_threshold(sae) else batch.threshold
        screen = Screen(self._kernels, batch.centred, sae.W_enc.T, sae.b_enc, floor)
        if isinstance(sae, TopKSAE):
            screen.raise_floors(sae.k, is_shared=isinstance(sae, BatchTopKSAE))
        return screen

    def _add_sparsely(self, batch: _Batch, tokens: slice, screen: Screen, sums: _Sums) -> Tensor:
        """Add the gradients of some tokens; returns the residual."""
        sae, n_tokens = self.sae, tokens.stop - tokens.start
        entries = screen.entries(tokens)
        decoded = self._decode(batch, tokens, entries.by_token, sums)
        self._kernels.accumulate[(sae.d_sae,)](
            batch.centred[tokens],
            batch.threshold,
            batch.scalars,
            *entries.by_feature,
            *decoded,
            *sums[:6],
            n_tokens,
            sae.d_in,
            sae.d_sae,
            LEARNS_THRESHOLD=_learns_threshold(sae),
            **self._rows,
        )
        return decoded[0]

    def _pre_activate(self, batch: _Batch, tokens: slice, features: Listed, pre: Tensor) -> None:
        """Write the listed entries' pre-activations to `pre` (tokens, d_sae)."""
        sae, (n_tokens, d_sae) = self.sae, pre.shape
        centred = batch.centred[tokens]
        self._kernels.pre_activate[(n_tokens,)](
            centred, sae.W_enc, sae.b_enc, *features, pre, sae.d_in, d_sae, **self._rows
        )

    def _decode(
        self, batch: _Batch, tokens: slice, features: Listed, sums: _Sums
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The residual, and for each entry its pre-activation and the gradient by it."""
        sae, kernels = self.sae, self._kernels
        x, grid = batch.x[tokens], (tokens.stop - tokens.start,)
        pre, gradient = (x.new_empty(len(x), sae.d_sae) for _ in range(2))
        residual, square = torch.empty_like(x), torch.empty_like(x[:, 0])
        sizes = sae.d_in, sae.d_sae
        self._pre_activate(batch, tokens, features, pre)
        if type(sae) is TopKSAE:
            bits = 8 * pre.element_size()
            block = min(KEYS_SIZE, power_of_two(sae.d_sae))
            kernels.silence_all_but[grid](*features, pre, sae.k, sae.d_sae, BLOCK=block, BITS=bits)
        rule = batch.threshold, batch.penalty, batch.scalars
        results = residual, pre, gradient
        kernels.decode[grid](
            x, sae.b_dec, sae.W_dec, *rule, *features, *results, square, *sizes, **self._rows
        )
        sums.residual.add_(residual.sum(dim=0))
        sums.square.add_(square.sum(dtype=torch.float64))
        return results

    # ---- dense -----------------------------------------------------------------------------

    def _add_densely(self, batch: _Batch, tokens: slice, sums: _Sums) -> Tensor:
        """The same mathematics on whole matrices, without an autograd graph."""
        sae = self.sae
        x, centred = batch.x[tokens], batch.centred[tokens]
        error_scale, penalty_scale, step_scale, bandwidth = batch.scalars[0, 5:]
        pre = torch.addmm(sae.b_enc, centred, sae.W_enc)
        if type(sae) is TopKSAE:
            pre = keep_largest(pre, sae.k)
        is_silent = pre <= batch.threshold
        f = pre.masked_fill(is_silent, 0)
        residual = torch.addmm(sae.b_dec, f, sae.W_dec) - x
        gradient = (residual @ sae.W_dec.T).mul_(error_scale).add_(penalty_scale * batch.penalty)
        if _learns_threshold(sae):
            is_near = (pre - batch.threshold).abs() < bandwidth / 2
            slope = -(batch.threshold * gradient + step_scale) / bandwidth * is_near
            sums.threshold.add_(slope.sum(dim=0))
        gradient.masked_fill_(is_silent, 0)
        sums.W_dec.addmm_(f.T, residual * error_scale)
        sums.W_enc.addmm_(gradient.T, centred)
        sums.f.add_(f.sum(dim=0))
        sums.b_enc.add_(gradient.sum(dim=0))
        sums.n_active.add_(len(x) - is_silent.sum(dim=0))
        sums.residual.add_(residual.sum(dim=0))
        sums.square.add_(residual.square().sum(dtype=torch.float64))
        return residual

    # ---- both ------------------------------------------------------------------------------

    def _update(self, batch: _Batch, sums: _Sums) -> None:
        """Adam on every parameter; the decoder's rows stay on their sphere where they must."""
        sae = self.sae
        b_dec_gradient = batch.scalars[0, 5] * sums.residual
        if sae.subtracts_b_dec:
            b_dec_gradient -= sums.b_enc @ sae.W_enc.T
        self._kernels.update_features[(sae.d_sae,)](
            *self._with_moments(sae.W_dec),
            *self._with_moments(sae.W_dec if isinstance(sae, TiedL1SAE) else sae.W_enc),
            sums.W_dec,
            sums.W_enc,
            sums.f,
            batch.scalars,
            sae.d_in,
            IS_TIED=isinstance(sae, TiedL1SAE),
            HAS_UNIT_NORM=sae.has_unit_norm_rows,
            **self._row,
        )
        self._update_vector(sae.b_enc, sums.b_enc, batch.scalars[0])
        self._update_vector(sae.b_dec, b_dec_gradient, batch.scalars[0])
        if _learns_threshold(sae):
            self._update_vector(sae.threshold, sums.threshold, batch.scalars[1])
            sae.threshold.clamp_(min=0)

    def _update_vector(self, vector: Tensor, gradient: Tensor, scalars: Tensor) -> None:
        self._kernels.update_vector[(ceil_div(len(vector), 1024),)](
            *self._with_moments(vector), gradient, scalars, len(vector), BLOCK=1024
        )

    def _with_moments(self, parameter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        state = self.optimizer.state[parameter]
        return parameter, state["exp_avg"], state["exp_avg_sq"]

    def _statistics(self, batch: _Batch, sums: _Sums) -> StepStatistics:
        if _learns_threshold(self.sae):
            penalty = sums.n_active.sum().double()
        elif self.sae.sparsity_is_chosen:
            penalty = sums.auxiliary
        else:
            penalty = sums.f.double() @ batch.penalty.double()
        mse, penalty = (torch.stack([sums.square, penalty]) / len(batch.x)).to(batch.x.dtype)
        return StepStatistics(mse, penalty, sums.n_active)

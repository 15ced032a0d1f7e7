"""Which SAEs a run trains: every combination of what was asked for. Nothing is made here."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sparse_coding.config import JOIN
from sparse_coding.errors import UserError
from sparse_coding.sae import ARCHITECTURES, CROSSCODERS, SAE, TRAINABLE


class SAESpec(NamedTuple):
    """One SAE of the ladder. Exactly one of `l1_coeff` and `target_l0` is set.

    `target_l0` is the `k` of classes that choose their sparsity (`SAE.sparsity_is_chosen`).
    """

    architecture: str
    ratio: int
    l1_coeff: float | None
    target_l0: float | None
    seed: int

    @property
    def name(self) -> str:
        """Sortable folder name, e.g. `l1_x08_c1.0_s0` or `l1_x08_l0-20_s0`."""
        sparsity = f"c{self.l1_coeff}" if self.target_l0 is None else f"l0-{self.target_l0:g}"
        return f"{self.architecture}_x{self.ratio:02d}_{sparsity}_s{self.seed}"


def shares(specs: Sequence[SAESpec], n: int) -> list[list[SAESpec]]:
    """The ladder in n parts of about equal size: the largest first, each to the lightest part."""
    parts: list[list[SAESpec]] = [[] for _ in range(n)]
    for spec in sorted(specs, key=lambda spec: -spec.ratio):
        min(parts, key=lambda part: sum(other.ratio for other in part)).append(spec)
    return parts


def _refuse_unless_l0_is_whole(
    architecture: str, l1_coeffs: Sequence[float], target_l0: Sequence[float]
) -> None:
    if l1_coeffs:
        raise UserError(
            f"--architecture {architecture} has no coefficient; give --target-l0 (its k) instead "
            "of --l1-coeffs"
        )
    broken = [target for target in target_l0 if target < 1 or target != round(target)]
    if broken:
        raise UserError(
            f"--target-l0 {broken[0]:g} is not possible for --architecture {architecture}; its k "
            "must be a whole number"
        )


def check_architectures(
    names: Sequence[str],
    flag: str = "--architecture",
    known: Mapping[str, type[SAE]] = ARCHITECTURES,
) -> None:
    """`UserError` about the first that there is not."""
    for name in names:
        if name not in known:
            allowed = ", ".join(known)
            raise UserError(f"{flag} {name} is unknown; it must be one of: {allowed}")


def _refuse_what_does_not_transcode(architectures: Sequence[str]) -> None:
    for architecture in architectures:
        if not TRAINABLE[architecture].can_transcode:
            able = ", ".join(name for name, cls in TRAINABLE.items() if cls.can_transcode)
            raise UserError(
                f"--architecture {architecture} cannot be a transcoder (--target-hook-name); "
                f"these can: {able}"
            )


def _refuse_what_cannot_be_joined(architectures: Sequence[str], n_hooks: int) -> None:
    joined = [name for name in architectures if name in CROSSCODERS]
    apart = [name for name in architectures if name not in CROSSCODERS]
    if joined and apart:
        raise UserError(
            f"--architecture {joined[0]} joins all hooks in one dictionary, {apart[0]} learns "
            "each by itself; train them in two runs"
        )
    if joined and n_hooks < 2:
        raise UserError(
            f"--architecture {joined[0]} joins the activations of several hooks; give two or more "
            "with --hook-name"
        )


def ladder(
    architectures: Sequence[str],
    ratios: Sequence[int],
    l1_coeffs: Sequence[float],
    target_l0: Sequence[float],
    seeds: Sequence[int],
    are_transcoders: bool = False,
    n_hooks: int = 1,
) -> list[SAESpec]:
    """Every combination, in the order of its arguments; `l1_coeffs` win over `target_l0`.

    `n_hooks` are there to be learnt from: apart, or joined by crosscoders, which must be alone.
    """
    check_architectures(architectures, known=TRAINABLE)
    if are_transcoders:
        _refuse_what_does_not_transcode(architectures)
    _refuse_what_cannot_be_joined(architectures, n_hooks)
    for architecture in architectures:
        if TRAINABLE[architecture].sparsity_is_chosen:
            _refuse_unless_l0_is_whole(architecture, l1_coeffs, target_l0)
    sparsities = [(c, None) for c in l1_coeffs] or [(None, t) for t in target_l0]
    specs = [
        SAESpec(architecture, ratio, l1_coeff, target, seed)
        for architecture in architectures
        for ratio in ratios
        for l1_coeff, target in sparsities
        for seed in seeds
    ]
    names = [spec.name for spec in specs]
    for name in (name for name in names if names.count(name) > 1):
        raise UserError(
            f"two SAEs would be called {name}; give each value once, and targets and coefficients "
            "that differ in six digits"
        )
    return specs


def places(specs: Sequence[SAESpec], hook_names: Sequence[str]) -> tuple[str, ...]:
    """Where a ladder is trained: at each hook by itself, or at all of them joined."""
    joins = any(spec.architecture in CROSSCODERS for spec in specs)
    return (JOIN.join(hook_names),) if joins else tuple(hook_names)

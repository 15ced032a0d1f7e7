"""Which dictionaries recover features in superposition whose truth is known, and when?

    python -m analysis.recover_toy_features
    python -m analysis.recover_toy_features --settings easy --noise 0 0.1 0.2 --ratios 2 4 8
    python -m analysis.recover_toy_features --phase-settings easy

A quarter of an hour on two cores with the phase diagram. Rows of activations are sparse sums of
random directions, twice as many as dimensions (Sharkey, Braun and Millidge 2022). Every
architecture is trained on the same batches and steered to the truth's own L0; each seed has its
own truth, data and start. Scores are on fresh rows; brackets are 95 % intervals of Student's t
over seeds. "random" is the null: dictionaries of the same shape that were never trained.
--phase-settings adds the phase diagram, ratio x coefficient. Writes
outputs/results/recover_toy_features.json.
"""

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.program import (
    Row,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.errors import UserError
from sparse_coding.settings import (
    Count,
    CountOrZero,
    Fraction,
    OutputFile,
    Positive,
    PositiveOrZero,
    Processes,
    Ratio,
    Seed,
)

if TYPE_CHECKING:
    from sparse_coding.ladder import SAESpec
    from sparse_coding.toy import ToySetting

SETTINGS: dict[str, dict[str, Any]] = {
    "easy": {},
    "dense": {"l0": 8.0},
    "noisy": {"noise": 0.15},
    "skewed": {"zipf": 1.0, "correlation": 0.8, "magnitude_low": 0.0, "magnitude_high": 1.0},
    "hierarchical": {"n_children": 3},
}


@dataclass(frozen=True)
class Config:
    """What is planted, and what is fitted to it. Every combination is run."""

    settings: tuple[str, ...] = tuple(SETTINGS)
    """easy; dense (L0 8 instead of 3); noisy; skewed (Zipf frequencies, correlated, magnitudes
    from 0); hierarchical (children fire only with their parent)."""
    d_in: Count = 32
    """Dimensions of the activations."""
    n_features: Count = 64
    """True features."""
    l0: tuple[Positive, ...] = ()
    """Mean true features per row, instead of the settings' own."""
    noise: tuple[PositiveOrZero, ...] = ()
    """Standard deviations of the noise per dimension, instead of the settings' own."""
    zipf: tuple[PositiveOrZero, ...] = ()
    """Exponents of the features' frequencies, instead of the settings' own."""
    correlation: tuple[Fraction, ...] = ()
    """Shares of firing that is decided in common, instead of the settings' own."""
    n_children: tuple[CountOrZero, ...] = ()
    """Children per parent, instead of the settings' own."""

    architecture: tuple[str, ...] = ()
    """Architectures of SAEs; empty: all."""
    ratios: tuple[Ratio, ...] = (4,)
    """Sizes of the dictionaries as multiples of d_in; the truth's is n_features / d_in."""
    target_l0: tuple[Positive, ...] = ()
    """L0s to steer to; empty: the truth's own."""
    phase_settings: tuple[str, ...] = ()
    """Settings for which ratio x coefficient is run too: the phase diagram."""
    phase_architecture: str = "l1"
    """Its architecture."""
    phase_ratios: tuple[Ratio, ...] = (1, 2, 4, 8)
    """Its ratios."""
    phase_l1_coeffs: tuple[PositiveOrZero, ...] = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    """Its coefficients."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds; each makes its own truth, data and start."""

    n_steps: Count = 1000
    """Training steps."""
    batch_tokens: Count = 512
    """Rows per step."""
    lr: Positive = 3e-3
    """Learning rate."""
    n_rows: Count = 8192
    """Fresh rows for the scores."""
    n_null_draws: Count = 10
    """Random dictionaries per seed."""
    n_processes: Processes = os.cpu_count() or 1
    """Processes, one core each."""
    output: OutputFile | None = None
    """Results file; by default outputs/results/recover_toy_features.json."""
    overwrite: bool = False
    """Replace the results file if it exists."""


TABLE = {
    "architecture": "{}",
    "ratio": "{}",
    "l1_coeff": "{:g}",
    "l0": "{:.1f}",
    "fvu": "{:.3f}",
    "mmcs_truth": "{:.2f}",
    "recovered_90": "{:.2f}",
    "n_alive": "{:.0f}",
    "n_false": "{:.0f}",
    "f1": "{:.2f}",
    "auroc": "{:.2f}",
}
VARIED = ("l0", "noise", "zipf", "correlation", "n_children")


def planted(cfg: Config) -> dict[str, "ToySetting"]:
    """Settings of the toy data by name: the named ones, varied by what the command line gives."""
    from sparse_coding.toy import ToySetting

    for flag, names in {"settings": cfg.settings, "phase-settings": cfg.phase_settings}.items():
        for name in names:
            if name not in SETTINGS:
                allowed = ", ".join(SETTINGS)
                raise UserError(f"--{flag} {name} is unknown; it must be one of: {allowed}")
    given = {key: getattr(cfg, key) for key in VARIED if getattr(cfg, key)}
    found = {}
    for name in cfg.settings:
        for values in itertools.product(*given.values()):
            varied = dict(zip(given, values, strict=True))
            label = "_".join([name, *(f"{key}-{value:g}" for key, value in varied.items())])
            size = {"d_in": cfg.d_in, "n_features": cfg.n_features}
            found[label] = ToySetting(**size | SETTINGS[name] | varied)
    return found


def ladder_of(name: str, setting: "ToySetting", seed: int, cfg: Config) -> list["SAESpec"]:
    """The SAEs that are trained on one setting with one seed."""
    from sparse_coding.ladder import ladder
    from sparse_coding.sae import ARCHITECTURES

    architectures = cfg.architecture or tuple(ARCHITECTURES)
    specs = ladder(architectures, cfg.ratios, (), cfg.target_l0 or (setting.l0,), (seed,))
    if name.partition("_")[0] in cfg.phase_settings:
        phase = (cfg.phase_architecture,), cfg.phase_ratios, cfg.phase_l1_coeffs
        specs += ladder(*phase, (), (seed,))
    return specs


def recover(name: str, setting: "ToySetting", seed: int, cfg: Config) -> list[Row]:
    """One setting with one seed: every SAE in one pass, the baselines, the null."""
    from analysis.toy_recovery import Fit, Recovery
    from sparse_coding.toy import toy_truth

    fit = Fit(cfg.n_steps, cfg.batch_tokens, cfg.lr, cfg.n_rows, cfg.n_null_draws)
    recovery = Recovery(toy_truth(setting, seed), seed, fit)
    specs, k = ladder_of(name, setting, seed, cfg), max(1, round(setting.l0))
    rows = [*recovery.saes(specs), *recovery.baselines(k)]
    rows += [recovery.null(ratio, k) for ratio in sorted({spec.ratio for spec in specs})]
    facts = {f"true_{key}": getattr(setting, key) for key in VARIED}
    facts |= {"d_in": cfg.d_in, "n_features": cfg.n_features, "n_rows": cfg.n_rows}
    return [{"setting": name, **facts, "seed": seed} | row for row in rows]


def print_rows(rows: Sequence[Row]) -> None:
    """One table per setting."""
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of_setting = [row for row in rows if row["setting"] == setting]
        first = of_setting[0]
        title = f"{setting}: {first['n_features']} features in {first['d_in']} dimensions"
        print_table(title, of_setting, TABLE)


def main(cfg: Config) -> None:
    """Fit, score, print, write."""
    path = results_path(cfg, "recover_toy_features", [])

    from analysis.toy_recovery import in_processes, over_seeds
    from sparse_coding.ladder import check_architectures

    check_architectures((cfg.phase_architecture,), "--phase-architecture")
    settings = planted(cfg)
    jobs = [(name, one, seed, cfg) for name, one in settings.items() for seed in cfg.seeds]
    if not jobs:
        raise UserError("nothing to do: give at least one of --settings and one of --seeds")
    n_saes = sum(len(ladder_of(*job)) for job in jobs)  # refuses what cannot be trained
    print(
        f"{len(settings)} settings x {len(cfg.seeds)} seeds: {n_saes} SAEs of {cfg.n_steps} "
        f"steps; results go to {path}"
    )
    rows = over_seeds(in_processes(recover, jobs, cfg.n_processes, "truth"))
    print_rows(rows)
    write_results(path, cfg, rows, "cpu")


if __name__ == "__main__":
    run_program(Config, main)

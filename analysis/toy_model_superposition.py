"""How do features share dimensions in a model that superposes them, and do SAEs find them again?

    python -m analysis.toy_model_superposition

Twenty minutes on two cores with the defaults. Trains toy models x_hat = relu(W^T W x + b) of
Elhage et al. (2022, arXiv 2209.10652) at many sparsities S at once, then SAEs on their hidden
activations: the true features there are the models' own W_i. Reports each feature's dimensionality
D_i = ||W_i||^2 / sum_j (W_i / ||W_i|| . W_j)^2 against 1 / (1 - S); brackets are 95 % intervals of
Student's t over seeds. Writes outputs/results/feature_dimensionality.json.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from analysis.program import (
    Row,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.errors import UserError
from sparse_coding.settings import Count, OutputFile, Positive, Processes, Range, Ratio, Seed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sparse_coding.toy import SuperpositionModels

REPRESENTED = 0.5  # norm of W_i: they come out near 0 or near 1
N_ROWS = 8192  # fresh rows for every score


InverseDensity = Annotated[float, Range(1)]


@dataclass(frozen=True)
class Config:
    """The toy models, and the SAEs on their hidden activations."""

    n_features: Count = 120
    """Features of the toy models' input, equally important."""
    d_hidden: Count = 15
    """Dimensions they are pressed into."""
    inverse_densities: tuple[InverseDensity, ...] = (
        1.4, 1.7, 2, 2.5, 3, 3.5, 4.2, 5, 6, 8, 12, 20, 32,
    )  # fmt: skip
    """1 / (1 - S): a feature is non-zero in one of so many inputs."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of the toy models, and of the SAEs on them."""
    n_steps: Count = 8000
    """Training steps of the toy models."""
    batch_tokens: Count = 256
    """Inputs per step and toy model."""
    lr: Positive = 1e-2
    """Learning rate of the toy models."""
    sae_architecture: tuple[str, ...] = ("l1", "p_anneal", "topk")
    """SAEs on the hidden activations; steered to the mean number of represented features."""
    sae_ratio: Ratio = 8
    """Their size as a multiple of d_hidden."""
    sae_steps: Count = 1000
    """Training steps of the SAEs, of 512 rows each."""
    n_processes: Processes = os.cpu_count() or 1
    """Processes, one core each."""
    output: OutputFile | None = None
    """Results file; by default outputs/results/feature_dimensionality.json."""
    overwrite: bool = False
    """Replace the results file if it exists."""


def train(cfg: Config, seed: int) -> "SuperpositionModels":
    """One toy model per inverse density, side by side."""
    import torch
    from tqdm import trange

    from sparse_coding.toy import SuperpositionModels

    generator = torch.Generator().manual_seed(seed)
    n_models = len(cfg.inverse_densities)
    models = SuperpositionModels(n_models, cfg.n_features, cfg.d_hidden, generator)
    importance = torch.ones(cfg.n_features)
    optimizer = torch.optim.Adam(models.parameters(), cfg.lr)
    # Features settle into exact polytopes only while the learning rate falls.
    warmup, decay = max(1, cfg.n_steps // 50), cfg.n_steps / 2
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup, (cfg.n_steps - step) / decay)
    )
    for _ in trange(cfg.n_steps, desc=f"toy models, seed {seed}", unit="step"):
        x = sparse_inputs(cfg.inverse_densities, cfg.batch_tokens, cfg.n_features, generator)
        loss = models.loss(x, importance).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return models.requires_grad_(False)


def sparse_inputs(
    inverse_densities: Sequence[float], batch: int, n_features: int, generator: "torch.Generator"
) -> "torch.Tensor":
    """(model, batch, feature): 0 with probability S, else uniform in [0, 1]."""
    import torch

    density = 1 / torch.tensor(inverse_densities)[:, None, None]
    u = torch.rand(len(density), batch, n_features, generator=generator)
    return torch.where(u < density, u / density, 0.0)  # given u < p, u / p is uniform again


def model_rows(cfg: Config, models: "SuperpositionModels", seed: int) -> list[Row]:
    """What each toy model represents, and a row per feature that it represents."""
    import torch

    from sparse_coding.toy import feature_dimensionality

    generator = torch.Generator().manual_seed(1_000_000 + seed)  # fresh inputs
    x = sparse_inputs(cfg.inverse_densities, N_ROWS, cfg.n_features, generator)
    loss = models.loss(x, torch.ones(cfg.n_features)) / x.square().sum(dim=2).mean(dim=1)
    norms, dimensionality = models.W.norm(dim=2), feature_dimensionality(models.W)
    rows = []
    for i, inverse_density in enumerate(cfg.inverse_densities):
        where = {"inverse_density": inverse_density, "seed": seed}
        represented = norms[i] > REPRESENTED
        rows.append({"kind": "model", **where} | {
            "n_features": cfg.n_features,
            "d_hidden": cfg.d_hidden,
            "n_rows": N_ROWS,
            "loss_share": loss[i].item(),
            "dimensions_per_feature": cfg.d_hidden / norms[i].square().sum().item(),
            "n_represented": int(represented.sum()),
        })  # fmt: skip
        rows += [
            {"kind": "feature", **where, "dimensionality": round(value, 4)}
            for value in dimensionality[i, represented].tolist()
        ]
    return rows


def recover(W: "np.ndarray", inverse_density: float, seed: int, cfg: Config) -> list[Row]:
    """SAEs on one toy model's hidden activations, and their null, against its W_i."""
    import torch

    from analysis.toy_recovery import Fit, Recovery
    from sparse_coding.ladder import ladder
    from sparse_coding.toy import ToySetting, toy_truth

    setting = ToySetting(
        cfg.d_hidden,
        cfg.n_features,
        l0=cfg.n_features / inverse_density,
        magnitude_low=0.0,
        magnitude_high=1.0,
    )
    directions = torch.from_numpy(W)
    truth = toy_truth(setting, seed)._replace(directions=directions)
    represented = directions.norm(dim=1) > REPRESENTED
    recovery = Recovery(truth, seed, Fit(n_steps=cfg.sae_steps, n_rows=N_ROWS), represented)
    k = max(1, round(recovery.l0))
    specs = ladder(cfg.sae_architecture, (cfg.sae_ratio,), (), (k,), (seed,))
    rows = [*recovery.saes(specs), recovery.null(cfg.sae_ratio, k)]
    where = {"inverse_density": inverse_density, "n_rows": N_ROWS}
    # k differs between seeds by rounding; the conditions do not.
    return [where | row | {"seed": seed, "target_l0": None} for row in rows]


MODEL_SCORES = ("loss_share", "dimensions_per_feature", "n_represented")
MODEL_TABLE = {
    "inverse_density": "{:g}",
    "n_represented": "{:.1f}",
    "dimensions_per_feature": "{:.3f}",
    "loss_share": "{:.3f}",
}
SAE_TABLE = {
    "inverse_density": "{:g}",
    "architecture": "{}",
    "l0": "{:.1f}",
    "fvu": "{:.3f}",
    "mmcs_truth": "{:.2f}",
    "recovered_90": "{:.2f}",
    "n_false": "{:.0f}",
    "f1": "{:.2f}",
    "auroc": "{:.2f}",
}


def main(cfg: Config) -> None:
    """Train, measure, print, write."""
    if not cfg.inverse_densities:
        raise UserError("--inverse-densities are 1 / (1 - S): give some, all 1 or more")
    path = results_path(cfg, "feature_dimensionality", [])
    n_models = len(cfg.inverse_densities) * len(cfg.seeds)

    from analysis.toy_recovery import in_processes, over_seeds
    from sparse_coding.ladder import check_architectures

    check_architectures(cfg.sae_architecture, "--sae-architecture")
    print(f"{n_models} toy models, each with SAEs; results go to {path}")
    measured, jobs = [], []
    for seed in cfg.seeds:
        models = train(cfg, seed)
        measured += model_rows(cfg, models, seed)
        W = zip(cfg.inverse_densities, models.W.numpy(), strict=True)
        # Where every feature is always on there is no firing to detect.
        jobs += [(one, density, seed, cfg) for density, one in W if density > 1]
    found = over_seeds(in_processes(recover, jobs, cfg.n_processes, "toy model"))
    of_models = over_seeds([row for row in measured if row["kind"] == "model"], MODEL_SCORES)
    size = f"{cfg.n_features} features in {cfg.d_hidden} dimensions"
    print_table(f"Toy models: {size}", of_models, MODEL_TABLE)
    print_table("Dictionaries on their hidden activations", found, SAE_TABLE)
    features = [
        row for row in measured if row["kind"] == "feature" and row["seed"] == cfg.seeds[0]
    ]
    write_results(path, cfg, [*of_models, *features, *found], "cpu")


if __name__ == "__main__":
    run_program(Config, main)

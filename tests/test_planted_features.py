"""Every architecture, trained as a user trains it, finds the features that made its data."""

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.ladder import SAESpec
from sparse_coding.sae import ARCHITECTURES
from sparse_coding.training import Trainer, TrainingConfig

D_IN, N_FEATURES, L0, RATIO = 32, 64, 3, 4
N_STEPS, BATCH = 1000, 512


@pytest.fixture(scope="module")
def planted() -> tuple[Tensor, Tensor]:
    """Unit directions, and sparse sums of them: each is on for 1 token in 21, at 0.5 to 1.5."""
    generator = torch.Generator().manual_seed(123)
    features = torch.randn(N_FEATURES, D_IN, generator=generator)
    features /= features.norm(dim=1, keepdim=True)
    size = (N_STEPS * BATCH, N_FEATURES)
    on = torch.rand(size, generator=generator) < L0 / N_FEATURES
    return features, (on * (0.5 + torch.rand(size, generator=generator))) @ features


def mean_max_cosine(features: Float[Tensor, "n d"], rows: Float[Tensor, "m d"]) -> float:
    rows = rows / rows.norm(dim=1, keepdim=True)
    return (features @ rows.T).max(dim=1).values.mean().item()


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_training_recovers_planted_features_and_the_start_does_not(architecture, planted):
    features, x = planted
    cfg = TrainingConfig(N_STEPS, BATCH, lr=3e-3, initial_l0=2.0 * L0, dead_after_tokens=20_000)
    trainer = Trainer([SAESpec(architecture, RATIO, None, float(L0), 0)], cfg, x[:8192])
    sae = trainer.lanes[0].sae
    at_start = mean_max_cosine(features, sae.W_dec.detach())
    for batch in x.split(BATCH):
        trainer.step(batch)
    assert at_start < 0.5
    assert mean_max_cosine(features, sae.W_dec.detach()) > 0.9

"""Metrics against independent float64 NumPy formulas and identities."""

import numpy as np
import pytest
import torch

from sparse_coding.dictionary import Dictionary
from sparse_coding.metrics import (
    ActivationSums,
    ReconstructionSums,
    bootstrap_weights,
    fvu,
    interval,
    mean_per_row,
)

N_ROWS, D_IN, D_SAE, N_DOCUMENTS = 57, 5, 8, 9


class Linear(Dictionary):
    """encode = relu(x W), decode = f W^T * shrink + offset: enough to have any error."""

    def __init__(self, shrink: float, offset: float) -> None:
        super().__init__()
        self.d_in, self.d_sae = D_IN, D_SAE
        self.W_dec = torch.randn(D_SAE, D_IN, generator=torch.Generator().manual_seed(3))
        self.shrink, self.offset = shrink, offset

    def encode(self, x):
        return torch.relu(x @ self.W_dec.T)

    def decode(self, f):
        return f @ self.W_dec * self.shrink + self.offset


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N_ROWS, D_IN, generator=generator) * 3 + 7
    document = torch.randint(N_DOCUMENTS, (N_ROWS,), generator=generator)
    document[:N_DOCUMENTS] = torch.arange(N_DOCUMENTS)
    return x, document


def sums(dictionary, x, document):
    reconstruction = ReconstructionSums(dictionary, N_DOCUMENTS)
    activations = ActivationSums(D_IN, N_DOCUMENTS)
    for part in (slice(0, 10), slice(10, 31), slice(31, None)):  # ragged batches
        reconstruction.add(x[part], document[part])
        activations.add(x[part], document[part])
    return reconstruction, activations


def test_fvu_equals_its_definition_with_the_datasets_own_mean(rows):
    x, document = rows
    dictionary = Linear(0.3, 2.0)
    reconstruction, activations = sums(dictionary, x, document)
    estimate = fvu(reconstruction, activations, torch.ones(2, N_DOCUMENTS).double())
    x64, x_hat = x.double().numpy(), dictionary(x).double().numpy()
    expected = ((x64 - x_hat) ** 2).sum() / ((x64 - x64.mean(axis=0)) ** 2).sum()
    assert estimate.value == pytest.approx(expected, rel=1e-6)  # x_hat itself is float32


def test_fvu_is_one_for_the_constant_mean(rows):
    x, document = rows
    mean = Linear(0.0, 0.0)
    mean.decode = lambda f: x.mean(dim=0).expand(len(f), -1)
    reconstruction, activations = sums(mean, x, document)
    estimate = fvu(reconstruction, activations, torch.ones(2, N_DOCUMENTS).double())
    assert estimate.value == pytest.approx(1.0, rel=1e-6)


def test_weighted_variance_equals_that_of_the_repeated_documents(rows):
    x, document = rows
    _, activations = sums(Linear(1.0, 0.0), x, document)
    times = torch.tensor([[2.0, 0, 1, 3, 0, 1, 1, 0, 1]], dtype=torch.float64)
    repeated = x.double().repeat_interleave(times[0, document].long(), dim=0).numpy()
    expected = ((repeated - repeated.mean(axis=0)) ** 2).sum()
    assert activations.total_variance(times).item() == pytest.approx(expected, rel=1e-12)


def test_l0_and_firing_counts_equal_a_count_by_hand(rows):
    x, document = rows
    dictionary = Linear(1.0, 0.0)
    reconstruction, activations = sums(dictionary, x, document)
    active = (x @ dictionary.W_dec.T).numpy() > 0
    l0 = mean_per_row(
        reconstruction.rows["n_active"], activations.n, torch.ones(2, N_DOCUMENTS).double()
    ).value
    assert l0 == pytest.approx(active.sum(axis=1).mean(), rel=1e-12)
    np.testing.assert_array_equal(reconstruction.n_firings.numpy(), active.sum(axis=0))


def test_bootstrap_draws_keep_the_number_of_documents():
    present = torch.ones(N_DOCUMENTS, dtype=torch.bool)
    present[2] = False
    weights = bootstrap_weights(present, 50, torch.Generator().manual_seed(0))
    assert weights.shape == (51, N_DOCUMENTS)
    assert torch.equal(weights[0], present.double())
    assert (weights.sum(dim=1) == N_DOCUMENTS - 1).all()
    assert not weights[:, 2].any()


def test_bootstrap_interval_of_a_mean_matches_its_standard_error():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(400, generator=generator, dtype=torch.float64)
    weights = bootstrap_weights(torch.ones(400, dtype=torch.bool), 2000, generator)
    mean = interval((weights @ values) / weights.sum(dim=1))
    half_width = 1.96 * values.std().item() / 400**0.5
    assert mean.value == pytest.approx(values.mean().item())
    # 2000 draws leave a few per cent of noise on a 2.5 % quantile
    assert mean.high - mean.low == pytest.approx(2 * half_width, rel=0.12)

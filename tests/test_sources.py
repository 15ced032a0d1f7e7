"""Every row once per epoch, in an order that looks random and can be taken up anywhere."""

import numpy as np
import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.hook_sources import AlignedSources
from sparse_coding.sources import ActivationSource, KeyedPermutation, TensorActivations, ahead


def numbered_rows(n: int) -> torch.Tensor:
    """(n, 3) rows, the first entry of which is the row's number."""
    return torch.arange(n, dtype=torch.float32)[:, None] * torch.tensor([1.0, 2.0, -1.0])


def delivered_rows(source: TensorActivations, n_batches: int) -> np.ndarray:
    batches = [batch for _, batch in zip(range(n_batches), source, strict=False)]
    return torch.cat(batches)[:, 0].long().numpy()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 17, 1000, 1024, 1025])
def test_a_permutation_is_a_bijection(n):
    for key in range(20):
        images = KeyedPermutation(n, (key, 7))(np.arange(n))
        assert np.array_equal(np.sort(images), np.arange(n))


def test_a_permutation_sends_an_index_to_the_same_place_in_any_company():
    permutation = KeyedPermutation(1025, (3, 1))
    together = permutation(np.arange(1025))
    alone = [permutation(np.array([index])).item() for index in (0, 511, 1024)]
    assert alone == together[[0, 511, 1024]].tolist()


def test_a_permutation_of_a_trillion_elements_is_computed_in_place():
    images = KeyedPermutation(10**12, (0, 0))(np.arange(10**12 - 1000, 10**12))
    assert len(np.unique(images)) == 1000
    assert images.min() >= 0
    assert images.max() < 10**12
    assert images.std() == pytest.approx(10**12 / 12**0.5, rel=0.1)  # that of uniform draws


@pytest.mark.parametrize("other", [(3, 2), (4, 1), (-3, 1), (1, 3), (3 + 2**32, 1)])
def test_another_key_gives_an_unrelated_permutation(other):
    one = KeyedPermutation(1000, (3, 1))(np.arange(1000))
    two = KeyedPermutation(1000, other)(np.arange(1000))
    # Two independent permutations agree in a Poisson(1) number of places: P(> 7) is 1e-5.
    assert (one == two).sum() <= 7


def images_over_keys(n: int, index: int, n_keys: int) -> np.ndarray:
    return np.array([KeyedPermutation(n, (key, 0))(np.array([index]))[0] for key in range(n_keys)])


@pytest.mark.parametrize(("n", "index"), [(3, 0), (10, 9), (37, 20)])
def test_over_keys_an_element_is_equally_likely_everywhere(n, index):
    n_keys = 200 * n
    counts = np.bincount(images_over_keys(n, index, n_keys), minlength=n)
    chi_square = ((counts - 200) ** 2 / 200).sum()
    # Chi-square with n - 1 degrees of freedom: mean n - 1, variance 2 (n - 1).
    assert chi_square < (n - 1) + 5 * (2 * (n - 1)) ** 0.5


@pytest.mark.parametrize("n", [1000, 2**16, 100_003])
@pytest.mark.parametrize("lag", [1, 2, 16, 32, 512])
def test_near_elements_do_not_land_near_each_other(n, lag):
    images = KeyedPermutation(n, (11, 0))(np.arange(n)) / n
    correlation = np.corrcoef(images[:-lag], images[lag:])[0, 1]
    assert abs(correlation) < 4.5 / (n - lag) ** 0.5  # its standard deviation is n^-1/2


def test_over_keys_an_ordered_pair_is_equally_likely_everywhere():
    n, n_keys = 12, 10_000
    pairs = np.array([KeyedPermutation(n, (key, 1))(np.array([4, 5])) for key in range(n_keys)])
    counts = np.bincount(pairs[:, 0] * n + pairs[:, 1], minlength=n * n).reshape(n, n)
    off_diagonal = counts[~np.eye(n, dtype=bool)]
    assert counts.trace() == 0
    expected, freedom = n_keys / (n * (n - 1)), n * (n - 1) - 1
    assert ((off_diagonal - expected) ** 2 / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5


def test_each_row_comes_once_per_epoch():
    source = TensorActivations(numbered_rows(104), batch_tokens=13, seed=5)
    rows = delivered_rows(source, 8 * 3).reshape(3, 104)
    assert np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(104), (3, 1)))


def test_epochs_have_different_orders():
    source = TensorActivations(numbered_rows(104), batch_tokens=13, seed=5)
    first, second = delivered_rows(source, 16).reshape(2, 104)
    assert (first == second).sum() < 9  # Poisson(1)


def test_the_last_batch_of_an_epoch_is_filled_from_the_next():
    source = TensorActivations(numbered_rows(103), batch_tokens=13, seed=5)
    rows = delivered_rows(source, 103)
    for epoch in rows.reshape(13, 103):
        assert np.array_equal(np.sort(epoch), np.arange(103))


def test_a_batch_may_be_larger_than_the_data():
    source = TensorActivations(numbered_rows(5), batch_tokens=20, seed=5)
    assert np.bincount(delivered_rows(source, 1)).tolist() == [4] * 5


def test_batches_are_full_and_end_with_the_epochs():
    source = TensorActivations(numbered_rows(103), batch_tokens=20, seed=5, n_epochs=2)
    assert [len(batch) for batch in source] == [20] * 10
    assert source.n_batches == 10


def test_sources_of_one_seed_agree_row_by_row_and_of_two_do_not():
    one, same = (TensorActivations(numbered_rows(104), 13, seed=5) for _ in range(2))
    other = TensorActivations(numbered_rows(104), 13, seed=6)
    rows = delivered_rows(one, 8)
    assert np.array_equal(rows, delivered_rows(same, 8))
    assert (rows == delivered_rows(other, 8)).sum() < 9


def test_iterating_again_goes_on_where_the_last_loop_stopped():
    unbroken = delivered_rows(TensorActivations(numbered_rows(50), 7, seed=1), 10)
    source = TensorActivations(numbered_rows(50), 7, seed=1)
    pieces = [delivered_rows(source, n_batches) for n_batches in (3, 5, 2)]
    assert np.array_equal(np.concatenate(pieces), unbroken)


class BreaksOnce(TensorActivations):
    """Cannot be read at batch 4, the first time."""

    is_broken = True

    def load(self, numbers):
        for number, batch in zip(numbers, super().load(numbers), strict=False):
            if number == 4 and self.is_broken:
                self.is_broken = False
                raise UserError("the shard cannot be read")
            yield batch


@pytest.mark.parametrize("is_saved", [True, False])
def test_an_error_in_one_of_several_sources_moves_none_of_them(is_saved):
    unbroken = delivered_rows(TensorActivations(numbered_rows(50), 7, seed=1, n_epochs=1), 7)
    sources = {
        name: kind(numbered_rows(50), 7, seed=1, n_epochs=1)
        for name, kind in (("a", TensorActivations), ("b", BreaksOnce), ("c", TensorActivations))
    }
    source, found = AlignedSources(sources), []
    with pytest.raises(UserError, match="cannot be read"):
        found.extend(source)
    assert len(found) == source.state_dict()["n_delivered"] == 4
    if is_saved:
        source.load_state_dict(source.state_dict())
    found.extend(source)
    for name in sources:
        rows = torch.cat([batch[name] for batch in found])[:, 0].long().numpy()
        assert np.array_equal(rows, unbroken)


@pytest.mark.parametrize(("n_rows", "batch_tokens"), [(51, 7), (50, 8)])
def test_a_position_in_other_data_is_refused(n_rows, batch_tokens):
    state = TensorActivations(numbered_rows(50), 7, seed=1).state_dict()
    with pytest.raises(UserError, match="the interrupted run had"):
        TensorActivations(numbered_rows(n_rows), batch_tokens, seed=1).load_state_dict(state)


@pytest.mark.parametrize(
    ("n_rows", "batch_tokens", "n_epochs"), [(0, 7, None), (50, 0, None), (50, 101, 2), (50, 7, 0)]
)
def test_data_that_do_not_fill_a_batch_are_refused(n_rows, batch_tokens, n_epochs):
    with pytest.raises(UserError, match="batch"):
        TensorActivations(numbered_rows(n_rows), batch_tokens, 0, n_epochs)


def test_float16_rows_are_delivered_in_float32():
    batch = next(iter(TensorActivations(numbered_rows(50).half(), 7, seed=1)))
    assert batch.dtype == torch.float32


def test_the_sources_have_the_protocol():
    assert isinstance(TensorActivations(numbered_rows(50), 7, seed=1), ActivationSource)


def test_ahead_keeps_the_order_and_goes_no_further_than_it_may():
    done = []
    results = ahead((done.append(i) or i * i for i in range(9)), n=2)
    assert next(results) == 0
    assert len(done) <= 3
    assert list(results) == [i * i for i in range(1, 9)]
    assert done == list(range(9))


def test_ahead_raises_an_error_where_it_happened_and_stops_when_closed():
    done = []

    def job(i):
        if i == 3:
            raise OSError("the third is broken")
        done.append(i)
        return i

    results = ahead(map(job, range(9)), n=1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the third"):
        next(results)
    done.clear()
    results = ahead(map(job, range(4, 10**6)), n=2)
    next(results)
    results.close()
    assert len(done) <= 3

"""The controller on plants whose answer is known, and what the committed benchmark says of it."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from sparse_coding.l0_controller import L0Controller
from sparse_coding.sae import ARCHITECTURES

ROOT = Path(__file__).parents[1]
TARGET, FIRST, WARMUP_STEPS = 20.0, 60.0, 15


def steered(n_steps: int, lag: float, drift: float, level: float = 600.0) -> list[float]:
    """L0 / target in each step of a run on a plant of the first order.

    L0 goes to level * l1_coeff^-1.5 with a time constant of `lag` steps, more slowly in the first
    few, as in the warmup of a learning rate; the level falls by `drift` e-folds over the run, as
    the coefficient that keeps an L0 does while an SAE improves.
    """
    controller = L0Controller(TARGET, n_steps, torch.device("cpu"))
    log_l0, found = math.log(FIRST), []
    for n in range(n_steps):
        found.append(math.exp(log_l0) / TARGET)
        controller.update(torch.tensor(log_l0).exp())
        goal = math.log(level) - drift * n / n_steps - 1.5 * controller.l1_coeff().log().item()
        log_l0 += (goal - log_l0) / lag * min(1, (n + 1) / WARMUP_STEPS)
    return found


# In 300 steps a lag of 40 leaves an L0 too little time to settle.
@pytest.mark.parametrize(("n_steps", "lag"), [(300, 5), (300, 20), (2000, 5), (2000, 40)])
@pytest.mark.parametrize("drift", [-6.0, 0.0, 6.0])
def test_a_plant_that_drifts_ends_at_the_target(n_steps, lag, drift):
    # p_anneal's penalty moves by some four e-folds, which is 6 of L0 at an exponent of 1.5.
    assert steered(n_steps, lag, drift)[-20:] == pytest.approx([1.0] * 20, abs=0.03)


@pytest.mark.parametrize(("first", "expected"), [(10, 0.5), (20, 1), (40, 1), (80, math.e / 4)])
def test_it_begins_at_one_or_below(first, expected):
    # The error's own factor, at most e, over first / target where that is above 1.
    controller = L0Controller(TARGET, 300, torch.device("cpu"))
    controller.integral_gain = 0.0
    controller.update(torch.tensor(float(first)))
    assert controller.l1_coeff().item() == pytest.approx(expected, rel=1e-5)
    controller.update(torch.tensor(float(first)))  # once only
    assert controller.l1_coeff().item() == pytest.approx(expected, rel=1e-5)


def test_a_restored_controller_goes_on_as_the_unbroken_one():
    one, other = (L0Controller(TARGET, 50, torch.device("cpu")) for _ in range(2))
    values = torch.linspace(90, 30, 50)
    for l0 in values[:20]:
        one.update(l0)
    for name, value in other.tensors().items():
        value.copy_(one.tensors()[name])
    for l0 in values[20:]:
        one.update(l0)
        other.update(l0)
    assert torch.equal(one.l1_coeff(), other.l1_coeff())
    assert all(torch.equal(value, other.tensors()[key]) for key, value in one.tensors().items())


def committed():
    """The benchmark's rows of classes whose L0 is steered, and the README on one line."""
    path = ROOT / "benchmarks" / "results" / "l0_targets.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    rows = [row for row in rows if not ARCHITECTURES[row["architecture"]].sparsity_is_chosen]
    return rows, " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_l0_of_the_committed_runs_is_within_what_the_readme_says():
    rows, readme = committed()
    penalised = {name for name, cls in ARCHITECTURES.items() if not cls.sparsity_is_chosen}

    def shares(data, n_steps, key):
        """Per cent by which L0 is above its target, ascending."""
        of = {
            (row["architecture"], row["target_l0"]): 100 * (row[key] / row["target_l0"] - 1)
            for row in rows
            if (row["data"], row["n_steps"]) == (data, n_steps)
        }
        assert of.keys() == set(itertools.product(penalised, (20.0, 40.0, 80.0)))
        return sorted(of.values())

    def n_kept(data, n_steps):
        return sum(abs(share) <= 5 for share in shares(data, n_steps, "l0_train"))

    assert [n_kept("lm", 2000), n_kept("lm", 300)] == [18, 14]
    assert [n_kept("toy", 2000), n_kept("toy", 300)] == [16, 6]
    low, *_, high = shares("lm", 2000, "l0_train")
    assert (
        f"all 18 SAEs keep it after 2,000 steps, {-low:.1f} % under to {high:.1f} % over" in readme
    )
    low, *_, high = shares("lm", 300, "l0_train")
    assert f"14 do, {-low:.1f} % under to {high:.1f} % over" in readme
    low, *_, high = shares("lm", 2000, "l0_heldout")
    less, *_, more = shares("lm", 300, "l0_heldout")
    heldout = f"{low:.1f} to {high:.1f} % above the target after 2,000 steps (300: {less:.1f} to"
    assert f"{heldout} {more:.1f} %)" in readme
    worst, second, *_ = shares("toy", 2000, "l0_train")
    assert f"at 80, {-worst:.1f} and {-second:.1f} % under" in readme


def test_unseen_rows_of_the_text_trained_on_have_the_l0_that_the_readme_says():
    rows, readme = committed()
    largest = max(
        abs(row["l0_last"] / row["l0_train"] - 1)
        for row in rows
        if (row["data"], row["n_steps"]) == ("lm", 300)
    )
    assert f"(the last 50 of 300 steps) have an L0 within {100 * largest:.1f} %" in readme

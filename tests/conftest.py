"""Settings for all tests: no network; a finished run."""

import os

import pytest
from tiny_runs import command, run_in, save_place

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

# Minutes each. Begun first, so that no worker is left with one of them when the others are done.
LONGEST = (
    "distributed", "easy_training_base", "faults", "gpu_step", "transcoder", "arguments",
    "measure_polysemanticity", "kernels", "compare_baselines", "training", "contract",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))  # stable within a module


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny language model and a text."""
    folder = tmp_path_factory.mktemp("place")
    save_place(folder)
    return folder


@pytest.fixture(scope="session")
def finished(place):
    """The entry script's process, and its run folder: ratios 1 and 4, seeds 0 and 1."""
    done = run_in(place, command("--name", "whole", "--seed", "0", "1"))
    assert done.returncode == 0, done.stderr
    return done, place / "outputs/runs/whole"

"""The memory of a method's training step, measured in a process of its own."""

import gc
import importlib.util
import multiprocessing
from pathlib import Path

from benchmarks.batches import Case, sparse_sae, still_task
from benchmarks.peers import METHODS

WARM_UP_WIDTH = 64
N_STEPS = 3


def measure_peak_mb(method: str, case: Case) -> float | None:
    """Peak resident MB (10^6 bytes) of parameters, optimizer, batch and steps; Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("forkserver")
    names = ("benchmarks.batches", *filter(importlib.util.find_spec, ("sae_lens", "numba")))
    context.set_forkserver_preload(list(names))  # once for all children
    with context.Pool(1) as pool:
        return pool.apply(_peak_mb, (method, case))


def _peak_mb(method: str, case: Case) -> float:
    # Every library imported, every kernel loaded, at the density of the case itself
    shrunk = case._replace(
        d_in=WARM_UP_WIDTH, l0=max(1.0, case.l0 * WARM_UP_WIDTH / case.d_in), activations="random"
    )
    _run(method, shrunk)
    gc.collect()
    before = _status("VmRSS")
    return (_run(method, case) - before) / 1e6


def _run(method: str, case: Case) -> int:
    """Peak resident bytes while a method of equal parameters takes its steps."""
    task, x = still_task(case)
    trained = METHODS[method].make(task)
    start = sparse_sae(task, x, case.l0)
    trained.load(start)
    del start
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    for _ in range(N_STEPS):
        trained.step(x)
    return _status("VmHWM")


def _status(field: str) -> int:
    """A size in bytes of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))

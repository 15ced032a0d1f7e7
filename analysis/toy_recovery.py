"""Fitting dictionaries to toy activations and scoring them against the truth, over seeds.

Shared by `recover_toy_features` and `toy_model_superposition`. No command line and no files here.
"""

import multiprocessing
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from analysis.program import Row
from sparse_coding.baselines import PerTokenTopK, covariance, ica, nmf, pca
from sparse_coding.dictionary import Dictionary
from sparse_coding.ladder import SAESpec
from sparse_coding.metrics import ActivationSums, ReconstructionSums, columns, t_interval
from sparse_coding.sae import TopKSAE
from sparse_coding.toy import ToyActivations, ToyTruth, assignment, detection, match_truth
from sparse_coding.training import Trainer, TrainingConfig

HELDOUT = 1_000_000  # added to a seed: a stream over the same truth that nothing trained on
N_NMF = 4096  # rows for NMF, which is slow
N_SAMPLE = 16_384  # rows for the units and the start of training, and for PCA and ICA


@dataclass(frozen=True)
class Fit:
    """How long dictionaries are trained and on how many fresh rows they are scored."""

    n_steps: int = 1000
    batch_tokens: int = 512
    lr: float = 3e-3
    n_rows: int = 8192
    n_null_draws: int = 10


class Recovery:
    """One truth and one seed: training rows, fresh rows, and the scores of what was fitted.

    `scored` (bool, n_features) says which true features count; by default all.
    """

    def __init__(self, truth: ToyTruth, seed: int, fit: Fit, scored: Tensor | None = None) -> None:
        self.truth, self.seed, self.fit = truth, seed, fit
        self.source = ToyActivations(truth, fit.batch_tokens, seed)
        (self.sample, _), (self.x, a) = (
            ToyActivations(truth, n, HELDOUT + seed).batch(i)
            for i, n in enumerate((N_SAMPLE, fit.n_rows))
        )
        if scored is None:
            scored = torch.ones(len(truth.directions), dtype=torch.bool)
        self.directions, self.a = truth.directions[scored], a[:, scored]
        # What an SAE's L0 is steered to: the scored features alone could be reconstructed.
        self.l0 = (self.a > 0).double().sum(dim=1).mean().item()

    def saes(self, specs: Sequence[SAESpec]) -> Iterator[Row]:
        """Every SAE of the ladder, trained in one pass over the same batches."""
        fit = self.fit
        dead_after = min(20_000, fit.n_steps * fit.batch_tokens // 10)
        start = {"initial_l0": 2 * self.l0, "dead_after_tokens": dead_after}
        cfg = TrainingConfig(fit.n_steps, fit.batch_tokens, fit.lr, **start)
        trainer = Trainer(specs, cfg, self.sample)
        for x in islice(self.source, fit.n_steps):
            trainer.step(x)
        trainer.metrics()  # refuses what has diverged
        for spec, sae in zip(specs, trainer.finished_saes().values(), strict=True):
            yield {
                "kind": "sae",
                "architecture": spec.architecture,
                "ratio": spec.ratio,
                "l1_coeff": spec.l1_coeff,
                "target_l0": spec.target_l0,
                "n_tokens_trained": fit.n_steps * fit.batch_tokens,
            } | self.scores(sae)

    def baselines(self, k: int) -> Iterator[Row]:
        """PCA, ICA and NMF (as many parts as true features): each row's k largest features."""
        found = {
            "pca": (pca(covariance([self.sample], N_SAMPLE)), N_SAMPLE),
            "ica": (ica(self.sample, self.seed).dictionary, N_SAMPLE),
            "nmf": (nmf(self.sample[:N_NMF], len(self.directions), self.seed), N_NMF),
        }
        for name, (dictionary, n_rows) in found.items():
            yield {
                "kind": "baseline",
                "architecture": name,
                "ratio": dictionary.d_sae // dictionary.d_in,
                "l1_coeff": None,
                "target_l0": k,
                "n_tokens_trained": n_rows,
            } | self.scores(PerTokenTopK(dictionary, k))

    def null(self, ratio: int, k: int) -> Row:
        """Means over draws of random dictionaries: TopK SAEs that were never trained."""
        generator = torch.Generator().manual_seed(self.seed)
        draws, d_in = [], self.x.shape[1]
        for _ in range(self.fit.n_null_draws):
            random = TopKSAE(d_in, ratio * d_in, generator, k)
            random.initialise_centre(self.sample.mean(dim=0))
            draws.append(self.scores(random))
        return {
            "kind": "null",
            "architecture": "random",
            "ratio": ratio,
            "l1_coeff": None,
            "target_l0": k,
            "n_tokens_trained": 0,
        } | {key: fmean(draw[key] for draw in draws) for key in draws[0]}

    @torch.no_grad()
    def scores(self, dictionary: Dictionary) -> Row:
        """Everything that is measured of one dictionary, on the fresh rows."""
        inputs, sums = ActivationSums(dictionary.d_in, 1), ReconstructionSums(dictionary, 1)
        document = torch.zeros(len(self.x), dtype=torch.int64)
        inputs.add(self.x, document)
        sums.add(self.x, document)
        alive = sums.n_firings > 0
        rows, f = dictionary.W_dec[alive], dictionary.encode(self.x)[:, alive]
        features, partners = assignment(self.directions, rows)
        matched = torch.zeros_like(self.a)
        matched[:, features] = f[:, partners]
        variance = inputs.total_variance(torch.ones(1, 1, dtype=torch.float64))
        return {
            "l0": (f > 0).double().sum(dim=1).mean().item(),
            "fvu": (sums.squared_error.sum() / variance).item() * 2,
            "n_alive": int(alive.sum()),
            **match_truth(self.directions, rows)._asdict(),
            **detection(matched, self.a)._asdict(),
        }


SCORES = (
    "l0", "fvu", "n_alive", "mmcs_truth", "mmcs_dictionary", "recovered_70", "recovered_90",
    "n_false", "hungarian", "f1", "auroc",
)  # fmt: skip


def over_seeds(rows: Sequence[Row], scores: Sequence[str] = SCORES) -> list[Row]:
    """One row per condition: means with 95 % intervals of Student's t over its seeds.

    A condition is all that rows say besides `seed` and the scores; without a second seed the
    bounds are None.
    """
    conditions: dict[Hashable, list[Row]] = {}
    for row in rows:
        key = tuple((k, v) for k, v in row.items() if k not in (*scores, "seed"))
        conditions.setdefault(key, []).append(row)
    return [
        dict(key)
        | {name: v for s in scores for name, v in estimate(s, [r[s] for r in of]).items()}
        for key, of in conditions.items()
    ]


def estimate(name: str, values: Sequence[float]) -> Row:
    """`name`, `name_low`, `name_high`, `name_n`: a mean and its interval, None for one seed."""
    if len(values) > 1:
        return columns(name, t_interval(values)) | {f"{name}_n": len(values)}
    return {name: values[0], f"{name}_low": None, f"{name}_high": None, f"{name}_n": 1}


def in_processes(
    function: Callable[..., list[Row]], jobs: Sequence[tuple], n_processes: int, unit: str
) -> list[Row]:
    """The rows of `function(*job)` for every job, in the jobs' order, with a progress bar.

    Small models keep one core busy each; more processes than jobs are not started.
    """
    n_processes = min(n_processes, len(jobs))
    if n_processes == 1:
        return [row for job in tqdm(jobs, unit=unit) for row in function(*job)]
    spawn = multiprocessing.get_context("spawn")  # forked threads of torch would hang
    with ProcessPoolExecutor(n_processes, spawn, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        for done in tqdm(as_completed(futures), total=len(jobs), unit=unit):
            done.result()  # an error ends the program at once
    return [row for future in futures for row in future.result()]

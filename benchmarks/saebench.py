"""Do our held-out numbers agree with SAEBench's core evaluation, and which is faster?

    python -m benchmarks.saebench

About ten minutes on two cores, in the environment that requirements-saebench.txt describes. Both
measure the same dictionaries on the same contexts of one language model in float32. The contexts
hold no special token but the first, which neither counts. Rows of `what`:

- metric: a quantity of ours and of theirs. `agrees` is whether the definitions are the same; where
  not, `why` says how they differ, and where their per-token values allow it, a second row compares
  them over our positions or by our formula.
- speed: seconds of each on the same contexts, in turn. Ours shares the clean and the ablated
  passes among the dictionaries, and the blocks before the hook among all passes; it also replaces
  the layer by its mean and bootstraps every interval, which theirs does not.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from analysis.program import MeasureConfig, Row
from analysis.subjects import Material, load_subjects
from benchmarks.peers import peer_versions
from sparse_coding.config import as_json, environment
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.evaluation import Evaluation, evaluate
from sparse_coding.models import LanguageModel
from sparse_coding.settings import Count, OutputFile, read_settings
from sparse_coding.storage import write_json
from sparse_coding.text import TokenBatch


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    dictionaries: tuple[str, ...] = ("pretrained/smollm2-135m-l12-small",)
    """Dictionaries of one hook, as in `python -m analysis.evaluate`. The metrics are compared on
    the first; the time is that of all."""
    n_contexts: Count = 64
    """Contexts of 128 tokens; both use all of them for every metric."""
    batch_contexts: Count = 16
    """Contexts that the language model sees at once, in both."""
    n_rounds: Count = 3
    """How often each is timed."""
    out: OutputFile = Path("benchmarks/results/saebench.json")
    """Results file, replaced at the end."""


SAME = "same definition"
# ours, theirs, whether the definitions agree and, if not, how they differ
PAIRS = (
    ("l0", "l0", True, SAME),
    ("l2_ratio", "l2_ratio", True, SAME),
    ("cosine", "cossim", True, SAME),
    ("ce_clean", "ce_loss_without_sae", True, SAME),
    ("ce_sae", "ce_loss_with_sae", True, SAME),
    ("reconstruction_bias", "relative_reconstruction_bias", False,
     "theirs is a mean over batches of a batch's ratio, ours one ratio of sums"),
    ("l1", "l1", False, "ours weighs activations by the norms of the decoder's rows"),
    ("mse", "mse", False,
     "theirs divides the summed error by the batch's tokens and then averages over tokens again"),
    ("explained_variance", "explained_variance", False,
     "theirs subtracts the squared mean of squares: a variance about something near zero"),
    ("explained_variance", "explained_variance_legacy", False,
     "theirs is a mean over tokens of each token's ratio, about the batch's mean"),
    ("kl", "kl_div_with_sae", False, "theirs counts the last position too, which has no target"),
    ("ce_zero", "ce_loss_with_ablation", False,
     "theirs also zeroes the first position, the attention sink"),
    ("ce_recovered", "ce_loss_score", False, "follows from the zero-ablation"),
)  # fmt: skip


class Contexts:
    """What SAEBench asks of an activations store: batches of tokens, in order."""

    context_size: int

    def __init__(self, tokens: Int[Tensor, "n position"]) -> None:
        self.tokens, self.context_size = tokens, tokens.shape[1]
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self.n_given = 0

    def get_batch_tokens(self, n: int) -> Int[Tensor, "n position"]:
        self.n_given += n
        return self.tokens[self.n_given - n : self.n_given]


def as_their_sae(dictionary: Dictionary, hook_name: str) -> Any:
    """Our dictionary with the attributes that SAEBench reads."""
    layer = int(hook_name.split(".")[1])
    cfg = SimpleNamespace(
        hook_name=hook_name, hook_layer=layer, hook_head_index=None, d_sae=dictionary.d_sae
    )
    return SimpleNamespace(
        cfg=cfg, device=dictionary.W_dec.device, encode=dictionary.encode, decode=dictionary.decode
    )


def theirs(
    cfg: Config, lm: LanguageModel, sae: Any, tokens: Int[Tensor, "n position"]
) -> dict[str, float]:
    """SAEBench's core metrics, by its own `run_evals`."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals

    n_batches = len(tokens) // cfg.batch_contexts
    settings = CoreEvalConfig(
        batch_size_prompts=cfg.batch_contexts,
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        exclude_special_tokens_from_reconstruction=True,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )
    first = int(tokens[0, 0])
    groups, _ = run_evals(sae, Contexts(tokens), lm.model, settings, ignore_tokens={first})
    return {key: value for group in groups.values() for key, value in group.items()}


def their_kl_over_our_positions(
    cfg: Config, lm: LanguageModel, sae: Any, tokens: Int[Tensor, "n position"]
) -> float:
    """Mean of SAEBench's per-token divergences over positions 1 .. last - 1."""
    from sae_bench.evals.core.main import get_recons_loss

    found = []
    for part in tokens.split(cfg.batch_contexts):
        values = get_recons_loss(sae, lm.model, part, None, True, True, {int(part[0, 0])}, True)
        found.append(values["kl_div_with_sae"][:, 1:-1])
    return torch.cat(found).mean().item()


def ours(
    cfg: Config, lm: LanguageModel, dictionaries: list[Dictionary], hook: str, tokens: Tensor
) -> dict[str, Any]:
    """Our numbers of the first dictionary; every context counts as a document."""
    batches = []
    for start in range(0, len(tokens), cfg.batch_contexts):
        part = tokens[start : start + cfg.batch_contexts]
        document = (start + torch.arange(len(part)))[:, None].expand_as(part)
        valid = torch.ones_like(part, dtype=torch.bool)
        valid[:, 0] = False
        batches.append(TokenBatch(part, document, valid))
    evaluation = Evaluation(lm, hook, batches, max_norm=math.inf)
    mean = torch.zeros(dictionaries[0].d_in)  # what mean-ablation writes: not compared
    named = {str(i): dictionary for i, dictionary in enumerate(dictionaries)}
    row = evaluate(evaluation, named, mean, n_tokens_ce=tokens.numel())["0"].row
    return row | {"explained_variance": 1 - row["fvu"]}


def metric_rows(
    mine: dict[str, Any], their: dict[str, float], same_kl: float, n_tokens_of_a_batch: int
) -> list[Row]:
    """Every pair of quantities, and those of theirs that can be brought to our definition."""
    n = {"n_tokens": mine["n_tokens_eval"]}
    rows = [
        {"what": "metric", "ours": a, "theirs": b, "value_ours": mine[a], "value_theirs": their[b],
         "agrees": agrees, "why": why, **n}
        for a, b, agrees, why in PAIRS
    ]  # fmt: skip
    by_our_formula = {
        "kl": ("kl_div_with_sae over our positions", same_kl),
        "mse": ("mse times the tokens of a batch", their["mse"] * n_tokens_of_a_batch),
    }
    rows += [
        {"what": "metric", "ours": key, "theirs": name, "value_ours": mine[key],
         "value_theirs": value, "agrees": True, "why": SAME, **n}
        for key, (name, value) in by_our_formula.items()
    ]  # fmt: skip
    for row in rows:
        row["relative_difference"] = row["value_ours"] / row["value_theirs"] - 1
    return rows


def without_special_tokens(material: Material, n: int) -> Int[Tensor, "n position"]:
    """The first `n` held-out contexts in which only the first position does not count."""
    found: list[Tensor] = []
    for batch in material.token_batches("heldout"):
        found += batch.tokens[batch.valid[:, 1:].all(dim=1) & ~batch.valid[:, 0]]
        if len(found) >= n:
            return torch.stack(found[:n])
    raise UserError(f"--n-contexts {n}: the held-out text has {len(found)} contexts to compare on")


def seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """How long it took, and what it returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> None:
    report_user_errors_in_one_line()
    cfg = read_settings(Config, description=__doc__)
    if cfg.n_contexts % cfg.batch_contexts:
        raise UserError("--n-contexts must be a multiple of --batch-contexts")
    subjects = load_subjects(cfg.dictionaries, MeasureConfig(dtype="float32", bos="always"))
    origin, hook = subjects[0].origin, subjects[0].origin.hook_name
    material = Material(origin, "cpu")
    material.check(subjects)
    tokens = without_special_tokens(material, cfg.n_contexts)
    with torch.no_grad():
        rows = compare(cfg, material.lm, [s.dictionary for s in subjects], hook, tokens)
    for row in rows:
        print({key: value for key, value in row.items() if key not in ("what", "s_all")})
    about = environment("cpu") | {"n_threads": torch.get_num_threads(), "peers": peer_versions()}
    print(write_json(cfg.out, {"config": as_json(cfg), "environment": about, "rows": rows}))


def compare(
    cfg: Config, lm: LanguageModel, dictionaries: list[Dictionary], hook: str, tokens: Tensor
) -> list[Row]:
    """All rows; the two take turns."""
    saes = [as_their_sae(dictionary, hook) for dictionary in dictionaries]
    seconds: dict[str, list[float]] = {"ours": [], "sae_bench": []}
    for _ in range(cfg.n_rounds):
        s, mine = seconds_of(lambda: ours(cfg, lm, dictionaries, hook, tokens))
        seconds["ours"].append(s)
        s, their = seconds_of(lambda: [theirs(cfg, lm, sae, tokens) for sae in saes])
        seconds["sae_bench"].append(s)
        print({name: round(values[-1], 1) for name, values in seconds.items()})
    same_kl = their_kl_over_our_positions(cfg, lm, saes[0], tokens)
    rows = metric_rows(mine, their[0], same_kl, cfg.batch_contexts * (tokens.shape[1] - 1))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    n = tokens.numel()
    return rows + [
        {"what": "speed", "method": name, "s": s, "s_all": seconds[name], "n_tokens": n,
         "n_dictionaries": len(saes), "tokens_per_s": n / s,
         "ours_is_faster_by": s / medians["ours"]}
        for name, s in medians.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()

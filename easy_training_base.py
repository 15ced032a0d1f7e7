# %% [markdown]
# # Sparse autoencoders of ratios 1:1 to 1:32 on a language model's residual stream
#
# One pass over a transformer's activations trains every autoencoder of a ladder: all ratios x
# sparsities x seeds. As a script this reads the command line; as a notebook, the demo preset.
#
#     python easy_training_base.py                                    # demo: minutes on two cores
#     python easy_training_base.py --preset offline                   # an evening on a laptop
#     python easy_training_base.py --preset pythia-70m                # a CUDA box with the hub
#     python easy_training_base.py --lm gpt2 --hook-name blocks.6.hook_resid_post --ratios 8 32
#     torchrun --nproc-per-node=4 easy_training_base.py               # divided among processes
#     python easy_training_base.py --help                             # every setting

# %%
from sparse_coding.config import hooks_of, read_config
from sparse_coding.errors import report_user_errors_in_one_line

report_user_errors_in_one_line()
cfg = read_config()

# %% [markdown]
# ## The plan
# What is wrong in the settings is said here, before anything is harvested or overwritten.
# Documents, not pieces of them, are split into training and held-out text.

# %%
import itertools
import sys

from sparse_coding.cache import CachedActivations
from sparse_coding.checkpoint import StopSignal, load_run, save_run, saved_at_an_error
from sparse_coding.distributed import make_trainer, share_of_batches
from sparse_coding.evaluation import Evaluation, evaluate, take_tokens
from sparse_coding.formats import save_sae
from sparse_coding.harvest import Rows, harvest_to_cache, norm_limit
from sparse_coding.hook_sources import AlignedSources, StreamingSources, side_by_side, take_sample
from sparse_coding.ladder import ladder, places
from sparse_coding.metrics import density_histogram
from sparse_coding.models import check_hook, check_target_hook, load_lm
from sparse_coding.processes import leave_to_first, open_processes
from sparse_coding.reporting import (
    Reporter,
    print_card,
    print_features,
    print_plan,
    print_results,
)
from sparse_coding.runs import Run, cache_settings, run_settings
from sparse_coding.splice import Target
from sparse_coding.text import contexts, load_text, starts_with_bos
from sparse_coding.training import training_config

target = cfg.target_hook_name  # of transcoders, else None
grid = cfg.architecture, cfg.ratios, cfg.l1_coeffs, cfg.target_l0, cfg.seed
specs = ladder(*grid, are_transcoders=bool(target), n_hooks=len(cfg.hook_name))
print_plan(cfg, specs)
if cfg.plan:
    sys.exit()
processes = open_processes(cfg.device)  # those that torchrun started, each running this script
with processes.first_before_others():  # what is downloaded or converted, is so once
    lm = load_lm(cfg.lm, device=cfg.device, dtype=cfg.dtype)
    for hook_name in cfg.hook_name:
        check_hook(lm, hook_name)
    if target:
        check_target_hook(lm, cfg.hook_name, target)
    text = load_text(
        cfg.text,
        text_field=cfg.text_field,
        skip_broken_lines=cfg.skip_broken_lines,
        heldout_fraction=cfg.heldout_fraction,
    )
    print_card(text, lm, cfg.output / "cache")
settings = run_settings(cfg, lm=lm.identity, text=text.fingerprint_fields())
run = Run(cfg, settings, str(lm.device), processes)


def token_batches(split):
    """Contexts of one split of the text: tokens, their documents, and which positions count."""
    return contexts(
        text.documents(split),
        lm.tokenizer,
        context_length=cfg.context_length,
        bos=cfg.bos,
        pack=cfg.pack,
    )


# %% [markdown]
# ## Harvest
# The model runs up to the last hook and never computes logits. First positions, special tokens and
# the few attention sinks with a huge norm are left out. Cached activations are shuffled globally:
# row i of epoch e is the i-th value of a keyed permutation, so a place in the data is one integer.

# %%
for split in ("train", "heldout"):  # what fills no context is refused before anything is written
    next(token_batches(split))
run.start()
stop = StopSignal(processes)  # from here on SIGINT and SIGTERM end the run, to be resumed
rows = Rows(lm, lambda: token_batches("train"), cfg.harvested_hooks, processes)
if cfg.cache:
    settings = cache_settings(cfg, lm.identity, text.fingerprint_fields())
    cache = harvest_to_cache(rows, cfg.output / "cache", settings, cfg.n_tokens, cfg.cache_dtype)
    batching = {"batch_tokens": cfg.batch_tokens, "seed": cfg.data_seed, "n_epochs": cfg.n_epochs}
    sources = AlignedSources(
        {
            hook_name: CachedActivations(cache, hook_name, **batching, device=lm.device)
            for hook_name in cfg.harvested_hooks
        }
    )
    n_steps = sources.n_batches
else:
    window = cfg.batch_tokens, cfg.data_seed, cfg.buffer_tokens
    sources = StreamingSources(rows, *window, is_stopped=stop.agreed)
    n_steps = cfg.n_tokens * cfg.n_epochs // cfg.batch_tokens

# %% [markdown]
# ## Train
# Every SAE sees the same batches. A step is: loss, gradient, projection, Adam, renormalisation;
# `--step reference` does it by autograd, `auto` by the fastest kernel with the same result. In a
# transcoder's rows the columns of its target follow those that it encodes; in a crosscoder's lie
# those of all its hooks.

# %%
training = training_config(cfg, n_steps)
trainers = {}
sample = take_sample(sources, 8192)
widths = {hook_name: x.shape[1] for hook_name, x in sample.items()}
trained_at = places(specs, cfg.hook_name)
for place in trained_at:
    x = side_by_side(sample, cfg.columns(place))
    prefix = f"{place}/" if len(trained_at) > 1 else ""
    hook_widths = [widths[hook_name] for hook_name in hooks_of(place)]
    trainers[place] = make_trainer(
        processes, cfg.parallel, specs, training, x, prefix, widths.get(target, 0), hook_widths
    )

parts = {"source": sources, **trainers}
step = load_run(run.checkpoints, parts, processes) if run.resumes else 0
run.cut_log(step)

sources.take_part(share_of_batches(processes, cfg))


def save():
    """A checkpoint from which --resume goes on."""
    save_run(run.checkpoints, step, parts, cfg.keep_checkpoints, processes)


batches = saved_at_an_error(itertools.islice(sources, n_steps - step), save, processes)
with Reporter(run, n_steps, step) as reporter, stop.awaited():
    for batch in batches:
        for place, trainer in trainers.items():
            trainer.step(side_by_side(batch, cfg.columns(place)))
        step += 1

        if step % cfg.log_every == 0 or step == n_steps:
            reporter.log([row for trainer in trainers.values() for row in trainer.metrics()])
        if stop.agreed():
            break
        if step % cfg.checkpoint_every == 0 or step == n_steps:
            save()
    if stopped_by := stop.agreed():  # after a step, or while a window of the stream was filled
        save()
        sys.exit(f"stopped by {stopped_by} at step {step} of {n_steps}; go on with --resume")

# %% [markdown]
# ## Measure on held-out documents and save
# `fvu` is the fraction of variance unexplained; `nats lost` is what the language model's
# cross-entropy rises by when it runs on reconstructions. All brackets are 95 % intervals of a
# bootstrap over documents.

# %%
heldout = take_tokens(token_batches("heldout"), cfg.n_tokens_eval)
written = Target(target, rows.max_norms[target]) if target else None
IDENTITY = ("name", "architecture", "ratio", "l1_coeff", "seed", "hook_name")
results, densities = [], []
for place, trainer in trainers.items():
    limit = norm_limit(place, rows.max_norms, widths)
    evaluation = Evaluation(lm, place, heldout, limit, target=written)
    saes, mean = trainer.finished_saes(), trainer.raw_mean()
    measured = evaluate(evaluation, saes, mean, cfg.n_tokens_ce, processes=processes)
    for name, facts in trainer.facts().items():
        hooks = {"hook_name": place} | ({"hook_name_out": target} if target else {})
        row = {"name": name, "lm": cfg.lm} | hooks | facts | measured[name].row
        results.append(row)
        n_firings, n_rows = measured[name].n_firings, row["n_tokens_eval"]
        identity = {key: row[key] for key in IDENTITY}
        densities += [identity | bin_ for bin_ in density_histogram(n_firings, n_rows)]
        metadata = {
            "model_name": cfg.lm,
            **hooks,
            "context_size": cfg.context_length,
            "dataset_path": cfg.text,
            "prepend_bos": starts_with_bos(lm.tokenizer, cfg.bos),
            "l0": row["l0"],
            **facts,
        }
        folder, density = run.folder / "saes" / name, n_firings / n_rows
        if processes.is_first:
            save_sae(saes[name], folder, metadata=metadata, density=density, overwrite=True)

leave_to_first(processes)
run.write_result("summary.json", results)
run.write_result("results/feature_density.json", densities)
print_results(results)
stop.restore()

# %% [markdown]
# ## A few features
# Drawn at random, not picked: features of the ratio nearest to 4 that fire on ten held-out tokens
# or more, each in the three documents where it fires most strongly. What they stand for, beside
# neurons and random directions, is measured by `analysis/`.

# %%
import torch

name = min(saes, key=lambda name: abs(saes[name].d_sae / saes[name].d_in - 4))
often = (measured[name].n_firings >= 10).nonzero().flatten()
some = often[torch.randperm(len(often), generator=torch.Generator().manual_seed(0))[:6]]
print_features(name, some, evaluation.strongest(saes[name], some, n=3), lm.tokenizer)

# %% [markdown]
# ## How training went, what they keep, how often features fire
# All that a run has results for, on one page: `python -m data_visualization.report RUN_FOLDER`.

# %%
from data_visualization import fig_feature_density, fig_reconstruction, fig_training, style

figures = run.folder / "figures"
log = style.read_lines(run.metrics)
style.show(style.save(fig_training.draw(log), figures, "fig_training"))
style.show(style.save(fig_reconstruction.draw(results), figures, "fig_reconstruction"))
style.show(style.save(fig_feature_density.draw(densities), figures, "fig_feature_density"))
print(f"everything is in {run.folder}")

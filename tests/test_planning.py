"""The planner against what is really allocated, multiplied and written."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from sparse_coding import runs
from sparse_coding.cache import SPARE_BYTES
from sparse_coding.checkpoint import save_run
from sparse_coding.config import PRESETS, RunConfig
from sparse_coding.errors import UserError
from sparse_coding.harvest import activations
from sparse_coding.ladder import SAESpec, ladder
from sparse_coding.models import SHIPPED, load_lm, size_of
from sparse_coding.planning import Job, Rates, job_of
from sparse_coding.reporting import print_plan
from sparse_coding.runs import run_folder
from sparse_coding.training import Trainer, TrainingConfig

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def cfg(tmp_path) -> RunConfig:
    return dataclasses.replace(
        PRESETS["demo"], lm="tiny-a", hook_name=(HOOK,), device="cpu", dtype="float32",
        output=tmp_path, ratios=(1, 4), n_tokens=2048, batch_tokens=256, context_length=64,
        step="reference",
    )  # fmt: skip


def specs(cfg: RunConfig) -> list[SAESpec]:
    return ladder(cfg.architecture, cfg.ratios, cfg.l1_coeffs, cfg.target_l0, cfg.seed)


def job(cfg: RunConfig, **changes: object) -> Job:
    return dataclasses.replace(job_of(cfg, specs(cfg)), **changes)


def test_a_size_from_the_configuration_is_that_of_the_loaded_model():
    size = size_of("tiny-a", device="cpu", dtype="float16")
    loaded = AutoModelForCausalLM.from_pretrained(SHIPPED / "tiny-a")
    assert size.n_parameters == loaded.num_parameters()
    block = sum(p.numel() for p in loaded.gpt_neox.layers[0].parameters())
    assert size.n_parameters_per_block == block
    assert size.n_layers == len(loaded.gpt_neox.layers)
    assert (size.vocabulary, size.d_model) == loaded.gpt_neox.embed_in.weight.shape
    assert size.dtype == torch.float16


def test_operations_are_those_that_torch_counts(cfg):
    lm, planned = load_lm("tiny-a", device="cpu", dtype="float32"), job(cfg)
    tokens = torch.randint(0, 100, (4, cfg.context_length))
    with FlopCounterMode(display=False) as counted:
        activations(lm, tokens, [HOOK])
    per_token = planned.harvest_operations / cfg.n_tokens
    # attention is planned causal, halved; eager attention multiplies the whole square
    assert per_token == pytest.approx(counted.get_total_flops() / tokens.numel(), rel=0.1)

    x = torch.randn(cfg.batch_tokens, lm.d_model)
    trainer = Trainer(specs(cfg), TrainingConfig(8, cfg.batch_tokens, step="reference"), x)
    with FlopCounterMode(display=False) as counted:
        trainer.step(x)
    per_step = planned.training_operations / planned.n_steps
    assert per_step == pytest.approx(counted.get_total_flops(), rel=0.01)


def test_bytes_are_those_of_a_checkpoint_and_of_finished_saes(cfg, tmp_path):
    planned, d = job(cfg), 192
    x = torch.randn(cfg.n_tokens, d)
    trainer = Trainer(specs(cfg), TrainingConfig(8, cfg.batch_tokens, step="reference"), x)
    checkpoint = save_run(tmp_path / "checkpoints", 0, {"trainer": trainer}, keep=1)
    foretold = planned.checkpoint_bytes / (cfg.keep_checkpoints + 1)
    assert checkpoint.stat().st_size == pytest.approx(foretold, rel=0.02)
    saes = trainer.finished_saes().values()
    written = sum(p.nbytes for sae in saes for p in sae.parameters())
    assert written == pytest.approx(planned.sae_bytes, rel=0.01)

    streamed = job(cfg, cache_dtype=None, buffer_tokens=100)
    assert (streamed.cache_bytes, streamed.buffer_bytes) == (0, 100 * d * 4)


def test_crosscoders_are_planned_as_wide_as_their_hooks_together(cfg):
    names = ("blocks.0.hook_resid_post", HOOK)
    joined = dataclasses.replace(cfg, hook_name=names, architecture=("crosscoder",))
    grid = (joined.architecture, cfg.ratios, (), cfg.target_l0, cfg.seed)
    crosscoders = ladder(*grid, n_hooks=2)
    planned, x = job_of(joined, crosscoders), torch.randn(cfg.batch_tokens, 2 * 192)
    training = TrainingConfig(8, cfg.batch_tokens, step="reference")
    trainer = Trainer(crosscoders, training, x, hook_widths=(192, 192))
    saes = trainer.finished_saes().values()
    assert sum(p.nbytes for sae in saes for p in sae.parameters()) == pytest.approx(
        planned.sae_bytes, rel=0.01
    )
    with FlopCounterMode(display=False) as counted:
        trainer.step(x)
    # the sixth product is the gradient of a b_dec that is subtracted, which is none here
    per_step = planned.training_operations / planned.n_steps * 5 / 6
    assert per_step == pytest.approx(counted.get_total_flops(), rel=0.01)
    # the tokens' and documents' numbers are kept once
    assert planned.cache_bytes == pytest.approx(2 * job(cfg).cache_bytes, rel=0.02)


def test_processes_share_what_their_mode_lets_them_share(cfg):
    one = job(cfg, n_processes=1)
    whole = {
        mode: job(cfg, n_processes=2, parallel=mode) for mode in ("ladder", "data", "features")
    }
    assert whole["features"].training_bytes == one.training_bytes // 2
    by_rank = [job(cfg, specs=[spec]).training_bytes for spec in one.specs]
    assert whole["ladder"].training_bytes == max(by_rank)
    assert whole["data"].training_bytes == job(cfg, batch_tokens=128).training_bytes
    assert one.exchanged_bytes == whole["ladder"].exchanged_bytes == 0
    # each of two processes sends half of the gradients twice
    assert whole["data"].exchanged_bytes == one.n_steps * 4 * one.n_parameters
    at = Rates(1e12, 1e10)
    assert whole["data"].seconds(at) == tuple(s / 2 for s in one.seconds(at))


def test_the_plan_of_what_does_not_fit_is_shown_and_refused(cfg, capsys):
    planned = dataclasses.replace(cfg, plan=True)
    print_plan(planned, specs(planned))
    assert "operations/s" in capsys.readouterr().out
    too_large = {
        "n_tokens": (10**11, "GB of disk and"),  # 39 TB of activations
        "ratios": ((4096,), "GB of memory and"),
        "hook_name": (("blocks.4.hook_resid_post",), "does not exist in tiny-a"),
    }
    for field, (value, line) in too_large.items():
        one = dataclasses.replace(planned, **{field: value, "seed": tuple(range(64))})
        with pytest.raises(UserError, match=line):
            print_plan(one, specs(one))
    assert (
        "39,200.00 GB of activations" in capsys.readouterr().out
    )  # printed before it was refused


@pytest.mark.parametrize("values", [((), (6.0, 6.000004)), ((1.0, 1.0), ())])
def test_saes_that_would_have_one_name_are_refused(values):
    with pytest.raises(UserError, match="two SAEs would be called l1_x01_"):
        ladder(("l1",), (1,), *values, (0,))


def test_a_run_that_goes_on_needs_no_room_for_what_it_has(cfg, monkeypatch):
    """And a new harvest leaves some of the disk free, which the plan counts."""
    streamed = dataclasses.replace(cfg, cache=False, keep_checkpoints=1)
    needed = job(streamed).disk_bytes
    written = run_folder(streamed) / "checkpoints" / "step-9" / "weights"
    written.parent.mkdir(parents=True)
    written.write_bytes(bytes(needed // 3))
    usage = SimpleNamespace(free=needed - needed // 3)
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda _: usage)
    print_plan(streamed, specs(streamed))
    usage.free -= 1
    with pytest.raises(UserError, match="GB of disk and"):
        print_plan(streamed, specs(streamed))
    usage.free += job(cfg).cache_bytes + SPARE_BYTES
    planned = dataclasses.replace(cfg, plan=True, keep_checkpoints=1)
    with pytest.raises(UserError, match="GB of disk and"):
        print_plan(planned, specs(planned))
    usage.free += 1
    print_plan(planned, specs(planned))

"""Blocks before the hook run once however many replacements there are, to the same losses."""

import pytest
import torch
from test_splice import CASES, FAMILIES, LAYER, batch, folders, lms  # noqa: F401

from sparse_coding.splice import cross_entropies

REPLACEMENTS = {
    "clean": None,
    "zero": torch.zeros_like,
    "half": lambda x: x / 2,
    "again": lambda x: x / 2,
}


@pytest.mark.parametrize(("family", "hook"), CASES)
def test_losses_are_those_of_each_replacement_alone_to_the_bit(lms, batch, family, hook):  # noqa: F811
    hook_name = f"blocks.{LAYER}.{hook}"
    together, *_ = cross_entropies(lms[family], batch, hook_name, REPLACEMENTS)
    for name, replace in REPLACEMENTS.items():
        alone, *_ = cross_entropies(lms[family], batch, hook_name, {name: replace})
        assert torch.equal(together[name], alone[name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_before_the_hooks_block_runs_once(lms, batch, family, layer):  # noqa: F811
    lm = lms[family]
    counts = [0] * 3

    def count(i):
        def hook(x, hook):
            counts[i] += 1

        return hook

    hooks = [(f"blocks.{i}.hook_attn_out", count(i)) for i in range(3)]
    with lm.model.hooks(fwd_hooks=hooks):
        cross_entropies(lm, batch, f"blocks.{layer}.hook_resid_post", REPLACEMENTS)
    assert counts == [1 if i < layer else 4 for i in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replacement_that_fails_leaves_the_model_as_it_was(lms, batch, family):  # noqa: F811
    lm = lms[family]
    before = lm.model(batch.tokens)

    def fail(x):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cross_entropies(lm, batch, "blocks.2.hook_resid_post", {"clean": None, "bad": fail})
    assert torch.equal(lm.model(batch.tokens), before)

"""What the model loses, against transformers with torch hooks written by hand."""

import pytest
import torch
from tiny_models import FAMILIES, TEXT, blocks_of, first, load_plain, save_tiny_lm

from sparse_coding.harvest import NormLimit, activations
from sparse_coding.models import load_lm
from sparse_coding.splice import Alone, Target, cross_entropies
from sparse_coding.text import TokenBatch

N_CONTEXTS, N_POSITIONS = 5, 13
LAYER = 1
HOOK = f"blocks.{LAYER}.hook_resid_post"
STREAM = ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out"]
CASES = [(f, h) for f in FAMILIES for h in STREAM if (f, h) != ("gpt_neox", "hook_resid_mid")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("lms")
    for family in FAMILIES:
        save_tiny_lm(family, place / family, TEXT, n_layers=3)
    return {family: place / family for family in FAMILIES}


@pytest.fixture(scope="module")
def lms(folders):
    return {
        f: load_lm(str(folder), device="cpu", dtype="float32") for f, folder in folders.items()
    }


@pytest.fixture(scope="module")
def plains(folders):
    return {family: load_plain(folder) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, 250, (N_CONTEXTS, N_POSITIONS), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 1 / 6] = 0
    valid = tokens != 0
    valid[:, 0] = False
    return TokenBatch(tokens, torch.zeros_like(tokens), valid)


def reference_losses(plain, batch):
    """Of every target that is predicted from a valid position and is no special token."""
    logits = plain(batch.tokens).logits.double()
    losses = torch.zeros(N_CONTEXTS, N_POSITIONS - 1)
    counted = torch.zeros(N_CONTEXTS, N_POSITIONS - 1, dtype=torch.bool)
    for c in range(N_CONTEXTS):
        for t in range(N_POSITIONS - 1):
            if batch.valid[c, t] and batch.tokens[c, t + 1] != 0:
                counted[c, t] = True
                target = batch.tokens[c, t + 1]
                losses[c, t] = -logits[c, t].log_softmax(dim=0)[target]
    return losses, counted


def spliced(plain, hook, change, layer=LAYER):
    """Handles of torch hooks that put `change(x)` in the place of x in a block."""
    block, attention, mlp = blocks_of(plain)[layer]
    kind = hook.removeprefix("hook_")

    def after(module, inputs, output):
        x = change(first(output))
        return (x, *output[1:]) if isinstance(output, tuple) else x

    if kind == "resid_pre":
        return [
            block.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
        ]
    if kind != "resid_mid":
        module = {"resid_post": block, "attn_out": attention, "mlp_out": mlp}[kind]
        return [module.register_forward_hook(after)]
    stream = []

    def mid(module, inputs, output):  # what attention must add to give the changed stream
        return (change(stream[-1] + output[0]) - stream[-1], *output[1:])

    return [
        block.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0])),
        attention.register_forward_hook(mid),
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_clean_losses_are_those_of_transformers_over_the_counted_targets(
    lms, plains, batch, family
):
    losses, _, counted = cross_entropies(lms[family], batch, HOOK, {"clean": None})
    with torch.no_grad():
        expected, expected_counted = reference_losses(plains[family], batch)
    assert torch.equal(counted, expected_counted)
    assert 0 < counted.sum() < counted.numel()
    torch.testing.assert_close(losses["clean"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_their_mean_is_the_loss_that_transformers_reports(lms, plains, batch, family):
    losses, _, counted = cross_entropies(lms[family], batch, HOOK, {"clean": None})
    labels = batch.tokens.clone()
    labels[:, 1:][~counted] = -100
    with torch.no_grad():
        expected = plains[family](batch.tokens, labels=labels).loss.item()
    assert losses["clean"][counted].mean().item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("family", "hook"), CASES)
def test_rows_put_back_as_they_are_change_nothing(lms, batch, family, hook):
    replacements = {"clean": None, "same": lambda x: x.clone()}
    losses, *_ = cross_entropies(lms[family], batch, f"blocks.{LAYER}.{hook}", replacements)
    torch.testing.assert_close(losses["same"], losses["clean"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "hook"), CASES)
@pytest.mark.parametrize("limited", [False, True])
def test_a_replacement_equals_a_torch_hook_on_transformers_own_module(
    lms, plains, batch, family, hook, limited
):
    """Other positions than valid ones, and rows above the limit, keep their activation."""
    hook_name = f"blocks.{LAYER}.{hook}"
    acts = activations(lms[family], batch.tokens, [hook_name])[hook_name]
    norms = acts.norm(dim=-1)
    max_norm = norms[batch.valid].median().item() if limited else float("inf")
    replaced = [
        (c, t) for c, t in batch.valid.nonzero().tolist() if norms[c, t].item() <= max_norm
    ]
    if limited:
        assert 0 < len(replaced) < batch.valid.sum()

    def change(x):
        x = x.clone()
        for c, t in replaced:
            x[c, t] = 0.5 - x[c, t]
        return x

    handles = spliced(plains[family], hook, change)
    with torch.no_grad():
        expected, _ = reference_losses(plains[family], batch)
    for handle in handles:
        handle.remove()
    losses, _, counted = cross_entropies(
        lms[family], batch, hook_name, {"clean": None, "x": lambda x: 0.5 - x}, max_norm=max_norm
    )
    torch.testing.assert_close(losses["x"], expected, rtol=0, atol=1e-5)
    assert (losses["x"] - losses["clean"])[counted].abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "read", "written"),
    [(f, "mlp.hook_in", "hook_mlp_out") for f in FAMILIES]
    + [
        ("gpt2", "hook_resid_pre", "hook_resid_mid"),
        ("llama", "hook_attn_out", "hook_resid_post"),
    ],
)
def test_a_target_gets_what_is_made_of_the_hooks_rows_of_the_same_pass(
    lms, plains, batch, family, read, written
):
    names = [f"blocks.{LAYER}.{kind}" for kind in (read, written)]
    acts = activations(lms[family], batch.tokens, names)
    norms = [acts[name].norm(dim=-1) for name in names]
    limits = [norm[batch.valid].quantile(0.8).item() for norm in norms]
    keep = batch.valid & (norms[0] <= limits[0]) & (norms[1] <= limits[1])
    assert 0 < keep.sum() < (batch.valid & (norms[0] <= limits[0])).sum()

    def change(y):
        y = y.clone()
        y[keep] = 0.5 - acts[names[0]][keep]
        return y

    handles = spliced(plains[family], written, change)
    with torch.no_grad():
        expected, _ = reference_losses(plains[family], batch)
    for handle in handles:
        handle.remove()
    losses, *_ = cross_entropies(
        lms[family],
        batch,
        names[0],
        {"clean": None, "x": lambda x: 0.5 - x},
        max_norm=limits[0],
        target=Target(names[1], limits[1]),
    )
    torch.testing.assert_close(losses["x"], expected, rtol=0, atol=1e-5)


JOINED = [
    *((f, "1.hook_mlp_out", "0.hook_attn_out") for f in FAMILIES),  # not in the model's order
    *((f, "0.hook_resid_post", "1.hook_resid_post") for f in FAMILIES),
    ("llama", "1.hook_resid_post", "1.hook_resid_mid"),
]


@pytest.mark.parametrize(("family", "first", "second"), JOINED)
def test_joined_hooks_are_all_replaced_by_what_is_made_of_the_clean_models_rows(
    lms, plains, batch, family, first, second
):
    names = [f"blocks.{kind}" for kind in (first, second)]
    clean = activations(lms[family], batch.tokens, names)
    norms = [clean[name].norm(dim=-1) for name in names]
    limits = [norm[batch.valid].quantile(0.8).item() for norm in norms]
    keep = batch.valid & (norms[0] <= limits[0]) & (norms[1] <= limits[1])
    assert 0 < keep.sum() < (batch.valid & (norms[0] <= limits[0])).sum()

    def handles_at(name):
        def change(x):  # each hook gets a function of both
            other = clean[names[1 - names.index(name)]]
            return torch.where(keep[..., None], 0.5 - clean[name] + 0.3 * other, x)

        _, layer, kind = name.split(".")
        return spliced(plains[family], kind, change, int(layer))

    def replace(x):
        a, b = x.chunk(2, dim=1)
        return torch.cat([0.5 - a + 0.3 * b, 0.5 - b + 0.3 * a], dim=1)

    parts = {"clean": None, "all": replace} | {name: Alone(replace, name) for name in names}
    found, *_ = cross_entropies(
        lms[family],
        batch,
        "+".join(names),
        parts,
        max_norm=[NormLimit(norm, limit) for norm, limit in zip([12, 12], limits, strict=True)],
    )
    for which, at in {"all": names, **{name: [name] for name in names}}.items():
        handles = [handle for name in at for handle in handles_at(name)]
        with torch.no_grad():
            expected, _ = reference_losses(plains[family], batch)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(found[which], expected, rtol=0, atol=1e-5)
        assert (found[which] - found["clean"]).abs().max() > 0.01


def test_joined_hooks_put_back_as_they_are_change_nothing(lms, batch):
    place = "blocks.0.hook_resid_mid+blocks.2.hook_resid_pre+blocks.1.hook_attn_out"
    replacements = {"clean": None, "same": lambda x: x.clone()}
    losses, *_ = cross_entropies(lms["gpt2"], batch, place, replacements)
    torch.testing.assert_close(losses["same"], losses["clean"], rtol=0, atol=1e-5)


def test_zero_ablation_equals_a_torch_hook_that_writes_zeros(lms, plains, batch):
    def zero(x):
        return torch.where(batch.valid[..., None], 0.0, x)

    (handle,) = spliced(plains["gpt2"], "hook_resid_post", zero)
    with torch.no_grad():
        expected, _ = reference_losses(plains["gpt2"], batch)
    handle.remove()
    losses, *_ = cross_entropies(lms["gpt2"], batch, HOOK, {"zero": torch.zeros_like})
    torch.testing.assert_close(losses["zero"], expected, rtol=0, atol=1e-5)


def test_the_replacement_sees_the_kept_rows_in_order_in_float32(folders, batch):
    half = load_lm(str(folders["llama"]), device="cpu", dtype="bfloat16")
    seen = []
    cross_entropies(half, batch, HOOK, {"look": lambda x: seen.append(x.clone()) or x})
    acts = activations(half, batch.tokens, [HOOK])[HOOK]
    (rows,) = seen
    assert rows.dtype == torch.float32
    assert torch.equal(rows, acts[batch.valid].float())


def test_losses_are_zero_where_they_do_not_count(lms, batch):
    losses, _, counted = cross_entropies(
        lms["llama"], batch, HOOK, {"clean": None, "zero": torch.zeros_like}
    )
    for loss in losses.values():
        assert (loss[~counted] == 0).all()
        assert (loss[counted] > 0).all()


def test_one_variant_leaves_nothing_behind_for_the_next(lms, batch):
    order = {"zero": torch.zeros_like, "clean": None, "again": torch.zeros_like}
    alone, *_ = cross_entropies(lms["gpt_neox"], batch, HOOK, {"clean": None})
    losses, *_ = cross_entropies(lms["gpt_neox"], batch, HOOK, order)
    assert torch.equal(losses["clean"], alone["clean"])
    assert torch.equal(losses["zero"], losses["again"])


def test_a_batch_without_a_counted_target_has_no_losses(lms, batch):
    nothing = batch._replace(valid=torch.zeros_like(batch.valid))
    losses, _, counted = cross_entropies(lms["llama"], nothing, HOOK, {"zero": torch.zeros_like})
    assert not counted.any() and not losses["zero"].any()

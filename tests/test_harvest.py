"""Harvested rows are the activations of their tokens, each once, whatever interrupts it."""

import json
import math
from itertools import islice

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, TEXT, save_tiny_lm

from sparse_coding import harvest
from sparse_coding.cache import CachedActivations
from sparse_coding.errors import UserError
from sparse_coding.harvest import (
    Rows,
    Seen,
    activations,
    harvest_to_cache,
    hook_width,
    kept_rows,
    measure_max_norms,
)
from sparse_coding.hook_sources import AlignedSources, StreamingSources, take_sample
from sparse_coding.models import load_lm
from sparse_coding.storage import write_json
from sparse_coding.text import TokenBatch

EARLY, LATE = "blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"
HOOKS = [LATE, EARLY]
N_BATCHES, N_CONTEXTS, N_POSITIONS = 6, 3, 11
SPECIAL = 0
BATCH_TOKENS = 7


@pytest.fixture(scope="module")
def lms(tmp_path_factory):
    place = tmp_path_factory.mktemp("lms")
    for family in FAMILIES:
        save_tiny_lm(family, place / family, TEXT, n_layers=3)
    return {f: load_lm(str(place / f), device="cpu", dtype="float32") for f in FAMILIES}


@pytest.fixture(scope="module")
def lm(lms):
    return lms["llama"]


def token_batches(n=N_BATCHES):
    """Random tokens, a seventh of them special; documents of 8 tokens."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for i in range(n):
        tokens = torch.randint(1, 250, (N_CONTEXTS, N_POSITIONS), generator=generator)
        tokens[torch.rand(tokens.shape, generator=generator) < 1 / 7] = SPECIAL
        places = torch.arange(tokens.numel()).view(tokens.shape) + i * tokens.numel()
        valid = tokens != SPECIAL
        valid[:, 0] = False
        batches.append(TokenBatch(tokens, torch.where(valid, places // 8, -1), valid))
    return batches


def make_rows(lm, hook_names=HOOKS, n=N_BATCHES, max_norms=None):
    rows = Rows(lm, lambda: iter(token_batches(n)), hook_names)
    if max_norms:
        rows.max_norms = max_norms
    return rows


def expected_rows(lm, max_norms, n=N_BATCHES):
    """Kept rows position by position: activations by hook, tokens, documents; and the dropped."""
    acts = {name: [] for name in HOOKS}
    tokens, documents, n_dropped = [], [], 0
    for batch in token_batches(n):
        found = activations(lm, batch.tokens, HOOKS)
        for place in np.ndindex(*batch.tokens.shape):
            if not batch.valid[place]:
                continue
            norms = {name: np.linalg.norm(found[name][place].double()) for name in HOOKS}
            if any(norms[name] > max_norms[name] for name in HOOKS):
                n_dropped += 1
                continue
            for name in HOOKS:
                acts[name].append(found[name][place])
            tokens.append(int(batch.tokens[place]))
            documents.append(int(batch.document[place]))
    return {name: torch.stack(x) for name, x in acts.items()}, tokens, documents, n_dropped


@pytest.fixture(scope="module")
def limits(lm):
    """Norm limits that drop about a fifth of the rows at one hook, a tenth at the other."""
    acts = [activations(lm, batch.tokens, HOOKS) for batch in token_batches()]
    limits = {}
    for name, quantile in ((EARLY, 0.8), (LATE, 0.9)):
        norms = torch.cat([a[name][:, 1:].norm(dim=-1).flatten() for a in acts])
        limits[name] = norms.quantile(quantile).item()
    return limits


def modules_run(lm, hook_names):
    """Names of the original modules that a call of `activations` runs."""
    run, handles = set(), []
    for name, module in lm.model.original_model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: run.add(name)))
    activations(lm, token_batches(1)[0].tokens, hook_names)
    for handle in handles:
        handle.remove()
    return run


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_no_block_after_the_last_hook_and_no_unembedding_runs(lms, family, layer):
    names = [f"blocks.{layer}.hook_resid_post", "blocks.0.hook_attn_out"]
    run = modules_run(lms[family], names)
    container = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "llama": "model.layers"}
    blocks = {i for i in range(3) if f"{container[family]}.{i}" in run}
    assert blocks == set(range(layer + 1))
    final = ("lm_head", "embed_out", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.norm")
    assert not run & set(final)


def test_a_model_that_was_left_early_computes_the_same_afterwards(lm):
    tokens = token_batches(1)[0].tokens
    before = lm.model(tokens)
    activations(lm, tokens, [EARLY])
    assert torch.equal(lm.model(tokens), before)


def test_several_hooks_in_one_pass_equal_each_alone(lm):
    tokens = token_batches(1)[0].tokens
    together = activations(lm, tokens, [*HOOKS, EARLY])
    assert list(together) == HOOKS
    for name in HOOKS:
        assert torch.equal(together[name], activations(lm, tokens, [name])[name])


def test_a_hooks_width_is_that_of_its_activations(lm):
    assert hook_width(lm, LATE) == lm.d_model


def test_rows_are_kept_if_valid_and_not_too_long():
    acts = torch.tensor([[[3.0, 4.0], [6.0, 8.0], [0.0, 10.1], [1.0, 1.0]]])
    valid = torch.tensor([[True, True, True, False]])
    assert kept_rows(acts, valid, 10.0).tolist() == [[True, True, False, False]]


def test_norms_are_not_measured_in_half_precision():
    acts = torch.full((1, 2, 4), 200.0, dtype=torch.float16)  # its squares overflow float16
    assert kept_rows(acts, torch.ones(1, 2, dtype=torch.bool), 401.0).all()


def test_the_norm_limit_is_ten_medians_over_valid_rows_of_the_sample(lm, monkeypatch):
    monkeypatch.setattr(harvest, "NORM_SAMPLE_TOKENS", 40)  # the first two batches
    norms = {name: [] for name in HOOKS}
    for batch in token_batches(2):
        for name, acts in activations(lm, batch.tokens, HOOKS).items():
            norms[name] += acts[batch.valid].double().norm(dim=-1).tolist()
    assert 40 <= len(norms[LATE]) < 60
    for name, limit in measure_max_norms(map(make_rows(lm).see, token_batches())).items():
        ordered = sorted(norms[name])
        assert limit == pytest.approx(10 * ordered[(len(ordered) - 1) // 2], rel=1e-6)


def test_a_text_of_special_tokens_only_is_refused(lm):
    batch = token_batches(1)[0]
    with pytest.raises(UserError, match="all special tokens"):
        measure_max_norms([Seen(batch._replace(valid=torch.zeros_like(batch.valid)), {})])


def test_a_model_whose_activations_are_not_finite_is_refused(lm, monkeypatch):
    broken = {name: torch.full((N_CONTEXTS, N_POSITIONS, 4), math.nan) for name in HOOKS}
    monkeypatch.setattr(harvest, "activations", lambda *_: broken)
    with pytest.raises(UserError, match="not finite in torch.float32: run the model in"):
        next(iter(StreamingSources(make_rows(lm), BATCH_TOKENS, 0, 20)))


def test_rows_are_those_of_the_rule_aligned_over_hooks_and_counted(lm, limits):
    acts, tokens, documents, n_dropped = expected_rows(lm, limits)
    rows = make_rows(lm, max_norms=limits)
    kept = list(rows)
    for name in HOOKS:
        assert torch.equal(torch.cat([k.acts[name] for k in kept]), acts[name])
    assert torch.cat([k.tokens for k in kept]).tolist() == tokens
    assert torch.cat([k.document for k in kept]).tolist() == documents
    assert (rows.n_valid, rows.n_dropped) == (len(tokens) + n_dropped, n_dropped)
    assert 0.1 < n_dropped / rows.n_valid < 0.35


def test_the_first_pass_measures_the_limits_without_running_the_model_twice(lm, monkeypatch):
    monkeypatch.setattr(harvest, "NORM_SAMPLE_TOKENS", 40)  # the first two batches
    run, n_calls = harvest.activations, []
    monkeypatch.setattr(harvest, "activations", lambda *a: n_calls.append(1) or run(*a))
    rows = make_rows(lm)
    kept = list(rows)
    assert len(n_calls) == N_BATCHES
    assert rows.max_norms == make_rows(lm).max_norms
    again = make_rows(lm, max_norms=rows.max_norms)
    for one, two in zip(kept, again, strict=True):
        assert all(torch.equal(one.acts[name], two.acts[name]) for name in HOOKS)


def test_a_second_pass_counts_anew(lm, limits):
    rows = make_rows(lm, max_norms=limits)
    counts = []
    for _ in range(2):
        list(rows)
        counts.append((rows.n_valid, rows.n_dropped))
    assert counts[0] == counts[1]


def make_cache(lm, root, limits, n_tokens=90, n=N_BATCHES, settings=None):
    return harvest_to_cache(
        make_rows(lm, n=n, max_norms=limits), root, settings or {"lm": "tiny"}, n_tokens, "float32"
    )


def test_cached_rows_are_the_activations_of_their_tokens(lm, tmp_path, limits):
    acts, tokens, documents, _ = expected_rows(lm, limits)
    cache = make_cache(lm, tmp_path, limits)
    every = np.arange(90)
    for name in HOOKS:
        assert torch.equal(cache.rows(name, every), acts[name][:90])
    assert cache.tokens(every).tolist() == tokens[:90]
    assert cache.documents(every).tolist() == documents[:90]


def test_the_cache_keeps_the_limits_and_what_they_dropped(lm, tmp_path, limits):
    _, tokens, _, n_dropped = expected_rows(lm, limits)
    extra = make_cache(lm, tmp_path, limits, n_tokens=10_000).extra
    assert extra["max_norms"] == limits
    assert (extra["n_valid"], extra["n_dropped"]) == (len(tokens) + n_dropped, n_dropped)


def test_a_text_that_ends_early_gives_a_smaller_cache_and_says_so(lm, tmp_path, limits, capsys):
    _, tokens, _, _ = expected_rows(lm, limits)
    cache = make_cache(lm, tmp_path, limits, n_tokens=10_000)
    assert cache.n_tokens == len(tokens)
    assert f"the text ended after {len(tokens)} of 10,000 tokens" in capsys.readouterr().out


def test_cached_settings_are_found_again_without_model_and_text(
    lm, tmp_path, limits, capsys, monkeypatch
):
    make_cache(lm, tmp_path, limits)
    monkeypatch.setattr(harvest, "activations", None)
    rows = Rows(lm, lambda: pytest.fail("the text was read"), HOOKS)
    cache = harvest_to_cache(rows, tmp_path, {"lm": "tiny"}, 90, "float32")
    assert (cache.n_tokens, rows.max_norms) == (90, limits)
    assert "90 tokens are cached" in capsys.readouterr().out


def test_other_settings_are_harvested_anew(lm, tmp_path, limits):
    one = make_cache(lm, tmp_path, limits)
    other = make_cache(lm, tmp_path, limits, settings={"lm": "other"})
    assert one.folder != other.folder


def content(folder):
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}
    manifest = json.loads((folder / "manifest.json").read_text())
    return files, {key: value for key, value in manifest.items() if key != "created"}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of 20 rows instead of a quarter of a gigabyte."""
    writer = harvest.CacheWriter
    monkeypatch.setattr(harvest, "CacheWriter", lambda *settings: writer(*settings, 20))


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), UserError("gone")], ids=repr)
@pytest.mark.parametrize("n_tokens", [90, 10_000])
def test_an_interrupted_harvest_continues_to_the_same_bytes(
    lm, tmp_path, limits, small_shards, interrupt, n_tokens
):
    unbroken = make_cache(lm, tmp_path / "unbroken", limits, n_tokens)

    def failing():
        yield from token_batches()[:3]
        raise interrupt

    rows = Rows(lm, failing, HOOKS)
    rows.max_norms = limits
    with pytest.raises(type(interrupt)):
        harvest_to_cache(rows, tmp_path / "broken", {"lm": "tiny"}, n_tokens, "float32")
    (progress,) = (tmp_path / "broken").rglob("progress.json")
    assert sum(shard["rows"] for shard in json.loads(progress.read_text())["shards"]) in (40, 60)
    # In the same process: the interrupt has given the folder's lock back.
    continued = make_cache(lm, tmp_path / "broken", limits, n_tokens)
    assert content(continued.folder) == content(unbroken.folder)


def test_a_harvest_that_stopped_with_every_row_written_is_finished(
    lm, tmp_path, limits, small_shards, monkeypatch
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        make_writer = harvest.CacheWriter

        def unfinished(*settings):
            writer = make_writer(*settings)
            writer.finish = lambda extra: (_ for _ in ()).throw(KeyboardInterrupt)
            return writer

        patch.setattr(harvest, "CacheWriter", unfinished)
        make_cache(lm, tmp_path / "broken", limits, 80)
    continued = make_cache(lm, tmp_path / "broken", limits, 80)
    unbroken = make_cache(lm, tmp_path / "unbroken", limits, 80)
    assert content(continued.folder) == content(unbroken.folder)


@pytest.mark.parametrize(
    ("is_old", "n_run"), [(False, 2), (True, 4)]
)  # rows 60 on: 2 of 4 batches
def test_the_model_runs_on_no_batch_before_the_rows_that_are_missing(
    lm, tmp_path, small_shards, monkeypatch, is_old, n_run
):
    monkeypatch.setattr(harvest, "NORM_SAMPLE_TOKENS", 40)
    see, run = Rows.see, []
    monkeypatch.setattr(Rows, "see", lambda rows, batch: run.append(1) or see(rows, batch))
    folder = make_cache(lm, tmp_path, None).folder
    before, path = content(folder), folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for shard in manifest["shards"] if is_old else []:
        del shard["ends_at"]  # caches once did not say it
    path.write_text(json.dumps(manifest))
    path.with_name("tokens").joinpath("shard_00003.safetensors").unlink()
    layout = {key: manifest[key] for key in ("hooks", "dtype", "shard_tokens", "n_tokens")}
    for _ in ("mended", "gone on with"):
        run.clear()
        make_cache(lm, tmp_path, None)
        assert (len(run), content(folder)[0]) == (n_run, before[0])
        write_json(folder / "progress.json", layout | {"shards": manifest["shards"][:3]})
        extra = json.loads(path.read_text())["extra"]
        path.unlink()
    assert extra == before[1]["extra"]


def test_cached_hooks_as_one_source_deliver_the_same_tokens_of_every_hook(lm, tmp_path, limits):
    cache = make_cache(lm, tmp_path, limits)
    row_of = {name: {} for name in HOOKS}
    for name in HOOKS:
        for i, x in enumerate(cache.rows(name, np.arange(90))):
            row_of[name][x.numpy().tobytes()] = i
    source = AlignedSources({h: CachedActivations(cache, h, 7, 1, 1) for h in HOOKS})
    assert source.n_batches == 90 // 7
    seen = []
    for batch in source:
        late, early = ([row_of[h][x.numpy().tobytes()] for x in batch[h]] for h in HOOKS)
        assert [cache.tokens(np.array(late)).tolist()] == [cache.tokens(np.array(early)).tolist()]
        assert late == early
        seen += late
    assert len(seen) == len(set(seen)) == 84


def streaming(lm, limits, seed=2, buffer_tokens=50):
    return StreamingSources(make_rows(lm, max_norms=limits), BATCH_TOKENS, seed, buffer_tokens)


def stacked(source, n):
    return [torch.cat([batch[name] for name in HOOKS], dim=1) for batch in islice(source, n)]


def rows_in(x):
    return {row.numpy().tobytes() for row in x}


def test_a_window_delivers_each_of_its_rows_once_but_for_the_rest_of_a_batch(lm, limits):
    counts = [len(k.tokens) for k in make_rows(lm, max_norms=limits)]
    acts, _, _, _ = expected_rows(lm, limits)
    every = torch.cat([acts[name] for name in HOOKS], dim=1)
    n_batches = int(np.argmax(np.cumsum(counts) >= 50)) + 1
    n_window = sum(counts[:n_batches])
    assert n_batches > 1 and n_window % BATCH_TOKENS
    delivered = torch.cat(stacked(streaming(lm, limits), n_window // BATCH_TOKENS))
    assert len(rows_in(delivered)) == len(delivered) == n_window - n_window % BATCH_TOKENS
    assert rows_in(delivered) <= rows_in(every[:n_window])
    assert not torch.equal(delivered, every[: len(delivered)])


def test_streaming_starts_over_when_the_text_ends(lm, limits):
    n_rows = len(expected_rows(lm, limits)[1])
    batches = stacked(streaming(lm, limits), 3 * n_rows // BATCH_TOKENS)
    counts = {}
    for row in torch.cat(batches):
        counts[row.numpy().tobytes()] = counts.get(row.numpy().tobytes(), 0) + 1
    assert len(counts) > 0.9 * n_rows
    assert max(counts.values()) <= 4


def test_another_seed_shuffles_otherwise(lm, limits):
    one, other = (stacked(streaming(lm, limits, seed), 5) for seed in (2, 3))
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("n_before", [0, 1, 4, 7, 8, 9, 15, 23, 40])
def test_a_restored_stream_goes_on_as_the_unbroken_one(lm, limits, n_before):
    unbroken = stacked(streaming(lm, limits), n_before + 20)
    broken = streaming(lm, limits)
    first = iter(broken)
    for _ in range(n_before):
        next(first)
    state = json.loads(json.dumps(broken.state_dict()))
    restored = streaming(lm, limits, seed=77)
    restored.load_state_dict(state)
    for x, y in zip(stacked(restored, 20), unbroken[n_before:], strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("n_before", [0, 3, 7, 9, 16])
@pytest.mark.parametrize("n_sampled", [1, 40, 130])
def test_a_sample_does_not_change_what_follows(lm, limits, n_before, n_sampled):
    unbroken = stacked(streaming(lm, limits), n_before + 20)
    source = streaming(lm, limits)
    stacked(source, n_before)
    sample = take_sample(source, n_sampled)
    joint = torch.cat([sample[name] for name in HOOKS], dim=1)
    assert n_sampled <= len(joint) < n_sampled + BATCH_TOKENS
    assert torch.equal(joint, torch.cat(unbroken[n_before:])[: len(joint)])
    for x, y in zip(stacked(source, 20), unbroken[n_before:], strict=True):
        assert torch.equal(x, y)


def test_a_sample_of_a_cache_does_not_change_what_follows(lm, tmp_path, limits):
    cache = make_cache(lm, tmp_path, limits)
    make = lambda: AlignedSources({h: CachedActivations(cache, h, 7, 1, 1) for h in HOOKS})  # noqa: E731
    source, unbroken = make(), stacked(make(), 12)
    take_sample(source, 30)
    for x, y in zip(stacked(source, 12), unbroken, strict=True):
        assert torch.equal(x, y)


def test_a_window_that_is_sampled_first_is_harvested_once(lm, limits):
    rows = make_rows(lm, max_norms=limits)
    keep, n_kept = rows.keep, []
    rows.keep = lambda seen: n_kept.append(1) or keep(seen)
    source = StreamingSources(rows, BATCH_TOKENS, 0, 20)
    take_sample(source, 10)
    next(iter(source))
    assert len(n_kept) == 1


def test_streamed_rows_are_float32_whatever_the_models_dtype(lm, tmp_path):
    save_tiny_lm("llama", tmp_path, TEXT)
    half = load_lm(str(tmp_path), device="cpu", dtype="bfloat16")
    source = StreamingSources(make_rows(half), BATCH_TOKENS, 0, 20)
    assert {x.dtype for x in next(iter(source)).values()} == {torch.float32}

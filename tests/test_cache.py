"""The cache gives back what was written, refuses what is damaged, and survives being killed."""

import os
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_coding import cache as cache_module
from sparse_coding.cache import (
    ActivationCache,
    CachedActivations,
    CacheWriter,
    cache_bytes,
    check_space,
    open_cache,
)
from sparse_coding.cache_files import Place
from sparse_coding.errors import UserError
from sparse_coding.sources import TensorActivations
from sparse_coding.storage import read_json, write_json

EARLY, LATE = "blocks.1.hook_resid_post", "blocks.3.hook_mlp_out"
HOOKS = {EARLY: 12, LATE: 5}
SETTINGS = {"lm": "planted", "hooks": (EARLY, LATE), "context": 16}
N_TOKENS = 103


class Planted:
    """Rows whose content is known: what a harvest would deliver."""

    def __init__(self, dtype: torch.dtype = torch.float32, n_tokens: int = N_TOKENS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = {
            hook: (3 + torch.randn(n_tokens, d, generator=generator)).to(dtype)
            for hook, d in HOOKS.items()
        }
        self.tokens = torch.randint(0, 50_000, (n_tokens,), generator=generator)
        self.documents = torch.arange(n_tokens) // 9

    def append_to(self, writer: CacheWriter, start: int, stop: int, step: int = 7) -> None:
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            activations = {hook: x[rows] for hook, x in self.x.items()}
            places = self.tokens[rows], self.documents[rows], Place(n_rows=first)
            writer.append(activations, *places)


def make_writer(root: Path, dtype: torch.dtype = torch.float32, shard_tokens: int = 20):
    return CacheWriter(root, SETTINGS, HOOKS, N_TOKENS, dtype, shard_tokens)


def make_cache(
    root: Path, dtype: torch.dtype = torch.float32, shard_tokens: int = 20
) -> ActivationCache:
    with make_writer(root, dtype, shard_tokens) as writer:
        Planted().append_to(writer, 0, N_TOKENS)
        return ActivationCache(writer.finish({}))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")
    }


def first_batches(source: CachedActivations | TensorActivations, n: int) -> Tensor:
    return torch.stack([batch for _, batch in zip(range(n), source, strict=False)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_come_back_to_the_bit_in_the_order_asked(tmp_path, dtype):
    cache = make_cache(tmp_path, dtype)
    indices = np.array([102, 0, 19, 20, 57, 19, 100, 3])
    for hook, x in Planted().x.items():
        assert torch.equal(cache.rows(hook, indices), x[indices].to(dtype))


def test_token_ids_and_documents_belong_to_their_rows(tmp_path):
    cache, planted = make_cache(tmp_path), Planted()
    indices = np.array([99, 2, 41])
    assert cache.tokens(indices).tolist() == planted.tokens[indices].tolist()
    assert cache.documents(indices).tolist() == planted.documents[indices].tolist()


def test_no_rows_can_be_asked_for(tmp_path):
    assert make_cache(tmp_path).rows(LATE, np.array([], dtype=np.int64)).shape == (0, 5)


@pytest.mark.parametrize("index", [-1, N_TOKENS])
def test_a_row_outside_the_cache_is_refused(tmp_path, index):
    with pytest.raises(IndexError, match="rows are 0 to 102"):
        make_cache(tmp_path).rows(EARLY, np.array([3, index]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_statistics_are_those_of_the_stored_rows_in_float64(tmp_path, dtype):
    cache = make_cache(tmp_path, dtype)
    for hook, x in Planted().x.items():
        stored = x.to(dtype).double().numpy()
        # A float64 sum of 103 rows, in any order, is good to about 1e-15.
        np.testing.assert_allclose(cache.mean(hook), stored.mean(axis=0), rtol=1e-13)
        square_norm = (stored**2).sum(axis=1).mean()
        assert cache.mean_square_norm(hook) == pytest.approx(square_norm, rel=1e-13)


def test_how_rows_are_divided_over_calls_does_not_matter(tmp_path):
    folders = []
    for step in (1, 50):
        with make_writer(tmp_path / str(step)) as writer:
            Planted().append_to(writer, 0, N_TOKENS, step)
            folders.append(writer.finish({}))
    assert folder_bytes(folders[0]) == folder_bytes(folders[1])


def anonymous_bytes() -> int:
    """Memory of this process that is not a file's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_reading_does_not_load_whole_shards_into_memory(tmp_path):
    with CacheWriter(tmp_path, {}, {"wide": 1024}, 2**15, torch.float32) as writer:
        zeros = torch.zeros(2**15, dtype=torch.int64)
        writer.append({"wide": torch.ones(2**15, 1024)}, zeros, zeros, Place())
        cache = ActivationCache(writer.finish({}))
    before = anonymous_bytes()
    cache.rows("wide", np.array([5, 20_000]))
    assert anonymous_bytes() - before < 2**27 / 8  # the shard has 2**27 bytes


def test_a_killed_writer_continued_equals_an_unbroken_one_to_the_bit(tmp_path):
    unbroken = make_cache(tmp_path / "unbroken", torch.bfloat16)
    planted = Planted()
    killed = make_writer(tmp_path / "killed", torch.bfloat16)
    planted.append_to(killed, 0, 66)
    killed.close()  # what the system does to the lock of a process that died
    with make_writer(tmp_path / "killed", torch.bfloat16) as writer:
        assert writer.n_tokens_done == 60
        planted.append_to(writer, writer.n_tokens_done, N_TOKENS, step=11)
        continued = ActivationCache(writer.finish({}))
    assert folder_bytes(continued.folder) == folder_bytes(unbroken.folder)
    for hook in HOOKS:
        assert torch.equal(continued.mean(hook), unbroken.mean(hook))
        assert continued.mean_square_norm(hook) == unbroken.mean_square_norm(hook)


def test_a_process_killed_while_it_harvests_leaves_no_cache_and_no_lock(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path

        sys.path.insert(0, sys.argv[2])
        from test_cache import Planted, make_writer

        writer = make_writer(Path(sys.argv[1]))
        Planted().append_to(writer, 0, 50)
        print("ready", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match=f"process {process.pid} is harvesting into"):
            make_writer(tmp_path)
        process.kill()
    assert open_cache(tmp_path, SETTINGS) is None
    with make_writer(tmp_path) as writer:
        assert writer.n_tokens_done == 40


def test_what_a_killed_writer_left_unfinished_is_removed(tmp_path):
    killed = make_writer(tmp_path)
    Planted().append_to(killed, 0, 25)
    killed.close()
    leftover = killed.folder / EARLY / ".shard_00001.safetensors.123.tmp"
    leftover.write_bytes(b"half a shard")
    make_writer(tmp_path).close()
    assert not leftover.exists()


def test_a_harvest_is_not_continued_with_another_shape(tmp_path):
    killed = make_writer(tmp_path, torch.bfloat16)
    Planted().append_to(killed, 0, 25)
    killed.close()
    with pytest.raises(UserError, match="dtype is 'bfloat16', not 'float32'"):
        make_writer(tmp_path, torch.float32)


def test_a_second_writer_is_told_who_holds_the_folder_now(tmp_path):
    make_writer(tmp_path).close()
    with make_writer(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} is harv"):
        make_writer(tmp_path)


def test_the_folder_is_free_after_the_with_block(tmp_path):
    with make_writer(tmp_path) as first, pytest.raises(KeyboardInterrupt):
        raise KeyboardInterrupt
    make_writer(tmp_path).close()
    assert first.n_tokens_done == 0


def test_a_complete_cache_is_not_written_again(tmp_path):
    make_cache(tmp_path)
    with pytest.raises(UserError, match="is a complete cache"):
        make_writer(tmp_path)


def test_a_text_that_ends_early_makes_a_smaller_cache(tmp_path):
    with make_writer(tmp_path) as writer:
        Planted().append_to(writer, 0, 31)
        assert ActivationCache(writer.finish({})).n_tokens == 31


def test_a_harvest_without_rows_is_refused(tmp_path):
    with make_writer(tmp_path) as writer, pytest.raises(UserError, match="no activations"):
        writer.finish({})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused(tmp_path, value):
    planted = Planted()
    planted.x[LATE][37, 2] = value
    with make_writer(tmp_path) as writer:
        with pytest.raises(UserError, match=f"{LATE} .* not finite in rows 20 to 40"):
            planted.append_to(writer, 0, N_TOKENS)
        assert writer.n_rows_written == 20


def test_the_cache_of_some_settings_is_found_again_and_no_other(tmp_path):
    make_cache(tmp_path)
    assert open_cache(tmp_path, dict(reversed(SETTINGS.items()))).n_tokens == N_TOKENS
    assert open_cache(tmp_path, SETTINGS | {"context": 32}) is None


def test_a_cache_made_for_other_settings_is_refused_with_the_differences(tmp_path):
    folder = make_cache(tmp_path).folder
    asked = SETTINGS | {"context": 32, "dtype": "float32"}
    with pytest.raises(UserError) as error:
        ActivationCache(folder, asked)
    assert "context is 16, not 32; dtype is None, not 'float32'" in str(error.value)
    assert "lm" not in str(error.value).split("(")[1].split(")")[0]


def test_a_folder_without_a_manifest_is_no_cache(tmp_path):
    with pytest.raises(UserError, match=r"manifest.json does not exist"):
        ActivationCache(tmp_path)


def test_an_unknown_hook_is_refused_with_those_held(tmp_path):
    with pytest.raises(UserError, match=f"'blocks.2' ?.* it holds {EARLY}, {LATE}"):
        make_cache(tmp_path).rows("blocks.2", np.array([0]))


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "missing": lambda path: path.unlink(),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"more"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", [f"{LATE}/shard_00002", "tokens/shard_00000", f"{EARLY}/statistics"]
)
def test_a_file_that_is_not_whole_is_named_when_the_cache_is_opened(tmp_path, damage, name):
    folder = make_cache(tmp_path).folder
    DAMAGES[damage](folder / f"{name}.safetensors")
    with pytest.raises(UserError, match=f"{name}.* delete the folder {folder} to harvest again"):
        ActivationCache(folder)


@pytest.mark.parametrize(
    "name", [f"{LATE}/shard_00005", "tokens/shard_00001", f"{EARLY}/statistics"]
)
def test_one_flipped_bit_is_found_by_verifying(tmp_path, name):
    folder = make_cache(tmp_path).folder
    path = folder / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ActivationCache(folder)
    with pytest.raises(UserError, match=f"{name}.*checksum.*delete the folder"):
        ActivationCache(folder, verify=True)


def test_a_shard_with_a_broken_header_is_named_when_it_is_read(tmp_path):
    cache = make_cache(tmp_path)
    path = cache.folder / EARLY / "shard_00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match="shard_00001.* cannot be read"):
        cache.rows(EARLY, np.array([25]))


def test_a_harvest_goes_on_before_the_first_damaged_shard(tmp_path, capsys):
    killed = make_writer(tmp_path)
    Planted().append_to(killed, 0, 70)
    killed.close()
    assert killed.n_rows_written >= 60
    path = killed.folder / LATE / "shard_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with make_writer(tmp_path) as writer:
        assert writer.n_tokens_done == 20
    assert "shard_00001" in capsys.readouterr().err


def test_a_cache_holds_what_was_foretold(tmp_path):
    n_foretold = cache_bytes(N_TOKENS, HOOKS, torch.bfloat16)
    assert n_foretold == N_TOKENS * ((12 + 5) * 2 + 4 + 4)
    cache = make_cache(tmp_path, torch.bfloat16, shard_tokens=N_TOKENS)
    shards = cache.folder.rglob("shard_*")
    n_bytes = sum(path.stat().st_size for path in shards)
    assert n_foretold < n_bytes < n_foretold + 3 * 1000  # three files' headers and sums


def pretend_free(monkeypatch, n_bytes: int) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - n_bytes, n_bytes)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)


def test_the_size_is_stated_before_writing(tmp_path, monkeypatch, capsys):
    pretend_free(monkeypatch, 10**10)
    check_space(tmp_path / "not" / "there", 5_800_000_000)
    assert capsys.readouterr().err.startswith("writing 5.80 GB of activations to ")


@pytest.mark.parametrize(("n_free", "fits"), [(6_000, True), (5_999, False)])
def test_the_disk_must_hold_the_cache_and_the_margin(tmp_path, monkeypatch, n_free, fits):
    pretend_free(monkeypatch, n_free)
    if fits:
        check_space(tmp_path, n_bytes=5_000, margin=1_000)
    else:
        with pytest.raises(UserError, match="do not fit"):
            check_space(tmp_path, n_bytes=5_000, margin=1_000)


def test_a_full_disk_is_refused_before_anything_is_written_and_the_lock_released(
    tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        pretend_free(patch, 1000)
        with pytest.raises(UserError) as refusal:
            make_writer(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    make_writer(tmp_path).close()
    assert "0.00 GB free" in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_source_delivers_the_rows_its_indices_name_in_float32(tmp_path, dtype):
    cache = make_cache(tmp_path, dtype)
    source = CachedActivations(cache, LATE, batch_tokens=13, seed=4)
    for number, batch in zip(range(20), source, strict=False):
        expected = Planted().x[LATE].to(dtype).float()[source.indices(number)]
        assert batch.dtype == torch.float32
        assert torch.equal(batch, expected)


def test_the_order_does_not_depend_on_the_shard_size(tmp_path):
    batches = [
        first_batches(CachedActivations(cache, EARLY, batch_tokens=13, seed=4), 20)
        for cache in (make_cache(tmp_path / f"{n}", shard_tokens=n) for n in (9, 64, 1000))
    ]
    assert torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])


def test_disk_and_memory_deliver_the_same_batches(tmp_path):
    cached = CachedActivations(make_cache(tmp_path), EARLY, batch_tokens=13, seed=4, n_epochs=3)
    in_memory = TensorActivations(Planted().x[EARLY], batch_tokens=13, seed=4, n_epochs=3)
    assert torch.equal(torch.stack(list(cached)), torch.stack(list(in_memory)))


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_a_source_resumed_from_json_equals_one_unbroken(tmp_path, prefetch):
    cache = make_cache(tmp_path)

    def make(seed: int) -> CachedActivations:
        return CachedActivations(cache, EARLY, batch_tokens=13, seed=seed, prefetch=prefetch)

    unbroken = first_batches(make(seed=4), 30)
    broken = make(seed=4)
    for number, _ in zip(range(13), broken, strict=False):
        if number == 10:
            write_json(tmp_path / "state.json", broken.state_dict())  # batch 10 is delivered
    resumed = make(seed=99)
    resumed.load_state_dict(read_json(tmp_path / "state.json"))
    assert torch.equal(first_batches(resumed, 19), unbroken[11:])


def test_the_reading_thread_ends_with_the_loop(tmp_path):
    source = CachedActivations(make_cache(tmp_path), EARLY, batch_tokens=13, seed=4)
    before = threading.active_count()
    for _ in source:
        assert threading.active_count() == before + 1
        break
    assert threading.active_count() == before


def test_an_error_in_the_reading_thread_reaches_the_loop(tmp_path):
    cache = make_cache(tmp_path)
    source = CachedActivations(cache, EARLY, batch_tokens=13, seed=4)
    (cache.folder / EARLY / "shard_00003.safetensors").unlink()
    with pytest.raises(UserError, match="shard_00003"):
        first_batches(source, 8)


@pytest.mark.gpu
def test_batches_on_an_accelerator_are_those_on_the_cpu(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: pinned, asynchronous copies cannot be tried")
    cache = make_cache(tmp_path, torch.bfloat16)
    on_cpu = CachedActivations(cache, EARLY, batch_tokens=13, seed=4)
    on_device = CachedActivations(cache, EARLY, batch_tokens=13, seed=4, device="cuda")
    assert torch.equal(first_batches(on_device, 50).cpu(), first_batches(on_cpu, 50))

"""Real small disks that are full or read-only: a tmpfs each, which only root may mount."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_faults import CountedRows, contents, open_run, train, trainer_and_source
from test_faults import shards_of_100 as shards_of_100  # a fixture

from sparse_coding.checkpoint import load_run, save_run
from sparse_coding.config import RunConfig
from sparse_coding.errors import UserError
from sparse_coding.formats.saelens import save_saelens
from sparse_coding.harvest import harvest_to_cache
from sparse_coding.settings import checked

PAGE = 4096


class Disk(NamedTuple):
    """A file system of its own."""

    folder: Path

    def mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)

    @property
    def n_free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self, n_left: int = 0) -> Path:
        """Another user's file, which leaves so many bytes."""
        filler = self.folder / "filler"
        filler.write_bytes(b"x" * (self.n_free - n_left))
        assert self.n_free == n_left
        return filler


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    disk.folder.mkdir()
    try:
        disk.mount("size=1m")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {getattr(error, 'stderr', error)!r}")
    yield disk
    subprocess.run(["umount", "-l", str(disk.folder)], check=True)


def test_a_cache_that_fills_the_disk_is_gone_on_with_when_there_is_room(
    disk, tmp_path, shards_of_100, monkeypatch
):
    monkeypatch.setattr("sparse_coding.cache.check_space", lambda *_: None)  # there was room then
    filler = disk.fill(n_left=10 * PAGE)
    with pytest.raises(UserError, match="cannot be written: .*No space left"):
        harvest_to_cache(CountedRows(), disk.folder, {}, 500, "float32")
    whole = contents(disk.folder)
    assert not list(disk.folder.rglob("*.tmp"))
    filler.unlink()
    caches = [
        harvest_to_cache(CountedRows(), root, {}, 500, "float32")
        for root in (disk.folder, tmp_path)
    ]
    assert contents(caches[0].folder) == contents(caches[1].folder)
    assert 0 < len(whole) < len(contents(disk.folder))


@pytest.mark.parametrize("n_pages_less", [0, 2])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_it(disk, n_pages_less):
    """Not even the numbers fit; or they do, and the header is too much."""
    parts = trainer_and_source()
    first = save_run(disk.folder / "run", 10, train(parts, 10), keep=1)
    n_bytes = first.stat().st_size
    filler = disk.fill(n_left=(n_bytes - 1) // PAGE * PAGE - n_pages_less * PAGE)
    line = "no space for a checkpoint" if n_pages_less else "cannot be written: .*No space left"
    with pytest.raises(UserError, match=line):
        save_run(disk.folder / "run", 20, train(parts, 10), keep=1)
    assert list((disk.folder / "run").iterdir()) == [first]
    resumed = trainer_and_source()
    assert load_run(disk.folder / "run", resumed) == 10
    filler.unlink()
    assert load_run(disk.folder / "run", resumed) == 10
    save_run(disk.folder / "run", 20, train(resumed, 10), keep=1)
    states = [part["one"].state_dict() for part in (resumed, parts)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_log_that_fills_the_disk_loses_no_line_that_was_whole(disk):
    run = open_run(disk.folder)
    filler = disk.fill(n_left=PAGE)
    step = 0
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: No space left"):
        for step in range(1000):
            run.log([{"step": step, "name": "a" * 50}])
    run._lock_file.close()
    filler.unlink()
    run = open_run(disk.folder, resume=True)
    run.cut_log(step - 1)
    run.log([{"step": step}])
    lines = run.metrics.read_text().splitlines()
    assert [line.partition(",")[0] for line in lines[:-1]] == [
        f'{{"step": {i}' for i in range(step)
    ]
    assert step > 40 and lines[-1] == f'{{"step": {step}}}'


def test_a_read_only_folder_is_refused_before_any_work_whoever_asks(disk, shards_of_100):
    sae = trainer_and_source()["one"].lanes[0].sae
    disk.mount("remount,ro")
    with pytest.raises(UserError, match="--output .* is not yours to write"):
        checked(RunConfig(output=disk.folder / "new"))
    line = "cannot be written: Read-only file system"
    with pytest.raises(UserError, match=line):
        open_run(disk.folder)
    with pytest.raises(UserError, match=line):
        harvest_to_cache(CountedRows(), disk.folder, {}, 500, "float32")
    with pytest.raises(UserError, match=line):
        save_saelens(sae, disk.folder / "sae", metadata={})
    with pytest.raises(UserError, match=line):
        save_run(disk.folder / "run", 1, trainer_and_source(), keep=1)

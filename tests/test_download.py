"""One file from a server on this machine that breaks off, lies and changes its mind."""

import hashlib
import json
from pathlib import Path

import pytest

from pretrained import download
from pretrained.download import Remote
from tests import file_server
from tests.file_server import CONTENT, PATH, error_of

offline, quiet, site = file_server.offline, file_server.quiet, file_server.site


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_alone(site, tmp_path):
    remote = Remote(site.url + PATH, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert download.download(remote, tmp_path / "w.bin").read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["w.bin"]
    assert "range" not in site.asked(PATH)[0]


def test_a_download_that_breaks_off_continues_where_it_was(site, tmp_path):
    site.cut[PATH] = [40_000, 30_000]
    download.download(Remote(site.url + PATH), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == CONTENT
    first, second, third = site.asked(PATH)
    etag = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    assert "range" not in first
    assert (second["range"], second["if-range"]) == ("bytes=40000-", etag)
    assert (third["range"], third["if-range"]) == ("bytes=70000-", etag)


def test_another_command_continues_too(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    site.cut[PATH] = [40_000]
    message = error_of(download.download, Remote(site.url + PATH), tmp_path / "w.bin")
    assert "broke off after 40,000 bytes" in message and "the same command goes on" in message
    assert not (tmp_path / "w.bin").exists()
    download.download(Remote(site.url + PATH), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == CONTENT
    assert site.asked(PATH)[1]["range"] == "bytes=40000-"


@pytest.mark.parametrize("minds_if_range", (True, False))
def test_a_file_that_changed_meanwhile_begins_anew(site, tmp_path, monkeypatch, minds_if_range):
    site.minds_if_range = minds_if_range
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    site.cut[PATH] = [40_000]
    error_of(download.download, Remote(site.url + PATH), tmp_path / "w.bin")
    site.files[PATH] = changed = CONTENT[::-1]
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    download.download(Remote(site.url + PATH, len(changed)), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == changed
    assert site.asked(PATH)[1]["range"] == "bytes=40000-"  # asked for the rest, was given all


@pytest.mark.parametrize("missing", ("knows_ranges", "has_etag"))
def test_a_server_that_cannot_continue_is_asked_for_all_of_it(site, tmp_path, missing):
    setattr(site, missing, False)
    site.cut[PATH] = [40_000]
    download.download(Remote(site.url + PATH), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == CONTENT
    assert ("range" in site.asked(PATH)[1]) == (missing == "knows_ranges")


def test_a_download_that_was_killed_at_its_end_is_not_repeated(site, tmp_path):
    (tmp_path / ".w.bin.part").write_bytes(CONTENT)
    etag = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    (tmp_path / ".w.bin.part.json").write_text(json.dumps({"version": etag}))
    download.download(Remote(site.url + PATH), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == CONTENT
    assert len(site.requests) == 1 and leftovers(tmp_path) == ["w.bin"]


@pytest.mark.parametrize(
    "wrong", ({"sha256": "0" * 64}, {"git_sha1": "0" * 40}, {"size": 99}), ids=str
)
def test_a_file_that_is_not_what_is_published_does_not_stay(site, tmp_path, wrong):
    message = error_of(download.download, Remote(site.url + PATH, **wrong), tmp_path / "w.bin")
    assert str(next(iter(wrong.values()))) in message
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "message"),
    ((404, "does not exist"), (403, "asks for permission"), (401, "hf auth login")),
)
def test_a_refusal_is_final_and_one_line(site, tmp_path, status, message):
    site.status[PATH] = [status]
    assert message in error_of(download.download, Remote(site.url + PATH), tmp_path / "w.bin")
    assert len(site.requests) == 1


def test_a_busy_server_is_asked_again(site, tmp_path):
    site.status[PATH] = [503, 429]
    download.download(Remote(site.url + PATH), tmp_path / "w.bin")
    assert (tmp_path / "w.bin").read_bytes() == CONTENT


def test_a_size_is_what_is_published_or_what_the_server_states(site):
    url = site.url + PATH
    assert download.stated_size(Remote(url)) is None  # this server knows no HEAD
    site.knows_head = True
    assert download.stated_size(Remote(url)) == len(CONTENT)
    assert download.stated_size(Remote(url, 7)) == 7
    assert download.stated_size(Remote(f"{site.url}/gone")) is None
    assert len(site.requests) == 2 and not site.asked(PATH)


def test_the_size_of_what_is_out_of_reach_is_unknown(offline):
    assert download.stated_size(Remote("http://127.0.0.1:1/w.bin")) is None


def test_a_full_disk_is_foreseen(site, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    message = error_of(download.download, Remote(site.url + PATH), tmp_path / "w.bin")
    assert "needs 100,003 bytes" in message and "1,000 free" in message

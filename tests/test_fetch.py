"""Fetching releases from a server on this machine that breaks off, lies and attacks."""

import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pretrained import catalogue, fetch
from pretrained.catalogue import Dictionary, Release, find_release, releases
from tests import file_server
from tests.file_server import COMMIT, CONTENT, TOKEN, Site, error_of, serving

hub, offline, quiet, site = (
    file_server.hub,
    file_server.offline,
    file_server.quiet,
    file_server.site,
)
ROOT = Path(__file__).parents[1]


# --- a release of plain files ------------------------------------------------------------------


def plain(site: Site, **facts) -> Release:
    site.files |= {
        f"/sets/{layer}/10_64/{name}": f"{layer} {name}".encode()
        for layer in ("mlp_out_layer0", "mlp_out_layer1")
        for name in ("ae.pt", "config.json")
    }
    dictionaries = tuple(
        Dictionary(f"mlp_out_layer{i}", f"mlp_out_layer{i}/10_64", f"blocks.{i}.hook_mlp_out")
        for i in range(2)
    )
    entry = {"files": ("ae.pt", "config.json"), "dictionaries": dictionaries} | facts
    return Release("old-set", "url", "", f"{site.url}/sets/", **entry)


def test_the_older_layout_is_fetched_one_dictionary_at_a_time(site, tmp_path):
    release = plain(site)
    (folder,) = fetch.fetch(release, release.choose([], [1], []), tmp_path)
    assert folder == tmp_path / "old-set/mlp_out_layer1/10_64"
    assert (folder / "ae.pt").read_bytes() == b"mlp_out_layer1 ae.pt"
    assert len(site.requests) == 2
    fetch.fetch(release, release.choose([], [1], []), tmp_path)
    assert len(site.requests) == 2  # from the cache
    (folder / "ae.pt").write_bytes(b"damaged")
    assert not fetch.Store(tmp_path / "old-set").has("mlp_out_layer1/10_64")


def test_files_put_there_by_hand_are_used(site, tmp_path):
    release = plain(site)
    folder = tmp_path / "old-set/mlp_out_layer0/10_64"
    folder.mkdir(parents=True)
    for name in release.files:
        (folder / name).write_text("by hand")
    assert fetch.fetch(release, release.choose(["mlp_out_layer0"], [], []), tmp_path) == [folder]
    assert site.requests == []


def test_without_a_network_it_says_what_to_put_where(site, offline, tmp_path):
    release = plain(site)
    message = error_of(fetch.fetch, release, release.choose([], [0], []), tmp_path)
    url = f"{site.url}/sets/mlp_out_layer0/10_64/ae.pt"
    assert f"save {url} as {tmp_path / 'old-set/mlp_out_layer0/10_64/ae.pt'}" in message


def test_a_closed_port_fails_at_once(tmp_path):
    with serving(Site()) as gone:
        release = plain(gone)
    message = error_of(fetch.fetch, release, release.choose([], [0], []), tmp_path)
    assert "is out of reach" in message and "By hand: save" in message


def test_a_second_process_is_turned_away(site, tmp_path):
    release = plain(site)
    with fetch.Store(tmp_path / "old-set").locked():
        message = error_of(fetch.fetch, release, release.choose([], [0], []), tmp_path)
    assert "being fetched by another process" in message


def test_what_is_there_is_used_without_a_lock(site, tmp_path):
    release = plain(site)
    chosen, store = release.choose([], [0], []), fetch.Store(tmp_path / "old-set")
    places = fetch.fetch(release, chosen, tmp_path)
    with store.locked():
        assert fetch.fetch(release, chosen, tmp_path) == places
    (store.folder / fetch.LOCK).unlink()
    assert fetch.fetch(release, chosen, tmp_path) == places
    assert not (store.folder / fetch.LOCK).exists()  # nothing was written


def test_plain_files_have_the_sizes_that_the_server_states(site, tmp_path):
    site.knows_head = True
    release = plain(site)
    n_bytes = len(b"mlp_out_layer0 ae.pt") + len(b"mlp_out_layer0 config.json")
    chosen, little = release.choose([], [0], []), (n_bytes - 1) / 1e9
    message = error_of(fetch.fetch, release, chosen, tmp_path, little)
    assert "--layer or --file, or allow it with --max-gb 1" in message
    assert [method for method, _, _ in site.requests] == ["HEAD", "HEAD"]
    fetch.fetch(release, chosen, tmp_path, n_bytes / 1e9)


@pytest.mark.parametrize("path", ("../../evil", "/etc/passwd", "a\\b"))
def test_a_file_outside_the_release_cannot_be_named(site, tmp_path, path):
    release = plain(site)
    message = error_of(fetch.fetch, release, release.choose([], [], [path]), tmp_path)
    assert "could leave its folder" in message
    assert site.requests == []


# --- a release in one archive ------------------------------------------------------------------


def zipped(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


INSIDE = "dictionaries/pythia-70m-deduped/mlp_out_layer0/10_32768"
ARCHIVE = zipped({f"{INSIDE}/ae.pt": CONTENT, f"{INSIDE}/config.json": b"{}"})


def in_archive(**facts) -> Release:
    dictionaries = (Dictionary("mlp_out_layer0", INSIDE, "blocks.0.hook_mlp_out"),)
    entry = {"files": ("ae.pt", "config.json"), "archive": "set.zip", "dictionaries": dictionaries}
    return Release("sm", "hub", "", "owner/saes", **(entry | facts))


def test_the_newer_layout_is_fetched_resumed_and_unpacked_once(hub, tmp_path):
    hub.repos["owner/saes"] = {"set.zip": ARCHIVE}
    hub.cut["/cdn/owner/saes/set.zip"] = [1000]
    release = in_archive()
    (folder,) = fetch.fetch(release, release.dictionaries, tmp_path)
    assert (folder / "ae.pt").read_bytes() == CONTENT
    assert not (tmp_path / "sm/set.zip").exists()
    first, second = hub.asked("/cdn/owner/saes/set.zip")
    assert second["range"] == "bytes=1000-"
    n = len(hub.requests)
    fetch.fetch(release, release.dictionaries, tmp_path)
    assert len(hub.requests) == n


def test_the_login_goes_to_the_hub_and_not_to_where_it_redirects(hub, tmp_path):
    hub.repos["owner/saes"] = {"set.zip": ARCHIVE}
    fetch.fetch(in_archive(), in_archive().dictionaries, tmp_path)
    (asked,) = hub.asked(f"/owner/saes/resolve/{COMMIT}/set.zip")
    (redirected,) = hub.asked("/cdn/owner/saes/set.zip")
    assert asked["authorization"] == f"Bearer {TOKEN}"
    assert "authorization" not in redirected
    written = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert not any(TOKEN.encode() in content for content in written)


def test_a_published_hash_outweighs_the_hubs(hub, tmp_path):
    hub.repos["owner/saes"] = {"set.zip": ARCHIVE}
    release = in_archive(sha256="0" * 64)
    assert "0" * 64 in error_of(fetch.fetch, release, release.dictionaries, tmp_path)
    assert not (tmp_path / "sm/set.zip").exists() and not (tmp_path / "sm/dictionaries").exists()


def test_a_malicious_archive_leaves_nothing_outside_or_inside(hub, tmp_path):
    evil = zipped({f"{INSIDE}/config.json": b"{}", "../../evil.txt": b"gotcha"})
    hub.repos["owner/saes"] = {"set.zip": evil}
    message = error_of(fetch.fetch, in_archive(), in_archive().dictionaries, tmp_path / "a/b")
    assert "could leave its folder" in message
    assert not list(tmp_path.rglob("evil.txt")) and not list(tmp_path.rglob("config.json"))


@pytest.mark.parametrize("name", ("fetched.json", ".lock", "Fetched.JSON", ".lock/a"))
def test_an_archive_that_would_replace_the_record_is_refused(hub, tmp_path, name):
    hub.repos["owner/saes"] = {"set.zip": zipped({f"{INSIDE}/ae.pt": CONTENT, name: b"[]"})}
    message = error_of(fetch.fetch, in_archive(), in_archive().dictionaries, tmp_path)
    assert f"{name!r} would replace a file that is not the archive's" in message
    assert {path.name for path in (tmp_path / "sm").iterdir()} == {".lock", "set.zip"}


def test_an_archive_fetched_meanwhile_is_not_fetched_again(hub, tmp_path, monkeypatch):
    hub.repos["owner/saes"] = {"set.zip": ARCHIVE}
    release, missing = in_archive(), fetch._missing
    fetch.fetch(release, release.dictionaries, tmp_path)
    n, before = len(hub.requests), [release.dictionaries]  # what was missing before the lock
    monkeypatch.setattr(fetch, "_missing", lambda *a: before.pop() if before else missing(*a))
    fetch.fetch(release, release.dictionaries, tmp_path)
    assert len(hub.requests) == n and not before


def test_a_large_archive_is_not_fetched_unasked(hub, tmp_path):
    hub.repos["owner/saes"] = {"set.zip": ARCHIVE}
    release, little = in_archive(), (len(ARCHIVE) - 1) / 1e9
    message = error_of(fetch.fetch, release, release.dictionaries, tmp_path, little)
    assert "GB; allow it with --max-gb 1" in message
    assert not any(path.startswith("/cdn") for _, path, _ in hub.requests)
    (tmp_path / "sm/set.zip").write_bytes(ARCHIVE)  # by hand: nothing is left to fetch
    fetch.fetch(release, release.dictionaries, tmp_path, little)


@pytest.mark.parametrize("unpacked", (False, True))
def test_an_archive_put_there_by_hand_needs_no_network(offline, tmp_path, unpacked):
    release, folder = in_archive(), tmp_path / "sm"
    message = error_of(fetch.fetch, release, release.dictionaries, tmp_path)
    assert f"set.zip as {folder / 'set.zip'}" in message
    if unpacked:
        zipfile.ZipFile(io.BytesIO(ARCHIVE)).extractall(folder)
    else:
        (folder / "set.zip").write_bytes(ARCHIVE)
    (place,) = fetch.fetch(release, release.dictionaries, tmp_path)
    assert (place / "ae.pt").read_bytes() == CONTENT


# --- a release of folders on the hub -----------------------------------------------------------

LENS = {
    "8/cfg.json": b'{"d_in": 12}',
    "8/sae_weights.safetensors": CONTENT,
    "8/sparsity.safetensors": b"s" * 80,
    "8/optimizer.pt": b"large",
    "9/cfg.json": b"{}",
    "README.md": b"hello",
}
FILES = ("cfg.json", "sae_weights.safetensors")


def on_hub(**facts) -> Release:
    dictionaries = (Dictionary("eight", "8", "blocks.8.hook_resid_pre"), Dictionary("nine", "9"))
    entry = {"files": FILES, "optional": ("sparsity.safetensors",), "dictionaries": dictionaries}
    return Release("lens", "hub", "", "owner/lens", **(entry | facts))


def test_a_folder_of_the_hub_is_fetched_without_what_nobody_needs(hub, tmp_path):
    hub.repos["owner/lens"] = LENS
    (folder,) = fetch.fetch(on_hub(), on_hub().choose(["eight"], [], []), tmp_path)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        name: LENS[f"8/{name}"] for name in (*FILES, "sparsity.safetensors")
    }
    record = json.loads((tmp_path / "lens/fetched.json").read_text())["8"]
    assert COMMIT in record["8/cfg.json"]["url"]
    assert record["8/cfg.json"]["sha256"] == hashlib.sha256(LENS["8/cfg.json"]).hexdigest()


def test_a_small_file_is_checked_by_gits_hash(hub, tmp_path):
    hub.repos["owner/lens"] = LENS
    hub.files["/cdn"] = b""
    hub.content = lambda _: b'{"d_in": 99}'  # as long as the true one
    message = error_of(fetch.fetch, on_hub(), on_hub().choose(["eight"], [], []), tmp_path)
    assert "came with git_sha1" in message


def test_any_repository_and_any_path_can_be_named(hub, tmp_path):
    hub.repos["owner/lens"] = LENS
    release = find_release("owner/lens")
    assert fetch.fetch(release, release.choose([], [], ["README.md"]), tmp_path) == [
        tmp_path / "owner--lens/README.md"
    ]
    (whole,) = fetch.fetch(release, release.choose([], [], []), tmp_path)
    assert {p.relative_to(whole).as_posix() for p in whole.rglob("*.*") if p.name in
            {Path(name).name for name in LENS}} == set(LENS)  # fmt: skip


@pytest.mark.parametrize("release", (on_hub(), find_release("owner/lens")), ids=("known", "any"))
def test_a_folder_put_there_by_hand_is_used_and_verified_later(
    hub, tmp_path, monkeypatch, release
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    chosen, folder = [Dictionary("eight", "8")], tmp_path / release.name / "8"
    message = error_of(fetch.fetch, release, chosen, tmp_path)
    assert f"{hub.url}/owner/lens/" in message and str(folder) in message
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_text('{"d_in": 99}')  # cfg.json has its true size
    assert fetch.fetch(release, chosen, tmp_path) == [folder]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.repos["owner/lens"] = LENS
    fetch.fetch(release, chosen, tmp_path)
    assert (folder / "cfg.json").read_bytes() == LENS["8/cfg.json"]


@pytest.mark.parametrize(("first", "then"), (("8", "8"), ("8", ""), ("", "8")))
def test_a_folder_that_came_in_part_is_not_there_by_hand(hub, tmp_path, monkeypatch, first, then):
    from huggingface_hub import constants

    hub.repos["owner/lens"] = {f"8/{name}": LENS[f"8/{name}"] for name in FILES}
    release, weights = find_release("owner/lens"), "8/sae_weights.safetensors"
    hub.status[f"/cdn/owner/lens/{weights}"] = [403]
    error_of(fetch.fetch, release, [Dictionary("x", first)], tmp_path)
    place = tmp_path / "owner--lens" / weights
    assert place.with_name("cfg.json").is_file() and not place.exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = error_of(fetch.fetch, release, [Dictionary("x", then)], tmp_path)
    assert f"{weights} as {place}" in message and "cfg.json" not in message
    place.write_bytes(CONTENT)
    fetch.fetch(release, [Dictionary("x", then)], tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch.fetch(release, [Dictionary("x", then)], tmp_path)
    assert fetch.Store(tmp_path / "owner--lens").has(then)


def test_a_repositorys_own_record_does_not_replace_the_caches(hub, tmp_path):
    hub.repos["owner/copy"] = {"fetched.json": b"[]", ".lock": b"x", "a/fetched.json": b"{}"}
    release, store = find_release("owner/copy"), fetch.Store(tmp_path / "owner--copy")
    fetch.fetch(release, [], tmp_path)
    assert list(store.record()[""]) == ["a/fetched.json"]
    assert (store.folder / fetch.LOCK).read_bytes() == b""
    for name in ("fetched.json", ".lock/a", "FETCHED.json"):
        chosen = [Dictionary("x", name)]
        assert "the cache's own file" in error_of(fetch.fetch, release, chosen, tmp_path)


def test_more_than_expected_is_not_fetched_unasked(hub, tmp_path):
    hub.repos["owner/lens"] = LENS
    message = error_of(fetch.fetch, on_hub(), on_hub().choose(["eight"], [], []), tmp_path, 5e-5)
    assert "--max-gb" in message
    assert not any(path.startswith("/cdn") for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    ("names", "message"),
    (
        ({"names": ["eigth"]}, "has no dictionary eigth (nearest: eight)"),
        ({"layers": [3]}, "has no layer 3; known layers: [8]"),
    ),
)
def test_a_wrong_choice_names_the_near_ones(names, message):
    choice = {"names": [], "layers": [], "paths": []} | names
    assert message in error_of(lambda: on_hub().choose(**choice))


def test_wrong_names_on_the_hub_are_one_line(hub, tmp_path):
    hub.repos["owner/lens"] = LENS
    wrong = [Dictionary("x", "8/cfg.jsom")]
    assert "has no 8/cfg.jsom (nearest: 8/cfg.json" in error_of(
        fetch.fetch, find_release("owner/lens"), wrong, tmp_path
    )
    message = error_of(fetch.fetch, on_hub(), on_hub().choose(["nine"], [], []), tmp_path)
    assert "lacks 9/sae_weights.safetensors" in message
    gone = find_release("owner/gone")
    assert "has no public repository owner/gone" in error_of(fetch.fetch, gone, [], tmp_path)


@pytest.mark.parametrize("source", ("owner/lens/8", "lens/eight", "lens/8"))
def test_a_dictionary_has_one_name_for_other_programs(hub, tmp_path, monkeypatch, source):
    hub.repos["owner/lens"] = LENS
    known = {"lens": on_hub()}
    monkeypatch.setattr(fetch, "releases", lambda: known)
    monkeypatch.setattr(fetch, "find_release", lambda name: known.get(name) or find_release(name))
    folder = fetch.fetched(source, tmp_path)
    assert (folder / "cfg.json").read_bytes() == LENS["8/cfg.json"]
    assert fetch.fetched(str(folder), tmp_path) == folder


@pytest.mark.parametrize(
    ("source", "message"),
    (
        ("gpt2-small-res-jb", "is 13 dictionaries; name one as gpt2-small-res-jb/DICTIONARY"),
        ("gpt2-openai-v1/mlp_post_act/x", "(nearest: mlp_post_act/"),
        ("gpt2-small-res-jp", "(nearest: gpt2-small-res-jb"),
        ("tests/no/such/folder", "tests/no/such/folder does not exist"),
        ("/no/such/folder", "/no/such/folder does not exist"),
        ("owner/lens", "name one as owner/lens/DICTIONARY"),
    ),
)
def test_a_name_that_means_no_single_dictionary_is_refused(
    offline, tmp_path, monkeypatch, source, message
):
    monkeypatch.chdir(ROOT)
    assert message in error_of(fetch.fetched, source, tmp_path)


def test_a_cache_that_cannot_be_written_is_one_line(site, tmp_path):
    (tmp_path / "file").touch()
    release = plain(site)
    message = error_of(fetch.fetch, release, release.choose([], [0], []), tmp_path / "file")
    assert "cannot be written" in message


# --- what ships with the repository -----------------------------------------------------------


def test_the_embedded_dictionary_is_used_where_it_lies(tmp_path, monkeypatch):
    release = releases()["smollm2-135m-l12-small"]
    monkeypatch.setattr(fetch, "HERE", tmp_path)
    assert "part of the repository" in error_of(
        fetch.fetch, release, release.dictionaries, tmp_path / "cache"
    )
    folder = tmp_path / release.source
    folder.mkdir()
    for name in release.files:
        (folder / name).touch()
    assert fetch.fetch(release, release.dictionaries, tmp_path / "cache") == [folder]
    assert not (tmp_path / "cache").exists()


# --- the command line --------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"HF_HUB_OFFLINE": "1"} | environment
    command = [sys.executable, "-m", "pretrained.fetch", *arguments]
    return subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)


def test_the_command_fetches_from_the_hub_that_the_environment_names(site, tmp_path):
    site.repos["owner/lens"] = LENS
    environment = {"HF_ENDPOINT": site.url, "HF_HUB_OFFLINE": "0",
                   "SPARSE_CODING_PRETRAINED": str(tmp_path)}  # fmt: skip
    done = run("owner/lens", "--file", "8/", **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'owner--lens/8'}\n"
    assert (tmp_path / "owner--lens/8/sae_weights.safetensors").read_bytes() == CONTENT


def test_the_command_prints_the_table_and_refuses_in_one_line():
    done = run("--list")
    assert done.stdout == catalogue.release_table(releases().values())
    done = run("gpt2-smal-res-jb")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "(nearest: gpt2-small-res-jb" in done.stderr


def test_the_programs_start_without_the_heavy_packages():
    code = (
        "import sys, pretrained.fetch, pretrained.publish, pretrained.catalogue\n"
        "print(*{'torch', 'numpy', 'huggingface_hub', 'httpx2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_a_record_of_a_name_that_no_file_can_have_is_of_nothing_that_is_there(tmp_path):
    store = fetch.Store(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    store.enter("a", {"a.json": "https://example.org/a.json"})
    assert store.has("a")
    record = json.loads((tmp_path / fetch.RECORD).read_text())
    record["a"]["a" * 5000] = record["a"].pop("a.json")
    (tmp_path / fetch.RECORD).write_text(json.dumps(record))
    assert not store.has("a")

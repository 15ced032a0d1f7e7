"""Archives of strangers: what is honest unpacks, the odd is refused before a byte is written."""

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest

from pretrained.archive import Limits, safe_name, unpack
from sparse_coding.errors import UserError

HONEST = {
    "dictionaries/a/ae.pt": bytes(range(256)) * 40,
    "dictionaries/a/config.json": b'{"trainer": {}}',
    "readme.txt": b"",
}


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return path


def with_mode(path: Path, name: str, mode: int, content: bytes = b"/etc/passwd") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("honest.txt", b"first")
        info = zipfile.ZipInfo(name)
        info.external_attr = mode << 16
        archive.writestr(info, content)
    return path


def refusal(path: Path, folder: Path, limits: Limits = Limits()) -> str:  # noqa: B008
    """The one line that refuses an archive; nothing of it may have been written."""
    with pytest.raises(UserError) as error:
        unpack(path, folder, limits)
    assert "\n" not in str(error.value)
    assert not folder.exists() or not any(p.is_file() for p in folder.rglob("*"))
    return str(error.value)


@pytest.mark.parametrize(
    "method", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
)
def test_an_honest_archive_unpacks_byte_by_byte(tmp_path, method):
    found = unpack(make_zip(tmp_path / "a.zip", HONEST, method), tmp_path / "out")
    assert {p.relative_to(tmp_path / "out").as_posix(): p.read_bytes() for p in found} == HONEST
    everything = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert sorted(everything) == sorted(found)  # no temporary file is left


def test_entries_for_folders_are_no_files(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a/": b"", "a/b/": b"", "a/b/c.txt": b"x"})
    assert unpack(path, tmp_path / "out") == [tmp_path / "out/a/b/c.txt"]


@pytest.mark.parametrize(
    "name",
    ("../evil", "a/../../evil", "/evil", "a//evil", "./evil", "..\\evil", "C:\\evil", "C:evil",
     "a\\..\\..\\evil", "a/..", "line\nbreak", ""),
)  # fmt: skip
def test_a_path_that_could_leave_the_folder_is_refused(tmp_path, name):
    files = {"honest.txt": b"first", name: b"gotcha"}
    assert "could leave its folder" in refusal(make_zip(tmp_path / "a.zip", files), tmp_path / "o")
    assert not (tmp_path / "evil").exists()
    with pytest.raises(UserError, match="could leave its folder"):
        safe_name(name)


def test_a_name_with_a_null_character_is_judged_whole(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"evil.txt?hidden": b"x"})
    path.write_bytes(path.read_bytes().replace(b"evil.txt?hidden", b"evil.txt\0hidden"))
    assert "could leave its folder" in refusal(path, tmp_path / "out")


@pytest.mark.parametrize(
    "mode", (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
)
def test_a_link_or_device_is_refused(tmp_path, mode):
    path = with_mode(tmp_path / "a.zip", "link", mode | 0o777)
    assert "is a link or a device" in refusal(path, tmp_path / "out")


def test_a_file_with_unix_permissions_is_a_plain_file(tmp_path):
    path = with_mode(tmp_path / "a.zip", "program", stat.S_IFREG | 0o4777, b"x")
    _, program = unpack(path, tmp_path / "out")
    assert program.stat().st_mode & 0o7111 == 0  # neither executable nor setuid


def test_a_bomb_is_refused_by_its_ratio(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"zeros": bytes(20_000_000)})
    assert path.stat().st_size < 100_000
    assert "times its size; at most 100" in refusal(path, tmp_path / "out")


def test_a_bomb_that_lies_about_its_size_is_refused(tmp_path):
    content = bytes(3_000_000)
    data = make_zip(tmp_path / "a.zip", {"zeros": content}).read_bytes()
    lie = data.replace(struct.pack("<L", len(content)), struct.pack("<L", 100))
    assert lie != data
    (tmp_path / "a.zip").write_bytes(lie)
    assert "not a whole zip archive" in refusal(tmp_path / "a.zip", tmp_path / "out")


def test_limits_on_files_and_on_bytes(tmp_path):
    path = make_zip(tmp_path / "a.zip", {f"{i}.txt": b"12345" for i in range(11)})
    assert "holds 11 entries; at most 10" in refusal(path, tmp_path / "o", Limits(n_files=10))
    assert "unpacks to 55 bytes; at most 54" in refusal(path, tmp_path / "o", Limits(n_bytes=54))
    assert len(unpack(path, tmp_path / "o", Limits(n_files=11, n_bytes=55))) == 11


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", (("a", "a"), ("a", "A"), ("a", "a/b"), ("a/b", "a")))
def test_two_entries_in_one_place_are_refused(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    assert "in the way of another" in refusal(tmp_path / "a.zip", tmp_path / "out")


def test_an_encrypted_entry_is_refused(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"secret": b"x" * 30})
    data = bytearray(path.read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(header) + flags] |= 1
    path.write_bytes(data)
    assert "is encrypted" in refusal(path, tmp_path / "out")


@pytest.mark.parametrize("share", (0.0, 0.5, 0.9))
def test_a_truncated_archive_is_refused_in_one_line(tmp_path, share):
    path = make_zip(tmp_path / "a.zip", HONEST)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert "not a whole zip archive" in refusal(path, tmp_path / "out")


def test_a_damaged_entry_is_not_left_half_written(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a": bytes(range(250))}, zipfile.ZIP_STORED)
    path.write_bytes(path.read_bytes().replace(bytes(range(100, 120)), bytes(20)))
    assert "not a whole zip archive" in refusal(path, tmp_path / "out")


def test_what_no_zip_is_is_refused(tmp_path):
    (tmp_path / "a.zip").write_bytes(io.BytesIO(b"<html>not found</html>").getvalue())
    assert "not a whole zip archive" in refusal(tmp_path / "a.zip", tmp_path / "out")

"""PyTorch's .pt files: read as torch reads them, and never run; every hostile one is one line."""

import io
import os
import pickle
import tarfile
import zipfile

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.formats import unpickle as module
from sparse_coding.formats.unpickle import Inert, contents, read_checkpoint, write_state_dict

FORMS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before_1.6"])
STATE = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "k": torch.tensor(3, dtype=torch.int32),
}


class Foreign:
    """Saved under the name of a class of somebody else's."""


class Command:
    """What runs a shell command wherever pickle follows it."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "ae.pt"


def refusal(file, classes=()):
    """The one line in which reading is refused; it names the file."""
    with pytest.raises(UserError) as caught:
        read_checkpoint(file, classes)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


def write_zip(file, program, storages=(), compression=zipfile.ZIP_STORED):
    """What torch.save would write if its pickle were `program`."""
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/byteorder", "little")
        for i, storage in enumerate(storages):
            archive.writestr(f"a/data/{i}", storage)
        archive.writestr("a/version", "3\n")


def rewrite(file, old, new, part="data.pkl"):
    """Change the bytes of one part of a zip checkpoint."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            if name.endswith(part):
                assert old in content
                content = content.replace(old, new)
            archive.writestr(name, content)


@FORMS
def test_a_state_dict_is_read_bit_by_bit(is_zip, file):
    torch.save(STATE, file, _use_new_zipfile_serialization=is_zip)
    read = read_checkpoint(file)
    assert set(read) == set(STATE)
    for name, tensor in STATE.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


@FORMS
def test_a_modules_state_dict_is_read(is_zip, file):
    state = torch.nn.Linear(3, 2).state_dict()  # an OrderedDict that carries versions
    torch.save(state, file, _use_new_zipfile_serialization=is_zip)
    assert torch.equal(read_checkpoint(file)["weight"], state["weight"])


@FORMS
def test_an_object_comes_back_as_its_attributes_alone(is_zip, file):
    thing = Foreign()
    thing.encoder, thing.l1_alpha, thing.norm_encoder = torch.ones(2, 3), 1e-3, True
    torch.save([(thing, {"dict_size": 2})], file, _use_new_zipfile_serialization=is_zip)
    name = f"{Foreign.__module__}.Foreign"
    ((found, values),) = read_checkpoint(file, [name])
    assert isinstance(found, Inert)
    assert not isinstance(found, Foreign)
    assert type(found).foreign_name == name
    assert set(vars(found)) == {"encoder", "l1_alpha", "norm_encoder"}
    assert values == {"dict_size": 2}


def test_a_class_is_read_only_by_request(file):
    torch.save(Foreign(), file)
    assert f"asks to run {Foreign.__module__}.Foreign" in refusal(file)
    assert "asks to run" in refusal(file, ["some.other.Class"])


def test_the_permission_for_a_class_ends_with_the_call(file):
    before = set(torch.serialization.get_safe_globals())
    torch.save(Foreign(), file)
    read_checkpoint(file, [f"{Foreign.__module__}.Foreign"])
    assert set(torch.serialization.get_safe_globals()) == before


def test_contents_are_named_without_reading_a_tensor(file):
    torch.save(STATE, file)
    rewrite(file, b"", b"", part="data/0")
    found = contents(file)
    assert {"weight", "bias", "k"} <= found.strings
    assert "torch.BFloat16Storage" in found.names


def test_what_is_written_torch_reads(file):
    write_state_dict(file, {"w": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)).T})
    read = torch.load(file, weights_only=True)["w"]
    assert type(read) is torch.Tensor
    assert read.is_contiguous()
    assert torch.equal(read, torch.arange(6.0).reshape(2, 3).T)


def test_a_write_that_fails_leaves_the_old_file(file, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    write_state_dict(file, {"w": torch.ones(2)})
    monkeypatch.setattr(module.torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        write_state_dict(file, {"w": torch.zeros(2)})
    assert torch.equal(read_checkpoint(file)["w"], torch.ones(2))
    assert os.listdir(file.parent) == [file.name]


# Nothing runs.


@FORMS
def test_a_pickle_that_runs_a_command_is_refused_and_not_run(is_zip, file, tmp_path):
    trace = tmp_path / "trace"
    torch.save({"weight": Command(trace)}, file, _use_new_zipfile_serialization=is_zip)
    assert f"asks to run {os.system.__module__}.system" in refusal(file)
    torch.load(file, weights_only=False)  # the trap is armed: the careless reader falls into it
    assert trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_protocol_of_pickle_hides_a_command(protocol, file, tmp_path):
    program = pickle.dumps(Command(tmp_path / "trace"), protocol)
    write_zip(file, program)
    refusal(file)
    file.write_bytes(program)
    refusal(file)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cbuiltins\neval\nX\x05\x00\x00\x001 + 1\x85R.",
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",  # 2^44 bytes
        b"\x80\x02ctorch\nTensor\n\x8a\x06\x00\x00\x00\x00\x00\x10\x85R.",
        b"\x80\x02ctorch.hub\nload\n.",
        b"(S'touch trace'\nios\nsystem\n.",
    ],
)
def test_a_name_that_tensors_do_not_need_is_refused(program, file):
    write_zip(file, program)
    refusal(file)


# Nothing outgrows the file.


def test_a_tuple_doubled_fifty_times_is_refused(file):
    doubling = b"".join(b"q%ch%c\x86" % (i, i) for i in range(50))
    write_zip(file, b"\x80\x02})" + doubling + b"K\x01s.")  # as a key, it would be hashed
    assert "uses a tuple twice" in refusal(file)


def test_a_pickle_that_nests_too_deep_is_refused(file):
    write_zip(file, b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.")
    assert "more than 50000 instructions" in refusal(file)


def test_a_pickle_without_end_is_refused_by_its_size(file, monkeypatch):
    torch.save(STATE, file)
    monkeypatch.setattr(module, "MAX_PROGRAM_BYTES", 50)
    assert "has a pickle of" in refusal(file)


def test_a_file_beyond_the_limit_is_refused(file, monkeypatch):
    torch.save(STATE, file)
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    assert "at most 100 are read" in refusal(file)


def test_a_zip_bomb_is_refused(file):
    write_zip(file, b"\x80\x02}.", [bytes(10_000_000)], zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 20_000
    assert "is compressed" in refusal(file)


def test_two_programs_under_one_name_are_refused(file):
    write_zip(file, b"\x80\x02}.")
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("a/data.pkl", b"\x80\x02}.")
    assert "two files of one name" in refusal(file)


def test_a_tensor_larger_than_its_numbers_is_refused(file):
    torch.save({"w": torch.ones(1).expand(10**6, 10**6)}, file)
    assert "(1000000, 1000000) without its data" in refusal(file)


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (b"K\x06t", b"K\xc8t", "data.pkl"),  # a storage of 200 numbers
        (b"K\x02K\x03\x86", b"K\x02K\x63\x86", "data.pkl"),  # a shape of (2, 99)
        (b"\x00\x00\x80\x3f", b"", "data/0"),  # numbers are missing
    ],
)
def test_numbers_that_are_not_there_are_refused(old, new, part, file):
    torch.save({"w": torch.arange(6.0).reshape(2, 3)}, file)
    rewrite(file, old, new, part)
    assert "is damaged" in refusal(file)


# Damaged.


@FORMS
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.98])
def test_a_truncated_file_is_refused(is_zip, share, file):
    torch.save(STATE, file, _use_new_zipfile_serialization=is_zip)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert "is damaged" in refusal(file)


@pytest.mark.parametrize("content", [b"hello world\n" * 9, bytes(2000), b"PK\x03\x04" + bytes(99)])
def test_a_file_of_another_kind_is_refused(content, file):
    file.write_bytes(content)
    assert "no PyTorch checkpoint" in refusal(file)


def test_the_tar_form_of_torch_0_1_is_refused(file):
    with tarfile.open(file, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    assert "no PyTorch checkpoint" in refusal(file)


def test_a_missing_file_and_a_folder_are_named(file):
    assert "does not exist" in refusal(file)
    assert "does not exist" in refusal(file.parent)

"""Texts that stall, break off or hold garbage: one line each, and nothing is lost."""

import itertools
import threading
import time

import pyarrow
import pytest
import torch
from pyarrow import parquet

from sparse_coding import sources, text_rows
from sparse_coding.checkpoint import load_run, save_run, saved_at_an_error
from sparse_coding.errors import UserError
from sparse_coding.harvest import KeptRows, Rows
from sparse_coding.hook_sources import StreamingSources
from sparse_coding.text import Text, load_text
from sparse_coding.text_files import Document


def documents(n: int):
    return (Document(f"text {i}", "here", f"here:{i}") for i in range(n))


def text_of(read) -> Text:
    return Text("slow", read, {}, 0.0, lambda document: document.text)


@pytest.fixture
def impatience(monkeypatch):
    monkeypatch.setattr(text_rows, "SAY_SECONDS", 0.05)
    monkeypatch.setattr(text_rows, "END_SECONDS", 0.3)
    monkeypatch.setattr(sources, "MAX_JOIN_SECONDS", 0.05)


def test_a_text_that_stalls_is_said_and_ends_with_what_it_gave(impatience, capsys):
    never = threading.Event()

    def stalls():
        yield from documents(20)
        never.wait()

    found = []
    with pytest.raises(UserError, match="text 'slow' gave nothing for 0 s.*--resume"):
        found += text_of(stalls).documents("train")
    assert found == list(documents(20))
    said = capsys.readouterr().err.splitlines()
    assert 3 <= len(said) <= 5
    assert set(said) == {"text 'slow': nothing for 0 s, still waiting (until 0 s)"}
    never.set()


def slow():
    for document in documents(3):
        time.sleep(0.12)
        yield document


def test_a_text_that_is_slow_is_read_to_its_end(impatience, capsys):
    assert list(text_of(slow).documents("train")) == list(documents(3))
    assert "still waiting" in capsys.readouterr().err


def test_a_clock_that_jumps_ends_no_waiting(impatience, monkeypatch, capsys):
    clock = itertools.count(2e9, 3600.0)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    assert list(text_of(slow).documents("train")) == list(documents(3))
    assert "nothing for 0 s, still waiting" in capsys.readouterr().err


class Stream(Rows):
    """Ten known rows of each of 60 batches, endlessly; breaks off once if it is told where."""

    def __init__(self, broken_at: int = -1) -> None:
        self.broken_at, self.hook_names = broken_at, ("hook",)

    def token_batches(self):
        for i in range(60):
            if i == self.broken_at:
                raise UserError("text 'far' broke off")
            yield i

    def seen(self, batches):
        return batches

    def keep(self, i):
        x = torch.randn(10, 6, generator=torch.Generator().manual_seed(i))
        return KeptRows({"hook": x}, torch.arange(10), torch.full((10,), i))


def streamed(stream: Stream, **settings) -> StreamingSources:
    return StreamingSources(stream, batch_tokens=16, seed=1, buffer_tokens=100, **settings)


def test_a_buffer_smaller_than_a_batch_is_refused():
    with pytest.raises(UserError, match="a buffer of 6 tokens holds no batch of 7"):
        StreamingSources(Stream(), 7, 0, 6)


@pytest.mark.parametrize("n_asked", [1, 10, 11, 17, 75])
def test_a_stream_that_is_stopped_ends_at_the_start_of_a_window_and_is_gone_on_with(n_asked):
    unbroken = [batch["hook"] for batch in itertools.islice(streamed(Stream()), 80)]
    stream, n_kept, asked = Stream(), [], itertools.count(1)
    keep = stream.keep
    stream.keep = lambda i: n_kept.append(i) or keep(i)
    source = streamed(stream, is_stopped=lambda: next(asked) >= n_asked)
    found = [batch["hook"] for batch in source]
    n_windows = (n_asked - 1) // 10  # of ten token batches, six batches of 16 rows each
    assert (len(found), len(n_kept), next(asked)) == (6 * n_windows, n_asked - 1, n_asked + 1)
    resumed = streamed(Stream())
    resumed.load_state_dict(source.state_dict())
    found += [batch["hook"] for batch in itertools.islice(resumed, 80 - len(found))]
    assert all(torch.equal(one, other) for one, other in zip(found, unbroken, strict=True))


def test_a_resumed_stream_can_be_stopped_while_it_reads_what_it_knows():
    source, asked = streamed(Stream()), itertools.count(1)
    next(itertools.islice(source, 29, None))  # the last batch of the fifth window
    state, stream = source.state_dict(), Stream()
    stream.keep = lambda i: pytest.fail("the model ran")
    resumed = streamed(stream, is_stopped=lambda: next(asked) == 7)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    assert resumed.state_dict() == state


def test_a_stream_that_breaks_off_is_saved_where_it_stood_and_gone_on_with(tmp_path):
    unbroken = [batch["hook"] for batch in itertools.islice(streamed(Stream()), 40)]
    source, found = streamed(Stream(broken_at=47)), []

    def save():
        save_run(tmp_path, len(found), {"source": source}, keep=1)

    with pytest.raises(UserError, match="'far' broke off"):
        for batch in saved_at_an_error(source, save):
            found.append(batch["hook"])
    assert len(found) == 4 * 6  # windows of ten token batches, six batches of 16 rows each
    resumed = streamed(Stream())
    assert load_run(tmp_path, {"source": resumed}) == len(found)
    found += [batch["hook"] for batch in itertools.islice(resumed, 40 - len(found))]
    assert all(torch.equal(one, other) for one, other in zip(found, unbroken, strict=True))


def test_an_error_of_the_loop_itself_saves_nothing():
    saved = []
    batches = saved_at_an_error(range(3), lambda: saved.append("now"))
    with pytest.raises(UserError, match="diverged"):
        for _ in batches:
            raise UserError("diverged")
    batches.close()
    assert not saved


GARBAGE = {
    "a number": b'{"text": 3}',
    "nothing": b'{"text": null}',
    "a list": b'{"text": ["a"]}',
    "no object": b"[1]",
    "another field": b'{"body": "a"}',
    "undecodable": b'{"text": "\xff\xfe"}',
    "half a surrogate pair": b'{"text": "\\ud800"}',
    "a raw NUL": b'{"text": "a\x00b"}',
    "NULs": b"\0" * 1000,
    "a megabyte": b"x" * 2**20,
    "cut": b'{"text": "a',
}


@pytest.mark.parametrize("line", GARBAGE.values(), ids=GARBAGE)
def test_a_line_of_garbage_is_named_or_skipped_counted_and_quoted(tmp_path, line, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2.*\(skip_broken_lines\)$"):
        load_text(str(path), heldout_fraction=0.0)
    text = load_text(str(path), heldout_fraction=0.0, skip_broken_lines=True)
    capsys.readouterr()
    assert [document.text for document in text.documents("train")] == ["first", "last"]
    assert "a.jsonl: 1 broken lines skipped" in (said := capsys.readouterr().err)
    assert "a.jsonl, line 2" in said


def test_what_is_text_stays_as_it_is_and_white_space_is_no_document(tmp_path):
    path = tmp_path / "a.jsonl"
    odd = ["a\0b", "x" * 2**20, "\ufffd", "<|endoftext|>"]
    lines = [f'"{text}"' for text in (" ", "", "\\n\\t", *odd)]
    path.write_text("".join(f'{{"text": {line}}}\n' for line in lines).replace("\0", "\\u0000"))
    text = load_text(str(path), heldout_fraction=0.0)
    assert [document.text for document in text.documents("train")] == odd


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pyarrow.array([["a"], ["b"]]), "list<.*>"),
        (pyarrow.array([b"a", b"b"]), "binary"),
        (pyarrow.array([1, 2]), "int64"),
        (pyarrow.array([{"text": "a"}]), "struct<.*>"),
    ],
)
def test_a_parquet_column_of_something_else_is_named_with_its_type(tmp_path, column, kind):
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet: field 'text' holds {kind}, not text"):
        load_text(str(tmp_path / "a.parquet"))


def test_a_parquet_row_without_a_text_is_named_or_skipped(tmp_path, capsys):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), path)
    with pytest.raises(UserError, match=r"row 2: field 'text' holds NoneType.*skip_broken_lines"):
        load_text(str(path), heldout_fraction=0.0)
    text = load_text(str(path), heldout_fraction=0.0, skip_broken_lines=True)
    assert [document.text for document in text.documents("train")] == ["a", "b"]
    assert "1 broken lines skipped" in capsys.readouterr().err


@pytest.fixture
def hub(monkeypatch):
    """A hub with one data set; the function gives its rows."""
    import datasets
    import huggingface_hub

    class Api:
        def dataset_info(self, hub_id, revision):
            return type("Info", (), {"sha": "0123abcd"})

    class Rows:
        def __init__(self, make):
            self.make = make

        def __iter__(self):
            return self.make()

    def serve(make):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows(make))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return serve


def test_a_hub_text_that_breaks_off_gave_what_it_gave_and_is_one_line(hub):
    def rows():
        yield from ({"text": f"row {i}"} for i in range(5))
        raise ConnectionResetError("104\nreset by peer")

    hub(rows)
    found = []
    with pytest.raises(UserError) as error:
        for document in load_text("owner/set", heldout_fraction=0.0).documents("train"):
            found.append(document.text)
    assert found == [f"row {i}" for i in range(5)]
    assert str(error.value).startswith(
        "text 'owner/set' broke off after 5 rows (ConnectionResetError: 104 reset by peer)"
    )


def test_a_hub_text_that_stalls_at_its_first_row_is_one_line(hub, impatience):
    never = threading.Event()
    hub(lambda: iter([never.wait()]))
    with pytest.raises(UserError, match="text 'owner/set' gave nothing for"):
        load_text("owner/set")
    never.set()


def test_a_hub_row_without_a_text_is_named_or_skipped(hub, capsys):
    odd = [{"text": None}, {"text": "\ud800"}, {"body": "b"}, {"text": " "}]
    hub(lambda: iter([{"text": "a"}, *odd, {"text": "c"}]))
    with pytest.raises(UserError, match=r"owner/set, row 1: .*NoneType.*\(skip_broken_lines\)$"):
        list(load_text("owner/set", heldout_fraction=0.0).documents("train"))
    text = load_text("owner/set", heldout_fraction=0.0, skip_broken_lines=True)
    assert [document.text for document in text.documents("train")] == ["a", "c"]
    assert "owner/set: 3 broken lines skipped" in capsys.readouterr().err

"""Text: sources, split, packing and masks. A tiny BPE tokenizer is trained here; no network."""

import json
import random
import string

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from sparse_coding import text
from sparse_coding.errors import UserError
from sparse_coding.text import (
    Document,
    contexts,
    load_text,
    separator_id,
    special_ids,
    valid_positions,
)

SPECIALS = ["<|endoftext|>", "<bos>", "<eos>"]


def words(n, seed):
    rng = random.Random(seed)
    letters = string.ascii_lowercase + "éß漢\n"
    return " ".join("".join(rng.choices(letters, k=rng.randint(1, 7))) for _ in range(n))


def docs(*texts):
    return [Document(t, "made", f"made:{i}") for i, t in enumerate(texts)]


def make_tokenizer(adds_bos=False, separator=True):
    specials = SPECIALS if separator else SPECIALS[1:]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([words(300, seed=1)], trainer)
    if adds_bos:
        bos = bpe.token_to_id("<bos>")
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", bos)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def encode(tokenizer, string):
    return tokenizer.backend_tokenizer.encode(string, add_special_tokens=False).ids


def all_tokens(batches):
    return torch.cat([b.tokens for b in batches])


def test_concatenated_contexts_decode_to_the_joined_documents_without_the_tail(tokenizer):
    texts = [words(n, seed=n) for n in (40, 3, 90, 17)]
    batches = list(contexts(docs(*texts), tokenizer, context_length=13, batch_contexts=7))
    decoded = tokenizer.decode(all_tokens(batches).flatten(), skip_special_tokens=False)
    joined = "<|endoftext|>".join(texts)
    ids = sum((encode(tokenizer, t) for t in texts), []) + [0] * 3
    # byte-level BPE may end in the middle of a character, which decodes to U+FFFD
    assert joined.startswith(decoded.rstrip("\ufffd"))
    assert all_tokens(batches).numel() == len(ids) - len(ids) % 13


def test_concatenated_contexts_are_the_stream_cut_at_exact_lengths(tokenizer):
    texts = [words(n, seed=n) for n in (40, 3, 90)]
    separator = [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    a, b, c = (encode(tokenizer, t) for t in texts)
    stream = a + separator + b + separator + c
    batches = list(contexts(docs(*texts), tokenizer, context_length=11, batch_contexts=4))
    assert all_tokens(batches).flatten().tolist() == stream[: len(stream) // 11 * 11]
    assert {tuple(batch.tokens.shape) for batch in batches[:-1]} == {(4, 11)}


def test_packing_does_not_depend_on_how_documents_are_grouped_for_tokenising(
    tokenizer, monkeypatch
):
    made = docs(*[words(25, seed=n) for n in range(9)])
    before = all_tokens(contexts(made, tokenizer, context_length=11))
    monkeypatch.setattr(text, "TOKENISE_CHARS", 1)
    assert torch.equal(all_tokens(contexts(made, tokenizer, context_length=11)), before)


def test_document_index_names_the_document_of_every_token(tokenizer):
    made = docs(*[words(n, seed=n) for n in (30, 8, 50)])
    for pack in ("concat", "document"):
        batches = list(contexts(made, tokenizer, context_length=9, pack=pack, bos="always"))
        tokens = all_tokens(batches).flatten()
        owner = torch.cat([b.document for b in batches]).flatten()
        for i, document in enumerate(made):
            found = tokens[owner == i].tolist()
            assert found == encode(tokenizer, document.text)[: len(found)] and found
        assert set(tokens[owner == -1].tolist()) <= special_ids(tokenizer)


def test_packing_by_document_pads_on_the_right_and_loses_no_token(tokenizer):
    made = docs(*[words(n, seed=n) for n in (30, 8, 50)])
    batches = list(contexts(made, tokenizer, context_length=9, pack="document"))
    tokens, owner = all_tokens(batches), torch.cat([b.document for b in batches])
    assert [tokens[owner == i].tolist() for i in range(3)] == [
        encode(tokenizer, d.text) for d in made
    ]
    assert ((owner >= 0).sum(1) > 0).all()
    assert (owner.diff(dim=1) <= 0).all()  # one document, then only padding (-1)


def test_valid_positions_are_all_but_the_first_and_the_special_ones(tokenizer):
    made = docs(*[words(n, seed=n) for n in (30, 8, 50, 2)])
    for pack in ("concat", "document"):
        for bos in ("always", "never"):
            for b in contexts(made, tokenizer, context_length=9, pack=pack, bos=bos):
                expected = b.document >= 0
                expected[:, 0] = False
                assert torch.equal(b.valid, expected)


def test_valid_positions_mask_special_ids_wherever_they_stand():
    tokens = torch.tensor([[5, 1, 6, 0], [1, 7, 7, 1]])
    expected = torch.tensor([[False, False, True, False], [False, True, True, False]])
    assert torch.equal(valid_positions(tokens, {0, 1}), expected)


def test_bos_is_first_in_every_context_and_takes_no_token_away(tokenizer):
    made = docs(words(80, seed=3))
    tokens = all_tokens(contexts(made, tokenizer, context_length=9, bos="always"))
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    stream = encode(tokenizer, made[0].text)
    assert tokens[:, 1:].flatten().tolist() == stream[: len(stream) // 8 * 8]


def test_auto_bos_follows_what_the_tokenizer_itself_does():
    made = docs(words(80, seed=3))
    for adds_bos in (True, False):
        tokenizer = make_tokenizer(adds_bos=adds_bos)
        tokens = all_tokens(contexts(made, tokenizer, context_length=9))
        assert (tokens == tokenizer.bos_token_id).sum() == (len(tokens) if adds_bos else 0)


def test_special_tokens_written_in_a_text_stay_text(tokenizer):
    written = "end <|endoftext|> and <bos> and <eos> of it " * 5
    tokens = all_tokens(contexts(docs(written), tokenizer, context_length=20)).flatten()
    assert not set(tokens.tolist()) & special_ids(tokenizer)
    assert written.startswith(tokenizer.decode(tokens))


def test_without_endoftext_in_the_vocabulary_eos_separates():
    tokenizer = make_tokenizer(separator=False)
    assert separator_id(tokenizer) == tokenizer.eos_token_id


def test_packing_streams_and_reads_no_further_than_it_must(tokenizer, monkeypatch):
    monkeypatch.setattr(text, "TOKENISE_CHARS", 100)
    read = []

    def long():
        for i in range(1000):
            read.append(i)
            yield Document(words(20, seed=i), "made", f"made:{i}")

    next(contexts(long(), tokenizer, context_length=10, batch_contexts=2))
    assert len(read) < 10


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"context_length": 1}, "context_length is 1"),
        ({"batch_contexts": 0}, "batch_contexts 0"),
        ({"bos": "maybe"}, "bos is 'maybe'"),
        ({"pack": "loose"}, "pack is 'loose'"),
    ],
)
def test_a_wrong_packing_argument_is_refused_before_any_document_is_read(
    tokenizer, wrong, message
):
    def unreadable():
        raise AssertionError("was read")
        yield

    with pytest.raises(UserError, match=message):
        contexts(unreadable(), tokenizer, **{"context_length": 9, **wrong})


def test_a_text_shorter_than_a_context_is_refused(tokenizer):
    with pytest.raises(UserError, match="shorter than one context of 500 tokens"):
        list(contexts(docs("few words"), tokenizer, context_length=500))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts_of(loaded, split):
    return [document.text for document in loaded.documents(split)]


def test_the_two_splits_together_are_the_whole_text_and_share_no_text(tmp_path):
    rows = [{"text": words(9, seed=n % 150)} for n in range(200)]  # 50 texts occur twice
    loaded = load_text(write_jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0.2)
    train, heldout = texts_of(loaded, "train"), texts_of(loaded, "heldout")
    assert sorted(train + heldout) == sorted(row["text"] for row in rows)
    assert not set(train) & set(heldout)


def test_the_split_of_a_document_does_not_depend_on_order_or_company(tmp_path):
    rows = [{"text": words(9, seed=n)} for n in range(100)]
    one = load_text(write_jsonl(tmp_path / "a.jsonl", rows), heldout_fraction=0.2)
    two = load_text(write_jsonl(tmp_path / "b.jsonl", rows[:30:-1]), heldout_fraction=0.2)
    assert set(texts_of(two, "heldout")) == set(texts_of(one, "heldout")) & {
        row["text"] for row in rows[:30:-1]
    }


def test_the_heldout_fraction_is_met_within_five_standard_deviations(tmp_path):
    n, p = 4000, 0.05
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(n)])
    n_heldout = len(texts_of(load_text(path, heldout_fraction=p), "heldout"))
    assert abs(n_heldout - n * p) < 5 * (n * p * (1 - p)) ** 0.5


def test_a_larger_heldout_fraction_only_adds_documents_to_the_heldout(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(300)])
    small, large = (load_text(path, heldout_fraction=p) for p in (0.05, 0.3))
    assert set(texts_of(small, "heldout")) < set(texts_of(large, "heldout"))


def test_txt_documents_are_separated_by_two_blank_lines_and_a_folder_has_one_a_file(tmp_path):
    (tmp_path / "one.txt").write_text("a\n\nb\n\n\n\nc\n \n\nd", encoding="utf-8")
    (tmp_path / "two.txt").write_text("e\n\n\nf", encoding="utf-8")
    single = load_text(str(tmp_path / "one.txt"), heldout_fraction=0.0)
    assert texts_of(single, "train") == ["a\n\nb", "c", "d"]
    folder = load_text(str(tmp_path), heldout_fraction=0.0)
    assert texts_of(folder, "train") == ["a\n\nb\n\n\n\nc\n \n\nd", "e\n\n\nf"]


def test_parquet_and_jsonl_give_the_same_documents(tmp_path):
    import pyarrow
    from pyarrow import parquet

    texts = [words(9, seed=n) for n in range(600)]
    parquet.write_table(pyarrow.table({"n": range(600), "body": texts}), tmp_path / "a.parquet")
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": t} for t in texts])
    a = load_text(str(tmp_path / "a.parquet"), text_field="body")
    b = load_text(path, text_field="body")
    assert texts_of(a, "heldout") == texts_of(b, "heldout")
    assert texts_of(a, "train") == texts_of(b, "train")


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    paths = [tmp_path / name / "a.jsonl" for name in "xyz"]
    for path, last in zip(paths, ["same", "same", "else"], strict=True):
        path.parent.mkdir()
        write_jsonl(path, [{"text": "first"}, {"text": last}])
    x, y, z = (load_text(str(p), heldout_fraction=0.0).fingerprint_fields() for p in paths)
    assert x == y != z
    other = load_text(str(paths[0]), heldout_fraction=1e-9 + 0.5).fingerprint_fields()
    assert json.loads(json.dumps(other)) == other != x


def test_the_card_counts_documents_bytes_and_tokens_of_every_source(tmp_path, tokenizer):
    for source, n in (("p", 3), ("q", 2)):
        (tmp_path / source).mkdir()
        for i in range(n):
            (tmp_path / source / f"{i}.txt").write_text(words(10 + i, seed=n), encoding="utf-8")
    loaded = load_text(str(tmp_path), heldout_fraction=0.0)
    card = loaded.card(tokenizer)
    for row in card.rows:
        found = [d.text for d in loaded.documents("train") if d.source == row.source]
        assert row.n_documents == len(found)
        assert row.n_bytes == sum(len(t.encode()) for t in found)
        assert row.n_tokens == sum(len(encode(tokenizer, t)) for t in found)
    assert {row.source for row in card.rows} == {"p", "q"}
    assert f"{sum(row.n_tokens for row in card.rows):,}" in str(card).splitlines()[-1]


def test_broken_lines_are_named_and_skipped_and_counted_only_if_asked(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b\n\n{"text": "\\ud800"}\n{"text": "c"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is broken.*skip_broken_lines"):
        load_text(str(path))
    loaded = load_text(str(path), skip_broken_lines=True, heldout_fraction=0.0)
    assert texts_of(loaded, "train") == ["a", "c"]
    assert "2 broken lines skipped" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "holds no document"),
        ("a.txt", b"  \n\n\n\n \n", "holds no document"),
        ("a.jsonl", b'{"body": "x", "n": 1}\n', "line 1 has no field 'text'; found 'body', 'n'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' holds int, not text"),
        ("a.txt", b"good\nbad \xff\n", "line 2 is not UTF-8"),
        ("a.txt", b"the only document", "none of them falls into the"),
        ("a.parquet", b"nonsense", "not a parquet file"),
        ("a.csv", b"x", "holds no text; allowed are files .txt, .jsonl, .parquet"),
    ],
)
def test_an_unusable_file_is_refused_on_loading(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        load_text(str(tmp_path / name))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["no-such-text", "missing/file.jsonl", "/not/there", ""])
def test_an_unknown_name_is_refused_with_what_is_allowed(name):
    with pytest.raises(UserError, match="does not exist; give 'builtin'"):
        load_text(name)


def test_a_hub_name_without_a_connection_is_refused_in_one_line():
    with pytest.raises(UserError, match="cannot be read from the hub") as raised:
        load_text("NeelNanda/pile-10k")
    assert "\n" not in str(raised.value)


def test_a_hub_name_is_read_with_its_config_and_at_its_resolved_revision(monkeypatch):
    import datasets
    import huggingface_hub

    class Api:
        def dataset_info(self, hub_id, revision):
            assert (hub_id, revision) == ("owner/set", "v1")
            return type("Info", (), {"sha": "0123abcd"})

    def load_dataset(hub_id, config, split, revision, streaming):
        assert (hub_id, config, split, revision) == ("owner/set", "small", "train", "0123abcd")
        assert streaming
        return [{"text": f"row {i}"} for i in range(50)]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load_text("owner/set:small@v1", heldout_fraction=0.0)
    assert texts_of(loaded, "train") == [f"row {i}" for i in range(50)]
    assert loaded.fingerprint_fields()["revision"] == "0123abcd"


def test_a_split_without_documents_is_an_error_when_it_is_read(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match="has no heldout document"):
        list(load_text(path, heldout_fraction=0.0).documents("heldout"))
    with pytest.raises(UserError, match="allowed are 'train' and 'heldout'"):
        load_text(path, heldout_fraction=0.0).documents("test")
    with pytest.raises(UserError, match=r"it must be in \[0, 1\)"):
        load_text(path, heldout_fraction=1.0)

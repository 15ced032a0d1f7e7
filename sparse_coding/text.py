"""Text as documents, split into training and held-out by document, and packed into contexts.

`load_text` reads the builtin mixture, local files or a hub data set; `contexts` tokenises and
packs. Both stream. This module knows nothing of models and activations.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_coding import builtin_text
from sparse_coding.errors import UserError
from sparse_coding.text_files import SUFFIXES, Document, FileReader
from sparse_coding.text_rows import Skipping, field_text, rows_to_the_end, watched

Tokenizer = Any  # a transformers PreTrainedTokenizerBase; importing the name costs seconds

CACHE = Path("outputs/cache/text")
BATCH_CONTEXTS = 16
TOKENISE_CHARS = 1_000_000  # of text in one call of the tokenizer
HUB_NAME = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w.-]+))?")


class CardRow(NamedTuple):
    """The size of one source: documents, UTF-8 bytes, and tokens (None without a tokenizer)."""

    source: str
    n_documents: int
    n_bytes: int
    n_tokens: int | None


class Card(NamedTuple):
    """What a text consists of; `str(card)` is a small table."""

    rows: list[CardRow]

    def __str__(self) -> str:
        counts = [row.n_tokens for row in self.rows if row.n_tokens is not None]
        total = CardRow(
            "total",
            sum(row.n_documents for row in self.rows),
            sum(row.n_bytes for row in self.rows),
            sum(counts) if counts else None,
        )
        width = max(len(row.source) for row in [*self.rows, total]) + 2
        lines = [f"{'source':<{width}}{'documents':>12}{'bytes':>14}{'tokens':>14}{'share':>8}"]
        for row in [*self.rows, total]:
            tokens = "-" if row.n_tokens is None else f"{row.n_tokens:,}"
            share = row.n_bytes / max(total.n_bytes, 1)
            lines.append(
                f"{row.source:<{width}}{row.n_documents:>12,}{row.n_bytes:>14,}{tokens:>14}"
                f"{share:>8.1%}"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Text:
    """A named text. Every call of a method reads it anew, in the same order.

    A document is held out if the hash of its `key` falls below `heldout_fraction`, whatever its
    position, the seed and the machine. The key is the document's text, so equal texts are never
    on both sides; for `builtin`, which has no equal texts, it is the parent that the document
    was cut from, so that the two sides share no speech, play, chapter or file.
    """

    name: str
    read: Callable[[], Iterator[Document]]
    fingerprint: dict
    heldout_fraction: float
    key: Callable[[Document], str]

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of one split; a `UserError` after the last if there was none."""
        if split not in ("train", "heldout"):
            raise UserError(f"split is {split!r}; allowed are 'train' and 'heldout'")
        return self._documents(split)

    def _documents(self, split: str) -> Iterator[Document]:
        empty = True
        for document in watched(self.read(), self.name):
            if self.split_of(document) == split:
                empty = False
                yield document
        if empty:
            raise UserError(
                f"text {self.name!r} has no {split} document with heldout_fraction "
                f"{self.heldout_fraction}: change the fraction or give more documents"
            )

    def split_of(self, document: Document) -> str:
        return "heldout" if _uniform(self.key(document)) < self.heldout_fraction else "train"

    def card(self, tokenizer: Tokenizer | None = None) -> Card:
        """Documents, bytes and (with a tokenizer) tokens per source, over both splits.

        Reads the whole text; special tokens are not counted.
        """
        n_documents: Counter[str] = Counter()
        n_bytes: Counter[str] = Counter()
        n_tokens: Counter[str] = Counter()
        for batch in _batches_of_text(watched(self.read(), self.name)):
            tokens = _encode(batch, tokenizer) if tokenizer else [[]] * len(batch)
            for document, ids in zip(batch, tokens, strict=True):
                n_documents[document.source] += 1
                n_bytes[document.source] += len(document.text.encode())
                n_tokens[document.source] += len(ids)
        return Card(
            [
                CardRow(s, n_documents[s], n_bytes[s], n_tokens[s] if tokenizer else None)
                for s in sorted(n_bytes, key=lambda s: (-n_bytes[s], s))
            ]
        )

    def fingerprint_fields(self) -> dict:
        """JSON that changes exactly when the documents or their split may change."""
        return {**self.fingerprint, "heldout_fraction": self.heldout_fraction}


def _uniform(key: str) -> float:
    """A number in [0, 1) that is uniform over keys and depends on nothing else."""
    digest = blake2b(key.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest, "big") / 2**64


def load_text(
    name: str,
    *,
    text_field: str = "text",
    skip_broken_lines: bool = False,
    heldout_fraction: float = 0.05,
) -> Text:
    """The text `name`, checked as far as can be without a network.

    `builtin`: see `builtin_text`. A local file, or a folder of files (all below it, in the order
    of their names): `.jsonl` and `.parquet` hold a document in `text_field` of each row; a single
    `.txt` file holds documents separated by two or more blank lines, in a folder every `.txt` is
    one document. Otherwise a hub data set `owner/name[:config][@revision]`, its split "train",
    streamed. The order is the file's own (`builtin` is shuffled already).

    Local files are read through once: a missing or empty file, a row that is broken or no text
    (unless `skip_broken_lines`; then their number is reported) and a split without documents are
    `UserError`s here; of a hub data set, where they are met.
    """
    if not 0 <= heldout_fraction < 1:
        raise UserError(f"heldout_fraction is {heldout_fraction}; it must be in [0, 1)")
    if name == "builtin":
        path = builtin_text.build(CACHE)
        fields = {"text": "builtin", **builtin_text.recipe()}
        return Text(name, lambda: _built(path), fields, heldout_fraction, _parent)
    local = Path(name).expanduser()
    if name and local.exists():
        reader = FileReader(local, text_field, skip_broken_lines)
        fields = {"text": local.name, **reader.fingerprint_fields()}
        text = Text(name, reader.documents, fields, heldout_fraction, _content)
        _check_splits(text)
        return text
    match = HUB_NAME.fullmatch(name)
    if match is None or local.suffix in SUFFIXES:
        raise UserError(
            f"text {name!r} does not exist; give 'builtin', a .txt, .jsonl or .parquet file, a "
            "folder of them, or a hub data set as owner/name[:config][@revision]"
        )
    return _hub_text(name, match, text_field, heldout_fraction, skip_broken_lines)


def _content(document: Document) -> str:
    return document.text


def _parent(document: Document) -> str:
    return document.id.rpartition("#")[0]


def _built(path: Path) -> Iterator[Document]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield Document(**json.loads(line))


def _check_splits(text: Text) -> None:
    splits = Counter(text.split_of(document) for document in watched(text.read(), text.name))
    if not splits:
        raise UserError(f"text {text.name!r} holds no document")
    for split in ("train", "heldout") if text.heldout_fraction else ("train",):
        if not splits[split]:
            raise UserError(
                f"text {text.name!r} has {splits.total()} documents and none of them falls into "
                f"the {split} split with heldout_fraction {text.heldout_fraction}: give more "
                "documents (in one .txt file two blank lines separate documents)"
            )


def _hub_text(
    name: str, match: re.Match, text_field: str, heldout_fraction: float, skips: bool
) -> Text:
    import datasets
    from huggingface_hub import HfApi

    hub_id, config = match["id"], match["config"]
    try:
        revision = HfApi().dataset_info(hub_id, revision=match["revision"]).sha
        rows = datasets.load_dataset(
            hub_id, config, split="train", revision=revision, streaming=True
        )
        first = next(watched(rows, name), None)
    except UserError:
        raise
    except Exception as error:  # the hub client raises a dozen kinds of its own and of httpx's
        raise UserError(
            f"text {name!r} is no local path and cannot be read from the hub "
            f"({type(error).__name__}): check the name and the connection, or use 'builtin'"
        ) from None
    if first is None:
        raise UserError(f"text {name!r} holds no document")
    if not skips:
        field_text(first, text_field, name)

    def read() -> Iterator[Document]:
        skipping = Skipping(skips)
        for number, row in rows_to_the_end(rows, name):
            with skipping.row(f"{name}, row {number}"):
                text = field_text(row, text_field, f"{name}, row {number}")
                if text.strip():
                    yield Document(text, hub_id, f"{hub_id}:{number}")
        skipping.report(name)

    fields = {"text": hub_id, "config": config, "revision": revision, "text_field": text_field}
    return Text(name, read, fields, heldout_fraction, _content)


class TokenBatch(NamedTuple):
    """Contexts of equal length.

    `document` is the running index of the document that a token comes from, -1 for BOS,
    separator and padding. `valid` marks the positions that SAEs are trained and measured on.
    """

    tokens: Int[Tensor, "contexts position"]
    document: Int[Tensor, "contexts position"]
    valid: Bool[Tensor, "contexts position"]


def valid_positions(
    tokens: Int[Tensor, "contexts position"], special_ids: Iterable[int]
) -> Bool[Tensor, "contexts position"]:
    """THE rule for what SAEs see: every position but the first of a context and special tokens.

    The first position is an attention sink (in SmolLM2-135M, from layer 12 on, its norm is 150
    times the median) whatever token stands there; special tokens carry no text.
    """
    special = torch.tensor(sorted(special_ids), dtype=tokens.dtype, device=tokens.device)
    valid = ~torch.isin(tokens, special)
    valid[:, 0] = False
    return valid


def separator_id(tokenizer: Tokenizer) -> int:
    """`<|endoftext|>` if the vocabulary has it, else EOS: stands between documents and pads."""
    found = tokenizer.get_vocab().get("<|endoftext|>", tokenizer.eos_token_id)
    if found is None:
        raise UserError("the tokenizer has neither <|endoftext|> nor an EOS token to separate by")
    return found


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Every token id that `valid_positions` masks."""
    return {*tokenizer.all_special_ids, separator_id(tokenizer)}


def contexts(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    context_length: int,
    bos: str = "auto",
    pack: str = "concat",
    batch_contexts: int = BATCH_CONTEXTS,
) -> Iterator[TokenBatch]:
    """Batches of at most `batch_contexts` contexts of exactly `context_length` tokens (int64).

    `concat`: the documents, with a separator between them, are one stream that is cut into
    contexts; the last incomplete one is dropped. `document`: each document is cut by itself and
    its last context padded on the right with the separator. No attention mask is needed: in a
    causal model no token attends to what stands on its right. In `concat` a token does attend to
    earlier documents of its context, as in the models' own training.

    `bos`: `auto` puts BOS first in every context if the tokenizer itself puts it before a text
    (Gemma and Llama do; GPT-2, Pythia and SmolLM2 do not). A special token that is written out
    in a text stays ordinary text. Raises `UserError` for bad arguments at once, and at the end
    if the documents do not fill one context.
    """
    if context_length < 2 or batch_contexts < 1:
        raise UserError(
            f"context_length is {context_length} and batch_contexts {batch_contexts}; at least "
            "2 and 1 are needed"
        )
    if bos not in ("auto", "always", "never") or pack not in ("concat", "document"):
        raise UserError(
            f"bos is {bos!r} (allowed: 'auto', 'always', 'never'), pack is {pack!r} (allowed: "
            "'concat', 'document')"
        )
    prefix = _prefix(tokenizer, bos)
    separator = separator_id(tokenizer)
    body = context_length - len(prefix)
    pieces = _concatenated if pack == "concat" else _by_document
    blocks = pieces(_tokenised(documents, tokenizer), body, separator)
    return _batches(blocks, prefix, batch_contexts, special_ids(tokenizer), context_length)


def starts_with_bos(tokenizer: Tokenizer, bos: str) -> bool:
    """Whether `contexts` puts a BOS token first under this policy."""
    return bool(_prefix(tokenizer, bos))


def _prefix(tokenizer: Tokenizer, bos: str) -> list[int]:
    bos_id = tokenizer.bos_token_id
    if bos == "always" and bos_id is None:
        raise UserError("bos is 'always', but the tokenizer has no BOS token: use 'never'")
    adds_bos = bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]
    return [bos_id] if bos == "always" or (bos == "auto" and adds_bos) else []


def _encode(batch: list[Document], tokenizer: Tokenizer) -> list[list[int]]:
    return tokenizer(
        [document.text for document in batch],
        add_special_tokens=False,
        split_special_tokens=True,  # "<|endoftext|>" in a text is text
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,  # no warning about texts longer than the model's context
    )["input_ids"]


def token_spans(text: str, tokenizer: Tokenizer) -> tuple[list[int], Int[np.ndarray, "tokens 2"]]:
    """Tokens of a text, and the characters that each is of: its first, and one past its last.

    Bytes of one character in UTF-8 may be several tokens, which then are all of that character.
    `UserError` if the tokenizer does not know.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} does not say which characters a token is "
            "of, which is needed here; use a language model with a fast tokenizer"
        )
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    return encoded["input_ids"], np.array(encoded["offset_mapping"], dtype=int).reshape(-1, 2)


def _batches_of_text(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Lists of documents of about `TOKENISE_CHARS` characters together."""
    batch, n_chars = [], 0
    for document in documents:
        batch.append(document)
        n_chars += len(document.text)
        if n_chars >= TOKENISE_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _tokenised(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[int, list[int]]]:
    index = 0
    for batch in _batches_of_text(documents):
        for ids in _encode(batch, tokenizer):
            yield index, ids
            index += 1


# A block is two rows of int64: token ids, and the document each comes from.


def _block(ids: list[int], document: int) -> np.ndarray:
    return np.stack([np.array(ids, dtype=np.int64), np.full(len(ids), document)])


def _concatenated(
    tokenised: Iterator[tuple[int, list[int]]], body: int, separator: int
) -> Iterator[np.ndarray]:
    """Blocks `(2, body)` of the joined stream; what is left at its end is dropped."""
    waiting: list[np.ndarray] = []
    n_waiting = 0
    for index, ids in tokenised:
        joint = [separator] if index else []
        waiting.append(np.concatenate([_block(joint, -1), _block(ids, index)], axis=1))
        n_waiting += waiting[-1].shape[1]
        if n_waiting >= body:
            stream = np.concatenate(waiting, axis=1)
            whole = n_waiting - n_waiting % body
            yield from np.split(stream[:, :whole], whole // body, axis=1)
            waiting, n_waiting = [stream[:, whole:]], n_waiting - whole


def _by_document(
    tokenised: Iterator[tuple[int, list[int]]], body: int, separator: int
) -> Iterator[np.ndarray]:
    for index, ids in tokenised:
        for start in range(0, len(ids), body):
            piece = ids[start : start + body]
            padding = [separator] * (body - len(piece))
            yield np.concatenate([_block(piece, index), _block(padding, -1)], axis=1)


def _batches(
    blocks: Iterator[np.ndarray],
    prefix: list[int],
    batch_contexts: int,
    special: set[int],
    context_length: int,
) -> Iterator[TokenBatch]:
    start = _block(prefix, -1)
    empty = True
    while group := list(islice(blocks, batch_contexts)):
        empty = False
        rows = torch.from_numpy(np.stack([np.concatenate([start, b], axis=1) for b in group]))
        tokens, document = rows[:, 0].contiguous(), rows[:, 1].contiguous()
        yield TokenBatch(tokens, document, valid_positions(tokens, special))
    if empty:
        raise UserError(
            f"the text, or its held-out part, is shorter than one context of {context_length} "
            "tokens: give more text, a larger heldout_fraction or a smaller context_length"
        )

"""What several dictionaries make of the same held-out text: sparse codes, and where tokens stand.

Dictionaries of one language model are encoded in one pass. Between language models, tokens are
paired by their place in the text: with one tokenizer the same tokens, with two tokenizers the
tokens that end with the same visible character of the same document.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from analysis.subjects import Material, Origin, Subject
from sparse_coding.consistency import Codes, join, sparse_codes
from sparse_coding.errors import UserError
from sparse_coding.evaluation import ROWS_AT_ONCE
from sparse_coding.harvest import Rows
from sparse_coding.text import Text, token_spans

Places = Int[np.ndarray, " tokens"]


@dataclass(frozen=True)
class Encoded:
    """Codes of dictionaries of one language model, token by token the same text."""

    codes: dict[str, Codes]
    """By the dictionary's name."""
    document: Places
    """Running index of the held-out document that each token is of."""
    place: Places
    """Index of the token within its document."""
    tokenizer: PreTrainedTokenizerBase
    text: Text


def one_text(subjects: Sequence[Subject]) -> None:
    """`UserError` unless all dictionaries name the same text with the same documents held out."""
    for flag in ("text", "text_field", "heldout_fraction"):
        found = sorted({str(getattr(subject.origin, flag)) for subject in subjects})
        if len(found) > 1:
            raise UserError(
                f"the dictionaries were trained with different settings of {flag} "
                f"({', '.join(found)}); choose one with --{flag.replace('_', '-')}"
            )


def by_reading(subjects: Sequence[Subject]) -> list[list[Subject]]:
    """Subjects that one pass of one language model encodes, whatever their hooks."""
    groups: dict[Origin, list[Subject]] = {}
    for subject in subjects:
        reading = dataclasses.replace(subject.origin, hook_name="")
        groups.setdefault(reading, []).append(subject)
    return list(groups.values())


def encode(subjects: Sequence[Subject], n_tokens: int, device: str = "auto") -> Encoded:
    """Codes of `subjects`, all of one reading, on at least `n_tokens` held-out tokens or all.

    A row that the norm limit leaves out at one hook is left out at all. Keeps 8 bytes per active
    feature and token: 240 MB for a million tokens at an L0 of 30.
    """
    by_hook: dict[str, list[Subject]] = {}
    for subject in subjects:
        by_hook.setdefault(subject.origin.hook_name, []).append(subject)
    material = None
    for group in by_hook.values():
        lm = material.lm if material else None
        material = Material(group[0].origin, device, lm)
        material.check(group)
    hooks = list(by_hook)
    rows = Rows(material.lm, partial(material.token_batches, "heldout"), hooks)
    training = Rows(material.lm, partial(material.token_batches, "train"), hooks)
    rows.max_norms = training.max_norms
    codes: dict[str, list[Codes]] = {subject.name: [] for subject in subjects}
    documents, kept = [], []
    for batch in tqdm(material.heldout(n_tokens), desc=material.lm.name, unit="batch"):
        seen = rows.see(batch)
        documents.append(batch.document.flatten())
        kept.append(rows.kept(seen).flatten())
        for hook, acts in rows.keep(seen).acts.items():
            for part in acts.float().split(ROWS_AT_ONCE):
                for subject in by_hook[hook]:
                    codes[subject.name].append(sparse_codes(subject.dictionary.encode(part)))
    document = torch.cat(documents).numpy()
    keep = torch.cat(kept).numpy()
    return Encoded(
        {name: join(parts) for name, parts in codes.items()},
        document[keep],
        places(document)[keep],
        material.lm.tokenizer,
        material.text,
    )


def places(document: Places) -> Places:
    """Index of each token within its document, -1 where the document is -1.

    A document's tokens are in their order, with nothing but -1 between them.
    """
    place = np.full(len(document), -1)
    of_text = document >= 0
    _, first, counts = np.unique(document[of_text], return_index=True, return_counts=True)
    place[of_text] = np.arange(int(of_text.sum())) - np.repeat(first, counts)
    return place


def pair_tokens(a: Encoded, b: Encoded) -> tuple[Places, Places]:
    """Indices of tokens of `a` and of `b` that are the same place of the text, in its order."""
    if a is b:
        return np.arange(len(a.document)), np.arange(len(a.document))
    if a.tokenizer.get_vocab() == b.tokenizer.get_vocab():
        keys = [one.document << 32 | one.place for one in (a, b)]
    else:
        keys = [_visible_ends(one) for one in (a, b)]
    # The negative ones are of tokens without an end of their own; they have no partner.
    _, in_a, in_b = np.intersect1d(*keys, assume_unique=False, return_indices=True)
    found = keys[0][in_a] >= 0
    return in_a[found], in_b[found]


def _visible_ends(encoded: Encoded) -> Places:
    """For each token its document and the character it ends with, -1 if it ends with none."""
    keys = np.full(len(encoded.document), -1)
    starts = np.flatnonzero(np.diff(encoded.document, prepend=-1))
    groups = np.split(np.arange(len(keys)), starts[1:])
    for rows, text in zip(groups, _texts(encoded, encoded.document[starts]), strict=True):
        ends = visible_ends(text, encoded.tokenizer)[encoded.place[rows]]
        keys[rows] = np.where(ends >= 0, encoded.document[rows] << 32 | ends, -1)
    return keys


def _texts(encoded: Encoded, documents: Places) -> Iterator[str]:
    """Texts of these held-out documents, whose indices rise."""
    wanted = set(documents.tolist())
    for index, document in enumerate(encoded.text.documents("heldout")):
        if index in wanted:
            yield document.text
        if index == documents[-1]:
            return


def visible_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> Int[np.ndarray, " n"]:
    """Index after each token's last character; -1 for a token of white space or a part of one.

    Tokens that share a character (bytes of one in UTF-8) all end with it, and the last one counts.
    """
    _, spans = token_spans(text, tokenizer)
    ends = np.array([end if text[start:end].strip() else -1 for start, end in spans], int)
    visible = np.flatnonzero(ends >= 0)
    repeated = visible[:-1][np.diff(ends[visible]) == 0]
    ends[repeated] = -1
    return ends

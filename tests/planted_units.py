"""A text of words and digits in which planted units fire where they are said to."""

import numpy as np

from sparse_coding.descriptions import Evidence
from sparse_coding.examples import Stream
from sparse_coding.token_tags import token_tags

WORDS = [" cat", " dog", " sees", " the", " a", " red", " old", " running", " jumping", " near"]
DIGITS = [f" {n}" for n in range(30)]
PIECES = [*WORDS, *DIGITS, "\n"]
CAT, THE, NEWLINE = WORDS.index(" cat"), WORDS.index(" the"), len(PIECES) - 1
LENGTH = 40


def planted_stream(n_documents=120, seed=0) -> Stream:
    """Documents of 40 random tokens, each one context; the first token is no row."""
    tokens = np.random.default_rng(seed).integers(len(PIECES), size=(n_documents, LENGTH))
    document = np.repeat(np.arange(n_documents), LENGTH)
    position = np.flatnonzero(np.arange(tokens.size) % LENGTH > 0)
    return Stream(tokens.flatten(), PIECES, document, position, document[position])


def evidence_of(stream: Stream, sources=("all",)) -> Evidence:
    """Of all rows; documents take turns in having the sources."""
    table = np.stack([token_tags(piece, np.array([[0, len(piece)]]))[0] for piece in PIECES])
    token, position = stream.token, stream.position
    inside = position % LENGTH > 1
    before = np.where(inside, token[position - 2], -1)
    return Evidence(
        token[position], token[position - 1], before, table[token[position]],
        table[token[position - 1]], stream.group % len(sources), PIECES, list(sources),
    )  # fmt: skip

"""Held-out rows of a language model, with all that rules about their tokens need."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from tqdm import tqdm

from analysis.encoded import places
from analysis.matched import REACH, scattered
from analysis.subjects import Material
from sparse_coding.descriptions import Evidence
from sparse_coding.evaluation import take_tokens
from sparse_coding.examples import Stream, first_half
from sparse_coding.harvest import activations, kept_rows
from sparse_coding.metrics import bootstrap_weights
from sparse_coding.text import TokenBatch, token_spans
from sparse_coding.token_tags import TAGS, token_tags


class Documents(NamedTuple):
    """Held-out documents: what each token is, and where each document comes from."""

    tags: list[Bool[np.ndarray, "tokens tags"] | None]
    source: list[str]
    key: list[str]
    """What the document is held out by: equal for documents that were cut from one file."""


def read_documents(material: Material, wanted: set[int]) -> Documents:
    """Tags are of the `wanted` documents alone."""
    found = Documents([], [], [])
    for index, document in enumerate(material.text.documents("heldout")):
        if index > max(wanted):
            break
        tags = None
        if index in wanted:
            _, spans = token_spans(document.text, material.lm.tokenizer)
            tags = token_tags(document.text, spans)
        found.tags.append(tags)
        found.source.append(document.source)
        found.key.append(material.text.key(document))
    return found


def drawn_contexts(
    material: Material, n_tokens: int, seed: int
) -> tuple[list[TokenBatch], Int[np.ndarray, " positions"]]:
    """Contexts from all over the held-out text, and each token's index in its document."""
    read = take_tokens(material.token_batches("heldout"), REACH * n_tokens)
    document = torch.cat([batch.document.flatten() for batch in read]).numpy()
    # both travel in one number through the drawing; -1 stays -1
    keys = torch.from_numpy(np.where(document < 0, -1, document << 32 | places(document)))
    parts = keys.split([batch.document.numel() for batch in read])
    keyed = [
        batch._replace(document=part.view_as(batch.document))
        for batch, part in zip(read, parts, strict=True)
    ]
    drawn = scattered(keyed, n_tokens, torch.Generator().manual_seed(seed))
    place = torch.cat([batch.document.flatten() for batch in drawn]).numpy()
    batches = [batch._replace(document=batch.document >> 32) for batch in drawn]
    return batches, np.where(place < 0, -1, place & 0xFFFFFFFF)


def kept_activations(
    material: Material, batches: Sequence[TokenBatch]
) -> Iterator[tuple[Float[Tensor, "rows d_in"], Int[np.ndarray, " rows"]]]:
    """Of each batch the activations that count, and their positions among all of `batches`."""
    hook, start = material.origin.hook_name, 0
    for batch in tqdm(batches, desc=f"held-out text, {material.lm.name}", unit="batch"):
        x = activations(material.lm, batch.tokens, [hook])[hook]
        keep = kept_rows(x, batch.valid.to(x.device), material.max_norm)
        yield x[keep], start + keep.flatten().nonzero()[:, 0].cpu().numpy()
        start += keep.numel()


class Held(NamedTuple):
    """Held-out rows with all that rules, contexts and scores need."""

    stream: Stream
    ids: Int[np.ndarray, " pieces"]
    """The tokenizer's number of each of the stream's pieces."""
    evidence: Evidence
    is_finding: Bool[np.ndarray, " rows"]
    weights: Float64[Tensor, "draws groups"]
    """Draws of the groups that scores are of."""


def make_held(
    material: Material, batches: Sequence[TokenBatch], place: Int[np.ndarray, " positions"],
    position: Int[np.ndarray, " rows"], n_draws: int, seed: int,
) -> Held:  # fmt: skip
    """`position` are the rows among all positions of `batches`."""
    tokens, document = (
        torch.cat([part.flatten() for part in parts]).numpy()
        for parts in ([b.tokens for b in batches], [b.document for b in batches])
    )
    width = batches[0].tokens.shape[1]
    context = np.arange(len(tokens)) // width
    changes = (np.diff(document) != 0) | (np.diff(context) != 0)
    segment = np.concatenate([[0], changes.cumsum()])
    ids, token = np.unique(tokens, return_inverse=True)
    pieces = [material.lm.tokenizer.decode([i]) for i in ids.tolist()]

    documents = read_documents(material, set(document[document >= 0].tolist()))
    _, group_of = np.unique(documents.key, return_inverse=True)
    group = np.unique(group_of[document[position]], return_inverse=True)[1]
    stream = Stream(token, pieces, segment, position, group)
    sources, source_of = np.unique(documents.source, return_inverse=True)
    tags = np.zeros((len(tokens), len(TAGS)), dtype=bool)
    for i in np.unique(document[document >= 0]).tolist():
        inside = document == i
        tags[inside] = documents.tags[i][place[inside]]

    previous = tokens_before(stream, 1)
    previous_tags = tags[position - 1] & (previous >= 0)[:, None]
    evidence = Evidence(
        token[position], previous, tokens_before(stream, 2), tags[position], previous_tags,
        source_of[document[position]], pieces, sources.tolist(),
    )  # fmt: skip
    is_finding = first_half(group, np.random.default_rng(seed))
    scored = torch.zeros(group.max() + 1, dtype=torch.bool)
    scored[group[~is_finding]] = True
    generator = torch.Generator().manual_seed(seed)
    return Held(stream, ids, evidence, is_finding, bootstrap_weights(scored, n_draws, generator))


def tokens_before(stream: Stream, n: int) -> Int[np.ndarray, " rows"]:
    """The token n positions before each row, -1 where that is of another segment."""
    there = (stream.position - n).clip(0)
    is_same = stream.segment[there] == stream.segment[stream.position]
    return np.where(is_same, stream.token[there], -1)

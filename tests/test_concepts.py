"""The concept corpus, its readers, the token tags and the data card's arithmetic."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from analysis.describe_concepts import bags, naive_bayes, package_licence, trigrams
from sparse_coding import concept_sources as read
from sparse_coding.builtin_text import File
from sparse_coding.concepts import (
    CONCEPTS,
    Concept,
    ConceptSource,
    concept_documents,
    find_concepts,
    read_parents,
    recipe,
    superclasses,
)
from sparse_coding.errors import UserError
from sparse_coding.metrics import share_interval
from sparse_coding.polysemanticity import Labelled
from sparse_coding.storage import fingerprint
from sparse_coding.token_tags import TAGS, token_tags

MISSION = ("citations", "dialogue", "http", "korean")
# Of RECIPE 1 with the pinned packages. If it changes, raise RECIPE and put the new value here.
GOLDEN = "491ceb49b0fdf2db"


def words(text, pattern=r"\w+|\W", **_):
    """A tokenizer: every run of letters and digits, and every other character, is a token."""
    spans = [match.span() for match in re.finditer(pattern, text)]
    ids = [sum(map(ord, text[a:b])) for a, b in spans]
    return {"input_ids": ids, "offset_mapping": spans}


def syllables(text, **_):
    """A tokenizer about as fine as real ones: three letters at most are a token."""
    return words(text, r"\w{1,3}|\W")


words.is_fast = syllables.is_fast = True  # they say which characters a token is of


def planted(text, n_parents=4, n_pieces=50):
    """A source of pieces "TEXT-P-I word word ..."; its package is any that is installed."""

    def read_planted(package, files):
        for p in range(n_parents):
            yield f"file{p}", [f"{text} {p} {i} " + "word " * 12 for i in range(n_pieces)]

    return ConceptSource(("tqdm",), "$^", read_planted, "none")


def pair(**kwargs):
    return (Concept("one", "kind", planted("a", **kwargs), planted("b", **kwargs)),)


# --- documents ---------------------------------------------------------------------------------


def test_documents_have_n_tokens_and_reproduce_them_from_their_text():
    corpus = concept_documents(words, 20, n_documents=30, concepts=pair())
    assert corpus.tokens.shape == (60, 20)
    for document in corpus.documents:
        assert words(document.text)["input_ids"] == document.tokens


def test_documents_begin_with_a_piece_where_pieces_are_short():
    corpus = concept_documents(words, 20, n_documents=30, concepts=pair())
    assert all(re.match(r"[ab] \d \d+ word", d.text) for d in corpus.documents)


def test_documents_of_a_piece_without_end_follow_each_other_without_overlap():
    def read_long(package, files):
        yield "file", [" ".join(map(str, range(5000)))]

    source = ConceptSource(("tqdm",), "$^", read_long, "none")
    concepts = (Concept("one", "kind", source, planted("b")),)
    corpus = concept_documents(words, 20, n_documents=30, concepts=concepts)
    numbers = [set(d.text.split()[1:-1]) for d in corpus.documents if d.source == "A"]
    assert sum(map(len, numbers)) == len(set.union(*numbers))


def test_documents_are_taken_from_every_parent_in_turn():
    corpus = concept_documents(words, 20, n_documents=6, concepts=pair(n_parents=4))
    parents = [d.parent for d in corpus.documents if d.source == "A"]
    assert sorted(parents[:4]) == [f"tqdm/file{p}" for p in range(4)]
    assert len(set(corpus.parent.tolist())) == 8  # parents of A and B are not one


def test_a_piece_of_source_a_is_not_in_source_b():
    def read_same(package, files):
        yield "file", [f"the very same piece of text number {i} stands here" for i in range(9)]

    same = ConceptSource(("tqdm",), "$^", read_same, "none")
    parents = read_parents(Concept("one", "kind", same, same))
    assert len(parents["A"][0].pieces) == 9
    assert parents["B"] == []


def test_too_few_documents_are_an_error_that_says_how_many_there_are():
    with pytest.raises(UserError, match=r"fewer than 9 .* one A \(5\), one B \(5\)"):
        concept_documents(words, 20, n_documents=9, concepts=pair(n_parents=1, n_pieces=5))


def test_equal_documents_of_different_pieces_are_taken_once():
    def read_repeating(package, files):
        yield "file", [f"{'word ' * 30}{i}" for i in range(9)]

    source = ConceptSource(("tqdm",), "$^", read_repeating, "none")
    concepts = (Concept("one", "kind", source, planted("b")),)
    with pytest.raises(UserError, match=r"one A \(1\)"):
        concept_documents(words, 20, n_documents=2, concepts=concepts)


def test_a_missing_package_is_named_with_what_to_install():
    source = planted("a")._replace(packages=("no-such-package",))
    with pytest.raises(UserError, match="no-such-package: pip install --no-deps"):
        concept_documents(words, 20, concepts=(Concept("one", "kind", source, source),))


def test_an_unknown_concept_is_named():
    with pytest.raises(UserError, match="no concept klingon; there are citations"):
        find_concepts(["korean", "klingon"])


def test_distance_of_concepts_is_that_of_the_superclass_tree():
    concepts = find_concepts(["python", "cpp", "korean"])
    sources = {"a": planted("a"), "b": planted("b")}
    corpus = concept_documents(
        words, 9, n_documents=2, concepts=tuple(c._replace(**sources) for c in concepts)
    )
    labels = Labelled(corpus.concept, torch.ones(12).double(), superclasses(corpus.concepts))
    assert labels.distance.tolist() == [[0, 0.5, 1], [0.5, 0, 1], [1, 1, 0]]
    assert corpus.concept.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert corpus.heldout.tolist() == [False, False, True, True] * 3


# --- the real sources --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus():
    concepts = find_concepts([*MISSION, "russian", "dna", "latex"])
    return concept_documents(syllables, 64, n_documents=200, concepts=concepts)


def test_there_are_enough_concepts_and_the_missions_four_differ_in_superclass():
    assert len({c.name for c in CONCEPTS}) == len(CONCEPTS) >= 12
    assert len({c.superclass for c in CONCEPTS}) >= 4
    assert len({c.superclass for c in find_concepts(MISSION)}) == 4


def test_sources_of_a_concept_share_no_package():
    for concept in CONCEPTS:
        assert not set(concept.a.packages) & set(concept.b.packages), concept.name


@pytest.mark.parametrize("source", "AB")
@pytest.mark.parametrize(
    "concept, pattern, share",
    [
        ("citations", r"^\[\w+\]|\b[A-Z]\.|\b(1[6-9]|20)\d\d\b|doi", 0.97),
        ("http", r"^(GET|POST|PUT|PATCH|DELETE) /\S* HTTP/1.1", 0.6),
        ("korean", r"[\uac00-\ud7a3]{2}", 0.98),
        ("russian", r"[а-яё]{4}", 0.98),
        ("dialogue", r".\n.", 0.9),
        ("dna", r"^[ACGTNRYKMSW?\n]+$", 1.0),
        ("latex", r"\\[A-Za-z]+|[_^]", 0.97),
    ],
)
def test_documents_look_like_their_concept(corpus, source, concept, pattern, share):
    texts = [d.text for d in corpus.documents if (d.concept, d.source) == (concept, source)]
    assert len(texts) == 200
    found = np.mean([re.search(pattern, text, re.M) is not None for text in texts])
    assert found >= share


def test_no_document_is_in_both_sources_or_twice(corpus):
    assert len({d.text for d in corpus.documents}) == len(corpus.documents)


@pytest.mark.parametrize(
    "package, licence",
    [
        (package, source.licence)
        for concept in CONCEPTS
        for source in concept.sources.values()
        for package in source.packages
    ],
)
def test_the_package_grants_the_licence_that_is_named(package, licence):
    """Works in the public domain are compared by their package: all of these are MIT."""
    words_of = {"BSD": "BSD", "Apache": "Apache", "MPL": "Mozilla", "PSF": "PSF", "GPL": "gpl"}
    families = re.findall("BSD|Apache|MPL|PSF|GPL|MIT", licence) or ["MIT"]
    granted = package_licence(package)
    assert any(words_of.get(family, family) in granted for family in families), granted


def test_documents_are_the_same_everywhere(corpus):
    root = Path(__file__).parents[1]
    files = (root / "requirements.txt", root / "pretrained/requirements.txt")
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", "".join(f.read_text() for f in files), re.M)
    installed = recipe(corpus.concepts)["packages"]
    others = [
        f"{name}=={version}" for name, version in pins if installed.get(name, version) != version
    ]
    if others:
        pytest.skip(f"not installed as pinned: {', '.join(others)}")
    assert fingerprint([list(document) for document in corpus.documents]) == GOLDEN


# --- readers -----------------------------------------------------------------------------------


def read_one(reader, tmp_path, name, content):
    path = tmp_path / name.replace("/", "_")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [pieces for _, pieces in reader("package", [File(name, path)]) if pieces]


def test_citations_are_entries_with_a_year_up_to_the_next_heading(tmp_path):
    source = '''
    Some text from 1999 that is no citation at all, however long it is.

    References
    ----------
    .. [1] A. Author and B. Author,
       "A title", Journal 1 (1984), 1-2.
    .. [2] https://example.org/a/page/without/any/date/in/it
    C. Author (2001). Another title. Another journal.

    Examples
    --------
    An example of 1998 that stands in its own section and is no citation.
    """
    '''
    assert read_one(read.read_citations, tmp_path, "a.py", source) == [
        [
            '[1] A. Author and B. Author, "A title", Journal 1 (1984), 1-2.',
            "C. Author (2001). Another title. Another journal.",
        ]
    ]


def test_latex_is_the_body_of_the_directive(tmp_path):
    source = """
    text

    .. math:: a_i = \\frac{b_i}{c_i} + d
    .. math::
       :label: one

       x^2 = y \\\\
         + z^{\\\\alpha}

    more text with x^2
    """
    expected = ["a_i = \\frac{b_i}{c_i} + d", "x^2 = y \\\\\n  + z^{\\alpha}"]
    assert read_one(read.read_latex, tmp_path, "a.py", source) == [expected]


def test_catalogues_give_translations_and_nothing_untranslated(tmp_path):
    po = (
        'msgid ""\nmsgstr "Language: de\\n"\n\nmsgid "Delete the old file"\n'
        'msgstr ""\n"Alte Datei \\"jetzt\\" "\n"löschen"\n\nmsgid "Not translated here"\n'
        'msgstr ""\n\nmsgid "A name of its own"\nmsgstr "A name of its own"\n'
    )
    po += 'msgid "a {setting}"\nmsgstr "Eine Einstellung: {\\n  \\"a\\": 1 }"\n'
    assert read_one(read.read_catalogue, tmp_path, "a.po", po) == [['Alte Datei "jetzt" löschen']]
    pack = json.dumps({"": {"language": "de"}, "Save this file": ["Diese Datei speichern"]})
    assert read_one(read.read_catalogue, tmp_path, "a.json", pack) == [["Diese Datei speichern"]]


def test_gabbi_tests_become_requests(tmp_path):
    suite = """
defaults: {request_headers: {accept: text/plain}}
tests:
- name: a
  GET: /things/$ENVIRON['ID']
  status: 200
- {name: b, PUT: /things, data: {size: 1}, request_headers: {x-token: admin}}
- {name: c, desc: no request}
"""
    ((first, second),) = read_one(read.read_gabbi, tmp_path, "a.yaml", suite)
    identifier = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    head = rf"GET /things/{identifier} HTTP/1\.1\nHost: localhost\nAccept: text/plain"
    assert re.fullmatch(head, first)
    assert second == (
        "PUT /things HTTP/1.1\nHost: localhost\nAccept: text/plain\nX-Token: admin\n\n"
        '{\n  "size": 1\n}'
    )


def test_recorded_requests_are_joined_with_the_head_of_their_response(tmp_path):
    contents = {
        "a.req": "GET /a HTTP/1.1\n",
        "a.resp": "HTTP/1.1 200 OK\nX: y\n\n{}",
        "b.req": "B",
    }
    files = []
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
        files.append(File(f"folder/{name}", tmp_path / name))
    found = dict(read.read_recorded_requests("package", files))
    assert found == {"a": ["GET /a HTTP/1.1\n\nHTTP/1.1 200 OK\nX: y"], "b": ["B"]}


def test_sequences_lose_names_and_gaps_and_short_ones_share_a_parent(tmp_path):
    long = "ACGT-" * 4 + "\n"
    fasta = ">one\n" + long * 11 + ">two\nACG-T\n>three\nTTT\n"
    found = read_one(read.read_sequences, tmp_path, "a.fasta", fasta)
    assert found == [["ACGT" * 4] * 11, ["ACGT", "TTT"]]


def test_rows_are_of_tables_of_numbers_only(tmp_path):
    numbers = "name,a,b\nx,1,2.5\ny,-3,4e-5\n"
    assert read_one(read.read_rows, tmp_path, "a.csv", numbers) == [numbers.split("\n")[:-1]]
    assert read_one(read.read_rows, tmp_path, "a.csv", "name,a\nx,yes\ny,no\n") == []
    assert read_one(read.read_rows, tmp_path, "a.csv", "a\n1\n2\n") == []


def test_base64_is_found_in_pem_and_in_a_string(tmp_path):
    line = "QUJD" * 16
    pem = "Text\n-----BEGIN-----\n" + f"{line}\n" * 5 + "QUI=\n-----END-----\n"
    assert read_one(read.read_base64, tmp_path, "a.pem", pem) == [[line] * 5]
    assert read_one(read.read_base64, tmp_path, "a.js", f'x="{line * 70}"') == [[line * 70]]


def test_python_loses_docstrings_and_comments(tmp_path):
    source = 'def f(x):\n    """Say\n\n    much."""\n    # why\n    return """x"""\n\ny = 1\n'
    found = read_one(read.read_python, tmp_path, "a.py", source)
    assert found == [["def f(x):", '    return """x"""', "y = 1"]]


def test_braced_code_loses_comments(tmp_path):
    source = "/* a\n\nb */\nint x;  // kept\n// lost\n\nint y;\n"
    found = read_one(read.read_braced_code, tmp_path, "a.h", source)
    assert found == [["int x;  // kept", "int y;"]]


def test_verses_lose_their_numbers(tmp_path):
    content = gzip.compress(
        "=001 Genesis\nGe 1:1 創世記 1:1 元始に神 \nEx 1:1 出 1:1 其名は\n".encode()
    )
    assert read_one(read.read_verses, tmp_path, "a.gz", content) == [["元始に神"], ["其名は"]]


# --- token tags --------------------------------------------------------------------------------


def tags_of(text):
    """The tags of each token of `words`, without those every Latin word has."""
    tags = token_tags(text, np.array(words(text)["offset_mapping"]))
    names = [{TAGS[j] for j in np.flatnonzero(row)} - {"latin"} for row in tags]
    return dict(zip(re.findall(r"\w+|\W", text), names, strict=True))


@pytest.mark.parametrize(
    "text, token, tags",
    [
        ("in 1984 or", "1984", {"digit", "year"}),
        ("in 19845 or", "19845", {"digit"}),
        ("costs 1984.5", "1984", {"digit"}),
        ("a, b", ",", {"punctuation"}),
        ("a + b", "+", {"mathematical"}),
        ("f(x)", "(", {"punctuation", "bracket"}),
        ('say "so it is" now', "it", {"quoted"}),
        ('say "so it is" now', '"', {"punctuation", "quote", "quoted"}),
        ("see https://a.org/b now", "org", {"url"}),
        ("see https://a.org/b now", "now", set()),
        ("to me@a.org now", "me", {"email"}),
        ("use getItem here", "getItem", {"camel_case"}),
        ("use JsonReader here", "JsonReader", {"camel_case"}),
        ("use Reader here", "Reader", {"capitalised"}),
        ("use HTTP here", "HTTP", {"all_caps"}),
        ("use my_item here", "my_item", {"snake_case"}),
        ("eine Größe", "Größe", {"accented"}),
        ("это так", "это", {"cyrillic"}),
        ("이것은 x", "이것은", {"hangul"}),
        ("日本", "日本", {"han"}),
        ("ひら と", "ひら", {"kana"}),
        ("שלום x", "שלום", {"hebrew"}),
        ("سلام x", "سلام", {"arabic"}),
        ("λόγος x", "λόγος", {"greek"}),
        ("a\nb", "\n", {"newline"}),
        ("a\n\tb", "\t", {"indent"}),
        ("plain word", "word", set()),
    ],
)
def test_tags_of_a_token(text, token, tags):
    assert tags_of(text)[token] == tags


def test_a_token_has_the_tags_of_any_of_its_characters_and_none_without_characters():
    tags = token_tags("ab1한", np.array([[0, 0], [0, 3], [3, 4], [3, 4]]))
    digit, latin, hangul = (TAGS.index(name) for name in ("digit", "latin", "hangul"))
    assert not tags[0].any()
    assert tags[1, [digit, latin]].all() and not tags[1, hangul]
    assert tags[2, hangul] and tags[3, hangul] and not tags[2:, latin].any()


# --- the card's arithmetic ---------------------------------------------------------------------


def test_wilson_interval_ends_where_the_score_test_rejects():
    z = 1.959964
    share, low, high = share_interval(8, 10)
    for p in (low, high):
        assert (p - 0.8) ** 2 == pytest.approx(z * z * p * (1 - p) / 10, rel=1e-6)
    assert low < share == 0.8 < high
    assert share_interval(0, 5).low == 0 and share_interval(5, 5).high == pytest.approx(1)


def test_naive_bayes_is_the_largest_smoothed_likelihood():
    rng = np.random.default_rng(0)
    train, test = rng.poisson(1.5, (12, 5)), rng.poisson(1.5, (7, 5))
    label = np.arange(12) % 3
    likelihood = np.zeros((7, 3))
    for k in range(3):
        share = (train[label == k].sum(axis=0) + 1) / (train[label == k].sum() + 5)
        likelihood[:, k] = np.prod(share**test, axis=1)
    assert (naive_bayes(train, label, test) == likelihood.argmax(axis=1)).all()


def test_trigrams_are_counted():
    assert trigrams("abcabc").sum() == 4
    assert trigrams("abcabc").max() == 2


def test_bags_know_the_units_of_the_training_documents_only():
    counts = bags([["a", "b", "a"], ["a", "c"], ["b"]], np.array([True, False, True]))
    assert counts.tolist() == [[2, 1], [1, 0], [0, 1]]

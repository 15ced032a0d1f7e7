"""What is the concept corpus made of, and do its two sources mean the same by a label?

    python -m analysis.describe_concepts

Prints and writes the data card: for every concept and source the packages, licence, size and how
far documents of the two sources are apart; a control, naive Bayes over characters or words
trained on source A and scored on source B, with what it confuses; and how often each token tag
occurs in held-out documents of the text `builtin`. About a minute on 2 CPU cores. The JSON goes
to outputs/results.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from typing import TYPE_CHECKING
from zlib import crc32

import numpy as np

from analysis.program import (
    Row,
    print_table,
    results_path,
    run_program,
    write_results,
)
from sparse_coding.settings import Count, CountOrZero, Draws, OutputFile, Seed

if TYPE_CHECKING:
    from sparse_coding.concepts import Concept, ConceptCorpus, ConceptDocument

N_BINS = 4096  # trigrams are counted by hash
N_SHUFFLES = 100
N_UNITS = 10_000  # words or characters that naive Bayes knows
# A word, a sign, or a character of the scripts that are written without blanks.
WORD = re.compile(r"[\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]|[^\W_]+|[^\w\s]|_|\n")


@dataclass(frozen=True)
class Config:
    """Which documents are described."""

    lm: str = "smollm2-135m"
    """Language model whose tokenizer cuts the documents."""
    n_tokens: Count = 64
    """Tokens of a document."""
    n_documents: Count = 200
    """Documents of each concept and source."""
    concepts: tuple[str, ...] = ()
    """Names of concepts; none: all."""
    n_natural: CountOrZero = 200
    """Held-out documents of the text builtin in which token tags are counted; 0: not counted."""
    n_draws: Draws = 1000
    """Bootstrap draws behind the intervals."""
    seed: Seed = 0
    """Seed of the bootstrap."""
    output: OutputFile | None = None
    """Results file; by default outputs/results/describe_concepts.json."""
    overwrite: bool = False
    """Replace the results file if it exists."""


def main(cfg: Config) -> None:
    path = results_path(cfg, "describe_concepts", [])
    from sparse_coding.concepts import concept_documents, find_concepts, recipe
    from sparse_coding.models import load_lm

    concepts = find_concepts(cfg.concepts)
    tokenizer = load_lm(cfg.lm).tokenizer
    corpus = concept_documents(
        tokenizer, cfg.n_tokens, n_documents=cfg.n_documents, concepts=concepts
    )
    made_by = recipe(concepts)
    sources = source_rows(corpus, made_by["packages"])
    controls = control_rows(corpus, cfg)
    tags = tag_rows(tokenizer, cfg) if cfg.n_natural else []
    print_card(cfg, sources, controls, tags)
    write_results(path, cfg, sources + controls + tags, "cpu", recipe=made_by)


# --- sources -----------------------------------------------------------------------------------


def source_rows(corpus: "ConceptCorpus", versions: dict[str, str]) -> list[Row]:
    """One row for each concept and source.

    Distances are means of 1 - cosine over pairs of documents, each the square roots of its
    counts of character trigrams: within the source, to the concept's other source, and to the
    documents of other concepts. `nearest` is the largest cosine to a document of the other
    source (1: a copy).
    """
    profiles = np.sqrt(np.stack([trigrams(document.text) for document in corpus.documents]))
    profiles /= np.linalg.norm(profiles, axis=1, keepdims=True)
    members: dict[tuple[str, str], list[int]] = {}
    for i, document in enumerate(corpus.documents):
        members.setdefault((document.concept, document.source), []).append(i)
    rows = []
    for concept in corpus.concepts:
        for source, other in (("A", "B"), ("B", "A")):
            own, twin = members[concept.name, source], members[concept.name, other]
            rest = np.setdiff1d(np.arange(len(profiles)), own + twin)
            within = profiles[own] @ profiles[own].T
            between = profiles[own] @ profiles[twin].T
            n = len(own)
            row = size_row(concept, source, [corpus.documents[i] for i in own], versions)
            rows.append(
                row
                | {
                    "distance_within": float(1 - (within.sum() - n) / (n * (n - 1))),
                    "distance_between": float(1 - between.mean()),
                    "distance_others": float(1 - (profiles[own] @ profiles[rest].T).mean())
                    if len(rest)
                    else None,
                    "nearest": float(between.max()),
                }
            )
    return rows


def size_row(
    concept: "Concept", source: str, documents: list["ConceptDocument"], versions: dict[str, str]
) -> Row:
    from sparse_coding.builtin_text import SOURCES

    origin = concept.sources[source]
    read_by_builtin = {package for builtin in SOURCES for package in builtin.packages}
    n_characters = sum(len(document.text) for document in documents)
    n_tokens = sum(len(document.tokens) for document in documents)
    return {
        "kind": "source",
        "concept": concept.name,
        "superclass": concept.superclass,
        "source": source,
        "split": "choosing" if source == "A" else "held out",
        "origin": ", ".join(f"{p}=={versions[p]}" for p in origin.packages),
        "files": origin.files,
        "licence": origin.licence,
        "package_licences": ", ".join(map(package_licence, origin.packages)),
        "in_builtin": any(p in read_by_builtin for p in origin.packages),
        "generated": origin.generated,
        "n_documents": len(documents),
        "n_parents": len({document.parent for document in documents}),
        "n_characters": n_characters,
        "n_tokens": n_tokens,
        "characters_per_token": n_characters / n_tokens,
    }


def package_licence(package: str) -> str:
    """What the installed package's metadata say of its licence, in one line."""
    from sparse_coding.builtin_text import PYTHON

    if package == PYTHON:
        return "PSF-2.0"
    about = metadata.metadata(package)
    classifiers = [c for c in about.get_all("Classifier") or [] if c.startswith("License")]
    said = about["License-Expression"] or ", ".join(c.rpartition(" :: ")[2] for c in classifiers)
    return said or (about["License"] or "none given").split("\n")[0]


def trigrams(text: str) -> np.ndarray:
    """Counts (N_BINS,) of the text's character trigrams, by hash."""
    hashes = [crc32(text[i : i + 3].encode("utf-8", "replace")) for i in range(len(text) - 2)]
    return np.bincount(np.array(hashes, dtype=np.int64) % N_BINS, minlength=N_BINS).astype(float)


# --- the control -------------------------------------------------------------------------------


def control_rows(corpus: "ConceptCorpus", cfg: Config) -> list[Row]:
    """Accuracy, recall, precision and confusions of naive Bayes, A to B; equal priors.

    The null is the same with shuffled labels.
    """
    heldout, label = corpus.heldout.numpy(), corpus.concept.numpy()
    parent = corpus.parent.numpy()[heldout]
    texts = [document.text for document in corpus.documents]
    names = [concept.name for concept in corpus.concepts]
    rows = []
    for features, units in (("characters", list), ("words", WORD.findall)):
        counts = bags([units(text) for text in texts], ~heldout)
        train, test = counts[~heldout], counts[heldout]
        guess = naive_bayes(train, label[~heldout], test)
        of_true = {"kind": "control", "features": features, "labels": "true"}
        overall = accuracy(guess == label[heldout], parent, cfg)
        rows.append(of_true | {"concept": "all"} | overall)
        rows += [of_true | row for row in recall_rows(names, guess, label[heldout])]
        null = shuffled_accuracy(train, label[~heldout], test, label[heldout], cfg.seed)
        rows.append(of_true | {"labels": "shuffled", "concept": "all"} | null)
    return rows


def shuffled_accuracy(
    train: np.ndarray, label: np.ndarray, test: np.ndarray, truth: np.ndarray, seed: int
) -> Row:
    """Mean and central 95 % of `N_SHUFFLES` accuracies, the training labels shuffled each time."""
    generator = np.random.default_rng(seed)
    values = [
        (naive_bayes(train, generator.permutation(label), test) == truth).mean()
        for _ in range(N_SHUFFLES)
    ]
    low, high = np.quantile(values, (0.025, 0.975))
    return {
        "split": "B",
        "accuracy": float(np.mean(values)),
        "accuracy_low": float(low),
        "accuracy_high": float(high),
        "accuracy_n": len(truth),
        "n_shuffles": N_SHUFFLES,
    }


def bags(documents: list[list[str]], train: np.ndarray) -> np.ndarray:
    """Counts (document, unit) of the units that are most common where `train` is true."""
    chosen = [units for units, is_chosen in zip(documents, train, strict=True) if is_chosen]
    common = Counter(chain.from_iterable(chosen)).most_common(N_UNITS)
    index = {unit: i for i, (unit, _) in enumerate(common)}
    counts = np.zeros((len(documents), len(index)))
    for row, units in zip(counts, documents, strict=True):
        for unit in units:
            if unit in index:
                row[index[unit]] += 1
    return counts


def naive_bayes(train: np.ndarray, label: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The most probable label of each row of `test`: multinomial, add-one smoothed."""
    totals = (label == np.arange(label.max() + 1)[:, None]) @ train + 1
    log_probability = np.log(totals / totals.sum(axis=1, keepdims=True))
    return (test @ log_probability.T).argmax(axis=1)


def accuracy(correct: np.ndarray, parent: np.ndarray, cfg: Config) -> Row:
    """Share correct, with the interval of a bootstrap over parents (not documents)."""
    import torch

    from sparse_coding.metrics import bootstrap_weights, interval

    _, cluster = np.unique(parent, return_inverse=True)
    n = torch.from_numpy(np.bincount(cluster)).double()
    n_correct = torch.from_numpy(np.bincount(cluster, weights=correct)).double()
    generator = torch.Generator().manual_seed(cfg.seed)
    weights = bootstrap_weights(torch.ones(len(n), dtype=torch.bool), cfg.n_draws, generator)
    value, low, high = interval(weights @ n_correct / (weights @ n))
    return {
        "split": "B",
        "accuracy": value,
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_n": len(correct),
        "n_parents": len(n),
    }


def recall_rows(names: list[str], guess: np.ndarray, label: np.ndarray) -> list[Row]:
    """Recall (Wilson interval over documents) and precision; the other labels most often given."""
    from sparse_coding.metrics import share_interval

    rows = []
    for k, name in enumerate(names):
        given = np.bincount(guess[label == k], minlength=len(names))
        n, n_correct = int(given.sum()), int(given[k])
        share, low, high = share_interval(n_correct, n)
        n_guessed = int((guess == k).sum())
        wrong = [(int(given[j]), names[j]) for j in range(len(names)) if j != k and given[j]]
        rows.append(
            {
                "concept": name,
                "split": "B",
                "accuracy": share,
                "accuracy_low": low,
                "accuracy_high": high,
                "accuracy_n": n,
                "precision": n_correct / n_guessed if n_guessed else None,
                "precision_n": n_guessed,
                "confused_with": ", ".join(f"{name} {m}" for m, name in sorted(wrong)[::-1]),
            }
        )
    return rows


# --- tags --------------------------------------------------------------------------------------


def tag_rows(tokenizer: Callable, cfg: Config) -> list[Row]:
    """How often each tag occurs in natural text, with bootstrap intervals over documents."""
    import torch

    from sparse_coding.metrics import bootstrap_weights, interval
    from sparse_coding.text import load_text, token_spans
    from sparse_coding.token_tags import TAGS, token_tags

    n_tagged, n_tokens = [], []
    documents = load_text("builtin").documents("heldout")
    for _, document in zip(range(cfg.n_natural), documents, strict=False):
        tags = token_tags(document.text, token_spans(document.text, tokenizer)[1])
        n_tagged.append(tags.sum(axis=0))
        n_tokens.append(len(tags))
    counts = torch.from_numpy(np.stack(n_tagged)).double()
    n = torch.tensor(n_tokens, dtype=torch.float64)
    generator = torch.Generator().manual_seed(cfg.seed)
    weights = bootstrap_weights(torch.ones(len(n), dtype=torch.bool), cfg.n_draws, generator)
    rows = []
    for tag, count in zip(TAGS, counts.T, strict=True):
        rate, low, high = interval(weights @ count / (weights @ n))
        rows.append(
            {"kind": "tag", "tag": tag, "split": "builtin, held out", "n_documents": len(n)}
            | {"rate": rate, "rate_low": low, "rate_high": high, "rate_n": int(n.sum())}
        )
    return rows


# --- tables ------------------------------------------------------------------------------------


def print_card(cfg: Config, sources: list[Row], controls: list[Row], tags: list[Row]) -> None:
    columns = {"concept": "{}", "superclass": "{}", "source": "{}", "origin": "{}"}
    columns |= {"licence": "{}", "in_builtin": "{}", "n_documents": "{:,}", "n_parents": "{:,}"}
    columns |= {"n_characters": "{:,}", "distance_within": "{:.2f}"}
    columns |= {"distance_between": "{:.2f}", "distance_others": "{:.2f}", "nearest": "{:.2f}"}
    n_generated = sum(row["generated"] for row in sources)
    note = f"{cfg.n_tokens} tokens each; {n_generated} of {len(sources)} sources are generated. "
    note += "Licences are the text's; the results file has the packages' own too"
    print_table("Sources of the concepts: A for choosing, B held out", sources, columns, note)
    columns = {"features": "{}", "labels": "{}", "concept": "{}", "accuracy": "{:.3f}"}
    columns |= {"accuracy_n": "{}", "precision": "{:.3f}", "confused_with": "{}"}
    n_concepts = len({row["concept"] for row in sources})
    print_table(
        "Naive Bayes, trained on source A, scored on source B (95 % intervals)",
        controls,
        columns,
        f"chance {1 / n_concepts:.3f}; all: bootstrap over parents, one: Wilson over documents, "
        "shuffled: over shuffles",
    )
    if tags:
        print_table(
            f"Token tags in {tags[0]['n_documents']} held-out documents of builtin",
            tags,
            {"tag": "{}", "rate": "{:.4f}", "rate_n": "{:,}"},
        )


if __name__ == "__main__":
    run_program(Config, main)

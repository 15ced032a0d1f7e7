"""`python -m analysis.probe_concepts`: planted concepts, and a run against numbers read apart."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny_runs import run_program

from analysis.concept_probes import (
    ALL,
    SHUFFLED,
    TRUE,
    Probed,
    averages,
    centred,
    make_task,
    rank,
    rows_of_concepts,
    rows_over_seeds,
    with_whole_axes,
)
from analysis.concept_study import Study
from analysis.program import MeasureConfig
from analysis.subjects import Material, load_subjects
from analysis.units import Split
from data_visualization import fig_probe_concepts
from sparse_coding.baselines import neuron_basis
from sparse_coding.concepts import concept_documents, find_concepts
from sparse_coding.dictionary import Dictionary
from sparse_coding.harvest import activations
from sparse_coding.polysemanticity import Labelled
from sparse_coding.probing import ranked_features

N_CONCEPTS, N_DOCUMENTS, N_TOKENS = 4, 24, 6  # of each source
HOOK = "blocks.1.hook_resid_post"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the study, on activations of planted concepts ---------------------------------------------


class Planted(Dictionary):
    """relu(x W_dec^T - 1/2): features along its rows."""

    def __init__(self, W_dec: torch.Tensor) -> None:
        super().__init__()
        self.d_sae, self.d_in = W_dec.shape
        self.register_buffer("W_dec", W_dec)

    def encode(self, x):
        return torch.relu(x @ self.W_dec.T - 0.5)

    def decode(self, f):
        return f @ self.W_dec


def split_of(x: torch.Tensor, superclass: torch.Tensor, first: int) -> Split:
    """Rows of N_DOCUMENTS documents of each concept, N_TOKENS tokens each."""
    document = torch.arange(len(x)) // N_TOKENS
    n = int(document[-1]) + 1
    concept = torch.arange(n) // N_DOCUMENTS
    counts = torch.full((n,), N_TOKENS).double()
    token = torch.zeros(len(x), dtype=torch.int64)
    return Split(
        {HOOK: x}, document, token, token, Labelled(concept, counts, superclass),
        first + torch.arange(n),
    )  # fmt: skip


def planted_reading(a: torch.Tensor, b: torch.Tensor) -> SimpleNamespace:
    """What `ConceptReading` holds. Documents 2i and 2i + 1 have one parent."""
    superclass = torch.arange(N_CONCEPTS)
    n = N_CONCEPTS * N_DOCUMENTS
    names = [SimpleNamespace(name=f"concept{c}") for c in range(N_CONCEPTS)]
    corpus = SimpleNamespace(parent=torch.arange(2 * n) // 2, concepts=names)
    return SimpleNamespace(
        choosing=split_of(a, superclass, 0), heldout=split_of(b, superclass, n),
        corpus=corpus, lm=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip


def concept_rows(seed: int) -> torch.Tensor:
    """Small noise in 8 dimensions; tokens of concept c have 2 in dimension c."""
    x = 0.1 * drawn(N_CONCEPTS * N_DOCUMENTS * N_TOKENS, 8, seed=seed)
    concept = torch.arange(len(x)) // (N_DOCUMENTS * N_TOKENS)
    x[torch.arange(len(x)), concept] += 2
    return x


def study(reading, *families: Probed, ks=(1, 2)) -> list[dict]:
    tasks = [make_task(reading, 50, 0, how) for how in (False, True)]
    found = Study(reading, HOOK, tasks, ks)
    for family in families:
        found.add(family)
    return found.rows()


def of_dictionary(W_dec: torch.Tensor, ratio: int = 1, seed: int = 0, family="sae") -> Probed:
    facts = {"family": family, "ratio": ratio, "seed": seed}
    return Probed(facts, HOOK, lambda: Planted(W_dec))


def only(rows: list[dict], **facts) -> dict:
    (row,) = [row for row in rows if all(row.get(k) == v for k, v in facts.items())]
    return row


@pytest.fixture(scope="module")
def detectors():
    """Rows of a dictionary with one feature per concept, and five that see noise alone."""
    reading = planted_reading(concept_rows(0), concept_rows(1))
    noise = torch.nn.functional.normalize(drawn(5, 8, seed=2), dim=1) * 0.01
    return study(reading, of_dictionary(torch.cat([torch.eye(8), noise])))


def test_averages_are_numpys():
    reading = planted_reading(concept_rows(0), concept_rows(1))
    found = averages(lambda x: x.square(), reading, HOOK)
    expected = concept_rows(1).square().view(-1, N_TOKENS, 8).mean(dim=1)
    torch.testing.assert_close(found.b, expected)


def test_a_basis_offers_whole_axes_beside_their_halves():
    reading = planted_reading(concept_rows(0), concept_rows(1))
    basis = neuron_basis(torch.zeros(8))
    found = with_whole_axes(averages(basis.encode, reading, HOOK))
    plain = averages(lambda x: x, reading, HOOK)
    torch.testing.assert_close(found.a[:, :8], plain.a)
    assert found.b.shape == (N_CONCEPTS * N_DOCUMENTS, 24)


def test_a_feature_that_is_the_label_has_auroc_one_with_k_one(detectors):
    for c in range(N_CONCEPTS):
        row = only(detectors, kind="probe", labels=TRUE, family="sae", k=1, concept=f"concept{c}")
        assert row["auroc"] == row["auroc_low"] == row["average_precision"] == 1
        assert row["n_documents"] == 96 and row["n_positive"] == 24 and row["n_parents"] == 12
        split = only(detectors, kind="splitting", labels=TRUE, concept=f"concept{c}")
        assert split["features"] == [c] and split["n_needed"] == 1
    mean = only(detectors, kind="probe", labels=TRUE, family="sae", k=1, concept=ALL)
    assert mean["auroc"] == 1 and mean["n_positive"] == 96


def test_shuffled_labels_leave_chance():
    """Means of four concepts in twelve studies: the null is neither better nor worse than 1/2."""
    reading = planted_reading(concept_rows(0), concept_rows(1))
    found = []
    for seed in range(12):
        one = Study(reading, HOOK, [make_task(reading, 2, seed, True)], (1,))
        found.append(one.scored[0].auroc[:, 0].mean().item())
    error = np.std(found, ddof=1) / np.sqrt(12)
    assert abs(np.mean(found) - 0.5) < 4 * error and error < 0.02


def test_shuffled_rows_keep_the_documents_of_each_concept(detectors):
    row = only(detectors, kind="probe", labels=SHUFFLED, family="sae", k=1, concept="concept0")
    assert row["n_positive"] == 24 and row["n_parents"] > 12 and row["auroc"] < 0.8


def test_features_are_chosen_on_source_a_alone():
    """Dimension 5 is concept 0 on B and noise on A; dimension 6 is weak on A and nothing on B."""
    a, b = concept_rows(0), concept_rows(1)
    first = torch.arange(len(a)) < N_DOCUMENTS * N_TOKENS
    for x in (a, b):
        x[first, 0] -= 2
    b[first, 5] += 2
    a[first, 6] += 0.6
    rows = study(planted_reading(a, b), of_dictionary(torch.eye(8)))
    facts = {"labels": TRUE, "family": "sae", "concept": "concept0"}
    assert only(rows, kind="splitting", **facts)["features"][0] == 6
    assert only(rows, kind="probe", k=1, **facts)["auroc"] < 0.7


def test_each_fold_ranks_features_on_what_it_trains_on():
    reading = planted_reading(concept_rows(0), concept_rows(1))
    task = make_task(reading, 2, 0)
    features = drawn(N_CONCEPTS * N_DOCUMENTS, 9)
    for c, found in enumerate(rank(task, features, 3)):
        positive = task.a.concept == c
        for row, members in zip(
            [found.whole, *found.in_folds],
            [torch.arange(len(positive)), *(train for train, _ in task.folds[c])],
            strict=True,
        ):
            some = positive[members]
            (expected,) = ranked_features(features[members], some[None], ~some[None], 3)
            assert row.tolist() == expected.tolist()


def test_differences_are_paired():
    """A family's difference to the same family under another name is 0 in every draw."""
    reading = planted_reading(*(concept_rows(i) + 3 * drawn(576, 8, seed=i + 4) for i in (0, 1)))
    W_dec = drawn(16, 8, seed=3)
    rows = study(
        reading, of_dictionary(W_dec, family="random_directions", seed=None),
        of_dictionary(W_dec), of_dictionary(torch.eye(8), seed=1), ks=(1,),
    )  # fmt: skip
    facts = {"kind": "probe", "labels": TRUE, "concept": ALL}
    twin = only(rows, **facts, family="sae", seed=0)
    assert twin["auroc_low"] < twin["auroc"] < twin["auroc_high"]
    assert twin["minus_random_low"] == twin["minus_random"] == twin["minus_random_high"] == 0
    other, dense = only(rows, **facts, family="sae", seed=1), only(rows, **facts, family="dense")
    assert other["minus_random"] == pytest.approx(other["auroc"] - twin["auroc"])
    assert other["minus_dense"] == pytest.approx(other["auroc"] - dense["auroc"])
    assert dense["k"] == 8


def split_rows(seed: int) -> torch.Tensor:
    """Concept 0's documents are of two kinds: half have dimension 6 as well, half dimension 7."""
    x = concept_rows(seed)
    kind = torch.arange(N_DOCUMENTS * N_TOKENS) // N_TOKENS % 2
    x[torch.arange(len(kind)), 6 + kind] += 2
    return x


def test_a_parent_split_into_two_children_is_found_again():
    """On B every fourth document of the concept is of neither kind."""
    a, b = split_rows(0), split_rows(1)
    b[: N_DOCUMENTS * N_TOKENS].view(-1, 4, N_TOKENS, 8)[:, 0, :, 6:] = 0
    eye = torch.eye(8)
    small = eye.clone()
    small[6:] = 0  # knows nothing of the kinds
    large = eye.clone()
    large[0] = 0
    # 0.2 * (2 + 2) is above the 1/2 that is left out: a child answers its own kind alone
    large[6], large[7] = 0.2 * (eye[0] + eye[6]), 0.2 * (eye[0] + eye[7])
    rows = study(planted_reading(a, b), of_dictionary(small, 1), of_dictionary(large, 2), ks=(1,))
    parent = only(rows, kind="splitting", labels=TRUE, ratio=1, concept="concept0")
    assert parent["n_needed"] == 1 and parent["features"] == [0]
    assert only(rows, kind="splitting", labels=TRUE, ratio=2, concept="concept0")["n_needed"] == 2
    found = only(rows, kind="children", ratio=2, concept="concept0")
    assert found["near"] == [6, 7] and found["n_cosine"] == 2 and found["from_ratio"] == 1
    assert found["best_cosine"] == pytest.approx(0.5**0.5)
    assert found["top"] == [6, 7] and found["n_positive"] == N_DOCUMENTS
    shares = {key: found[f"{key}_covers"] for key in ("near", "best", "top")}
    assert shares == {"near": 0.75, "best": 0.25, "top": 0.75}
    assert found["near_covers_silent"] == found["top_covers_silent"] == 0


def test_parents_are_of_the_same_seed_and_of_the_next():
    reading = planted_reading(concept_rows(0), concept_rows(1))
    other = torch.eye(8).roll(1, dims=0)
    small = [of_dictionary(W_dec, 1, seed) for seed, W_dec in enumerate((torch.eye(8), other))]
    rows = study(reading, *small, of_dictionary(torch.eye(8), 2, 0), ks=(1,))
    found = {
        row["from_seed"]: row for row in rows
        if row["kind"] == "children" and row["concept"] == "concept1"
    }  # fmt: skip
    assert {seed: row["shares_start"] for seed, row in found.items()} == {0: True, 1: False}
    assert found[0]["near"] == found[1]["near"] == [1]
    assert only(rows, kind="splitting", labels=TRUE, seed=1, concept="concept1")["features"] == [2]


def test_features_that_share_a_concept_are_both_needed():
    x, heldout = split_rows(0), split_rows(1)
    for part in (x, heldout):
        part[:, 0] = 0
    reading = planted_reading(x, heldout)
    rows = study(reading, of_dictionary(torch.eye(8)))
    row = only(rows, kind="splitting", labels=TRUE, concept="concept0")
    assert row["n_needed"] == 2 and set(row["features"]) == {6, 7}
    assert row["f1_of_needed"] == 1 and row["f1_of_one"] < 0.75


class Absorbing(Planted):
    """Feature 5 takes the place of feature 0 where that would be large, if `is_there`."""

    def __init__(self, is_there: bool) -> None:
        rows = torch.eye(8)
        rows[5] = rows[0]
        super().__init__(rows)
        self.is_there = is_there

    def encode(self, x):
        f = super().encode(x)
        is_large = x[:, :1] > 2.75
        f[:, 5:6] = f[:, :1] * is_large * self.is_there
        f[:, :1] *= ~is_large
        return f


@pytest.mark.parametrize("is_there", (True, False))
def test_the_planted_absorber_is_found_token_by_token(is_there):
    """Of three tokens of concept 0 one has 3.5 in dimension 0 instead of 2, and one nothing."""
    a, b = concept_rows(0), concept_rows(1)
    for x in (a, b):
        of_concept = x[: N_DOCUMENTS * N_TOKENS, 0].view(-1, 3)
        of_concept += torch.tensor([0, 1.5, -2])
    facts = {"family": "sae", "ratio": 1, "seed": 0}
    rows = study(planted_reading(a, b), Probed(facts, HOOK, lambda: Absorbing(is_there)), ks=(1,))
    row = only(rows, kind="absorption", labels=TRUE, concept="concept0")
    assert row["n_main"] == 1 and row["main_silent"] == 0.5
    assert row["share_taken"] == pytest.approx(2 / 3)
    assert row["n_tokens"] == N_DOCUMENTS * N_TOKENS * 2 / 3
    (main,) = only(rows, kind="splitting", labels=TRUE, concept="concept0")["features"]
    # The other half is written by the other feature, but for the 1/2 that both leave out.
    expected = {0: 3 / 3.5, 5: 1.5 / 2}[main] / 2 if is_there else 0
    assert row["absorption"] == pytest.approx(expected, abs=0.02)


def test_draws_of_a_biased_score_are_centred_at_the_estimate():
    found = centred(torch.tensor([[0.2, 0.3, 0.5, 0.4], [0.99, 0.9, 1.0, 0.95]]).double())
    expected = torch.tensor([[0.2, 0.1, 0.3, 0.2], [0.99, 0.94, 1.0, 0.99]]).double()
    torch.testing.assert_close(found, expected)


def test_seeds_are_summed_up_with_students_interval():
    facts = {"kind": "splitting", "labels": TRUE, "family": "sae", "ratio": 4, "target_l0": 30.0}
    rows = [
        facts | {"seed": seed, "concept": ALL, "n_needed": n, "sae": f"s{seed}", "n_documents": 9}
        for seed, n in enumerate((1.0, 2.0, 6.0))
    ]
    (row,) = rows_over_seeds(rows)
    assert row["seed"] == ALL and row["n_seeds"] == 3 and row["n_documents"] == 9
    assert row["n_needed"] == 3 and row["target_l0"] == 30 and "target_l0_low" not in row
    half = 4.302652730 * np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    assert row["n_needed_high"] - 3 == pytest.approx(half)


def test_the_mean_over_concepts_leaves_out_those_without_a_value():
    values = {"absorption": torch.tensor([[0.2, 0.1, 0.3], [torch.nan] * 3, [0.6, 0.5, 0.7]])}
    rows = rows_of_concepts({}, list("abc"), values, [{"n_tokens": n} for n in (3, 0, 5)])
    assert rows[1]["absorption"] is None
    assert rows[3]["absorption"] == pytest.approx(0.4) and rows[3]["n_tokens"] == 8


# --- the program -------------------------------------------------------------------------------

RUN = Path("outputs/runs/probed")
FLAGS = ["--concepts", "korean", "python", "dna", "--n-documents", "12", "--n-tokens", "24",
         "--ks", "1", "2", "--n-draws", "50"]  # fmt: skip


@pytest.fixture(scope="module")
def probed(place, finished):
    """Rows of a finished run with ratios 1 and 4, seeds 0 and 1."""
    shutil.copytree(finished[1], place / RUN)
    done = run_program(place, "analysis.probe_concepts", str(RUN), *FLAGS)
    assert done.returncode == 0, done.stderr
    return json.loads((place / RUN / "results/probe_concepts.json").read_text())["rows"]


def test_every_family_is_probed_with_every_k_and_both_labellings(probed):
    found = {
        (row["labels"], row["family"], row["ratio"], row["seed"], row["k"])
        for row in probed
        if row["kind"] == "probe" and row["concept"] == ALL and row["seed"] != ALL
    }
    alone = ("neuron_basis", "pca", "mlp_neurons")
    own = [(family, ratio, seed) for family in ("sae", "untrained") for ratio in (1, 4)
           for seed in (0, 1)]  # fmt: skip
    own += [("random_directions", ratio, None) for ratio in (1, 4)]
    own += [(family, None, None) for family in alone]
    expected = {(labels, *one, k) for labels in (TRUE, SHUFFLED) for one in own for k in (1, 2)}
    expected |= {(labels, "dense", None, None, 12) for labels in (TRUE, SHUFFLED)}
    assert found == expected


def test_only_larger_ratios_have_children_and_both_controls_stand_beside_absorption(probed):
    means = [row for row in probed if row["concept"] == ALL and row["seed"] in (0, 1)]
    children = [row for row in means if row["kind"] == "children"]
    found = {(row["family"], row["from_ratio"], row["ratio"]) for row in children}
    assert found == {("sae", 1, 4), ("untrained", 1, 4)}
    # Untrained, a seed's larger dictionary has its smaller one's rows: why others are looked for.
    untrained = [row for row in children if row["family"] == "untrained"]
    assert len(untrained) == 4
    assert all((r["best_cosine"] > 1 - 1e-6) == r["shares_start"] for r in untrained)
    found = {(r["family"], r["labels"]) for r in means if r["kind"] == "absorption"}
    assert found == {(f, labels) for f in ("sae", "untrained") for labels in (TRUE, SHUFFLED)}


def test_the_score_of_one_feature_is_scikit_learns_on_activations_read_apart(
    probed, place, monkeypatch
):
    monkeypatch.chdir(place)
    name = "l1_x04_l0-6_s1"
    (subject,) = load_subjects([str(RUN / "saes" / name)], MeasureConfig(device="cpu"))
    lm = Material(subject.origin, "cpu").lm
    corpus = concept_documents(
        lm.tokenizer, 24, n_documents=12, concepts=find_concepts(("korean", "python", "dna"))
    )
    tokens = corpus.tokens[corpus.heldout]
    start = torch.full((len(tokens), 1), lm.tokenizer.bos_token_id)
    acts = activations(lm, torch.cat([start, tokens], dim=1), [HOOK])[HOOK][:, 1 + 4 :]
    mean = subject.dictionary.encode(acts.float()).mean(dim=1)
    for c, concept in enumerate(corpus.concepts):
        facts = {"labels": TRUE, "sae": name, "family": "sae", "concept": concept.name}
        feature = only(probed, kind="splitting", **facts)["features"][0]
        positive = corpus.concept[corpus.heldout] == c
        expected = roc_auc_score(positive.numpy(), mean[:, feature].numpy())
        row = only(probed, kind="probe", k=1, **facts)
        # A feature that is silent in the concept is read with a minus.
        assert abs(row["auroc"] - 0.5) == pytest.approx(abs(expected - 0.5), abs=1e-6)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--concepts", "dna"], "one concept"),
        (["--n-documents", "3"], "10 or more"),
        (["--ks", "0"], "1 or more"),
        (["--concepts", "dna", "runes"], "no concept runes"),
        (["--ratios", "3"], "it has [1, 4]"),
    ],
)
def test_what_cannot_be_probed_is_refused_in_one_line(finished, place, flags, said):
    output = ["--output", "refused.json"]
    done = run_program(place, "analysis.probe_concepts", str(finished[1]), *flags, *output)
    assert done.returncode == 2 and said in done.stderr
    assert "Traceback" not in done.stderr


# --- the figure --------------------------------------------------------------------------------


def test_the_figure_shows_the_means(probed):
    figure = fig_probe_concepts.draw(probed)
    assert len(figure.axes) == 4
    for i, measure in enumerate(("auroc", "average_precision")):
        for ax, label, facts in (
            (figure.axes[i], "PCA", {"family": "pca", "seed": None}),
            (figure.axes[i], "SAE 1:4", {"family": "sae", "ratio": 4, "seed": ALL}),
            (figure.axes[2 + i], "SAE 1:1", {"family": "sae", "ratio": 1, "seed": ALL}),
        ):
            drawn_lines = {c.get_label(): c.lines[0] for c in ax.containers}
            expected = [
                only(probed, kind="probe", labels=TRUE, concept=ALL, k=k, **facts)[measure]
                for k in (1, 2)
            ]
            assert drawn_lines[label].get_ydata() == pytest.approx(expected)
        dense = only(probed, kind="probe", labels=TRUE, concept=ALL, family="dense")[measure]
        lines = [line for line in figure.axes[i].lines if line.get_label() == "dense probe"]
        levels = [line.get_ydata()[0] for line in lines]
        assert levels == [dense]


def test_a_row_without_an_interval_is_refused(probed):
    rows = [dict(row) for row in probed if row["kind"] == "probe" and row["concept"] == ALL]
    del rows[3]["auroc_low"]
    with pytest.raises(ValueError, match="auroc_low"):
        fig_probe_concepts.draw(rows)

"""`python -m analysis.compare_baselines`: its numbers against NumPy, its controls, its draws."""

import json
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import run_program

from analysis.controls import (
    FROZEN,
    RETRAINED,
    UNTRAINED,
    TrainingActivations,
    controls,
    run_config,
)
from analysis.matched import Families, scattered
from analysis.program import MeasureConfig
from analysis.subjects import Material, load_subjects
from data_visualization import fig_baselines
from sparse_coding.harvest import activations, kept_rows
from sparse_coding.splice import cross_entropies
from sparse_coding.text import TokenBatch

HOOK = "blocks.1.hook_resid_post"
RUN = Path("outputs/runs/compared")
BASES = ("pca", "pca_leading", "ica", "neuron_basis", "random_rotation", "random_directions",
         "whitened_random")  # fmt: skip
FLAGS = ["--n-tokens", "1500", "--n-tokens-ce", "600", "--n-tokens-ica", "3000"]


@pytest.fixture(scope="module")
def compared(place, finished):
    """The program's process, and its rows by model, SAE, family and k; a run of its own."""
    shutil.copytree(finished[1], place / RUN)
    done = run_program(
        place, "analysis.compare_baselines", str(RUN), "--random-lms", "random", *FLAGS
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((place / RUN / "results/compare_baselines.json").read_text())
    rows = {(row["lm"], row["sae"], row["family"], row["k"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"])
    return done, rows


class Measured:
    """One SAE's activations and model, read without the program, and NumPy's numbers of them."""

    def __init__(self, name: str) -> None:
        subjects = load_subjects([str(RUN)], MeasureConfig(device="cpu"))
        (self.subject,) = [subject for subject in subjects if subject.name == name]
        self.material = Material(self.subject.origin, "cpu")
        cfg = run_config(RUN, self.subject.origin)
        self.activations = TrainingActivations(cfg, self.material)
        # The program's contexts: 1,500 tokens, seed 0.
        generator = torch.Generator().manual_seed(0)
        self.batches = scattered(self.material.token_batches("heldout"), 1500, generator)

    @cached_property
    def training(self) -> np.ndarray:
        """Every training activation."""
        return torch.cat(list(self.activations.batches())).double().numpy()

    @cached_property
    def heldout(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows, and the documents they are of."""
        rows, documents = [], []
        for batch in self.batches:
            acts = activations(self.material.lm, batch.tokens, [HOOK])[HOOK]
            keep = kept_rows(acts, batch.valid, self.material.max_norm)
            rows.append(acts[keep].double())
            documents.append(batch.document[keep])
        return torch.cat(rows).numpy(), torch.cat(documents).numpy()

    def nats_lost(self, replace, n_batches: int) -> float:
        """Mean rise of the cross-entropy when the hook's rows are replaced."""
        totals, n = np.zeros(2), 0
        for batch in self.batches[:n_batches]:
            found = cross_entropies(
                self.material.lm, batch, HOOK, {"clean": None, "new": replace},
                max_norm=self.material.max_norm,
            )  # fmt: skip
            totals += [found.cross_entropy[key].double().sum().item() for key in ("clean", "new")]
            n += int(found.counted.sum())
        return (totals[1] - totals[0]) / n


@pytest.fixture(scope="module")
def measured(place, compared):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        yield Measured("l1_x04_l0-6_s0")


def of(compared, family, k="matched", name="l1_x04_l0-6_s0", lm="lm"):
    """The one row of a family."""
    found = [
        row
        for key, row in compared[1].items()
        if key[:3] == (lm, name, family) and (row["k"] is None) == (k is None)
    ]
    (row,) = found
    return row


def top_k_of_axes(x: np.ndarray, mean: np.ndarray, axes: np.ndarray, k: int) -> np.ndarray:
    """x_hat from each row's k largest coordinates on orthonormal `axes`."""
    a = (x - mean) @ axes.T
    smallest = np.argsort(np.abs(a), axis=1)[:, : a.shape[1] - k]
    np.put_along_axis(a, smallest, 0.0, axis=1)
    return a @ axes + mean


def fvu(x: np.ndarray, x_hat: np.ndarray) -> float:
    return ((x - x_hat) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()


# What is compared.


def test_every_sae_is_compared_with_every_family_and_control_on_either_model(compared):
    _, rows = compared
    names = {key[1] for key in rows}
    assert names == {f"l1_x{ratio}_l0-6_s{seed}" for ratio in ("01", "04") for seed in (0, 1)}
    for name in names:
        for lm, expected in (
            ("lm", ("sae", UNTRAINED, FROZEN, *BASES)),
            ("lm@random", ("sae", *BASES)),
        ):
            families = {key[2] for key in rows if key[:2] == (lm, name) and key[3] is not None}
            assert families == set(expected)
            assert of(compared, "sae", None, name, lm)["fvu_minus_sae"] == 0


def test_every_token_keeps_as_many_features_as_the_sae_has_on_average(compared):
    for row in compared[1].values():
        k = round(of(compared, "sae", None, row["sae"], row["lm"])["l0"])
        if row["family"] in BASES:
            assert row["k"] == k
            assert (row["l0_low"], row["l0"], row["l0_high"]) == (k, k, k)
        elif row["k"] is not None:
            assert row["k"] == k and row["l0_p95"] <= k


def test_random_directions_are_as_many_as_the_saes_features(compared):
    for row in compared[1].values():
        if row["family"] in ("random_directions", "whitened_random", "sae"):
            assert row["d_sae"] == 12 * row["sae_ratio"]
        elif row["family"] in ("pca", "ica", "neuron_basis", "random_rotation"):
            assert row["d_sae"] == 2 * 12


# The numbers.


def test_pca_is_that_of_numpy_fitted_to_all_training_rows(compared, measured):
    row = of(compared, "pca")
    x, documents = measured.heldout
    mean = measured.training.mean(axis=0)
    axes = np.linalg.svd(measured.training - mean, full_matrices=False)[2]
    x_hat = top_k_of_axes(x, mean, axes, row["k"])
    assert row["n_tokens_fit"] == len(measured.training)
    assert (row["n_tokens_eval"], row["n_documents_eval"]) == (len(x), len(set(documents)))
    assert row["fvu"] == pytest.approx(fvu(x, x_hat), rel=1e-3)
    assert row["gain"] == pytest.approx(1, abs=1e-4)

    def replace(rows):
        return torch.from_numpy(top_k_of_axes(rows.double().numpy(), mean, axes, row["k"])).float()

    n_batches = 1 + (row["n_tokens_ce"] - 1) // (16 * 30)
    lost = measured.nats_lost(replace, n_batches)
    assert row["nats_lost"] == pytest.approx(lost, rel=1e-2, abs=1e-4)


def test_leading_axes_are_those_of_the_largest_variance(compared, measured):
    row = of(compared, "pca_leading")
    x, _ = measured.heldout
    mean = measured.training.mean(axis=0)
    axes = np.linalg.svd(measured.training - mean, full_matrices=False)[2][: row["k"]]
    assert row["fvu"] == pytest.approx(fvu(x, (x - mean) @ axes.T @ axes + mean), rel=1e-3)


def test_the_neuron_basis_keeps_the_neurons_farthest_from_their_training_mean(compared, measured):
    row = of(compared, "neuron_basis")
    x, _ = measured.heldout
    mean = measured.training.mean(axis=0)
    expected = fvu(x, top_k_of_axes(x, mean, np.eye(12), row["k"]))
    assert row["fvu"] == pytest.approx(expected, rel=1e-3)


def test_the_sae_is_measured_as_it_is_and_cut(compared, measured):
    x, _ = measured.heldout
    dictionary = measured.subject.dictionary.double()
    f = dictionary.encode(torch.from_numpy(x)).numpy()
    w, b = dictionary.W_dec.numpy(), dictionary.b_dec.numpy()
    native, cut = of(compared, "sae", None), of(compared, "sae")
    assert native["l0"] == pytest.approx((f > 0).sum(axis=1).mean(), rel=1e-3)
    assert native["fvu"] == pytest.approx(fvu(x, f @ w + b), rel=1e-4)
    kept = f * (f >= -np.sort(-f, axis=1)[:, [cut["k"] - 1]])  # rows of W_dec have unit norm
    assert cut["fvu"] == pytest.approx(fvu(x, cut["gain"] * kept @ w + b), rel=1e-4)
    assert cut["fvu_minus_sae"] == pytest.approx(cut["fvu"] - native["fvu"], abs=1e-9)


def test_the_interval_of_a_difference_is_that_of_documents_drawn_together(compared, measured):
    row = of(compared, "pca")
    x, documents = measured.heldout
    mean = measured.training.mean(axis=0)
    axes = np.linalg.svd(measured.training - mean, full_matrices=False)[2]
    dictionary = measured.subject.dictionary.float()
    sae = dictionary(torch.from_numpy(x).float()).double().numpy()
    more = (x - top_k_of_axes(x, mean, axes, row["k"])) ** 2 - (x - sae) ** 2
    rng, found = np.random.default_rng(1), []
    groups = [np.flatnonzero(documents == one) for one in np.unique(documents)]
    for _ in range(3000):
        drawn = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        spread = ((x[drawn] - x[drawn].mean(axis=0)) ** 2).sum()
        found.append(more[drawn].sum() / spread)
    low, high = np.quantile(found, [0.025, 0.975])
    width = high - low
    assert row["fvu_minus_sae_low"] == pytest.approx(low, abs=0.12 * width)
    assert row["fvu_minus_sae_high"] == pytest.approx(high, abs=0.12 * width)
    # Two intervals side by side would be wider: both share what the documents are like.
    assert row["fvu_minus_sae"] == pytest.approx(row["fvu"] - of(compared, "sae", None)["fvu"])


# Controls.


def test_the_same_sae_trained_again_on_the_runs_activations_is_the_runs(measured, tmp_path):
    shutil.copy(RUN / "config.json", tmp_path)
    again = controls(RETRAINED, tmp_path, [measured.subject], measured.activations)
    own = measured.subject.dictionary.float().state_dict()
    for name, value in again[measured.subject.name].state_dict().items():
        assert torch.equal(value, own[name]), name


def test_controls_start_as_the_sae_did_and_only_the_frozen_ones_encoder_learns(measured, compared):
    found = {}
    for kind in (UNTRAINED, FROZEN):
        of_kind = controls(kind, RUN, [measured.subject], measured.activations)
        found[kind] = of_kind[measured.subject.name].state_dict()
    # A seed's first draw is the decoder; the encoder starts as its transpose.
    generator = torch.Generator().manual_seed(measured.subject.facts["seed"])
    rows = torch.randn(48, 12, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    assert torch.equal(found[UNTRAINED]["W_dec"], rows)
    assert torch.equal(found[UNTRAINED]["W_enc"], rows.T)
    assert torch.equal(found[FROZEN]["W_dec"], rows)
    assert not torch.allclose(found[FROZEN]["W_enc"], rows.T, atol=0.01)


def test_an_sae_of_the_random_model_is_trained_and_measured_on_its_activations(compared, measured):
    random = of(compared, "sae", None, lm="lm@random")
    folder = RUN / "controls/saes/sae@random/l1_x04_l0-6_s0"
    (subject,) = load_subjects([str(folder)], MeasureConfig(device="cpu"))
    assert subject.origin.lm == "lm@random" and subject.origin.hook_name == HOOK
    material = Material(subject.origin, "cpu")
    batches = scattered(material.token_batches("heldout"), 1500, torch.Generator().manual_seed(0))
    acts = [activations(material.lm, batch.tokens, [HOOK])[HOOK][batch.valid] for batch in batches]
    x = torch.cat(acts).double()
    x_hat = subject.dictionary.double()(x)
    assert random["fvu"] == pytest.approx(fvu(x.numpy(), x_hat.detach().numpy()), rel=1e-3)
    own_there = measured.subject.dictionary.float()(x.float()).double()
    assert fvu(x.numpy(), own_there.numpy()) > 1.5 * random["fvu"]
    assert random["ce_clean"] != of(compared, "sae", None)["ce_clean"]


def test_controls_are_trained_once(place, compared):
    assert compared[0].stderr.count("training sae") and "training frozen" in compared[0].stderr
    flags = ["--ratios", "4", "--families", "untrained", "frozen_decoder", "--random-lms"]
    output = ["--output", "again.json"]
    done = run_program(place, "analysis.compare_baselines", str(RUN), *flags, *FLAGS, *output)
    assert done.returncode == 0 and "training" not in done.stderr
    rows = json.loads((place / "again.json").read_text())["rows"]
    assert {row["sae_ratio"] for row in rows} == {4}
    (row,) = [r for r in rows if r["family"] == FROZEN and r["sae_seed"] == 0]
    assert row["fvu"] == pytest.approx(of(compared, FROZEN)["fvu"], rel=1e-6)


# Fits and draws.


def test_random_families_are_those_of_their_seed(measured):
    names = ["random_rotation", "random_directions", "whitened_random"]
    one, same, other = (
        Families(measured.activations, names, 3000, 5, seed).of_size(48, 4) for seed in (0, 0, 1)
    )
    for name in names:
        assert torch.equal(one[name].W_dec, same[name].W_dec)
        assert not torch.allclose(one[name].W_dec, other[name].W_dec, atol=0.01)


def one_context_per_document(n: int, length: int = 10) -> list[TokenBatch]:
    tokens = torch.arange(n * length).view(n, length)
    document = torch.arange(n)[:, None].expand(n, length)
    valid = torch.ones(n, length, dtype=torch.bool)
    valid[:, 0] = False
    return [TokenBatch(*(part[i : i + 4] for part in (tokens, document, valid)))
            for i in range(0, n, 4)]  # fmt: skip


def test_contexts_are_drawn_from_sixteen_times_as_much_text_and_no_further():
    batches = iter(one_context_per_document(1000))
    drawn = scattered(batches, 180, torch.Generator().manual_seed(0))
    documents = torch.cat([batch.document[:, 0] for batch in drawn])
    # 9 valid positions a context: 20 contexts hold 180; batches are of 16, so 32 are taken.
    assert len(documents) == 32 == len(documents.unique())
    assert documents.max() < 16 * 180 / 9
    assert documents.float().std() > 60  # uniform over 320: 92; 32 in a row: 9
    assert len(list(batches)) == 1000 / 4 - 16 * 180 / 9 / 4
    for batch in drawn:  # a context stays with its document and its valid positions
        assert torch.equal(batch.tokens[:, 0] // 10, batch.document[:, 0])
        assert batch.valid.sum() == 9 * len(batch.valid)


def test_a_text_that_is_shorter_is_taken_whole():
    drawn = scattered(one_context_per_document(10), 10**6, torch.Generator().manual_seed(0))
    assert sum(len(batch.tokens) for batch in drawn) == 10


# The figure.


def test_the_figures_points_and_bars_are_the_rows(compared):
    rows = list(compared[1].values())
    figure = fig_baselines.draw(rows)
    panels = [("lm", "fvu"), ("lm", "nats_lost"), ("lm@random", "fvu")]
    for i, (lm, measure) in enumerate(panels):
        ax, first = figure.axes[i], figure.axes[i // 2 * 2]
        assert ax.get_title("left") == lm
        points, bars = ([line for line in ax.lines if len(line.get_xdata()) == n] for n in (1, 2))
        there = [row for row in rows if row["lm"] == lm]
        assert sorted(line.get_xdata()[0] for line in points) == sorted(r[measure] for r in there)
        ends = {(row[f"{measure}_low"], row[f"{measure}_high"]) for row in there}
        assert {tuple(line.get_xdata()) for line in bars} == ends
        # The axes of a line share its labels; a family's points are on its line.
        names = [tick.get_text() for tick in first.get_yticklabels()]
        for line in points:
            if line.get_label().endswith(" pca"):
                assert names[round(line.get_ydata()[0])] == "PCA, each token's k axes"
    assert not figure.axes[3].get_visible()
    other_hook = [row | {"hook_name": "blocks.0.hook_resid_post"} for row in rows]
    titles = [ax.get_title("left") for ax in fig_baselines.draw(rows + other_hook).axes]
    assert titles[:4:2] == [f"lm\n{HOOK}", "lm\nblocks.0.hook_resid_post"]
    assert titles[4:] == [f"lm@random\n{HOOK}", "lm@random\nblocks.0.hook_resid_post"]


def test_the_figure_refuses_rows_that_it_cannot_draw(compared):
    rows = list(compared[1].values())
    with pytest.raises(ValueError, match="pca lacks fvu_low"):
        fig_baselines.draw(
            [{k: v for k, v in rows[3].items() if k != "fvu_low"} | {"family": "pca"}]
        )
    with pytest.raises(ValueError, match="no label for the family nmf"):
        fig_baselines.draw([rows[0] | {"family": "nmf"}])


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["outputs/runs/none"], "outputs/runs/none does not exist"),
        ([str(RUN), "--ratios", "3"], "no SAE of these --ratios; it has [1, 4]"),
        ([str(RUN), "--n-tokens", "0"], "--n-tokens 0 is not possible"),
        ([str(RUN), "--n-tokens-ica", "5", "--families", "ica"], "too few for ICA"),
        ([str(RUN), "--n-tokens-train", "10"], "--n-tokens-train 10 is less than one batch"),
    ],
)
def test_bad_input_is_one_clear_line(place, compared, arguments, message):
    done = run_program(place, "analysis.compare_baselines", *arguments, "--output", "bad.json")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert message in done.stderr
    assert not (place / "bad.json").exists()


def test_results_are_not_replaced_unasked(place, compared):
    done = run_program(place, "analysis.compare_baselines", str(RUN))
    assert done.returncode == 2 and "compare_baselines.json exists" in done.stderr

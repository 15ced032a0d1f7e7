"""SAELens's format against SAELens itself: ours as it reads them, theirs as we do; all or nothing.

What needs no SAELens, its files as it wrote them and what is refused, is in
`tests/golden/test_saelens_golden.py`.
"""

import json
import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_coding import storage
from sparse_coding.errors import UserError
from sparse_coding.formats import saelens as module
from sparse_coding.formats.saelens import load_saelens, save_saelens
from sparse_coding.sae import ARCHITECTURES, L1SAE, BatchTopKSAE, JumpReLUSAE

GOLDEN = os.path.join(os.path.dirname(__file__), "golden")
METADATA = {
    "model_name": "gpt2",
    "hook_name": "blocks.2.hook_resid_pre",
    "context_size": 128,
    "prepend_bos": True,
    "dataset_path": "builtin",
    "ratio": 2,
    "l1_coeff": 0.5,
}
# One product of width 20 in another order of summation: a few units in the last place.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(params=list(ARCHITECTURES))
def sae(request):
    generator = torch.Generator().manual_seed(1)
    cls = ARCHITECTURES[request.param]
    sae = cls(12, 20, generator, **({"k": 6} if cls.sparsity_is_chosen else {}))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    sae.normalise()
    for threshold in sae.buffers():  # BatchTopK's, which starts at 0: a ReLU
        threshold.fill_(0.7)
    return sae


@pytest.fixture
def existing(tmp_path):
    """The folder of another SAE, to be overwritten or kept."""
    return save_saelens(L1SAE(5, 7), tmp_path / "existing", metadata={})


@pytest.fixture(scope="module")
def sae_lens():
    reason = "sae-lens is not installed: pip install -r tests/requirements.txt"
    return pytest.importorskip("sae_lens", reason=reason)


def inputs(d_in, dtype=torch.float32):
    return 3 * torch.randn(7, d_in, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_encodes_alike(a, b, x, tolerance=ROUNDING):
    f, expected = a.encode(x), b.encode(x)
    assert (f > 0).any()
    assert (f == 0).any()
    torch.testing.assert_close(f, expected, **tolerance)
    torch.testing.assert_close(a.decode(f), b.decode(f), **tolerance)


def assert_same_class_and_bits(loaded, sae):
    assert type(loaded) is type(sae)
    assert getattr(loaded, "k", None) == getattr(sae, "k", None)
    for name, expected in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected)
        assert loaded.state_dict()[name].dtype == expected.dtype


# Ours, there.


def test_saelens_encodes_and_decodes_with_our_files_as_we_do(sae, tmp_path, sae_lens):
    theirs = sae_lens.SAE.load_from_disk(save_saelens(sae, tmp_path / "a", metadata=METADATA))
    with torch.no_grad():
        assert_encodes_alike(theirs, sae, inputs(12))


def test_saelens_loads_ours_without_a_warning(sae, tmp_path, sae_lens, caplog):
    folder = save_saelens(sae, tmp_path / "a", metadata=METADATA, density=torch.full((20,), 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sae_lens.SAE.load_from_disk(folder)
    assert not caplog.records


def test_saelens_reads_our_bfloat16_files_as_bfloat16(sae, tmp_path, sae_lens):
    sae = sae.bfloat16()
    theirs = sae_lens.SAE.load_from_disk(save_saelens(sae, tmp_path / "a", metadata=METADATA))
    assert theirs.dtype == torch.bfloat16
    torch.testing.assert_close(theirs.W_enc.data, sae.W_enc.data, rtol=0, atol=0)


def test_saelens_keeps_our_metadata_and_does_not_claim_the_training(sae, tmp_path, sae_lens):
    theirs = sae_lens.SAE.load_from_disk(save_saelens(sae, tmp_path / "a", metadata=METADATA))
    kept = theirs.cfg.metadata.to_dict()
    assert {key: kept[key] for key in METADATA} == METADATA
    assert kept["sae_lens_training_version"] is None


def test_a_centred_model_is_named_by_transformer_lenss_option(tmp_path):
    """No other library looks up our MODEL@centred."""
    said = {"model_name": "gpt2@centred", module.OF_MODEL: {"fold_ln": False}}
    sae = L1SAE(5, 7, torch.Generator())
    folder = save_saelens(sae, tmp_path / "sae", metadata=METADATA | said)
    metadata = json.loads((folder / "cfg.json").read_text())["metadata"]
    assert metadata["model_name"] == "gpt2"
    assert metadata[module.OF_MODEL] == {"fold_ln": False, "center_writing_weights": True}
    assert module.training_facts(folder)["lm"] == "gpt2@centred"


def test_our_configuration_has_the_keys_that_saelens_writes(sae, tmp_path):
    ours = json.loads((save_saelens(sae, tmp_path / "a", metadata={}) / "cfg.json").read_text())
    goldens = {"standard": "bfloat16", "topk": "topk_rescaled", "jumprelu": "batchtopk"}
    goldens["gated"] = "gated_b_dec_subtracted"
    with open(os.path.join(GOLDEN, f"saelens_{goldens[ours['architecture']]}/cfg.json")) as file:
        theirs = json.load(file)
    assert set(ours) == set(theirs)


def test_ours_saved_again_by_saelens_is_still_our_class(sae, tmp_path, sae_lens):
    save_saelens(sae, tmp_path / "a", metadata=METADATA)
    sae_lens.SAE.load_from_disk(tmp_path / "a").save_model(tmp_path / "b")
    assert_same_class_and_bits(load_saelens(tmp_path / "b"), sae)


def test_ours_changed_by_saelens_encodes_as_saelens_changed_it(sae, tmp_path, sae_lens):
    save_saelens(sae, tmp_path / "a", metadata=METADATA)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "a")
    theirs.fold_activation_norm_scaling_factor(0.25)  # unties W_enc from W_dec^T
    theirs.save_model(tmp_path / "b")
    with torch.no_grad():
        assert_encodes_alike(load_saelens(tmp_path / "b"), theirs, inputs(12))


def test_batch_topk_is_written_as_saelens_writes_its_own(tmp_path):
    sae = BatchTopKSAE(12, 20, k=6)
    sae.threshold.fill_(0.7)
    folder = save_saelens(sae, tmp_path / "a", metadata={})
    config = json.loads((folder / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert config["metadata"]["training_architecture"] == "batchtopk"
    assert torch.equal(load_file(folder / module.WEIGHTS)["threshold"], torch.full((20,), 0.7))


def test_batch_topk_with_thresholds_that_saelens_changed_is_a_jumprelu(tmp_path, sae_lens):
    sae = BatchTopKSAE(12, 20, torch.Generator().manual_seed(1), k=6)
    with torch.no_grad():
        sae.threshold.fill_(0.7)
        sae.b_dec += 1.0
        sae.W_dec *= torch.linspace(0.5, 2.0, 20)[:, None]
        save_saelens(sae, tmp_path / "a", metadata={})
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "a", fold_W_dec_norm=True)
        theirs.save_model(tmp_path / "b")
        loaded = load_saelens(tmp_path / "b")
        assert type(loaded) is JumpReLUSAE
        assert_encodes_alike(loaded, theirs, inputs(12))


# Theirs, here.


@pytest.mark.parametrize("subtracted", [True, False])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("topk", {"k": 5}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
    ],
)
def test_we_encode_and_decode_with_saelens_files_as_saelens_does(
    architecture, options, subtracted, tmp_path, sae_lens
):
    cls, cfg = sae_lens.registry.get_sae_class(architecture)
    cfg = cfg(d_in=12, d_sae=20, dtype="float64", apply_b_dec_to_input=subtracted, **options)
    theirs, generator = cls(cfg), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        theirs.save_model(tmp_path)
        assert_encodes_alike(load_saelens(tmp_path), theirs, inputs(12, torch.float64), FLOAT64)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [("Standard", {"l1_coefficient": 2.0}), ("TopK", {"k": 5}), ("JumpReLU", {})],
)
def test_a_saelens_training_checkpoint_encodes_as_it_does_there(
    architecture, options, tmp_path, sae_lens
):
    cfg = getattr(sae_lens, f"{architecture}TrainingSAEConfig")(d_in=12, d_sae=20, **options)
    theirs = getattr(sae_lens, f"{architecture}TrainingSAE")(cfg)
    with torch.no_grad():
        theirs.b_dec += 1.0
        theirs.W_dec *= torch.linspace(1, 9, 20)[:, None]
        theirs.save_model(tmp_path)
        assert_encodes_alike(load_saelens(tmp_path), theirs, inputs(12))


@pytest.mark.parametrize("training", ["batchtopk", "matryoshka_batchtopk"])
def test_what_saelens_saves_of_batchtopk_training_encodes_alike(training, tmp_path, sae_lens):
    cls, cfg = sae_lens.registry.get_sae_training_class(training)
    widths = {"matryoshka_widths": [8, 20]} if training.startswith("matryoshka") else {}
    trained = cls(cfg(d_in=12, d_sae=20, k=5, **widths))
    trained.topk_threshold.fill_(0.02)
    with torch.no_grad():
        trained.b_dec += 1.0
        trained.save_inference_model(tmp_path)
        loaded, theirs = load_saelens(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
        assert type(loaded) is JumpReLUSAE
        assert_encodes_alike(loaded, theirs, inputs(12))


# Ours, here.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_ours_comes_back_as_the_same_class_bit_by_bit(sae, dtype, tmp_path):
    sae = sae.to(dtype)
    loaded = load_saelens(save_saelens(sae, tmp_path / "a", metadata=METADATA))
    assert loaded.W_dec.dtype == dtype
    assert_same_class_and_bits(loaded, sae)


def test_density_is_written_as_its_decimal_logarithm(sae, tmp_path):
    density = torch.zeros(20)
    density[3], density[4] = 1.0, 0.01
    folder = save_saelens(sae, tmp_path / "a", metadata={}, density=density)
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    expected = torch.full((20,), -10.0)
    expected[3], expected[4] = 0.0, -2.0
    torch.testing.assert_close(sparsity, expected, rtol=0, atol=1e-6)


# Whole or absent.


def test_an_existing_folder_is_kept(sae, existing):
    before = (existing / "sae_weights.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists"):
        save_saelens(sae, existing, metadata={})
    assert (existing / "sae_weights.safetensors").read_bytes() == before


def test_overwriting_replaces_an_sae_and_leaves_nothing_else(sae, existing):
    save_saelens(sae, existing, metadata={}, overwrite=True)
    assert load_saelens(existing).d_sae == 20
    assert os.listdir(existing.parent) == ["existing"]


def test_overwriting_never_deletes_a_folder_that_is_not_an_saes(sae, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is of another kind"):
        save_saelens(sae, tmp_path, metadata={}, overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("failing", ["write_json", "_put_in_place"])
def test_a_failure_while_writing_leaves_the_old_sae_whole(sae, existing, failing, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in existing.iterdir()}
    monkeypatch.setattr(storage if failing == "_put_in_place" else module, failing, fail)
    with pytest.raises(OSError, match="no space"):
        save_saelens(sae, existing, metadata={}, overwrite=True)
    assert {path.name: path.read_bytes() for path in existing.iterdir()} == before
    assert os.listdir(existing.parent) == ["existing"]


@pytest.mark.parametrize("failing", ["write_tensors", "write_json", "_put_in_place"])
def test_a_failure_while_writing_leaves_no_folder(sae, tmp_path, failing, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(storage if failing == "_put_in_place" else module, failing, fail)
    with pytest.raises(OSError, match="no space"):
        save_saelens(sae, tmp_path / "a", metadata={})
    assert not os.listdir(tmp_path)


# Before SAELens 6.


@pytest.mark.parametrize(
    "old",
    [
        {"activation_fn_str": "relu", "normalize_activations": False},
        {"architecture": "jumprelu", "hook_point": "blocks.2.hook_resid_pre"},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
        {"apply_b_dec_to_input": False},
    ],
)
def test_an_old_configuration_is_read_as_saelens_reads_it(sae_lens, tmp_path, old):
    generator = torch.Generator().manual_seed(1)
    sae = JumpReLUSAE(12, 20, generator)
    sae.threshold.data = 1 + torch.rand(20, generator=generator)
    sae.b_dec.data = torch.randn(12, generator=generator)
    folder = save_saelens(sae, tmp_path / "a", metadata={})
    if old.get("architecture") != "jumprelu":
        weights = load_file(folder / "sae_weights.safetensors")
        del weights["threshold"]
        save_file(weights, folder / "sae_weights.safetensors")
    config = {"d_in": 12, "d_sae": 20, "dtype": "float32", "device": "cpu"} | old
    (folder / "cfg.json").write_text(json.dumps(config))
    theirs = sae_lens.SAE.load_from_disk(folder)
    assert_encodes_alike(load_saelens(folder), theirs, inputs(12))


# Refused.


@pytest.mark.parametrize("cls", ARCHITECTURES.values())
def test_an_sae_with_an_encoder_of_its_own_is_not_written(cls, tmp_path):
    class Shrunk(cls):
        def encode(self, x):
            return super().encode(x) / 2

    with pytest.raises(UserError, match="Shrunk has its own encode"):
        save_saelens(Shrunk(12, 20), tmp_path / "a", metadata={})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("cls", [BatchTopKSAE, JumpReLUSAE])
def test_a_threshold_below_0_is_not_written(cls, tmp_path):
    sae = cls(12, 20)
    sae.threshold.data.fill_(-0.1)
    with pytest.raises(UserError, match="threshold below 0"):
        save_saelens(sae, tmp_path / "a", metadata={})


def test_a_subclass_with_only_a_loss_of_its_own_is_written(tmp_path):
    class Squared(L1SAE):
        name = "squared_l1"

        def sparsity(self, f):
            return f.square().sum(dim=1)

    sae = Squared(12, 20)
    loaded = load_saelens(save_saelens(sae, tmp_path / "a", metadata={}))
    assert_encodes_alike(loaded, sae, inputs(12))


@pytest.mark.parametrize("architecture", ["abstopk"])
def test_another_architecture_of_saelens_is_refused_by_name(architecture, tmp_path, sae_lens):
    config_class = sae_lens.registry.get_sae_class(architecture)[1]
    sae_lens.SAE.from_dict(config_class(d_in=5, d_sae=7).to_dict()).save_model(tmp_path)
    with pytest.raises(UserError, match=f"architecture is '{architecture}'; supported is"):
        load_saelens(tmp_path)


def test_a_density_of_another_length_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"density is \(7,\); it must be \(20,\)"):
        save_saelens(L1SAE(12, 20), tmp_path / "a", metadata={}, density=torch.ones(7))

"""SAELens's files: theirs as they wrote them, ours as they read them, and what is refused.

`tests/golden/` holds files that SAELens wrote, and its own encode and decode of recorded inputs
(`tests/golden/make_saelens.py`), so that most of this runs without SAELens installed.
"""

import json
import os
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_coding.errors import UserError
from sparse_coding.formats import saelens as module
from sparse_coding.formats.saelens import load_saelens, save_saelens
from sparse_coding.sae import ARCHITECTURES, L1SAE

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


@pytest.fixture(params=list(ARCHITECTURES))
def sae(request):
    generator = torch.Generator().manual_seed(1)
    sae = ARCHITECTURES[request.param](12, 20, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    sae.normalise()
    return sae


@pytest.fixture
def golden(tmp_path):
    """A copy of a folder that SAELens wrote, to be damaged."""
    return shutil.copytree(
        os.path.join(GOLDEN, "saelens_b_dec_subtracted"), tmp_path / "theirs", dirs_exist_ok=True
    )


@pytest.fixture(scope="module")
def sae_lens():
    reason = "sae-lens is not installed: pip install -r tests/requirements.txt"
    return pytest.importorskip("sae_lens", reason=reason)


def inputs(d_in, dtype=torch.float32):
    return 3 * torch.randn(7, d_in, generator=torch.Generator().manual_seed(2)).to(dtype)


def assert_encodes_alike(a, b, x):
    f, expected = a.encode(x), b.encode(x)
    assert (f > 0).any()
    assert (f == 0).any()
    torch.testing.assert_close(f, expected, **ROUNDING)
    torch.testing.assert_close(a.decode(f), b.decode(f), **ROUNDING)


def edit_config(folder, **changes):
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, remove=(), **changes):
    path = folder / "sae_weights.safetensors"
    weights = load_file(path) | changes
    save_file({name: weights[name] for name in weights if name not in remove}, path)


def refusal(folder):
    """The one line in which loading is refused; it names the file."""
    with pytest.raises(UserError) as caught:
        load_saelens(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


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


def test_our_configuration_has_the_keys_that_saelens_writes(sae, tmp_path):
    ours = json.loads((save_saelens(sae, tmp_path / "a", metadata={}) / "cfg.json").read_text())
    with open(os.path.join(GOLDEN, "saelens_bfloat16", "cfg.json")) as file:
        theirs = json.load(file)
    assert set(ours) == set(theirs)


def test_ours_saved_again_by_saelens_is_still_our_class(sae, tmp_path, sae_lens):
    save_saelens(sae, tmp_path / "a", metadata=METADATA)
    sae_lens.SAE.load_from_disk(tmp_path / "a").save_model(tmp_path / "b")
    loaded = load_saelens(tmp_path / "b")
    assert type(loaded) is type(sae)
    with torch.no_grad():
        assert_encodes_alike(loaded, sae, inputs(12))


def test_ours_changed_by_saelens_encodes_as_saelens_changed_it(sae, tmp_path, sae_lens):
    save_saelens(sae, tmp_path / "a", metadata=METADATA)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "a")
    theirs.fold_activation_norm_scaling_factor(0.25)  # unties W_enc from W_dec^T
    theirs.save_model(tmp_path / "b")
    with torch.no_grad():
        assert_encodes_alike(load_saelens(tmp_path / "b"), theirs, inputs(12))


# Theirs, here.


@pytest.mark.parametrize("subtracted", [True, False])
def test_we_encode_and_decode_with_saelens_files_as_saelens_does(subtracted, tmp_path, sae_lens):
    cfg = sae_lens.StandardSAEConfig(d_in=12, d_sae=20, apply_b_dec_to_input=subtracted)
    theirs, generator = sae_lens.StandardSAE(cfg), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        theirs.save_model(tmp_path)
        assert_encodes_alike(load_saelens(tmp_path), theirs, inputs(12))


def test_a_saelens_training_checkpoint_encodes_as_it_does_there(tmp_path, sae_lens):
    cfg = sae_lens.StandardTrainingSAEConfig(d_in=12, d_sae=20, l1_coefficient=2.0)
    theirs = sae_lens.StandardTrainingSAE(cfg)
    with torch.no_grad():
        theirs.b_dec += 1.0
        theirs.save_model(tmp_path)
        assert_encodes_alike(load_saelens(tmp_path), theirs, inputs(12))


@pytest.mark.parametrize(
    ("name", "class_name", "tolerance"),
    [
        ("saelens_b_dec_subtracted", "l1", ROUNDING),
        ("saelens_b_dec_not_subtracted", "norm_weighted_l1", ROUNDING),
        # 8 bits of mantissa; sums of up to 7 products of size about 10.
        ("saelens_bfloat16", "l1", {"rtol": 2**-7, "atol": 0.1}),
    ],
)
def test_golden_files_encode_and_decode_as_saelens_recorded(name, class_name, tolerance):
    recorded = load_file(os.path.join(GOLDEN, f"{name}_recorded.safetensors"))
    sae = load_saelens(os.path.join(GOLDEN, name))
    assert sae.name == class_name
    with torch.no_grad():
        f = sae.encode(recorded["x"].to(sae.W_dec.dtype))
        x_hat = sae.decode(recorded["f"])
    torch.testing.assert_close(f, recorded["f"], **tolerance)
    torch.testing.assert_close(x_hat, recorded["x_hat"], **tolerance)


# Ours, here.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_ours_comes_back_as_the_same_class_bit_by_bit(sae, dtype, tmp_path):
    sae = sae.to(dtype)
    loaded = load_saelens(save_saelens(sae, tmp_path / "a", metadata=METADATA))
    assert type(loaded) is type(sae)
    for name, expected in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected)
        assert loaded.state_dict()[name].dtype == dtype


def test_density_is_written_as_its_decimal_logarithm(sae, tmp_path):
    density = torch.zeros(20)
    density[3], density[4] = 1.0, 0.01
    folder = save_saelens(sae, tmp_path / "a", metadata={}, density=density)
    sparsity = load_file(folder / "sparsity.safetensors")["sparsity"]
    expected = torch.full((20,), -10.0)
    expected[3], expected[4] = 0.0, -2.0
    torch.testing.assert_close(sparsity, expected, rtol=0, atol=1e-6)


def test_loading_does_not_advance_the_global_random_stream(golden):
    before = torch.get_rng_state()
    load_saelens(golden)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_class_unknown_here_is_read_by_how_it_encodes(golden):
    edit_config(
        golden,
        metadata={"sae_lens_version": "6.0.0-rc.1", "sparse_coding": {"class": "of_tomorrow"}},
    )
    assert type(load_saelens(golden)) is L1SAE


# Whole or absent.


def test_an_existing_folder_is_kept(sae, golden):
    before = (golden / "sae_weights.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists"):
        save_saelens(sae, golden, metadata={})
    assert (golden / "sae_weights.safetensors").read_bytes() == before


def test_overwriting_replaces_an_sae_and_leaves_nothing_else(sae, golden):
    save_saelens(sae, golden, metadata={}, overwrite=True)
    assert load_saelens(golden).d_sae == 20
    assert os.listdir(golden.parent) == ["theirs"]


def test_overwriting_never_deletes_a_folder_that_is_not_an_saes(sae, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="not an SAE's folder"):
        save_saelens(sae, tmp_path, metadata={}, overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("failing", ["write_json", "_put_in_place"])
def test_a_failure_while_writing_leaves_the_old_sae_whole(sae, golden, failing, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in golden.iterdir()}
    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(OSError, match="no space"):
        save_saelens(sae, golden, metadata={}, overwrite=True)
    assert {path.name: path.read_bytes() for path in golden.iterdir()} == before
    assert os.listdir(golden.parent) == ["theirs"]


@pytest.mark.parametrize("failing", ["_write_tensors", "write_json", "_put_in_place"])
def test_a_failure_while_writing_leaves_no_folder(sae, tmp_path, failing, monkeypatch):
    def fail(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(module, failing, fail)
    with pytest.raises(OSError, match="no space"):
        save_saelens(sae, tmp_path / "a", metadata={})
    assert not os.listdir(tmp_path)


# Refused.


def test_an_sae_with_an_encoder_of_its_own_is_not_written_as_standard(tmp_path):
    class Shrunk(L1SAE):
        def encode(self, x):
            return super().encode(x) / 2

    with pytest.raises(UserError, match="Shrunk has its own encode"):
        save_saelens(Shrunk(12, 20), tmp_path / "a", metadata={})
    assert not os.listdir(tmp_path)


def test_a_subclass_with_only_a_loss_of_its_own_is_written(tmp_path):
    class Squared(L1SAE):
        name = "squared_l1"

        def sparsity(self, f):
            return f.square().sum(dim=1)

    sae = Squared(12, 20)
    loaded = load_saelens(save_saelens(sae, tmp_path / "a", metadata={}))
    assert_encodes_alike(loaded, sae, inputs(12))


@pytest.mark.parametrize("architecture", ["topk", "gated", "jumprelu"])
def test_another_architecture_of_saelens_is_refused_by_name(architecture, tmp_path, sae_lens):
    config_class = sae_lens.registry.get_sae_class(architecture)[1]
    sae_lens.SAE.from_dict(config_class(d_in=5, d_sae=7).to_dict()).save_model(tmp_path)
    assert f"architecture is '{architecture}'; supported is 'standard'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in'"),
        ({"normalize_activations": "layer_norm"}, "supported is 'none'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"dtype": "int8"}, "dtype is 'int8'; supported is 'float32'"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input is None"),
        ({"architecture": "topk"}, "architecture is 'topk'; supported is 'standard'"),
        ({"architecture": "jumprelu"}, "architecture is 'jumprelu'; supported is 'standard'"),
        ({"architecture": ["standard"]}, "architecture is"),
        ({"d_in": 6}, "W_enc is (5, 7); cfg.json says (6, 7)"),
        ({"d_sae": "7"}, "d_sae is '7'; it must be a positive integer"),
        ({"metadata": {}}, "SAELens none; 6 or newer"),
        ({"metadata": {"sae_lens_version": "5.9.1"}}, "SAELens 5.9.1; 6 or newer"),
        ({"metadata": [1]}, "must be a JSON object"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(golden, changes, line):
    edit_config(golden, **changes)
    assert line in refusal(golden)


@pytest.mark.parametrize("key", ["d_in", "dtype", "architecture", "apply_b_dec_to_input"])
def test_a_configuration_without_a_key_is_refused(golden, key):
    config = json.loads((golden / "cfg.json").read_text())
    del config[key]
    (golden / "cfg.json").write_text(json.dumps(config))
    assert f"lacks {key}" in refusal(golden)


@pytest.mark.parametrize(
    ("content", "line"),
    [("", "not valid JSON"), ('{"d_in": 5', "not valid JSON"), ("[1, 2]", "must be a JSON obj")],
)
def test_a_broken_configuration_is_refused(golden, content, line):
    (golden / "cfg.json").write_text(content)
    assert line in refusal(golden)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"W_dec": torch.zeros(5, 7)}, "W_dec is (5, 7); cfg.json says (7, 5)"),
        ({"b_enc": torch.zeros(7, 1)}, "b_enc is (7, 1); cfg.json says (7,)"),
        ({"b_dec": torch.full((5,), float("nan"))}, "b_dec must hold finite"),
        ({"W_enc": torch.full((5, 7), float("inf"))}, "W_enc must hold finite"),
        ({"b_enc": torch.zeros(7, dtype=torch.int32)}, "b_enc must hold finite floating"),
        ({"threshold": torch.ones(7)}, "threshold; a standard SAE holds"),
        ({"remove": ["b_enc"]}, "holds W_dec, W_enc, b_dec; a standard SAE holds"),
    ],
)
def test_tensors_that_are_not_a_standard_saes_are_refused(golden, changes, line):
    edit_weights(golden, **changes)
    assert line in refusal(golden)


@pytest.mark.parametrize("kept_bytes", [0, 5, 300, 583])
def test_a_truncated_weights_file_is_refused(golden, kept_bytes):
    path = golden / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert "is damaged" in refusal(golden)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file_is_named(golden, name):
    (golden / name).unlink()
    assert f"{name} does not exist" in refusal(golden)


def test_a_missing_folder_is_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_a_density_of_another_length_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"density is \(7,\); it must be \(20,\)"):
        save_saelens(L1SAE(12, 20), tmp_path / "a", metadata={}, density=torch.ones(7))

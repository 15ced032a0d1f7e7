"""SAELens files that SAELens wrote: read as it reads them, and refused when they are damaged.

`saelens_*` are its folders, `saelens_*_recorded.safetensors` its own encode and decode of recorded
inputs (`make_saelens.py`), so that none of this needs SAELens installed.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_coding.errors import UserError
from sparse_coding.formats.saelens import WEIGHTS, load_saelens
from sparse_coding.sae import L1SAE, BatchTopKSAE, JumpReLUSAE, MatryoshkaSAE

HERE = Path(__file__).parent / "golden"
# One product of width 5 in another order of summation: a few units in the last place.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
SUPPORTED = "supported is 'standard' or 'topk' or 'jumprelu' or 'gated'"


@pytest.fixture
def golden(tmp_path, request):
    """A copy of a folder that SAELens wrote, to be damaged; a `standard` one by default."""
    name = getattr(request, "param", "b_dec_subtracted")
    return shutil.copytree(HERE / f"saelens_{name}", tmp_path / "theirs")


TOPK = pytest.mark.parametrize("golden", ["topk_rescaled"], indirect=True)
JUMPRELU = pytest.mark.parametrize("golden", ["jumprelu_b_dec_not_subtracted"], indirect=True)


def edit_config(folder, remove=(), **changes):
    path = folder / "cfg.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: config[key] for key in config if key not in remove}))


def edit_weights(folder, remove=(), **changes):
    path = folder / WEIGHTS
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


@pytest.mark.parametrize(
    ("name", "class_name", "tolerance"),
    [
        ("saelens_b_dec_subtracted", "l1", ROUNDING),
        ("saelens_b_dec_not_subtracted", "norm_weighted_l1", ROUNDING),
        ("saelens_topk_b_dec_subtracted", "topk", ROUNDING),
        ("saelens_topk_b_dec_not_subtracted", "topk", ROUNDING),
        ("saelens_topk_rescaled", "topk", ROUNDING),
        ("saelens_jumprelu_b_dec_subtracted", "jumprelu", ROUNDING),
        ("saelens_jumprelu_b_dec_not_subtracted", "jumprelu", ROUNDING),
        ("saelens_batchtopk", "jumprelu", ROUNDING),
        ("saelens_gated_b_dec_subtracted", "gated", ROUNDING),
        ("saelens_gated_b_dec_not_subtracted", "gated", ROUNDING),
        # 8 bits of mantissa; sums of up to 7 products of size about 10.
        ("saelens_bfloat16", "l1", {"rtol": 2**-7, "atol": 0.1}),
    ],
)
def test_golden_files_encode_and_decode_as_saelens_recorded(name, class_name, tolerance):
    recorded = load_file(HERE / f"{name}_recorded.safetensors")
    sae = load_saelens(HERE / name)
    assert sae.name == class_name
    with torch.no_grad():
        f = sae.encode(recorded["x"].to(sae.W_dec.dtype))
        x_hat = sae.decode(recorded["f"])
    torch.testing.assert_close(f, recorded["f"], **tolerance)
    torch.testing.assert_close(x_hat, recorded["x_hat"], **tolerance)


@JUMPRELU
def test_a_threshold_below_0_acts_as_0(golden):
    written = load_file(golden / WEIGHTS)["threshold"]
    assert (written < 0).any()
    assert torch.equal(load_saelens(golden).threshold.data, torch.relu(written))


@TOPK
def test_a_topk_that_rescales_gets_unit_rows_and_a_row_of_zeros_stays_silent(golden):
    W_dec = load_file(golden / WEIGHTS)["W_dec"]
    W_dec[2] = 0
    edit_weights(golden, W_dec=W_dec)
    sae = load_saelens(golden)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), (torch.arange(7) != 2).float())
    x = load_file(HERE / "saelens_topk_rescaled_recorded.safetensors")["x"]
    assert (sae.encode(x)[:, 2] == 0).all()


@TOPK
def test_a_topk_that_does_not_rescale_keeps_the_norms_of_its_rows(golden):
    edit_config(golden, rescale_acts_by_decoder_norm=False)
    assert torch.equal(load_saelens(golden).W_dec.data, load_file(golden / WEIGHTS)["W_dec"])
    edit_config(golden, remove=["rescale_acts_by_decoder_norm"])  # as of 6.0 to 6.15
    assert torch.equal(load_saelens(golden).W_dec.data, load_file(golden / WEIGHTS)["W_dec"])


@JUMPRELU
def test_a_b_dec_that_is_subtracted_there_and_not_here_is_folded_into_b_enc(golden):
    edit_config(golden, apply_b_dec_to_input=True)
    weights = load_file(golden / WEIGHTS)
    expected = weights["b_enc"].double() - weights["b_dec"].double() @ weights["W_enc"].double()
    sae = load_saelens(golden)
    assert torch.equal(sae.b_enc.data, expected.float())
    assert torch.equal(sae.b_dec.data, weights["b_dec"])
    assert not JumpReLUSAE.subtracts_b_dec
    assert not sae.subtracts_b_dec


def test_loading_does_not_advance_the_global_random_stream(golden):
    before = torch.get_rng_state()
    load_saelens(golden)
    assert torch.equal(torch.get_rng_state(), before)


def claim(folder, **ours):
    edit_config(folder, metadata={"sae_lens_version": "6.0.0-rc.1", "sparse_coding": ours})


@pytest.mark.parametrize("name", ["of_tomorrow", "norm_weighted_l1", "topk", "batch_topk"])
def test_a_class_unknown_or_contradicted_is_read_by_how_it_encodes(golden, name):
    claim(golden, **{"class": name, "k": 3})
    assert type(load_saelens(golden)) is L1SAE


@pytest.mark.parametrize("golden", ["batchtopk"], indirect=True)
@pytest.mark.parametrize(
    ("k", "cls"), [(3, BatchTopKSAE), (None, JumpReLUSAE), (0, JumpReLUSAE), (2.5, JumpReLUSAE)]
)
def test_a_jumprelu_is_a_batch_topk_only_with_the_k_that_it_had(golden, k, cls):
    claim(golden, **{"class": "batch_topk", "k": k})
    assert type(load_saelens(golden)) is cls


# Before SAELens 6 a configuration was flat, had other names and left defaults out.


def make_old(folder, **changes):
    config = json.loads((folder / "cfg.json").read_text())
    kept = {key: config[key] for key in ("d_in", "d_sae", "dtype")}
    (folder / "cfg.json").write_text(json.dumps(kept | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"hook_point": "blocks.2.hook_resid_pre", "normalize_activations": False},
        {"hook_name": "blocks.2.hook_resid_pre", "activation_fn_str": "relu"},
        {"architecture": "standard", "sae_lens_version": "3.1.0", "normalize_activations": None},
    ],
)
def test_an_old_configuration_encodes_and_decodes_as_it_did(golden, changes):
    make_old(golden, **changes)
    edit_weights(golden, scaling_factor=torch.ones(7))
    recorded = load_file(HERE / "saelens_b_dec_subtracted_recorded.safetensors")
    sae = load_saelens(golden)
    assert sae.name == "l1"
    torch.testing.assert_close(sae.encode(recorded["x"]), recorded["f"], **ROUNDING)
    torch.testing.assert_close(sae.decode(recorded["f"]), recorded["x_hat"], **ROUNDING)


@TOPK
def test_an_old_topk_has_its_k_among_the_arguments_of_its_function(golden):
    make_old(golden, activation_fn_str="topk", activation_fn_kwargs={"k": 3})
    sae = load_saelens(golden)
    assert (sae.name, sae.k) == ("topk", 3)
    make_old(golden, activation_fn_str="topk", activation_fn_kwargs={})
    assert "k is None" in refusal(golden)


def test_a_scaling_factor_that_does_something_is_refused(golden):
    edit_weights(golden, scaling_factor=torch.full((7,), 0.5))
    assert "scaling_factor" in refusal(golden)


@pytest.mark.parametrize("golden", ["batchtopk"], indirect=True)
@pytest.mark.parametrize(
    ("prefixes", "cls"),
    [
        ([2, 7], MatryoshkaSAE),
        ([2, 6], JumpReLUSAE),
        ([7, 2], JumpReLUSAE),
        ([0, 7], JumpReLUSAE),
        ([2.0, 7], JumpReLUSAE),
        ([], JumpReLUSAE),
        ("27", JumpReLUSAE),
        (None, JumpReLUSAE),
    ],
)
def test_a_jumprelu_is_a_matryoshka_only_with_the_prefixes_that_it_had(golden, prefixes, cls):
    claim(golden, **{"class": "matryoshka", "k": 3, "prefixes": prefixes})
    sae = load_saelens(golden)
    assert type(sae) is cls
    assert sae.settings.get("prefixes") == (tuple(prefixes) if cls is MatryoshkaSAE else None)


# Refused.


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"normalize_activations": "expected_average_only_in"}, "'expected_average_only_in'"),
        ({"normalize_activations": "layer_norm"}, "supported is 'none'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
        ({"dtype": "int8"}, "dtype is 'int8'; supported is 'float32'"),
        ({"apply_b_dec_to_input": None}, "apply_b_dec_to_input is None"),
        ({"architecture": "gated"}, "a gated SAE holds"),
        ({"architecture": "temporal"}, f"architecture is 'temporal'; {SUPPORTED}"),
        ({"architecture": "batchtopk"}, f"architecture is 'batchtopk'; {SUPPORTED}"),
        ({"architecture": ["standard"]}, "architecture is"),
        ({"d_in": 6}, "W_enc is (5, 7); it must be (6, 7)"),
        ({"d_sae": "7"}, "d_sae is '7'; it must be a positive integer"),
        ({"metadata": {}, "normalize_activations": True}, "'expected_average_only_in'"),
        ({"remove": ["metadata", "reshape_activations"], "hook_name": "x.hook_z"}, "is 'hook_z'"),
        ({"metadata": [1]}, "must be a JSON object"),
        ({"metadata": {}, "activation_fn_str": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ({"metadata": {}, "activation_fn": "topk", "activation_fn_kwargs": [1]}, "k is None"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(golden, changes, line):
    edit_config(golden, **changes)
    assert line in refusal(golden)


def test_weights_that_the_stated_dtype_cannot_hold_are_refused(golden):
    edit_weights(golden, b_enc=torch.full((7,), 1e5))
    edit_config(golden, dtype="float16")
    assert "too large for float16" in refusal(golden)


@pytest.mark.parametrize("key", ["d_in", "dtype", "architecture", "apply_b_dec_to_input"])
def test_a_configuration_without_a_key_is_refused(golden, key):
    edit_config(golden, remove=[key])
    assert f"lacks {key}" in refusal(golden)


@TOPK
@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"remove": ["k"]}, "lacks k"),
        ({"k": 8}, "k is 8; it must be at most d_sae 7"),
        ({"k": 0}, "k is 0; it must be a positive integer"),
        ({"k": 2.5}, "k is 2.5; it must be a positive integer"),
        ({"rescale_acts_by_decoder_norm": None}, "rescale_acts_by_decoder_norm is None"),
    ],
)
def test_a_topk_configuration_that_cannot_be_followed_is_refused(golden, changes, line):
    edit_config(golden, **changes)
    assert line in refusal(golden)


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
        ({"W_dec": torch.zeros(5, 7)}, "W_dec is (5, 7); it must be (7, 5)"),
        ({"b_enc": torch.zeros(7, 1)}, "b_enc is (7, 1); it must be (7,)"),
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


@JUMPRELU
def test_a_jumprelu_without_thresholds_is_refused(golden):
    edit_weights(golden, remove=["threshold"])
    assert "a jumprelu SAE holds W_enc, W_dec, b_enc, b_dec, threshold" in refusal(golden)


@JUMPRELU
def test_thresholds_of_another_shape_are_refused(golden):
    edit_weights(golden, threshold=torch.ones(()))
    assert "threshold is (); it must be (7,)" in refusal(golden)


@pytest.mark.parametrize("kept_bytes", [0, 5, 300, 583])
def test_a_truncated_weights_file_is_refused(golden, kept_bytes):
    path = golden / WEIGHTS
    path.write_bytes(path.read_bytes()[:kept_bytes])
    assert "is damaged" in refusal(golden)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_a_missing_file_is_named(golden, name):
    (golden / name).unlink()
    assert f"{name} does not exist" in refusal(golden)


def test_a_missing_folder_is_named(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")

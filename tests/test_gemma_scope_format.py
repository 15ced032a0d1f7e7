"""Gemma Scope's format: files as SAELens's loaders for it read them, and what is refused."""

import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_coding.errors import UserError
from sparse_coding.formats import format_of, load_dictionary
from sparse_coding.formats.gemma_scope import load_gemma_scope, save_gemma_scope
from sparse_coding.sae import ARCHITECTURES, JumpReLUSAE

GOLDEN = Path(__file__).parent / "golden" / "gemma_scope"
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def golden(tmp_path):
    return shutil.copytree(GOLDEN / "layer_12", tmp_path / "layer_12")


def arrays(folder):
    with np.load(folder / "params.npz") as content:
        return dict(content)


def refusal(path):
    with pytest.raises(UserError) as caught:
        load_gemma_scope(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["layer_12", "embedding"])
def test_golden_files_encode_and_decode_as_saelens_recorded(name):
    recorded = load_file(GOLDEN / name / "recorded.safetensors")
    sae = load_dictionary(GOLDEN / name)
    assert sae.name == "jumprelu"
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(recorded["x"]), recorded["f"], **ROUNDING)
        torch.testing.assert_close(sae.decode(recorded["f"]), recorded["x_hat"], **ROUNDING)


def test_matrices_are_not_turned_b_dec_is_not_subtracted_and_each_feature_has_its_threshold(
    golden,
):
    theirs, sae = arrays(golden), load_gemma_scope(golden)
    for name, array in theirs.items():
        assert np.array_equal(getattr(sae, name).detach().numpy(), array)
    assert torch.equal(sae.pre_activations(torch.zeros(5)), sae.b_enc)
    assert len(set(theirs["threshold"].tolist())) == 7


def test_an_embeddings_sae_is_rescaled_by_the_root_of_its_width(tmp_path, golden):
    embedding = shutil.copytree(golden, tmp_path / "embedding" / "width_4k")
    sae, plain = load_gemma_scope(embedding / "params.npz"), load_gemma_scope(golden)
    torch.testing.assert_close(sae.W_enc * 5**0.5, plain.W_enc)
    torch.testing.assert_close(sae.W_dec / 5**0.5, plain.W_dec)
    assert torch.equal(sae.b_enc, plain.b_enc)
    assert torch.equal(sae.threshold, plain.threshold)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_safetensors_of_gemma_scope_2_hold_the_same_under_small_names(golden, dtype):
    expected = load_gemma_scope(golden).to(dtype)
    names = {"W_enc": "w_enc", "W_dec": "w_dec"}
    tensors = {names.get(n, n): torch.from_numpy(a).to(dtype) for n, a in arrays(golden).items()}
    (golden / "params.npz").unlink()
    save_file(tensors, golden / "params.safetensors")
    assert format_of(golden) == "gemma_scope"
    sae = load_gemma_scope(golden)
    for name, value in expected.state_dict().items():
        assert torch.equal(sae.state_dict()[name], value)


def test_ours_comes_back_bit_by_bit(tmp_path):
    generator = torch.Generator().manual_seed(1)
    sae = JumpReLUSAE(12, 20, generator)
    sae.threshold.data = torch.rand(20, generator=generator)
    loaded = load_gemma_scope(save_gemma_scope(sae, tmp_path / "a"))
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(UserError, match="exists"):
        save_gemma_scope(sae, tmp_path / "a")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "jumprelu"])
def test_another_class_is_not_written(name, tmp_path):
    with pytest.raises(UserError, match="Gemma Scope has no .*; it can hold: JumpReLUSAE"):
        save_gemma_scope(ARCHITECTURES[name](12, 20), tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"W_dec": np.zeros((5, 7), np.float32)}, "W_dec is (5, 7); it must be (7, 5)"),
        ({"threshold": np.zeros((), np.float32)}, "threshold is (); it must be (7,)"),
        ({"threshold": np.full(7, np.inf, np.float32)}, "threshold must hold finite"),
        ({"b_dec": np.zeros(5, np.int64)}, "b_dec must hold finite"),
        ({"extra": np.zeros(1)}, "an SAE of Gemma Scope holds"),
        ({"affine_skip_connection": np.zeros((5, 5))}, "is a transcoder"),
        ({"b_dec": np.array([{}] * 5, dtype=object)}, "b_dec.npy claims to be (5,) of object"),
    ],
)
def test_arrays_that_are_not_an_saes_are_refused(golden, changes, line):
    np.savez(golden / "params.npz", **(arrays(golden) | changes))
    assert line in refusal(golden)


def test_a_transcoder_is_known_by_its_two_hooks(golden):
    hooks = {"hf_hook_point_in": "model.layers.3.pre", "hf_hook_point_out": "model.layers.3.post"}
    (golden / "config.json").write_text(json.dumps(hooks))
    assert "is a transcoder" in refusal(golden)
    hooks["hf_hook_point_out"] = hooks["hf_hook_point_in"]
    (golden / "config.json").write_text(json.dumps(hooks))
    assert load_gemma_scope(golden).name == "jumprelu"


def test_an_archive_that_claims_more_than_it_holds_is_refused_before_it_is_read(golden):
    header = io.BytesIO()
    description = {"descr": "<f4", "fortran_order": False, "shape": (2**20, 2**20)}
    np.lib.format.write_array_header_1_0(header, description)
    with zipfile.ZipFile(golden / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", header.getvalue() + bytes(64))
    assert "claims to be (1048576, 1048576) of float32" in refusal(golden)


def test_a_damaged_archive_is_refused_in_one_line(golden):
    whole = (golden / "params.npz").read_bytes()
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], b"\x80\x04K\x01.", whole[::-1]):
        (golden / "params.npz").write_bytes(content)
        assert "params.npz is damaged" in refusal(golden)
    (golden / "params.npz").unlink()
    assert "does not exist" in refusal(golden)

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


EMBEDDING = "embedding/width_4k/average_l0_6"
TRANSCODERS = ("gemma-scope-2b-pt-transcoders/layer_3", "transcoder")


@pytest.mark.parametrize("name", ["layer_12", EMBEDDING, "gemma_scope_2", *TRANSCODERS])
def test_golden_files_encode_and_decode_as_saelens_recorded(name):
    recorded = load_file(GOLDEN / name / "recorded.safetensors")
    sae = load_dictionary(GOLDEN / name)
    assert sae.name == "jumprelu"
    assert sae.is_transcoder == (name in TRANSCODERS)
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
    embedding = shutil.copytree(golden, tmp_path / EMBEDDING)
    sae, plain = load_gemma_scope(embedding / "params.npz"), load_gemma_scope(golden)
    torch.testing.assert_close(sae.W_enc * 5**0.5, plain.W_enc)
    torch.testing.assert_close(sae.W_dec / 5**0.5, plain.W_dec)
    assert torch.equal(sae.b_enc, plain.b_enc)
    assert torch.equal(sae.threshold, plain.threshold)


def test_an_embeddings_sae_is_recognised_from_within_its_folder_too(tmp_path, golden, monkeypatch):
    folder = shutil.copytree(golden, tmp_path / EMBEDDING)
    expected = load_gemma_scope(folder)
    monkeypatch.chdir(folder)
    assert torch.equal(load_gemma_scope("params.npz").W_enc, expected.W_enc)


def test_a_folder_that_happens_to_be_called_embedding_says_nothing(tmp_path, golden):
    elsewhere = shutil.copytree(golden, tmp_path / "runs/embedding/a")
    assert torch.equal(load_gemma_scope(elsewhere).W_dec, load_gemma_scope(golden).W_dec)


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder"])
def test_nothing_is_written_where_gemma_scope_would_take_it_for_another_kind(tmp_path, kind):
    with pytest.raises(UserError, match=f"says to Gemma Scope that it is a {kind}; choose"):
        save_gemma_scope(JumpReLUSAE(4, 8), tmp_path / kind / "layer_3")
    assert not list(tmp_path.iterdir())


def test_a_configuration_goes_before_what_its_folders_are_called(tmp_path, golden):
    folder = shutil.copytree(golden, tmp_path / "transcoder" / "layer_3")
    assert load_gemma_scope(folder).is_transcoder
    (folder / "config.json").write_text(json.dumps({"type": "sae"}))
    assert not load_gemma_scope(folder).is_transcoder


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


@pytest.mark.parametrize("folder", ["a", EMBEDDING, "runs/embedding/a"])
def test_ours_comes_back_bit_by_bit(tmp_path, folder):
    generator = torch.Generator().manual_seed(1)
    sae = JumpReLUSAE(16, 20, generator)  # whose root is exact
    sae.threshold.data = torch.rand(20, generator=generator)
    loaded = load_gemma_scope(save_gemma_scope(sae, tmp_path / folder))
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with pytest.raises(UserError, match="exists"):
        save_gemma_scope(sae, tmp_path / folder)


@pytest.mark.parametrize("folder", ["layer_3/width_16k", EMBEDDING])
def test_ours_encodes_and_decodes_alike_in_saelens(tmp_path, monkeypatch, folder):
    """With SAELens's loader for Gemma Scope, which is given our file for a download."""
    reason = "SAELens is not installed: benchmarks/requirements-peers.txt"
    sae_lens = pytest.importorskip("sae_lens", reason=reason)
    from sae_lens.loading import pretrained_sae_loaders as loaders

    generator = torch.Generator().manual_seed(1)
    sae = JumpReLUSAE(12, 20, generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.rand(parameter.shape, generator=generator)
    written = save_gemma_scope(sae, tmp_path / folder)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(written / "params.npz"))
    sizes = {"d_in": 12, "d_sae": 20}
    _, weights, _ = loaders.gemma_2_sae_huggingface_loader(
        "google/gemma-scope-2b-pt-res", folder, cfg_overrides=sizes
    )
    theirs = sae_lens.JumpReLUSAE(
        sae_lens.JumpReLUSAEConfig(**sizes, apply_b_dec_to_input=False, dtype="float32")
    )
    theirs.load_state_dict(weights)
    x = 3 * torch.randn(7, 12, generator=generator)
    with torch.no_grad():
        f = theirs.encode(x)
        torch.testing.assert_close(sae.encode(x), f, **ROUNDING)
        torch.testing.assert_close(sae(x), theirs.decode(f), **ROUNDING)
    assert (f > 0).any()


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "jumprelu" not in name])
def test_another_class_is_not_written(name, tmp_path):
    with pytest.raises(UserError, match="Gemma Scope has no .*; it can hold: JumpReLUSAE"):
        save_gemma_scope(ARCHITECTURES[name](12, 20), tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"W_enc": np.zeros((2, 5, 7), np.float32)},
            "W_enc is (2, 5, 7); it must be (d_in, d_sae)",
        ),
        ({"w_enc": np.zeros((5, 7), np.float32)}, "the same matrix twice"),
        ({"W_dec": np.zeros((5, 7), np.float32)}, "W_dec is (5, 7); it must be (7, 5)"),
        ({"threshold": np.full(7, np.inf, np.float32)}, "threshold must hold finite"),
        ({"b_dec": np.zeros(5, np.int64)}, "b_dec.npy holds int64; it must hold floating-point"),
        ({"b_dec": np.array(["a"] * 5)}, "b_dec.npy holds <U1"),
        ({"extra": np.zeros(1)}, "an SAE of Gemma Scope holds"),
        ({"affine_skip_connection": np.zeros((5, 5))}, "is a transcoder"),
        ({"b_dec": np.array([{}] * 5, dtype=object)}, "b_dec.npy holds object"),
    ],
)
def test_arrays_that_are_not_an_saes_are_refused(golden, changes, line):
    np.savez(golden / "params.npz", **(arrays(golden) | changes))
    assert line in refusal(golden)


# google/gemma-scope-2-4b-pt's resid_post/layer_17_width_16k_l0_big/config.json
CONFIG = {
    "hf_hook_point_in": "model.layers.17.output",
    "hf_hook_point_out": "model.layers.17.output",
    "width": 16384,
    "model_name": "google/gemma-3-4b-pt",
    "architecture": "jump_relu",
    "l0": 150,
    "affine_connection": False,
    "type": "sae",
}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"type": "crosscoder"}, "is a crosscoder"),  # with one hook name
        ({"type": "transcoder", "affine_connection": True}, "a skip connection"),
        ({"architecture": "topk"}, "architecture is 'topk'; supported is 'jump_relu'"),
        (None, "is not a configuration of Gemma Scope"),
    ],
)
def test_a_configuration_of_something_else_is_refused(golden, changes, line):
    content = [CONFIG] if changes is None else CONFIG | changes
    (golden / "config.json").write_text(json.dumps(content))
    assert line in refusal(golden)


@pytest.mark.parametrize("absent", [(), ("type",), ("type", "hf_hook_point_out")])
def test_an_saes_configuration_is_followed_also_where_it_says_less(golden, absent):
    facts = {key: CONFIG[key] for key in CONFIG if key not in absent}
    (golden / "config.json").write_text(json.dumps(facts))
    assert load_gemma_scope(golden).name == "jumprelu"


@pytest.mark.parametrize(
    "folder",
    [
        "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_76",
        "models--google--gemma-scope-2b-pt-transcoders/snapshots/1/layer_3/width_16k/average_l0_7",
        "transcoder_all/layer_5_width_16k_l0_big",
    ],
)
def test_a_transcoder_without_a_configuration_is_known_by_its_folder(golden, tmp_path, folder):
    shutil.copytree(golden, tmp_path / folder)
    assert load_gemma_scope(tmp_path / folder).is_transcoder
    assert not load_gemma_scope(golden).is_transcoder


@pytest.mark.parametrize(
    "changes", [{"type": "transcoder"}, {"hf_hook_point_out": "model.layers.17.mlp.output"}]
)
def test_a_transcoder_is_known_by_its_configuration(golden, changes):
    (golden / "config.json").write_text(json.dumps(CONFIG | changes))
    assert load_gemma_scope(golden).is_transcoder


@pytest.mark.parametrize("folder", ["crosscoder/layer_5_w_16k", "clt_all/layer_5_w_16k"])
def test_a_crosscoder_without_a_configuration_is_refused(golden, tmp_path, folder):
    shutil.copytree(golden, tmp_path / folder)
    assert "is a crosscoder" in refusal(tmp_path / folder)


def test_a_transcoder_is_not_written_for_nothing_in_the_file_would_say_so(tmp_path):
    sae = JumpReLUSAE(16, 20, torch.Generator())
    sae.retarget(16, torch.Generator())
    with pytest.raises(UserError, match="Gemma Scope has no transcoders"):
        save_gemma_scope(sae, tmp_path / "a")


@pytest.mark.parametrize("threshold", [np.array(0.5, np.float32), np.full(1, 0.5, np.float32)])
def test_one_threshold_for_all_features_is_refused(golden, threshold):
    np.savez(golden / "params.npz", **(arrays(golden) | {"threshold": threshold}))
    assert f"threshold is {threshold.shape}; it must be (7,)" in refusal(golden)


def test_a_threshold_below_zero_acts_as_zero(golden):
    theirs = arrays(golden) | {"threshold": np.linspace(-2, 1, 7, dtype=np.float32)}
    np.savez(golden / "params.npz", **theirs)
    x = 2 * torch.randn(11, 5, generator=torch.Generator().manual_seed(3))
    pre = x.numpy() @ theirs["W_enc"] + theirs["b_enc"]
    f = np.maximum(pre, 0) * (pre > theirs["threshold"])
    assert ((pre < 0) & (pre > theirs["threshold"])).any()
    torch.testing.assert_close(load_gemma_scope(golden).encode(x), torch.from_numpy(f), **ROUNDING)


def test_numbers_of_another_width_or_byte_order_are_read_as_float32(golden):
    expected = load_gemma_scope(golden)
    for dtype in (">f4", "<f8"):
        np.savez(golden / "params.npz", **{n: a.astype(dtype) for n, a in arrays(golden).items()})
        assert torch.equal(load_gemma_scope(golden).W_dec, expected.W_dec)


def test_a_bomb_is_refused_before_it_is_unpacked(golden):
    with zipfile.ZipFile(golden / "params.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(2**24))
    assert "unpacks to 16,777,216 bytes, over 8 times its own" in refusal(golden)


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
        assert "params.npz is damaged or no archive" in refusal(golden)
    (golden / "params.npz").unlink()
    assert "does not exist" in refusal(golden)


def test_no_byte_that_changes_brings_a_traceback(golden):
    """Deflated, so that zipfile, zlib and numpy each meet damage; what loads is a whole SAE."""
    np.savez_compressed(golden / "params.npz", **arrays(golden))
    whole = (golden / "params.npz").read_bytes()
    random = np.random.default_rng(0)
    n_refused = 0
    for place in range(0, len(whole), 3):
        content = bytearray(whole)
        content[place] ^= int(random.integers(1, 256))
        (golden / "params.npz").write_bytes(content)
        try:
            assert load_gemma_scope(golden).W_dec.shape == (7, 5)
        except UserError as error:
            n_refused += 1
            assert "\n" not in str(error)
    assert n_refused > len(whole) / 6

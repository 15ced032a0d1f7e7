"""sparsify's format: its files as it wrote them, ours as it reads them, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_coding.errors import UserError
from sparse_coding.formats import format_of, load_dictionary
from sparse_coding.formats.sparsify import load_sparsify, save_sparsify
from sparse_coding.sae import ARCHITECTURES, TopKSAE

GOLDEN = Path(__file__).parent / "golden" / "sparsify"
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def golden(tmp_path):
    """A copy of a folder that sparsify wrote, to be damaged."""
    return shutil.copytree(GOLDEN / "topk", tmp_path / "theirs")


@pytest.fixture
def sae():
    generator = torch.Generator().manual_seed(1)
    sae = TopKSAE(12, 20, generator, k=6)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return sae


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [
        ("topk", ROUNDING),
        ("topk_by_factor", ROUNDING),
        # 8 bits of mantissa; sums of up to 5 products of size about 10.
        ("topk_bfloat16", {"rtol": 2**-7, "atol": 0.1}),
    ],
)
def test_golden_files_encode_and_decode_as_sparsify_recorded(name, tolerance):
    recorded = load_file(GOLDEN / name / "recorded.safetensors")
    sae = load_dictionary(GOLDEN / name)
    assert (sae.name, sae.k, sae.W_dec.dtype) == ("topk", 3, recorded["x"].dtype)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(recorded["x"]), recorded["f"], **tolerance)
        torch.testing.assert_close(sae.decode(recorded["f"]), recorded["x_hat"], **tolerance)


def test_the_encoder_is_transposed_the_decoder_is_not_and_b_dec_is_subtracted(golden):
    theirs = load_file(golden / "sae.safetensors")
    sae = load_sparsify(golden)
    assert torch.equal(sae.W_enc, theirs["encoder.weight"].T)
    assert torch.equal(sae.W_dec, theirs["W_dec"])
    at_centre = sae.pre_activations(theirs["b_dec"])
    torch.testing.assert_close(at_centre, theirs["encoder.bias"])


def test_each_token_keeps_its_own_k_largest(sae):
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    x[0] *= 100  # would take every place of a batch's top k
    loaded = load_sparsify(GOLDEN / "topk")
    for dictionary, k, rows in ((sae, 6, x), (loaded, 3, x[:, :5])):
        pre = torch.relu(dictionary.pre_activations(rows))
        n_active = (dictionary.encode(rows) > 0).sum(dim=1)
        assert torch.equal(n_active, (pre > 0).sum(dim=1).clamp(max=k))


def test_a_configuration_of_2024_is_an_saes(golden):
    """EleutherAI/sae-llama-3-8b-32x has these keys alone: no activation, no num_latents."""
    shutil.copytree(GOLDEN / "topk_by_factor", golden, dirs_exist_ok=True)
    expected = load_sparsify(golden)
    keys = {"expansion_factor": 2, "normalize_decoder": True, "k": 3, "signed": False, "d_in": 5}
    (golden / "cfg.json").write_text(json.dumps(keys))
    sae = load_sparsify(golden)
    assert (sae.d_sae, sae.k) == (10, 3)
    assert torch.equal(sae.W_enc, expected.W_enc)


def test_metadata_cannot_contradict_what_is_written(sae, tmp_path):
    folder = save_sparsify(sae, tmp_path / "a", metadata={"signed": True, "k": 1, "d_in": 3})
    assert (load_sparsify(folder).k, load_sparsify(folder).d_in) == (6, 12)


def test_ours_comes_back_bit_by_bit_and_names_its_format(sae, tmp_path):
    folder = save_sparsify(sae, tmp_path / "a", metadata={"lm": "gpt2"})
    loaded = load_sparsify(folder)
    assert format_of(folder) == "sparsify"
    assert loaded.k == sae.k
    for name, value in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert json.loads((folder / "cfg.json").read_text())["lm"] == "gpt2"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ours_encodes_and_decodes_alike_in_sparsify(sae, tmp_path, dtype, monkeypatch):
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # its kernels fail without a GPU
    sparsify = pytest.importorskip(
        "sparsify", reason="sparsify is not installed: benchmarks/requirements-peers.txt"
    )
    folder = save_sparsify(sae.to(dtype), tmp_path / "a", metadata={"lm": "gpt2"})
    theirs = sparsify.SparseCoder.load_from_disk(folder)
    assert theirs.dtype == dtype
    # Both in float32: in bfloat16 ties among the k largest would be broken differently.
    theirs, sae = theirs.float(), load_sparsify(folder).float()
    x = 3 * torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        top = theirs.encode(x)
        f = torch.zeros(7, 20).scatter(1, top.top_indices, top.top_acts)
        torch.testing.assert_close(sae.encode(x), f, **ROUNDING)
        x_hat = theirs.decode(top.top_acts, top.top_indices)
        torch.testing.assert_close(sae(x), x_hat, **ROUNDING)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "topk"])
def test_another_class_is_not_written(name, tmp_path):
    with pytest.raises(UserError, match="sparsify has no .*; it can hold: TopKSAE"):
        save_sparsify(ARCHITECTURES[name](12, 20), tmp_path / "a", metadata={})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'; supported is 'topk'"),
        ({"transcode": True}, "transcode is True"),
        ({"skip_connection": True}, "skip_connection is True"),
        ({"k": 8}, "k is 8; it must be at most the 7 latents"),
        ({"k": 0}, "k is 0; it must be an integer from 1 to 2147483647"),
        ({"k": True}, "k is True; it must be an integer"),
        ({"d_in": "5"}, "d_in is '5'"),
        ({"d_in": 6}, "encoder.weight is (7, 5); it must be (7, 6)"),
        ({"num_latents": 0, "expansion_factor": None}, "expansion_factor is None"),
        ({"num_latents": 0, "expansion_factor": 10**4000, "d_in": 10**4000}, "d_in is 1000"),
        # EleutherAI/skip-transcoder-Llama-3.2-1B-131k, which does not say `transcode`.
        ({"transcode": False, "skip_connection": True}, "skip_connection is True"),
    ],
)
def test_a_configuration_that_cannot_be_followed_is_refused(golden, changes, line):
    config = json.loads((golden / "cfg.json").read_text())
    (golden / "cfg.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as caught:
        load_sparsify(golden)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"W_skip": torch.zeros(5, 5)}, "an SAE of sparsify holds"),
        ({"W_dec": torch.zeros(5, 7)}, "W_dec is (5, 7); it must be (7, 5)"),
        ({"b_dec": torch.full((5,), torch.nan)}, "b_dec must hold finite"),
        ({"b_dec": torch.zeros(5, dtype=torch.int32)}, "b_dec must hold finite"),
    ],
)
def test_tensors_that_are_not_an_saes_are_refused(golden, changes, line):
    save_file(load_file(golden / "sae.safetensors") | changes, golden / "sae.safetensors")
    with pytest.raises(UserError) as caught:
        load_sparsify(golden)
    assert line in str(caught.value)


def test_a_truncated_file_is_refused_in_one_line(golden):
    whole = (golden / "sae.safetensors").read_bytes()
    for n in (0, 7, 60, len(whole) - 1):
        (golden / "sae.safetensors").write_bytes(whole[:n])
        with pytest.raises(UserError, match=r"sae.safetensors is damaged: [^\n]*$"):
            load_sparsify(golden)

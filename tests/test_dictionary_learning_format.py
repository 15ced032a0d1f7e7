"""dictionary_learning's files: as it wrote them, as it reads ours, and refused when damaged.

The folders of `golden/dictionary_learning` are its own, `recorded.safetensors` there its own
encode and decode of recorded inputs (`make_dictionary_learning.py`): only the last part needs it
installed.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparse_coding.errors import UserError
from sparse_coding.formats import dictionary_learning as module
from sparse_coding.formats.dictionary_learning import (
    load_dictionary_learning,
    recognises,
    save_dictionary_learning,
)
from sparse_coding.formats.unpickle import read_checkpoint, write_state_dict
from sparse_coding.sae import ARCHITECTURES, L1SAE, BatchTopKSAE, JumpReLUSAE, TopKSAE

GOLDEN = Path(__file__).parent / "golden" / "dictionary_learning"
METADATA = {"lm_name": "EleutherAI/pythia-70m-deduped", "layer": 3, "steps": 100}
# One product of width 20 in another order of summation: a few units in the last place.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def random_sae(cls, rows="unit"):
    """d_in 12, d_sae 20, every parameter moved from its start, a BatchTopK's threshold 0.7."""
    generator = torch.Generator().manual_seed(1)
    sae = cls(12, 20, generator, **({"k": 6} if cls.sparsity_is_chosen else {}))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for threshold in sae.buffers():
            threshold.fill_(0.7)
    if rows == "unit":
        sae.normalise()
    return sae


@pytest.fixture(params=list(ARCHITECTURES))
def sae(request):
    return random_sae(ARCHITECTURES[request.param])


@pytest.fixture
def golden(tmp_path, request):
    """A copy of a folder that dictionary_learning wrote, to be damaged; a TopK's by default."""
    return shutil.copytree(GOLDEN / getattr(request, "param", "topk"), tmp_path / "theirs")


def of(*names):
    return pytest.mark.parametrize("golden", names, indirect=True)


def edit_weights(folder, remove=(), **changes):
    state = read_checkpoint(folder / "ae.pt") | changes
    write_state_dict(folder / "ae.pt", {k: state[k] for k in state if k not in remove})


def edit_trainer(folder, remove=(), **changes):
    path = folder / "config.json"
    trainer = json.loads(path.read_text())["trainer"] | changes
    path.write_text(json.dumps({"trainer": {k: trainer[k] for k in trainer if k not in remove}}))


def refusal(path):
    """The one line in which loading is refused; it names the file."""
    with pytest.raises(UserError) as caught:
        load_dictionary_learning(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def inputs(d_in=12):
    return 3 * torch.randn(7, d_in, generator=torch.Generator().manual_seed(2))


def assert_encodes_alike(a, b, x, tolerance=ROUNDING):
    with torch.no_grad():
        f, expected = a.encode(x), b.encode(x)
        assert (f > 0).any()
        assert (f == 0).any()
        torch.testing.assert_close(f, expected, **tolerance)
        torch.testing.assert_close(a.decode(f), b.decode(f), **tolerance)


# Theirs, as they recorded it.


@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("december_2023", "l1"),
        ("autoencoder_rows_not_unit", "l1"),
        ("autoencoder_bfloat16", "l1"),
        ("autoencoder_new", "norm_weighted_l1"),
        ("gated", "gated"),
        ("topk", "topk"),
        ("batchtopk", "batch_topk"),
        ("matryoshka", "matryoshka"),
        ("jumprelu", "jumprelu"),
    ],
)
def test_golden_files_encode_and_decode_as_dictionary_learning_recorded(name, class_name):
    recorded = load_file(GOLDEN / "recorded.safetensors")
    sae = load_dictionary_learning(GOLDEN / name)
    assert sae.name == class_name
    with torch.no_grad():
        f = sae.encode(recorded["x"].to(sae.W_dec.dtype))
        x_hat = sae.decode(recorded[f"{name}.f"].to(sae.W_dec.dtype))
    # bfloat16: 8 bits of mantissa, sums of up to 7 products of size about 10; they upcast.
    tolerance = {"rtol": 2**-7, "atol": 0.1} if name.endswith("bfloat16") else ROUNDING
    torch.testing.assert_close(f.float(), recorded[f"{name}.f"], **tolerance)
    torch.testing.assert_close(x_hat.float(), recorded[f"{name}.x_hat"], **tolerance)


def test_the_decoder_of_a_linear_layer_is_transposed():
    theirs = read_checkpoint(GOLDEN / "topk" / "ae.pt")["decoder.weight"]
    assert theirs.shape == (5, 7)
    assert torch.equal(load_dictionary_learning(GOLDEN / "topk").W_dec.data, theirs.T)


def test_a_bfloat16_file_stays_bfloat16():
    sae = load_dictionary_learning(GOLDEN / "autoencoder_bfloat16")
    assert {p.dtype for p in sae.parameters()} == {torch.bfloat16}
    theirs = read_checkpoint(GOLDEN / "autoencoder_bfloat16" / "ae.pt")["decoder.weight"]
    assert torch.equal(sae.W_dec.data, theirs.T)  # unit rows up to its rounding are left alone


def test_an_autoencoder_is_normalised_as_their_loader_does():
    theirs = read_checkpoint(GOLDEN / "autoencoder_rows_not_unit" / "ae.pt")
    norms = theirs["decoder.weight"].norm(dim=0)
    sae = load_dictionary_learning(GOLDEN / "autoencoder_rows_not_unit")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(sae.b_enc.data, theirs["encoder.bias"] * norms)


@of("autoencoder_rows_not_unit")
def test_a_row_of_zeros_is_no_nan(golden):
    decoder = read_checkpoint(golden / "ae.pt")["decoder.weight"]
    decoder[:, 2] = 0
    edit_weights(golden, **{"decoder.weight": decoder})
    assert (load_dictionary_learning(golden).W_dec[2] == 0).all()


@of("autoencoder_new")
def test_an_autoencoder_new_keeps_the_norms_of_its_rows(golden):
    theirs = read_checkpoint(golden / "ae.pt")["decoder.weight"]
    assert torch.equal(load_dictionary_learning(golden).W_dec.data, theirs.T)


def test_topk_counts_per_token_whatever_its_threshold(golden):
    edit_weights(golden, threshold=torch.tensor(100.0))
    sae = load_dictionary_learning(golden)
    assert type(sae) is TopKSAE
    assert ((sae.encode(inputs(5)) > 0).sum(dim=1) <= 3).all()
    assert (sae.encode(inputs(5)) > 0).any()


@of("batchtopk", "matryoshka")
def test_a_threshold_that_was_never_learnt_is_a_relu(golden):
    edit_weights(golden, threshold=torch.tensor(-1.0))
    sae, x = load_dictionary_learning(golden), inputs(5)
    torch.testing.assert_close(sae.encode(x), torch.relu(sae.pre_activations(x)))


@of("jumprelu")
def test_a_threshold_below_0_acts_as_0(golden):
    theirs = read_checkpoint(golden / "ae.pt")["threshold"]
    assert (theirs < 0).any()
    assert torch.equal(load_dictionary_learning(golden).threshold.data, torch.relu(theirs))


def test_a_norm_factor_in_the_configuration_changes_nothing(golden):
    before = load_dictionary_learning(golden).state_dict()
    edit_trainer(golden, norm_factor=4.0)
    after = load_dictionary_learning(golden).state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_k_of_an_older_file_is_in_the_configuration(golden):
    edit_weights(golden, remove=["k", "threshold"])
    assert load_dictionary_learning(golden).k == 3


@of("matryoshka")
def test_group_sizes_become_prefixes(golden):
    assert tuple(load_dictionary_learning(golden).prefixes) == (2, 7)


def test_a_file_and_a_checkpoint_are_read_by_themselves(golden):
    expected = load_dictionary_learning(golden).state_dict()
    (golden / "checkpoints").mkdir()
    shutil.copy(golden / "ae.pt", golden / "checkpoints" / "ae_1000.pt")
    for path in (golden / "ae.pt", golden / "checkpoints" / "ae_1000.pt"):
        read = load_dictionary_learning(path).state_dict()
        assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_loading_does_not_advance_the_global_random_stream():
    before = torch.get_rng_state()
    load_dictionary_learning(GOLDEN / "topk")
    assert torch.equal(torch.get_rng_state(), before)


def test_it_is_recognised_by_names_alone(golden):
    assert recognises(golden)
    assert recognises(golden / "ae.pt")
    assert recognises((golden / "ae.pt").rename(golden / "layer_3.pt"))
    assert not recognises(golden)
    assert not recognises(golden / "config.json")
    torch.save({"w": torch.ones(2)}, golden / "other.pt")
    (golden / "text.pt").write_text("no checkpoint")
    assert not recognises(golden / "other.pt")
    assert not recognises(golden / "text.pt")


# Ours, here.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_ours_comes_back_as_the_same_class_bit_by_bit(sae, dtype, tmp_path):
    sae = sae.to(dtype)
    loaded = load_dictionary_learning(
        save_dictionary_learning(sae, tmp_path / "a", metadata=METADATA)
    )
    assert type(loaded) is type(sae)
    assert getattr(loaded, "k", None) == getattr(sae, "k", None)
    assert getattr(loaded, "prefixes", None) == getattr(sae, "prefixes", None)
    for name, expected in sae.state_dict().items():
        assert loaded.state_dict()[name].dtype == expected.dtype
        assert torch.equal(loaded.state_dict()[name], expected)


def test_an_l1_sae_without_unit_rows_keeps_its_features(tmp_path):
    sae = random_sae(L1SAE, rows="any")
    folder = save_dictionary_learning(sae, tmp_path / "a", metadata={})
    assert json.loads((folder / "config.json").read_text())["trainer"]["dict_class"] == (
        "AutoEncoderNew"
    )
    assert_encodes_alike(load_dictionary_learning(folder), sae, inputs())


def test_a_tied_sae_whose_decoder_was_changed_is_untied(tmp_path):
    sae = random_sae(ARCHITECTURES["tied_l1"])
    folder = save_dictionary_learning(sae, tmp_path / "a", metadata={})
    edit_weights(folder, **{"decoder.weight": sae.W_dec.data.T.flip(1)})
    assert type(load_dictionary_learning(folder)) is L1SAE


def test_metadata_joins_the_trainers_keys(sae, tmp_path):
    folder = save_dictionary_learning(sae, tmp_path / "a", metadata=METADATA)
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert {key: trainer[key] for key in METADATA} == METADATA
    assert (trainer["activation_dim"], trainer["dict_size"]) == (12, 20)


def test_an_existing_folder_is_kept_or_replaced_whole(sae, tmp_path, monkeypatch):
    folder = save_dictionary_learning(L1SAE(5, 7), tmp_path / "a", metadata={})
    with pytest.raises(UserError, match="exists"):
        save_dictionary_learning(sae, folder, metadata={})
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(module, "write_json", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        save_dictionary_learning(sae, folder, metadata={}, overwrite=True)
    assert load_dictionary_learning(folder).d_sae == 7
    save_dictionary_learning(sae, folder, metadata={}, overwrite=True)
    assert load_dictionary_learning(folder).d_sae == 20
    assert os.listdir(tmp_path) == ["a"]


def test_overwriting_never_deletes_a_folder_that_is_not_an_saes(sae, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="is of another kind"):
        save_dictionary_learning(sae, tmp_path, metadata={}, overwrite=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("cls", ARCHITECTURES.values())
def test_an_sae_with_an_encoder_of_its_own_is_not_written(cls, tmp_path):
    class Shrunk(cls):
        def encode(self, x):
            return super().encode(x) / 2

    with pytest.raises(UserError, match="Shrunk has its own encode"):
        save_dictionary_learning(Shrunk(12, 20), tmp_path / "a", metadata={})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("cls", [BatchTopKSAE, JumpReLUSAE])
def test_a_threshold_below_0_is_not_written(cls, tmp_path):
    sae = cls(12, 20)
    sae.threshold.data.fill_(-0.1)
    with pytest.raises(UserError, match="threshold below 0"):
        save_dictionary_learning(sae, tmp_path / "a", metadata={})


# Refused.

NAN = torch.full((7,), float("nan"))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"encoder.bias": NAN}, "encoder.bias must hold finite"),
        ({"encoder.bias": torch.zeros(7, dtype=torch.int32)}, "encoder.bias must hold finite"),
        ({"encoder.bias": torch.zeros(8)}, "encoder.bias is (8,), which does not fit a decoder"),
        ({"encoder.weight": torch.zeros(5, 7)}, "encoder.weight is (5, 7), which does not fit"),
        ({"decoder.weight": torch.zeros(7, 5)}, "which does not fit a decoder of 5 features"),
        ({"decoder.weight": torch.zeros(7)}, "the decoder has 1 axes; it must have 2"),
        ({"k": torch.tensor(4)}, "k is 4 and 3; the file and config.json must agree"),
        ({"k": torch.tensor([3])}, "must agree on an integer"),
        ({"extra": torch.zeros(1)}, "as no SAE of dictionary_learning"),
        ({"remove": ["b_dec"]}, "as no SAE of dictionary_learning"),
        (
            {"W_enc": torch.zeros(5, 7), "remove": ["encoder.weight"]},
            "as no SAE of dictionary_learning",
        ),
    ],
)
def test_tensors_that_are_not_an_saes_are_refused(golden, changes, line):
    edit_weights(golden, **changes)
    assert line in refusal(golden)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dict_class": "AutoEncoder"}, "config.json states dict_class 'AutoEncoder'"),
        ({"dict_class": "CrossCoder"}, "AutoEncoderTopK or BatchTopKSAE; config.json states"),
        ({"dict_class": ["AutoEncoder"]}, "config.json states dict_class ['AutoEncoder']"),
        ({"remove": ["dict_class"]}, "config.json states no dict_class"),
        ({"activation_dim": 6}, "config.json says activation_dim 6, the tensors 5"),
        ({"dict_size": "7"}, "config.json says dict_size 7, the tensors 7"),
        ({"k": 8}, "k is 3 and 8"),
    ],
)
def test_a_configuration_that_contradicts_the_file_is_refused(golden, changes, line):
    edit_trainer(golden, **changes)
    assert line in refusal(golden)


@pytest.mark.parametrize("k", [0, 8, 2.5, True, None])
def test_a_k_that_no_topk_can_have_is_refused(golden, k):
    edit_weights(golden, remove=["k"])
    edit_trainer(golden, k=k)
    assert "an integer between 1 and d_sae 7" in refusal(golden)


@of("matryoshka")
@pytest.mark.parametrize("sizes", [[3, 5], [0, 7], [7.0], 7, [[7]]])
def test_groups_that_do_not_partition_the_features_are_refused(golden, sizes):
    edit_weights(golden, group_sizes=torch.tensor(sizes))
    assert "group_sizes" in refusal(golden)


@of("batchtopk", "jumprelu")
def test_a_threshold_that_is_nan_is_refused(golden):
    nan = torch.full_like(read_checkpoint(golden / "ae.pt")["threshold"], float("nan"))
    edit_weights(golden, threshold=nan)
    assert "threshold must hold finite" in refusal(golden)


def test_a_transcoder_is_refused(golden):
    path = golden / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"buffer": {"io": "in_and_out"}}))
    assert "holds a transcoder" in refusal(golden)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"a": "text"}, {1: torch.ones(2)}])
def test_a_checkpoint_that_is_no_state_dict_is_refused(golden, content):
    torch.save(content, golden / "ae.pt")
    assert "not a state dict" in refusal(golden)


def test_a_truncated_a_broken_and_a_missing_file_are_refused(golden):
    (golden / "config.json").write_text('{"trainer": ')
    assert "not valid JSON" in refusal(golden)
    (golden / "ae.pt").write_bytes((golden / "ae.pt").read_bytes()[:1500])
    assert "is damaged" in refusal(golden)
    (golden / "ae.pt").unlink()
    assert "ae.pt does not exist" in refusal(golden)
    assert "does not exist" in refusal(golden / "nowhere")


# With dictionary_learning itself.


@pytest.fixture(scope="module")
def theirs():
    reason = "dictionary-learning is not installed: pip install dictionary-learning==0.1.0"
    return pytest.importorskip("dictionary_learning.utils", reason=reason)


def test_dictionary_learning_encodes_and_decodes_with_our_files_as_we_do(sae, tmp_path, theirs):
    folder = save_dictionary_learning(sae, tmp_path / "a", metadata=METADATA)
    loaded, config = theirs.load_dictionary(str(folder), device="cpu")
    assert config["trainer"]["layer"] == 3
    assert_encodes_alike(loaded, sae, inputs())


def test_dictionary_learning_keeps_features_of_rows_that_are_not_unit(tmp_path, theirs):
    sae = random_sae(L1SAE, rows="any")
    folder = save_dictionary_learning(sae, tmp_path / "a", metadata={})
    loaded, _ = theirs.load_dictionary(str(folder), device="cpu")
    assert_encodes_alike(loaded, sae, inputs())


@pytest.mark.parametrize("name", list(module.LAYOUTS))
def test_we_encode_and_decode_with_their_files_as_they_do(name, tmp_path, theirs):
    sizes = {"k": 4} if "k" in module.LAYOUTS[name].numbers else {}
    sizes |= {"group_sizes": [3, 7, 10]} if name.startswith("Matryoshka") else {}
    sae = getattr(theirs, name)(12, 20, **sizes)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(3)
            )
        for buffer in sae.buffers():
            if buffer.is_floating_point():
                buffer.fill_(0.5)
    torch.save(sae.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": 12, "dict_size": 20, **sizes}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    expected, _ = theirs.load_dictionary(str(tmp_path), device="cpu")
    assert_encodes_alike(load_dictionary_learning(tmp_path), expected, inputs())


def test_ours_saved_again_by_dictionary_learning_is_still_our_class(sae, tmp_path, theirs):
    folder = save_dictionary_learning(sae, tmp_path / "a", metadata=METADATA)
    loaded, config = theirs.load_dictionary(str(folder), device="cpu")
    torch.save(loaded.state_dict(), folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps(config))
    assert type(load_dictionary_learning(folder)) is type(sae)

"""OpenAI's format. They publish no package: the forward passes are written out here, from
openai/sparse_autoencoder's model.py, in float64 NumPy; and files that its module wrote, with what
it made of them; and what is refused.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparse_coding.errors import UserError
from sparse_coding.formats import format_of, load_dictionary
from sparse_coding.formats.openai import StandardisedDictionary, load_openai, save_openai
from sparse_coding.formats.unpickle import read_checkpoint, write_state_dict
from sparse_coding.sae import ARCHITECTURES, L1SAE

GOLDEN = Path(__file__).parent / "golden" / "openai"
D_IN, D_SAE, K = 8, 12, 3


def state(changes=None, **more):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = {
        "encoder.weight": random(D_SAE, D_IN),
        "decoder.weight": random(D_IN, D_SAE),
        "latent_bias": random(D_SAE),
        "pre_bias": random(D_IN),
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.int64),
        "latents_activation_frequency": torch.zeros(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
    }
    changed = tensors | (changes or {}) | more
    return {name: value for name, value in changed.items() if value is not None}


def write(path, changes=None, **more):
    torch.save(state(changes, **more), path)
    return path


TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}


@pytest.fixture
def x():
    return 3 + 2 * torch.randn(6, D_IN, generator=torch.Generator().manual_seed(5))


def forward(x, weights, is_topk):
    """Features of the inner dictionary and reconstruction of one token, as model.py has them."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    mean, std = x.mean(), x.std(ddof=1)
    z = (x - mean) / (std + 1e-5) if is_topk else x
    pre = w["encoder.weight"] @ (z - w["pre_bias"]) + w["latent_bias"]
    if is_topk:
        kept = np.argsort(-pre)[:K]
        pre = np.where(np.isin(np.arange(D_SAE), kept), pre, 0)
    f = np.maximum(pre, 0)
    x_hat = w["decoder.weight"] @ f + w["pre_bias"]
    return f, (x_hat * std + mean if is_topk else x_hat)


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_golden_files_encode_and_decode_as_their_module_recorded(name):
    recorded = load_file(GOLDEN / f"{name}_recorded.safetensors")
    dictionary = load_dictionary(GOLDEN / f"{name}.pt")
    with torch.no_grad():
        f, x_hat = dictionary.encode(recorded["x"]), dictionary(recorded["x"])
    if name == "topk":
        f = f[:, :-2] / recorded["x"].std(dim=1, keepdim=True)
    torch.testing.assert_close(f, recorded["f"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, recorded["x_hat"], rtol=1e-5, atol=1e-5)


def test_a_topk_encodes_each_token_by_itself(tmp_path, x):
    """The mean, the deviation and the k largest are a token's own, whatever stands beside it."""
    dictionary = load_openai(write(tmp_path / "5.pt", **TOPK))
    louder = x * torch.tensor([[1.0], [100.0], [1.0], [1.0], [1.0], [1.0]])
    encoded = dictionary.encode(louder)
    torch.testing.assert_close(encoded[2:], dictionary.encode(x)[2:])
    assert dictionary.encode(x[0]).shape == (D_SAE + 2,)
    assert dictionary.decode(encoded.view(2, 3, -1)).shape == (2, 3, D_IN)


def test_what_a_topk_adds_to_its_features_are_rows_of_the_decoder(tmp_path, x):
    dictionary = load_openai(write(tmp_path / "5.pt", **TOPK))
    assert torch.equal(dictionary.W_dec[-2:], torch.stack([torch.ones(D_IN), state()["pre_bias"]]))
    assert torch.equal(dictionary.decode(torch.zeros(D_SAE + 2)), torch.zeros(D_IN))


def test_v1_is_a_relu_dictionary_that_subtracts_its_bias(tmp_path, x):
    path = write(tmp_path / "5.pt", activation="ReLU")
    assert format_of(path) == "openai"
    sae = load_dictionary(path)
    assert type(sae) is L1SAE
    rows = [forward(row, state(), is_topk=False) for row in x.double().numpy()]
    f, x_hat = (torch.tensor(np.stack(part)).float() for part in zip(*rows, strict=True))
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-5, atol=1e-5)


def test_topk_standardises_each_token_and_undoes_it_through_two_more_features(tmp_path, x):
    dictionary = load_openai(write(tmp_path / "5.pt", **TOPK))
    assert isinstance(dictionary, StandardisedDictionary)
    assert (dictionary.d_sae, dictionary.W_dec.shape) == (D_SAE + 2, (D_SAE + 2, D_IN))
    rows = [forward(row, state(), is_topk=True) for row in x.double().numpy()]
    f, x_hat = (torch.tensor(np.stack(part)).float() for part in zip(*rows, strict=True))
    encoded = dictionary.encode(x)
    mean, std = x.mean(dim=1, keepdim=True), x.std(dim=1, keepdim=True)
    torch.testing.assert_close(encoded[:, :-2], std * f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoded[:, -2:], torch.cat([mean, std], dim=1))
    assert (encoded[:, :-2] > 0).sum(dim=1).max() <= K
    torch.testing.assert_close(dictionary.decode(encoded), x_hat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["l1", "tied_l1"])
def test_ours_is_written_in_the_layout_of_v1(tmp_path, x, name):
    sae = ARCHITECTURES[name](D_IN, D_SAE, torch.Generator().manual_seed(3))
    sae.b_dec.data += 1.0
    path = save_openai(sae, tmp_path / "a.pt")
    written = {n: v for n, v in read_checkpoint(path).items() if n in state()}
    assert written.keys() == state().keys()
    rows = [forward(row, written, is_topk=False) for row in x.double().numpy()]
    f, x_hat = (torch.tensor(np.stack(part)).float() for part in zip(*rows, strict=True))
    torch.testing.assert_close(sae.encode(x), f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(x), x_hat, rtol=1e-5, atol=1e-5)
    assert torch.equal(load_openai(path).W_enc, sae.W_enc)
    with pytest.raises(UserError, match="exists"):
        save_openai(sae, path)


def test_a_topk_of_theirs_is_written_as_their_module_wrote_it(tmp_path):
    theirs = read_checkpoint(GOLDEN / "topk.pt")
    path = save_openai(load_openai(GOLDEN / "topk.pt"), tmp_path / "a.pt")
    written = read_checkpoint(path)
    assert written.keys() == theirs.keys()
    for name, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            assert written[name] == value
        elif not name.startswith(("stats", "latents")):  # of their training
            assert torch.equal(written[name], value)
    changed = load_openai(path)
    changed.inner.b_dec.data += 1.0
    again = load_openai(save_openai(changed, tmp_path / "b.pt"))
    assert torch.equal(again.W_dec, changed.W_dec)


@pytest.mark.parametrize(
    "name", [n for n in ARCHITECTURES if n not in ("l1", "tied_l1", "p_anneal")]
)
def test_another_class_is_not_written(name, tmp_path):
    with pytest.raises(UserError, match="OpenAI's layout has no .*; it can hold: L1SAE"):
        save_openai(ARCHITECTURES[name](D_IN, D_SAE), tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"activation": "Tanh"}, "activation is 'Tanh'"),
        ({"activation": "TopK"}, "k is None; it must be an integer between 1 and d_sae 12"),
        (TOPK | {"activation_state_dict": {"k": 13}}, "k is 13"),
        (TOPK | {"activation_state_dict": {"k": 3, "postact_fn": "Identity"}}, "'Identity'"),
        ({"pre_bias": None}, "one of OpenAI's holds"),
        ({"decoder.weight": torch.zeros(D_SAE, D_IN)}, "decoder.weight is (12, 8); it must be"),
        ({"latent_bias": torch.full((D_SAE,), torch.nan)}, "latent_bias must hold finite"),
        ({"pre_bias": "text"}, "'pre_bias' is 'text'; it must be a tensor"),
        ({1: torch.ones(2)}, "is not a state dict"),
        ({"activation": torch.ones(3, 3)}, "activation is 'Tensor'"),
        (TOPK | {"activation_state_dict": "k"}, "k is None"),
        (TOPK | {"activation_state_dict": torch.ones(3)}, "k is None"),
        (TOPK | {"activation_state_dict": {"k": torch.ones(3, 3)}}, "k is 'Tensor'"),
    ],
)
def test_what_is_not_one_of_theirs_is_refused(tmp_path, changes, line):
    with pytest.raises(UserError) as caught:
        load_openai(write(tmp_path / "5.pt", changes))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (Bomb.target,)


def test_a_pickle_that_runs_something_runs_nothing(tmp_path):
    Bomb.target = str(tmp_path / "ran")
    path = write(tmp_path / "5.pt", activation=Bomb())
    with pytest.raises(UserError, match="nothing of it was run"):
        load_openai(path)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_no_format_knows_is_named_with_those_that_are(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"not a pickle")
    for path in (
        tmp_path,
        tmp_path / "a.pt",
        write_state_dict(tmp_path / "b.pt", {"a": torch.ones(2)}),
    ):
        with pytest.raises(UserError, match=r"holds no dictionary that is known here.*saelens"):
            load_dictionary(path)
    with pytest.raises(UserError, match="does not exist; .*pretrained.fetch"):
        load_dictionary(tmp_path / "nothing")

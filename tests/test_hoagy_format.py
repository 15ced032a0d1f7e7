"""HoagyC's and loganriggs's pickles, built here under their class names, against their formulas.

Each reference below is written per token from the definitions in the repositories, not with
matrices of ours: centre, encode, decode, undo the centring.
"""

import os
import sys
import types
from math import sqrt

import pytest
import torch
from torch import nn

from sparse_coding.errors import UserError
from sparse_coding.formats.hoagy import load_hoagy, load_learned_dicts, recognises
from sparse_coding.sae import L1SAE, TiedL1SAE, TopKSAE

D_IN, D_SAE = 6, 10
# float32 weights from float64 sums of 6 products against float64 all through.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
FORMS = pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before_1.6"])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rotation():
    return torch.linalg.qr(random(D_IN, D_IN, seed=7)).Q


ENCODER, DECODER = 1.7 * random(D_SAE, D_IN), 0.3 * random(D_SAE, D_IN, seed=1)
BIAS, SHIFT = random(D_SAE, seed=2), random(D_IN, seed=3)
CENTRED = {
    "center_trans": random(D_IN, seed=4),
    "center_rot": rotation(),
    "center_scale": 0.5 + random(D_IN, seed=5).abs(),
}


@pytest.fixture
def build(monkeypatch):
    """An object of a class of the given dotted name, with the given attributes."""

    classes = {}

    def built(name, base=object, **attributes):
        module, _, qualified = name.rpartition(".")
        if name not in classes:
            classes[name] = type(qualified, (base,), {"__module__": module})
            for i in range(1, module.count(".") + 2):
                package = ".".join(module.split(".")[:i])
                if package not in sys.modules:
                    monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
            monkeypatch.setattr(sys.modules[module], qualified, classes[name], raising=False)
        thing = classes[name]()
        for key, value in attributes.items():
            setattr(thing, key, value)
        return thing

    return built


@pytest.fixture
def file(tmp_path):
    return tmp_path / "learned_dicts.pt"


def unit(row):
    return [value / sqrt(sum(v * v for v in row)) for value in row]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def expected(x, encoder, decoder, bias=BIAS, shift=None, scale=None, out=None):
    """c_i = relu(e_i . (x - shift) + b_i);  x_hat = sum_i scale_i c_i d_i / |d_i| + out."""
    shift = [0.0] * D_IN if shift is None else shift.tolist()
    out = shift if out is None else out.tolist()
    scale = [1.0] * D_SAE if scale is None else scale.tolist()
    f, x_hat = [], []
    for token in x.double().tolist():
        moved = [a - b for a, b in zip(token, shift, strict=True)]
        c = [
            max(0.0, dot(row, moved) + b)
            for row, b in zip(encoder.double().tolist(), bias.double().tolist(), strict=True)
        ]
        rows = [unit(row) for row in decoder.double().tolist()]
        f.append(c)
        x_hat.append(
            [sum(s * a * row[j] for s, a, row in zip(scale, c, rows, strict=True)) + out[j]
             for j in range(D_IN)]
        )  # fmt: skip
    return torch.tensor(f), torch.tensor(x_hat)


def assert_does(sae, x, f, x_hat):
    with torch.no_grad():
        found = sae.encode(x)
        assert (f > 0).any()
        assert (f == 0).any()
        torch.testing.assert_close(found, f.to(found.dtype), **ROUNDING)
        torch.testing.assert_close(sae.decode(found), x_hat.to(found.dtype), **ROUNDING)


def x():
    return 2 * random(7, D_IN, seed=6)


def learned(name):
    return f"autoencoders.learned_dict.{name}"


def refusal(path, **options):
    """The one line in which loading is refused; it names the file."""
    with pytest.raises(UserError) as caught:
        load_hoagy(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@FORMS
def test_an_untied_sae_is_an_l1_sae_with_a_normalised_decoder(is_zip, file, build):
    thing = build(learned("UntiedSAE"), encoder=ENCODER, decoder=DECODER, encoder_bias=BIAS)
    torch.save(thing, file, _use_new_zipfile_serialization=is_zip)
    sae = load_hoagy(file)
    assert type(sae) is L1SAE
    assert_does(sae, x(), *expected(x(), ENCODER, DECODER))


def test_an_anthropic_sae_has_its_shift_as_b_dec(file, build):
    tensors = {"encoder": ENCODER, "decoder": DECODER, "encoder_bias": BIAS, "shift_bias": SHIFT}
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    torch.save(
        build(learned("AnthropicSAE"), n_feats=D_SAE, activation_size=D_IN, **tensors), file
    )
    sae = load_hoagy(file)
    assert torch.equal(sae.b_dec.data, SHIFT)
    assert_does(sae, x(), *expected(x(), ENCODER, DECODER, shift=SHIFT))


def test_a_transfer_sae_has_its_scale_in_the_decoder_and_two_biases(file, build):
    scale, out = random(D_SAE, seed=8), random(D_IN, seed=9)  # scales below 0 too
    thing = build(
        learned("TransferSAE"), mode="dfree", encoder=ENCODER, decoder=DECODER, encoder_bias=BIAS,
        shift_bias=SHIFT, decoder_bias=out, scale=scale,
    )  # fmt: skip
    torch.save(thing, file)
    want = expected(x(), ENCODER, DECODER, shift=SHIFT, scale=scale, out=out)
    assert_does(load_hoagy(file), x(), *want)


def test_a_tied_sae_normalises_its_encoder_only_where_it_decodes(file, build):
    thing = build(learned("TiedSAE"), encoder=ENCODER, encoder_bias=BIAS, norm_encoder=False)
    torch.save(thing, file)
    sae = load_hoagy(file)
    assert type(sae) is L1SAE
    assert_does(sae, x(), *expected(x(), ENCODER, ENCODER))


def test_the_module_that_scripts_define_does_the_same(file, build):
    parameters = {"encoder": nn.Parameter(ENCODER), "encoder_bias": nn.Parameter(BIAS)}
    torch.save(build("__main__.TiedSAE", base=nn.Module, **parameters), file)
    assert_does(load_hoagy(file), x(), *expected(x(), ENCODER, ENCODER))


def test_a_tied_sae_with_a_normalised_encoder_is_tied(file, build):
    thing = build(learned("TiedSAE"), encoder=ENCODER, encoder_bias=BIAS, norm_encoder=True)
    torch.save(thing, file)
    sae = load_hoagy(file)
    assert type(sae) is TiedL1SAE
    rows = torch.tensor([unit(row) for row in ENCODER.tolist()])
    assert_does(sae, x(), *expected(x(), rows, rows))


@pytest.mark.parametrize("norm_encoder", [True, False])
@pytest.mark.parametrize("parts", ["center_trans", "center_rot", "center_scale", "all"])
def test_centring_is_folded_into_the_weights(norm_encoder, parts, file, build):
    centring = CENTRED if parts == "all" else {parts: CENTRED[parts]}
    thing = build(
        learned("TiedSAE"), encoder=ENCODER, encoder_bias=BIAS, norm_encoder=norm_encoder,
        **centring,
    )  # fmt: skip
    torch.save(thing, file)
    trans = centring.get("center_trans", torch.zeros(D_IN)).double()
    turn = centring.get("center_rot", torch.eye(D_IN)).double()
    scale = centring.get("center_scale", torch.ones(D_IN)).double()
    rows = torch.tensor([unit(row) for row in ENCODER.tolist()])
    centred = torch.stack([(turn @ (token - trans)) * scale for token in x().double()])
    f, y_hat = expected(centred, rows if norm_encoder else ENCODER, ENCODER)
    x_hat = torch.stack([turn.T @ (y / scale) + trans for y in y_hat])
    sae = load_hoagy(file)
    is_tied = norm_encoder and "center_scale" not in centring
    assert type(sae) is (TiedL1SAE if is_tied else L1SAE)
    assert_does(sae, x(), f, x_hat)


def test_a_topk_learned_dict_keeps_its_k_largest_scores(file, build):
    rows = torch.tensor([unit(row) for row in ENCODER.tolist()])
    name = "autoencoders.topk_encoder.TopKLearnedDict"
    torch.save(build(name, dict=rows, sparsity=3), file)
    sae = load_hoagy(file)
    assert (type(sae), sae.k) == (TopKSAE, 3)
    scores = x() @ rows.T
    kept = [sorted(range(D_SAE), key=lambda i: -row[i])[:3] for row in scores.tolist()]
    f = torch.zeros(7, D_SAE)
    for token, chosen in enumerate(kept):
        f[token, chosen] = scores[token, chosen].clamp(min=0)
    assert_does(sae, x(), f, f @ rows)


def test_a_row_of_zeros_stays_silent_in_the_output(file, build):
    decoder = DECODER.clone()
    decoder[4] = 0
    thing = build(learned("UntiedSAE"), encoder=ENCODER, decoder=decoder, encoder_bias=BIAS)
    torch.save(thing, file)
    assert (load_hoagy(file).W_dec[4] == 0).all()


def test_half_precision_stays_half_precision(file, build):
    thing = build(
        learned("UntiedSAE"), encoder=ENCODER.half(), decoder=DECODER.half(),
        encoder_bias=BIAS.half(),
    )  # fmt: skip
    torch.save(thing, file)
    assert {p.dtype for p in load_hoagy(file).parameters()} == {torch.float16}


# A sweep's list.


@pytest.fixture
def sweep(file, build):
    things = [
        (build(learned("TiedSAE"), encoder=ENCODER * s, encoder_bias=BIAS * s, norm_encoder=True),
         {"l1_alpha": s / 1000, "dict_size": D_SAE})
        for s in (1.0, 2.0, 3.0)
    ]  # fmt: skip
    torch.save(things, file)
    return file


def test_a_sweep_is_read_in_order_with_its_hyper_parameters(sweep):
    found = load_learned_dicts(sweep)
    assert [entry.hyperparameters["l1_alpha"] for entry in found] == [0.001, 0.002, 0.003]
    for i, entry in enumerate(found):
        assert torch.equal(entry.sae.b_enc.data, BIAS * (i + 1))
        assert torch.equal(load_hoagy(sweep, index=i).b_enc, entry.sae.b_enc)


def test_a_sweep_wants_an_index_and_says_what_there_is(sweep):
    message = refusal(sweep)
    assert "holds 3 dictionaries, from {'l1_alpha': 0.001, 'dict_size': 10}" in message
    assert "an index from 0 to 2" in message
    assert "there is no index 3" in refusal(sweep, index=3)
    assert "there is no index -1" in refusal(sweep, index=-1)


def test_a_folder_stands_for_its_learned_dicts(sweep):
    assert load_hoagy(sweep.parent, index=1).d_sae == D_SAE


def test_it_is_recognised_by_its_class_names(sweep, tmp_path):
    assert recognises(sweep)
    assert recognises(sweep.parent)
    torch.save({"encoder": torch.ones(2)}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    assert not recognises(tmp_path / "other.pt")
    assert not recognises(tmp_path / "text.pt")
    assert not recognises(tmp_path / "nowhere")


def test_loading_does_not_advance_the_global_random_stream(sweep):
    before = torch.get_rng_state()
    load_learned_dicts(sweep)
    assert torch.equal(torch.get_rng_state(), before)


# Refused.


@pytest.mark.parametrize(
    ("attributes", "line"),
    [
        ({"encoder": None}, "must have an encoder of two axes"),
        ({"encoder": torch.ones(D_SAE)}, "must have an encoder of two axes"),
        ({"encoder_bias": torch.ones(3)}, f"is (3,); it must be ({D_SAE},)"),
        ({"encoder_bias": "text"}, "is no tensor; it must be"),
        ({"encoder_bias": torch.full((D_SAE,), float("nan"))}, "must hold finite"),
        ({"encoder": torch.ones(D_SAE, D_IN, dtype=torch.int64)}, "must hold finite floating"),
        ({"center_rot": torch.ones(2, 2)}, f"is (2, 2); it must be ({D_IN}, {D_IN})"),
        ({"center_scale": torch.zeros(D_IN)}, "center_scale of autoencoders.learned_dict.TiedSAE"),
        ({"_parameters": 5, "encoder": None}, "must have an encoder of two axes"),
    ],
)
def test_a_tied_sae_that_is_none_is_refused(attributes, line, file, build):
    given = {"encoder": ENCODER, "encoder_bias": BIAS, "norm_encoder": True} | attributes
    torch.save(build(learned("TiedSAE"), **given), file)
    assert line in refusal(file)


@pytest.mark.parametrize("k", [0, D_SAE + 1, 2.5, None])
def test_a_sparsity_that_no_topk_can_have_is_refused(k, file, build):
    torch.save(build("autoencoders.topk_encoder.TopKLearnedDict", dict=ENCODER, sparsity=k), file)
    assert f"sparsity is {k!r}; it must be from 1 to 10" in refusal(file)


def test_another_class_is_named(file, build):
    torch.save(build(learned("ReverseSAE"), encoder=ENCODER, encoder_bias=BIAS), file)
    assert "asks to run autoencoders.learned_dict.ReverseSAE" in refusal(file)


@pytest.mark.parametrize("content", [[], [5], [(5, {})], {"encoder": torch.ones(2, 2)}])
def test_a_file_without_a_dictionary_is_refused(content, file):
    torch.save(content, file)
    assert "must hold one of autoencoders.learned_dict.TiedSAE" in refusal(file)


def test_a_command_beside_a_dictionary_is_refused_and_not_run(file, build, tmp_path):
    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trace'}",)

    thing = build(learned("TiedSAE"), encoder=ENCODER, encoder_bias=Command(), norm_encoder=True)
    torch.save([(thing, {})], file)
    assert f"asks to run {os.system.__module__}.system" in refusal(file)
    assert not (tmp_path / "trace").exists()


def test_a_truncated_file_is_refused(sweep):
    sweep.write_bytes(sweep.read_bytes()[:2000])
    assert "is damaged" in refusal(sweep)

"""What every dictionary promises, for every architecture there is.

A new architecture joins through `TRAINABLE`; another kind of dictionary (PCA, random
directions ...) by one line in `DICTIONARIES`.
"""

import copy

import pytest
import torch

from sparse_coding.formats import load_dictionary, save_sae
from sparse_coding.kernels import make_adam, make_step
from sparse_coding.kernels.reference import ReferenceStep
from sparse_coding.sae import SAE, TRAINABLE, BatchTopKSAE, TargetJumpReLUSAE

BATCH, D_IN, D_SAE, D_OUT = 7, 12, 20, 9
L1_COEFF = torch.tensor(0.3)


K = {"k": 6}
WIDTHS = (7, 5)  # of the hooks that a crosscoder joins
TOPK = ("topk", "batch_topk", "matryoshka", "batch_topk_crosscoder")
OWN = dict.fromkeys(TOPK, lambda sae: sae.aux_coeff)
OWN["jumprelu_target"] = lambda sae: sae.target_coeff


def make_sae(architecture: str) -> SAE:
    """An SAE away from its start, where ties and zero biases could hide a mistake."""
    generator = torch.Generator().manual_seed(4)
    cls = TRAINABLE[architecture]
    joined = {"widths": WIDTHS} if cls.joins_hooks else {}
    sae = cls(D_IN, D_SAE, generator, **(K if cls.sparsity_is_chosen else {}), **joined)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        if architecture.startswith("batch_topk"):
            sae.threshold.fill_(0.7)
    sae.normalise()
    return sae


def make_transcoder(architecture: str) -> SAE:
    generator = torch.Generator().manual_seed(8)
    sae = make_sae(architecture)
    sae.retarget(D_OUT, generator)
    with torch.no_grad():
        sae.b_dec += torch.randn(D_OUT, generator=generator)
    return sae


TRANSCODERS = [name for name, cls in TRAINABLE.items() if cls.can_transcode]
DICTIONARIES = {name: lambda name=name: make_sae(name) for name in TRAINABLE}
DICTIONARIES |= {
    f"{name} transcoder": lambda name=name: make_transcoder(name) for name in TRANSCODERS
}


@pytest.fixture(params=list(DICTIONARIES))
def dictionary(request):
    return DICTIONARIES[request.param]()


@pytest.fixture(params=list(TRAINABLE))
def sae(request):
    return make_sae(request.param)


@pytest.fixture
def x():
    return 0.5 + 2 * torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(5))


def saved(sae, folder):
    return save_sae(sae, folder, metadata={"hook_name": "a+b"})


def state(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal_states(a, b):
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]), name


# Every dictionary.


@pytest.mark.parametrize("batch", [(), (1,), (BATCH,), (3, BATCH)])
def test_encode_and_decode_keep_the_leading_dimensions(dictionary, batch):
    x = torch.randn(*batch, D_IN, generator=torch.Generator().manual_seed(6))
    f = dictionary.encode(x)
    assert f.shape == (*batch, D_SAE)
    assert dictionary.decode(f).shape == (*batch, dictionary.d_out)


def test_w_dec_has_one_row_per_feature(dictionary):
    d_out = D_OUT if dictionary.is_transcoder else D_IN
    assert dictionary.W_dec.shape == (dictionary.d_sae, dictionary.d_out) == (D_SAE, d_out)
    assert dictionary.d_in == D_IN


def test_a_features_row_is_what_it_writes(dictionary):
    f = torch.zeros(D_SAE, D_SAE).fill_diagonal_(2.0)
    writes = dictionary.decode(f) - dictionary.decode(torch.zeros(D_SAE))
    torch.testing.assert_close(writes, 2.0 * dictionary.W_dec, rtol=1e-5, atol=1e-6)


def test_encode_treats_every_row_by_itself(dictionary, x):
    # Equal up to the order of a float32 product's sums, which BLAS chooses by the batch's size.
    whole = dictionary.encode(x)
    for rows in (slice(0, 5), slice(6, 7), [3, 0, 3]):
        torch.testing.assert_close(dictionary.encode(x[rows]), whole[rows], rtol=1e-5, atol=1e-5)


def test_encode_and_decode_change_nothing(dictionary, x):
    parameters, given, random_state = state(dictionary), x.clone(), torch.get_rng_state()
    dictionary.decode(dictionary.encode(x))
    assert_equal_states(state(dictionary), parameters)
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in dictionary.parameters())


def test_encode_gives_the_same_twice(dictionary, x):
    assert torch.equal(dictionary.encode(x), dictionary.encode(x))


def test_encode_is_the_same_in_training_and_in_evaluation_mode(dictionary, x):
    assert torch.equal(dictionary.train().encode(x), dictionary.eval().encode(x))


def test_forward_decodes_what_encode_returns(dictionary, x):
    assert torch.equal(dictionary(x), dictionary.decode(dictionary.encode(x)))


def test_float64_inputs_and_weights_stay_float64(dictionary, x):
    f = dictionary.double().encode(x.double())
    assert f.dtype == dictionary.decode(f).dtype == torch.float64


# Every SAE.


def test_features_are_not_negative_and_some_are_silent(sae, x):
    f = sae.encode(x)
    assert (f >= 0).all()
    assert (f > 0).any()
    assert (f == 0).any()


def test_an_sae_depends_on_its_generator_only(sae):
    random_state = torch.get_rng_state()
    first, second, other = (
        type(sae)(D_IN, D_SAE, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert_equal_states(state(first), state(second))
    assert not torch.equal(first.W_dec, other.W_dec)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_losses_parts_add_up(sae, x):
    loss = sae.loss(x, L1_COEFF, dead=torch.arange(9))
    coefficient = OWN[sae.name](sae) if sae.sparsity_is_chosen else L1_COEFF
    parts = loss.mse + coefficient * loss.penalty
    if sae.name in ("gated", "matryoshka"):  # the gate's error; the mean error of all prefixes
        assert not torch.isclose(loss.total, parts)
    else:
        torch.testing.assert_close(loss.total, parts)
    assert loss.penalty > 0
    if isinstance(sae, BatchTopKSAE):  # it trains with the batch's own threshold
        assert loss.f.count_nonzero() == K["k"] * BATCH != sae.encode(x).count_nonzero()
    else:
        assert torch.equal(loss.f, sae.encode(x))


def test_the_loss_is_a_mean_over_the_batch(sae, x):
    sae, x = sae.double(), x.double()
    dead = torch.arange(9)
    per_row = torch.stack([sae.loss(row[None], L1_COEFF.double(), dead).total for row in x])
    is_mean = torch.isclose(sae.loss(x, L1_COEFF.double(), dead).total, per_row.mean())
    # the batch shares its k
    assert is_mean != isinstance(sae, BatchTopKSAE | TargetJumpReLUSAE)


def test_every_parameter_gets_a_gradient_from_the_loss(sae, x):
    sae.loss(x, L1_COEFF).total.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name


def test_a_saved_sae_comes_back_bit_by_bit(sae, x, tmp_path):
    loaded = load_dictionary(saved(sae, tmp_path / sae.name))
    assert type(loaded) is type(sae)
    assert_equal_states(state(loaded), state(sae))
    assert torch.equal(loaded.encode(x), sae.encode(x))


def test_the_encoder_lies_feature_major_in_memory_also_when_loaded(sae, tmp_path):
    loaded = load_dictionary(saved(sae, tmp_path / sae.name))
    for each in (sae, loaded, copy.deepcopy(sae), copy.deepcopy(sae).double()):
        assert each.W_enc.T.is_contiguous()


def test_a_training_step_changes_every_parameter(sae, x):
    before = state(sae)
    ReferenceStep(sae, make_adam(sae, lr=1e-2))(x, L1_COEFF)
    assert all(
        not torch.equal(value, before[name])
        for name, value in state(sae).items()
        if name != "scales"  # a crosscoder's units
    )


def test_training_on_one_batch_lowers_its_loss(sae, x):
    before = sae.loss(x, L1_COEFF).total
    step = ReferenceStep(sae, make_adam(sae, lr=1e-2))
    for _ in range(50):
        step(x, L1_COEFF)
    assert sae.loss(x, L1_COEFF).total < 0.5 * before


@pytest.mark.parametrize("kind", ["reference", "auto"])
def test_rows_have_unit_norm_after_a_step_where_the_class_says_so(sae, x, kind):
    step = make_step(sae, make_adam(sae, lr=0.1), kind)
    for _ in range(3):
        step(x, L1_COEFF)
    # A norm of 12 squares in float32: a few units of 6e-8.
    off = (sae.W_dec.norm(dim=1) - 1).abs().max()
    assert off < 1e-6 if sae.has_unit_norm_rows else off > 1e-3


def test_a_step_gives_adam_no_gradient_along_a_unit_row(sae, x):
    before = sae.W_dec.detach().clone()
    ReferenceStep(sae, make_adam(sae, lr=0.1))(x, L1_COEFF)
    along = (sae.W_dec.grad * before).sum(dim=1).abs().max() / sae.W_dec.grad.norm()
    # A sum of 12 products in float32: a few units of 6e-8.
    assert along < 1e-6 if sae.has_unit_norm_rows else along > 1e-3


def fold(sae, scale):
    sae.fold_scale(*[scale] * (len(WIDTHS) if sae.joins_hooks else 1))


@pytest.mark.parametrize("scale", [0.03, 17.0])
def test_a_folded_scale_gives_the_scaled_saes_output_in_raw_units(sae, x, scale):
    sae, x = sae.double(), x.double()
    folded = copy.deepcopy(sae)
    fold(folded, scale)
    raw, unit = x / scale, 1 if sae.joins_hooks else scale
    torch.testing.assert_close(folded.encode(raw), sae.encode(x) / unit, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(folded(raw), sae(x) / scale, rtol=1e-10, atol=1e-10)


def test_a_scale_folds_back(sae):
    sae, before = sae.double(), state(sae.double())
    fold(sae, 17.0)
    fold(sae, 1 / 17.0)
    for name, value in state(sae).items():
        torch.testing.assert_close(value, before[name], rtol=1e-14, atol=0)

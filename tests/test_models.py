"""Models are those of transformers, with nothing folded; what does not exist is refused."""

import json
import shutil

import pytest
import torch
from tiny_models import D_MODEL, FAMILIES, TEXT, blocks_of, first, load_plain, save_tiny_lm
from transformers import AutoTokenizer

from sparse_coding import models
from sparse_coding.errors import UserError
from sparse_coding.harvest import activations
from sparse_coding.models import STREAM_HOOKS, check_hook, choose_device, choose_dtype, load_lm
from sparse_coding.text import starts_with_bos

N_LAYERS = 3
STD = 0.2
TOKENS = torch.randint(1, 250, (5, 11), generator=torch.Generator().manual_seed(1))
# Sums of 12 to 20 products of numbers of size 1 to 10, in another order.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_tiny_lm(family, place / family, TEXT, n_layers=N_LAYERS, std=STD)
    return {family: place / family for family in FAMILIES}


def load(folder, suffix="", **settings):
    return load_lm(f"{folder}{suffix}", device="cpu", dtype="float32", **settings)


def weights_of(lm):
    """The weights that the running model has, under the names that transformers gives them.

    The bridge wraps modules, and runs on split copies of joint matrices under other names.
    """
    weights = {
        name.replace("._original_component", ""): tensor
        for name, tensor in lm.model.original_model.state_dict().items()
    }
    expected = load_plain(lm.name.partition("@")[0]).state_dict()
    return {name: weights[name] for name in expected}


@torch.no_grad()
def reference_activations(plain, tokens):
    """Every hook's activations, from forward hooks on the modules of transformers."""
    found = {}

    def save(key):
        return lambda module, inputs, output: found.__setitem__(key, first(output))

    def save_input(key):
        return lambda module, inputs: found.__setitem__(key, inputs[0])

    for i, (block, attention, mlp) in enumerate(blocks_of(plain)):
        block.register_forward_hook(save(f"blocks.{i}.hook_resid_post"))
        attention.register_forward_hook(save(f"blocks.{i}.hook_attn_out"))
        mlp.register_forward_hook(save(f"blocks.{i}.hook_mlp_out"))
        mlp.register_forward_pre_hook(save_input(f"blocks.{i}.mlp.hook_in"))
    streams = plain(tokens, output_hidden_states=True).hidden_states
    for i in range(N_LAYERS):
        found[f"blocks.{i}.hook_resid_pre"] = streams[i]
        found[f"blocks.{i}.hook_resid_mid"] = streams[i] + found[f"blocks.{i}.hook_attn_out"]
    return found


def hooks_of(family):
    """In GPT-NeoX attention and MLP both read the block's input: nothing lies between them."""
    missing = {"hook_resid_mid"} if family == "gpt_neox" else set()
    return [f"blocks.{i}.{h}" for i in range(N_LAYERS) for h in STREAM_HOOKS if h not in missing]


@pytest.mark.parametrize("suffix", ["", "@random", "@shuffled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_hook_gives_what_transformers_computes_with_these_weights(folders, family, suffix):
    lm = load(folders[family], suffix)
    plain = load_plain(folders[family])
    plain.load_state_dict(weights_of(lm))
    expected = reference_activations(plain, TOKENS)
    for hook_name in hooks_of(family):
        acts = activations(lm, TOKENS, [hook_name])[hook_name]
        torch.testing.assert_close(acts, expected[hook_name], **ROUNDING, msg=hook_name)


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_weights_are_the_files_to_the_bit(folders, family):
    stored = load_plain(folders[family]).state_dict()
    for name, tensor in weights_of(load(folders[family])).items():
        assert torch.equal(tensor, stored[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_random_draws_every_matrix_anew_and_leaves_norms_at_their_start(folders, family):
    lm = load(folders[family], "@random", seed=7)  # the stored one was drawn with seed 0
    for name, tensor in load_plain(folders[family]).state_dict().items():
        drawn = weights_of(lm)[name]
        assert drawn.shape == tensor.shape
        if tensor.dim() == 1:
            is_norm_weight = name.endswith("weight")
            assert torch.equal(drawn, torch.full_like(drawn, float(is_norm_weight))), name
        else:
            assert torch.isclose(drawn, tensor).double().mean() < 0.02, name
            # The smallest matrix has 72 entries: its spread is known to 8 %. GPT-2 starts what
            # writes into the stream smaller, by the root of twice its layers.
            smaller = (2 * N_LAYERS) ** 0.5 if name.endswith("c_proj.weight") else 1
            assert drawn.std().item() == pytest.approx(STD / smaller, rel=0.35), name


@pytest.mark.parametrize("family", FAMILIES)
def test_shuffled_moves_the_values_of_every_tensor_within_it(folders, family):
    shuffled = weights_of(load(folders[family], "@shuffled"))
    for name, tensor in load_plain(folders[family]).state_dict().items():
        assert torch.equal(shuffled[name].flatten().sort()[0], tensor.flatten().sort()[0]), name
        assert tensor.unique().numel() == 1 or not torch.equal(shuffled[name], tensor), name


@pytest.mark.parametrize("suffix", ["@random", "@shuffled"])
def test_a_seed_names_one_random_model(folders, suffix):
    one, same, other = (weights_of(load(folders["gpt2"], suffix, seed=s)) for s in (3, 3, 4))
    for name, tensor in one.items():
        assert torch.equal(tensor, same[name]), name
        if tensor.dim() == 2:
            assert not torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("suffix", ["@random", "@shuffled"])
def test_drawing_a_model_leaves_the_global_generator_alone(folders, suffix):
    after = []
    for seed in (3, 4):
        torch.manual_seed(0)
        load(folders["gpt2"], suffix, seed=seed)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_centred_takes_the_mean_out_of_the_stream_and_changes_no_logit(folders, family):
    lm, plain = load(folders[family], "@centred"), load(folders[family])
    for hook_name in hooks_of(family):
        acts, raw = (activations(one, TOKENS, [hook_name])[hook_name] for one in (lm, plain))
        is_written = not hook_name.endswith("mlp.hook_in")  # that is normed, and the same
        expected = raw - raw.mean(dim=-1, keepdim=True) if is_written else raw
        torch.testing.assert_close(acts, expected, **ROUNDING, msg=hook_name)
    torch.testing.assert_close(lm.model(TOKENS), plain.model(TOKENS), **ROUNDING)
    assert lm.identity != plain.identity


def test_a_model_whose_norms_see_the_mean_is_not_centred(folders):
    with pytest.raises(UserError, match="@centred needs LayerNorms"):
        load(folders["llama"], "@centred")


@pytest.mark.parametrize(
    ("name", "on_the_hub"),
    [
        ("gpt2-small", "gpt2"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("gpt2", "gpt2"),
        ("owner/unheard-of", "owner/unheard-of"),
    ],
)
def test_a_short_name_of_transformer_lens_is_looked_up(monkeypatch, name, on_the_hub):
    asked = []

    def ask(source, **_):
        asked.append(source)
        raise OSError("no network")

    monkeypatch.setattr(models.AutoConfig, "from_pretrained", ask)
    for look in (load_lm, models.size_of):
        with pytest.raises(UserError):
            look(name, device="cpu")
    assert asked == [on_the_hub] * 2


def test_the_identity_tells_models_apart_that_give_other_activations(folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders["llama"], copy)
    variants = [load(copy, suffix).identity for suffix in ("", "@random", "@shuffled")]
    variants += [load(copy, "@random", seed=1).identity]
    variants += [load_lm(str(copy), device="cpu", dtype="bfloat16").identity]
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    variants += [load(copy).identity]
    save_tiny_lm("llama", copy, TEXT, n_layers=N_LAYERS, seed=1)
    variants += [load(copy).identity]
    assert len({json.dumps(identity) for identity in variants}) == len(variants)
    assert load(folders["gpt2"]).identity == load(folders["gpt2"]).identity


def test_the_tokenizer_is_the_folders_own_and_puts_no_bos_first(folders):
    for family, folder in folders.items():
        own = AutoTokenizer.from_pretrained(folder)
        lm = load(folder)
        assert lm.tokenizer("a cat")["input_ids"] == own("a cat")["input_ids"], family
        assert not starts_with_bos(lm.tokenizer, "auto"), family


def test_a_model_says_its_width_and_depth(folders):
    for folder in folders.values():
        lm = load(folder)
        assert (lm.d_model, lm.n_layers) == (D_MODEL, N_LAYERS)


def test_weights_are_in_the_dtype_asked_for_and_need_no_gradient(folders):
    for suffix in ("", "@random", "@shuffled"):
        lm = load_lm(f"{folders['llama']}{suffix}", device="cpu", dtype="bfloat16")
        parameters = list(lm.model.original_model.parameters())
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in parameters)


def one_line(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("name", ["nowhere/at-all", "no-such-model", "gpt2@no-such-revision"])
def test_an_unknown_model_is_refused_with_what_is_possible(name):
    message = one_line(lambda: load_lm(name, device="cpu"))
    assert message.startswith(f"--lm {name} cannot be loaded") and "smollm2-135m" in message


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c"])
def test_a_folder_that_does_not_exist_is_named(name):
    assert one_line(lambda: load_lm(name)) == f"--lm {name}: there is no such folder"


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("suffix", ["", "@shuffled"])
def test_a_folder_without_a_whole_model_is_refused(folders, tmp_path, missing, suffix):
    folder = shutil.copytree(folders["gpt2"], tmp_path / "lm")
    (folder / missing).unlink()
    assert "cannot be loaded" in one_line(lambda: load(folder, suffix))


def test_a_damaged_weights_file_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders["gpt2"], tmp_path / "lm")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot be loaded" in one_line(lambda: load(folder))


def test_a_folder_may_be_given_from_home(folders, monkeypatch):
    monkeypatch.setenv("HOME", str(folders["gpt2"].parent))
    assert load("~/gpt2").identity["sha256"] == load(folders["gpt2"]).identity["sha256"]


@pytest.mark.parametrize("device", ["banana", "cuda:99", "gpu", "meta", "meta:0", "xla"])
def test_a_device_that_is_not_there_is_refused(device):
    message = one_line(lambda: choose_device(device))
    assert message.startswith(f"--device {device} cannot be used") and "auto" in message


@pytest.mark.parametrize(
    ("hook_name", "hint"),
    [
        ("blocks.1.hook_resid_pots", "did you mean blocks.1.hook_resid_post?"),
        ("blocks.3.hook_resid_post", "L from 0 to 2"),
        ("blocks.-1.hook_resid_post", "L from 0 to 2"),
        ("blocks.x.hook_mlp_out", "L from 0 to 2"),
        ("embeddings", "NAME one of hook_resid_pre, hook_attn_out"),
        ("blocks.1.attn.hook_q", "NAME one of hook_resid_pre, hook_attn_out"),
    ],
)
def test_an_unknown_hook_is_refused_with_the_nearest_and_the_possible(folders, hook_name, hint):
    message = one_line(lambda: check_hook(load(folders["llama"]), hook_name))
    assert message.startswith(f"--hook-name {hook_name} does not exist in") and hint in message


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_hooks_that_a_model_has_are_accepted(folders, family):
    lm = load(folders[family])
    for hook_name in hooks_of(family):
        check_hook(lm, hook_name)
    if family == "gpt_neox":
        message = one_line(lambda: check_hook(lm, "blocks.1.hook_resid_mid"))
        assert "hook_resid_mid" not in message.split("NAME one of")[1]


def test_auto_is_bfloat16_exactly_where_the_processor_multiplies_it(monkeypatch):
    for has_it, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(models, "_cpu_multiplies_bfloat16", lambda has_it=has_it: has_it)
        assert choose_dtype("auto", torch.device("cpu")) == dtype
    assert choose_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_auto_is_bfloat16_on_gpus_since_ampere(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    expected = torch.bfloat16 if capability[0] >= 8 else torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == expected


def test_a_named_dtype_is_taken_as_it_is():
    for device in ("cpu", "cuda", "mps"):
        assert choose_dtype("float16", torch.device(device)) == torch.float16

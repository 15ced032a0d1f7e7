"""The two shipped language models are what their cards say; how they are trained."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from pretrained.train_tiny_lm import Config, Training, build_model, lr_at, token_bytes
from sparse_coding.models import SHIPPED, SHIPPED_NAMES, load_lm, size_of
from sparse_coding.text import load_text


@pytest.fixture(scope="module")
def shipped():
    return {name: load_lm(name, device="cpu", dtype="float32") for name in SHIPPED_NAMES}


def nats(lm, text):
    """Mean cross-entropy of a text's tokens, in contexts of 256, by log-softmax."""
    ids = torch.tensor(lm.tokenizer(text, add_special_tokens=False)["input_ids"][:2048])
    tokens = ids[: len(ids) // 256 * 256].view(-1, 256)
    with torch.no_grad():
        logits = lm.model(tokens, return_type="logits")
    chosen = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])
    return -chosen.mean().item()


def test_the_two_differ_in_their_weights_and_nothing_else(shipped):
    a, b = (shipped[name] for name in SHIPPED_NAMES)
    for file in ("tokenizer.json", "config.json"):
        assert (SHIPPED / a.name / file).read_bytes() == (SHIPPED / b.name / file).read_bytes()
    assert (a.n_layers, a.d_model) == (b.n_layers, b.d_model) == (4, 192)
    assert size_of("tiny-a@random").n_layers == 4
    W = [lm.model.blocks[1].mlp.W_in.detach().flatten() for lm in (a, b)]
    assert abs(torch.corrcoef(torch.stack(W))[0, 1]) < 0.05, "no weight is the other model's"


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_held_out_text_costs_what_the_card_says(shipped, name):
    text = load_text("builtin", heldout_fraction=0.05)
    documents = text.documents("heldout")
    found = [nats(shipped[name], d.text) for d, _ in zip(documents, range(24), strict=False)
             if len(d.text) > 2000]  # fmt: skip
    mean = sum(found) / len(found)
    half = 2.1 * torch.tensor(found).std().item() / math.sqrt(len(found))
    training = json.loads((SHIPPED / name / "training.json").read_text())
    said = training["heldout"]["nats_per_token"][0]
    assert abs(mean - said) < 2 * half < 1
    assert said < training["heldout"]["unigram_nats_per_token"][0] - 3, (
        "it learnt more than shares"
    )
    card = (SHIPPED / name / "README.md").read_text()
    assert f"| nats per token | {said:.3f} |" in card


def test_a_folder_is_small_enough_to_ship():
    for name in SHIPPED_NAMES:
        size = sum(path.stat().st_size for path in (SHIPPED / name).iterdir())
        assert size < 6e6, name


def test_the_seed_draws_the_weights():
    one, same, other = (build_model(Config(seed=seed)).state_dict() for seed in (0, 0, 1))
    name = next(name for name, x in one.items() if x.ndim == 2)
    assert torch.equal(one[name], same[name])
    assert not torch.equal(one[name], other[name])


SMALL = Config(n_steps=8, warmup_steps=2, vocabulary=300, d_model=16, n_layers=1, n_heads=2,
               context_length=16, dtype="float32")  # fmt: skip


def test_a_training_that_was_stopped_goes_on_exactly():
    tokens = torch.randint(300, (8, 4, 16), generator=torch.Generator().manual_seed(0))
    whole = Training(SMALL)
    losses = [whole.step(batch, i) for i, batch in enumerate(tokens)]
    first = Training(SMALL)
    for i in range(3):
        first.step(tokens[i], i)
    second = Training(SMALL)
    second.load_state_dict({key: x.clone() for key, x in first.state_dict().items()})
    assert [second.step(tokens[i], i) for i in range(3, 8)] == losses[3:]
    for name, weight in whole.parameters.items():
        assert torch.equal(weight, second.parameters[name]), name


def test_the_learning_rate_rises_and_falls_in_straight_lines():
    rates = [lr_at(SMALL, step) / SMALL.lr for step in range(8)]
    assert rates[:2] == pytest.approx([0.5, 1.0])
    assert rates[2:] == pytest.approx([rates[2] - i * (rates[2] - rates[3]) for i in range(6)])
    assert 0 <= rates[-1] < 0.2


def test_bytes_of_tokens_add_up_to_the_texts(shipped):
    tokenizer = shipped["tiny-a"].tokenizer
    text = "def f(x):\n    return 한국어 + 'é'  # naïve\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert token_bytes(tokenizer)[ids].sum().item() == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_card_names_its_command():
    for name, seed in zip(SHIPPED_NAMES, (0, 1), strict=True):
        card = (Path(SHIPPED) / name / "README.md").read_text()
        command = f"python -m pretrained.train_tiny_lm --seed {seed} --output pretrained/{name}"
        assert re.search(re.escape(command) + "$", card, re.MULTILINE)

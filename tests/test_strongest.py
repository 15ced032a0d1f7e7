"""Contexts of features' strongest firings, against every firing row by row."""

import pytest
import torch
from tiny_models import D_MODEL, TEXT, save_tiny_lm

from sparse_coding.evaluation import Evaluation
from sparse_coding.harvest import activations
from sparse_coding.models import load_lm
from sparse_coding.sae import L1SAE
from sparse_coding.text import TokenBatch

HOOK = "blocks.1.hook_resid_post"
N_CONTEXTS, N_POSITIONS, DOCUMENT = 5, 11, 8


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    save_tiny_lm("gpt_neox", folder, TEXT, n_layers=2)
    return load_lm(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(3):
        tokens = torch.randint(1, 250, (N_CONTEXTS, N_POSITIONS), generator=generator)
        places = torch.arange(tokens.numel()).view(tokens.shape) + i * tokens.numel()
        valid = torch.ones_like(tokens, dtype=torch.bool)
        valid[:, 0] = False
        found.append(TokenBatch(tokens, places // DOCUMENT, valid))
    return found


def test_the_strongest_firings_are_those_of_every_document_in_order(lm, batches):
    sae = L1SAE(D_MODEL, 20, torch.Generator().manual_seed(0)).requires_grad_(False)
    sae.b_enc += 0.3
    sae.b_enc[3] = -1e3
    features, n, radius = torch.tensor([0, 3, 7]), 4, 2
    found = Evaluation(lm, HOOK, batches, torch.inf).strongest(sae, features, n, radius)
    assert found[1] == []
    for feature, firings in ((0, found[0]), (7, found[2])):
        best = {}  # of each document the activation, its tokens around it, and its place there
        for batch in batches:
            f = sae.encode(activations(lm, batch.tokens, [HOOK])[HOOK])[..., feature]
            for c, t in batch.valid.nonzero().tolist():
                document = int(batch.document[c, t])
                if f[c, t] > best.get(document, (0.0,))[0]:
                    near = [
                        s
                        for s in range(max(0, t - radius), min(N_POSITIONS, t + radius + 1))
                        if batch.document[c, s] == document
                    ]
                    tokens = [int(batch.tokens[c, s]) for s in near]
                    best[document] = f[c, t].item(), tokens, near.index(t)
        expected = sorted(best.values(), key=lambda one: -one[0])[:n]
        assert len(expected) == n
        for one, (activation, tokens, place) in zip(firings, expected, strict=True):
            assert one.activation == pytest.approx(activation, rel=1e-5)
            assert (one.tokens, one.place) == (tokens, place)

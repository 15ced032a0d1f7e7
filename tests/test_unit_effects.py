"""Units taken out of a shipped language model: where, how much, and that nothing else changes."""

import pytest
import torch

from analysis.subjects import Material, Origin
from analysis.unit_effects import effect, places, some_documents
from analysis.units import ConceptReading, Conditions, Family, choose_units, observe
from sparse_coding.baselines import SplitDirections, neuron_basis
from sparse_coding.concepts import concept_documents, find_concepts
from sparse_coding.harvest import activations

HOOK = "blocks.1.hook_resid_post"
CONCEPTS = ("http", "prose", "korean")


@pytest.fixture(scope="module")
def reading():
    material = Material(Origin("tiny-a", HOOK, bos="always", dtype="float32"), "cpu")
    tokenizer = material.lm.tokenizer
    corpus = concept_documents(tokenizer, 20, n_documents=8, concepts=find_concepts(CONCEPTS))
    return ConceptReading(material, corpus, [HOOK, "blocks.1.mlp.hook_post"])


def family(reading, dictionary, hook=HOOK):
    return Family("neurons", hook, dictionary, {"ratio": None, "seed": None}, reading, 4)


def test_rows_are_those_of_a_pass_over_the_documents(reading):
    for split, is_heldout in ((reading.choosing, False), (reading.heldout, True)):
        assert len(split.labels.concept) == 3 * 8
        assert split.labels.n_tokens.sum() == len(split.token)
        for row in (0, 77, len(split.token) - 1):
            document = split.documents[split.document[row]]
            one = reading.corpus.documents[document]
            assert (one.source == "B") == is_heldout
            assert one.concept == CONCEPTS[split.labels.concept[split.document[row]]]
            position = int(split.position[row])
            assert position >= 4 and one.tokens[position] == split.token[row]
            bos = reading.lm.tokenizer.bos_token_id
            tokens = torch.tensor([[bos, *one.tokens]])
            acts = activations(reading.lm, tokens, [HOOK])[HOOK][0, position + 1]
            assert torch.allclose(acts, split.acts[HOOK][row], atol=1e-4)


def test_observed_units_fire_at_the_rate_on_source_a(reading):
    width = reading.choosing.acts[HOOK].shape[1]
    mean = reading.choosing.acts[HOOK].double().mean(dim=0)
    basis = family(reading, neuron_basis(mean))
    units = choose_units(2 * width, 50, seed=1)
    seen = observe(basis, units, Conditions((0.05, 0.2)))
    n_positive = (basis.dictionary.encode(reading.choosing.acts[HOOK])[:, units] > 0).sum(dim=0)
    for i, rate in enumerate((0.05, 0.2)):
        n = int(rate * len(reading.choosing.token))
        fires = seen.choosing.active[i].sum(dim=0)
        # documents that begin alike have rows that are equal
        assert ((fires[n_positive >= n] - n).abs() <= 2).all() and (
            fires[n_positive < n] == 0
        ).all()
    assert (n_positive >= n).sum() > 30
    native = (basis.dictionary.encode(reading.heldout.acts[HOOK])[:, units] > 0).sum(dim=0)
    assert torch.equal(seen.heldout.active[2].sum(dim=0), native.float())
    # of all units together exactly k are active on a token
    every = observe(basis, torch.arange(2 * width), Conditions((0.05,)))
    assert every.heldout.active[-1].sum() == 4 * len(reading.heldout.token)


def test_places_are_the_firing_tokens_of_the_chosen_documents(reading):
    b = reading.heldout
    fired = torch.zeros(len(b.token), dtype=torch.bool)
    fired[3::7] = True
    documents = torch.tensor([2, 9, 20])
    context, position, concept = places(family(reading, None), fired, documents)
    batch = reading.contexts_of(b.documents[documents])
    expected = fired & torch.isin(b.document, documents) & (b.position < 19)
    assert torch.equal(batch.tokens[context, position], b.token[expected])
    assert torch.equal(concept, b.labels.concept[b.document[expected]])


def test_some_documents_are_two_of_each_concept_where_the_unit_fires():
    concept = torch.arange(3).repeat_interleave(5)
    fired = torch.tensor([0, 1, 2, 2, 3, 5, 14])
    chosen = some_documents(fired, concept, torch.Generator().manual_seed(0))
    assert concept[chosen].bincount(minlength=3).tolist() == [2, 1, 1]
    assert set(chosen.tolist()) <= {0, 1, 2, 3, 5, 14}


def measured(reading, dictionary, unit, threshold):
    one = family(reading, dictionary)
    a = dictionary.encode(reading.heldout.acts[HOOK])[:, unit]
    generator = torch.Generator().manual_seed(0)
    return effect(one, unit, threshold, a > threshold, generator)


def test_a_unit_that_writes_nothing_has_no_effect_and_one_that_writes_has(reading):
    width = reading.choosing.acts[HOOK].shape[1]
    mean = reading.choosing.acts[HOOK].double().mean(dim=0)
    axes = torch.eye(width, dtype=torch.float64)
    dictionary = SplitDirections(axes, axes, mean)
    deviation = reading.choosing.acts[HOOK].std(dim=0)
    unit, threshold = int(deviation.argmax()), float(deviation.max())
    found = measured(reading, dictionary, unit, threshold)
    assert found.n_firings.sum() > 5
    assert (found.kl[found.n_firings > 0] > 0).all()
    assert found.shares.sum().item() == pytest.approx(1)
    dictionary.W_dec[unit] = 0
    nothing = measured(reading, dictionary, unit, threshold)
    assert torch.equal(nothing.n_firings, found.n_firings)
    assert nothing.kl.abs().max() < 1e-6


def test_taking_a_unit_out_equals_the_models_own_pass_without_it(reading):
    """KL of one document by hand: the stream without the unit's output, then the blocks above."""
    width = reading.choosing.acts[HOOK].shape[1]
    dictionary = neuron_basis(torch.zeros(width))
    b, unit, threshold = reading.heldout, 3, 0.2
    found = measured(reading, dictionary, unit, threshold)
    fired = dictionary.encode(b.acts[HOOK])[:, unit] > threshold
    documents = some_documents(
        b.document[fired], b.labels.concept, torch.Generator().manual_seed(0)
    )
    batch = reading.contexts_of(b.documents[documents])

    def take_out(x, hook):
        a = x[..., unit].clone()
        keep = batch.valid & (x.norm(dim=-1) <= reading.max_norm) & (a > threshold)
        x = x.clone()
        x[..., unit] = torch.where(keep, 0.0, a)
        return x

    model = reading.lm.model
    with torch.inference_mode():
        clean = model(batch.tokens, return_type="logits").log_softmax(dim=-1)
        changed = model.run_with_hooks(
            batch.tokens, return_type="logits", fwd_hooks=[(HOOK, take_out)]
        ).log_softmax(dim=-1)
    kl = (clean.exp() * (clean - changed)).sum(dim=-1)
    context, position, concept = places(family(reading, dictionary), fired, documents)
    by_hand = torch.zeros(3).index_add(0, concept, kl[context, position])
    assert torch.allclose(found.kl.float(), by_hand, rtol=1e-3, atol=1e-5)

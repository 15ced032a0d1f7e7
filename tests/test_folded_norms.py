"""Activations scaled in training: of what norm the scale is, and what a saved file keeps of it."""

import json

import pytest
import torch

from sparse_coding.formats.dictionary_learning import load_dictionary_learning
from sparse_coding.formats.saelens import load_saelens

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def inputs():
    """Rows of different norms: their mean is not their root mean square."""
    x = 3 * torch.randn(7, 12, generator=torch.Generator().manual_seed(2))
    return x * torch.linspace(0.1, 3, 7)[:, None]


def test_a_scale_that_saelens_folded_is_of_the_mean_norm(tmp_path):
    """sqrt(d_in) / E norm(x), not of the root mean square; features keep its units."""
    reason = "sae-lens is not installed: pip install -r tests/requirements.txt"
    sae_lens = pytest.importorskip("sae_lens", reason=reason)
    from sae_lens.training.activation_scaler import ActivationScaler

    x = inputs()
    scaler = ActivationScaler()
    scaler.estimate_scaling_factor(12, iter([x] * 2), 2)
    scale = scaler.scaling_factor
    assert scale == pytest.approx(12**0.5 / x.norm(dim=1).mean().item(), rel=1e-5)
    assert scale != pytest.approx(12**0.5 / x.square().sum(dim=1).mean().sqrt().item(), rel=0.05)
    theirs = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=12, d_sae=20))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.3 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(3)
            )
        f = theirs.encode(x * scale)
        x_hat = theirs.decode(f) / scale
        theirs.fold_activation_norm_scaling_factor(scale)
        theirs.save_model(tmp_path)
        ours = load_saelens(tmp_path)
        torch.testing.assert_close(ours.encode(x), f, **ROUNDING)
        torch.testing.assert_close(ours(x), x_hat, **ROUNDING)


def test_a_norm_factor_is_the_root_mean_square_and_in_the_biases_already(tmp_path):
    """Their features have the unit of x again, unlike SAELens's."""
    reason = "dictionary-learning is not installed: benchmarks/requirements-peers.txt"
    library = pytest.importorskip("dictionary_learning.training", reason=reason)
    x = inputs()
    norm = library.get_norm_factor([x] * 3, steps=3)
    assert norm == pytest.approx(x.square().sum(dim=1).mean().sqrt().item(), rel=1e-5)
    assert norm != pytest.approx(x.norm(dim=1).mean().item(), rel=0.05)
    from dictionary_learning.dictionary import AutoEncoder

    sae = AutoEncoder(12, 20)
    with torch.no_grad():
        sae.normalize_decoder()
        sae.bias += 0.1
        sae.encoder.bias += 0.05
        f = norm * sae.encode(x / norm)
        x_hat = norm * sae(x / norm)
        sae.scale_biases(norm)  # as `trainSAE` does before it saves
    torch.save(sae.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "norm_factor": norm}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    ours = load_dictionary_learning(tmp_path)
    with torch.no_grad():
        assert (f > 0).any()
        torch.testing.assert_close(ours.encode(x), f, **ROUNDING)
        torch.testing.assert_close(ours(x), x_hat, **ROUNDING)

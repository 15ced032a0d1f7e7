"""The README's table of formats: what it claims is what a named test shows; damage to any format.

What each cell means is in the tests that `PROOFS` names. Here stand what goes over all of them:
every architecture into every layout, and every kind of damage to a file of each.
"""

import json
import pickle
import re
import shutil
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_coding.errors import UserError
from sparse_coding.formats import FORMATS, load_dictionary
from sparse_coding.formats.crosscoder import save_crosscoder
from sparse_coding.formats.dictionary_learning import save_dictionary_learning
from sparse_coding.formats.gemma_scope import save_gemma_scope
from sparse_coding.formats.openai import save_openai
from sparse_coding.formats.saelens import save_saelens
from sparse_coding.formats.sparsify import save_sparsify
from sparse_coding.sae import ARCHITECTURES, CrosscoderSAE

GOLDEN = Path(__file__).parent / "golden"
README = Path(__file__).parents[1] / "README.md"
D_IN, D_SAE = 5, 7

# The first words of a row of the README's table: the tests of reading and of writing; "" is no.
PROOFS = {
    "SAELens 6": (
        "saelens_golden.golden_files_encode_and_decode_as_saelens_recorded",
        "saelens_format.saelens_encodes_and_decodes_with_our_files_as_we_do",
    ),
    "SAELens 2 to 5": ("saelens_golden.an_old_configuration_encodes_and_decodes_as_it_did", ""),
    "dictionary_learning": (
        "dictionary_learning_format."
        "golden_files_encode_and_decode_as_dictionary_learning_recorded",
        "dictionary_learning_format."
        "dictionary_learning_encodes_and_decodes_with_our_files_as_we_do",
    ),
    "`10_32768`": (
        "dictionary_learning_format."
        "golden_files_encode_and_decode_as_dictionary_learning_recorded",
        "",
    ),
    "sparsify": (
        "sparsify_format.golden_files_encode_and_decode_as_sparsify_recorded",
        "sparsify_format.ours_encodes_and_decodes_alike_in_sparsify",
    ),
    "Gemma Scope": (
        "gemma_scope_format.golden_files_encode_and_decode_as_saelens_recorded",
        "gemma_scope_format.ours_encodes_and_decodes_alike_in_saelens",
    ),
    "OpenAI": (
        "openai_format.golden_files_encode_and_decode_as_their_module_recorded",
        "openai_format.ours_is_written_in_the_layout_of_v1",
    ),
    "crosscoders": (
        "crosscoder.ours_comes_back_bit_by_bit",
        "crosscoder.ours_comes_back_bit_by_bit",
    ),
    "HoagyC": ("hoagy_format.an_untied_sae_is_an_l1_sae_with_a_normalised_decoder", ""),
}
CONVENTIONS = [
    "saelens_golden.a_b_dec_that_is_subtracted_there_and_not_here_is_folded_into_b_enc",
    "gemma_scope_format."
    "matrices_are_not_turned_b_dec_is_not_subtracted_and_each_feature_has_its_threshold",
    "dictionary_learning_format.the_decoder_of_a_linear_layer_is_transposed",
    "sparsify_format.the_encoder_is_transposed_the_decoder_is_not_and_b_dec_is_subtracted",
    "dictionary_learning_format.a_norm_factor_in_the_configuration_changes_nothing",
    "folded_norms.a_norm_factor_is_the_root_mean_square_and_in_the_biases_already",
    "folded_norms.a_scale_that_saelens_folded_is_of_the_mean_norm",
    "saelens_format.batch_topk_with_thresholds_that_saelens_changed_is_a_jumprelu",  # norms folded
    "saelens_golden.a_topk_that_rescales_gets_unit_rows_and_a_row_of_zeros_stays_silent",
    "dictionary_learning_format.topk_counts_per_token_whatever_its_threshold",
    "saelens_format.batch_topk_is_written_as_saelens_writes_its_own",  # one threshold for all
    "gemma_scope_format.one_threshold_for_all_features_is_refused",
    "dictionary_learning_format.a_bfloat16_file_stays_bfloat16",
    "gemma_scope_format.an_embeddings_sae_is_rescaled_by_the_root_of_its_width",
]


def is_there(proof: str) -> bool:
    module, _, name = proof.partition(".")
    return callable(getattr(import_module(f"test_{module}"), f"test_{name}", None))


def table() -> dict[str, tuple[str, str]]:
    """Of the README's rows: read, written."""
    _, _, after = README.read_text().partition("| format (`sparse_coding/formats/`) |")
    lines = after.partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: (read, written) for first, read, written, *_ in cells}


def test_every_cell_of_the_readmes_table_has_its_test():
    rows = table()
    assert len(rows) == len(PROOFS) == 9
    for (name, (read, written)), (start, proofs) in zip(rows.items(), PROOFS.items(), strict=True):
        assert start in name
        assert [read.startswith("no"), written.startswith("no")] == [not p for p in proofs], name
        assert all(is_there(proof) for proof in proofs if proof), name


def test_every_convention_that_is_easy_to_get_wrong_has_its_test():
    assert all(map(is_there, CONVENTIONS))


# Every architecture into every layout.

LAYOUTS = {
    "saelens": lambda sae, path: save_saelens(sae, path, metadata={}),
    "dictionary_learning": lambda sae, path: save_dictionary_learning(sae, path, metadata={}),
    "sparsify": lambda sae, path: save_sparsify(sae, path, metadata={}),
    "gemma_scope": save_gemma_scope,
    "openai": lambda sae, path: save_openai(sae, path.with_suffix(".pt")),
}
JUMPRELUS = {"jumprelu", "jumprelu_target"}
HOLDS = {  # what is not named here is refused
    "saelens": set(ARCHITECTURES),
    "dictionary_learning": set(ARCHITECTURES),
    "sparsify": {"topk"},
    "gemma_scope": JUMPRELUS,
    "openai": {"l1", "tied_l1", "p_anneal"},
}


def filled(name: str, is_transcoder: bool = False):
    """An SAE with random weights of the norms that its class has."""
    cls = ARCHITECTURES[name]
    generator = torch.Generator().manual_seed(3)
    options = {"k": 3} if cls.sparsity_is_chosen else {}
    sae = cls(D_IN, D_SAE, generator, **options)
    if is_transcoder:
        sae.retarget(D_IN + 1, generator)
    with torch.no_grad():
        for key, value in sae.state_dict().items():
            if key not in ("W_dec", "W_enc"):
                value += 0.2 * torch.rand(value.shape, generator=generator)
    return sae


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_written_whole_or_refused_by_name(name, layout, tmp_path):
    sae, path = filled(name), tmp_path / "a"
    if name not in HOLDS[layout]:
        with pytest.raises(UserError) as caught:
            LAYOUTS[layout](sae, path)
        assert type(sae).__name__ in str(caught.value) and "\n" not in str(caught.value)
        assert not list(tmp_path.iterdir())
        return
    loaded = load_dictionary(LAYOUTS[layout](sae, path))
    x = 2 * torch.randn(11, D_IN, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        f = sae.encode(x)
        assert (f > 0).any()
        torch.testing.assert_close(loaded.encode(x), f, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded(x), sae(x), rtol=1e-5, atol=1e-5)


TRANSCODERS = [name for name, cls in ARCHITECTURES.items() if cls.can_transcode]


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "saelens"])
@pytest.mark.parametrize("name", TRANSCODERS)
def test_a_transcoder_is_refused_by_all_but_saelens(name, layout, tmp_path):
    sae = filled(name, is_transcoder=True)
    with pytest.raises(UserError, match="has no transcoders; SAELens has|has no|can hold"):
        LAYOUTS[layout](sae, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# Every kind of damage to a file of every format.

FILES = {
    "saelens": ("saelens_b_dec_subtracted", "sae_weights.safetensors"),
    "sparsify": ("sparsify/topk", "sae.safetensors"),
    "gemma_scope_npz": ("gemma_scope/layer_12", "params.npz"),
    "gemma_scope": ("gemma_scope/gemma_scope_2", "params.safetensors"),
    "dictionary_learning": ("dictionary_learning/gated", "ae.pt"),
    "december_2023": ("dictionary_learning/december_2023", "ae.pt"),
    "openai": ("openai", "topk.pt"),
    "crosscoder": ("", "crosscoder.safetensors"),
    "hoagy": ("", "learned_dicts.pt"),
}
RAN = []  # what a hostile file's code would add to


class Bomb:
    def __reduce__(self):
        return RAN.append, ("ran",)


class UntiedSAE:
    """As HoagyC's; pickled under its name by `whole`."""


UntiedSAE.__module__ = "autoencoders.learned_dict"


def whole(name: str, folder: Path, monkeypatch) -> Path:
    """A good file of a format, in a folder of its own."""
    golden, file = FILES[name]
    if golden:
        shutil.copytree(GOLDEN / golden, folder)
        return folder / file
    if name == "crosscoder":
        sae = CrosscoderSAE(D_IN, D_SAE, widths=(2, 3))
        return save_crosscoder(sae, folder, metadata={"hook_name": "a+b"}) / file
    import sys
    import types

    module = types.ModuleType("autoencoders.learned_dict")
    module.UntiedSAE = UntiedSAE
    monkeypatch.setitem(sys.modules, "autoencoders", types.ModuleType("autoencoders"))
    monkeypatch.setitem(sys.modules, "autoencoders.learned_dict", module)
    thing = UntiedSAE()
    thing.encoder, thing.decoder = torch.ones(D_SAE, D_IN), torch.ones(D_SAE, D_IN)
    thing.encoder_bias = torch.zeros(D_SAE)
    folder.mkdir()
    torch.save([(thing, {"l1_alpha": 0.1})], folder / file)
    return folder / file


def changed(path: Path, change) -> None:
    """Rewrite a file with `change` applied to its first matrix."""

    def first_matrix(tensors):
        return next(name for name, value in tensors.items() if getattr(value, "ndim", 0) == 2)

    if path.suffix == ".safetensors":
        tensors = load_file(path)
        name = first_matrix(tensors)
        save_file(tensors | {name: change(tensors[name]).contiguous()}, path)
    elif path.suffix == ".npz":
        with np.load(path) as content:
            arrays = dict(content)
        name = first_matrix(arrays)
        arrays[name] = change(torch.from_numpy(arrays[name])).numpy()
        np.savez(path, **arrays)
    else:
        content = torch.load(path, weights_only=False)
        tensors = vars(content[0][0]) if isinstance(content, list) else content
        name = first_matrix(tensors)
        tensors[name] = change(tensors[name]).clone()
        torch.save(content, path)


def with_nan(matrix):
    matrix = matrix.clone()
    matrix[0, 0] = torch.nan
    return matrix


def zip_slip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped", "text")
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))


def mislabelled(path: Path) -> None:
    """Another format's content under this one's name."""
    other = "openai/relu.pt" if path.suffix != ".pt" else "sparsify/topk/sae.safetensors"
    shutil.copy(GOLDEN / other, path)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "mislabelled": mislabelled,
    "wrong shape": lambda path: changed(path, lambda matrix: matrix[:, :-1]),
    "NaN": lambda path: changed(path, with_nan),
    "integers": lambda path: changed(path, lambda matrix: matrix.long()),
    "pickle bomb": lambda path: path.write_bytes(pickle.dumps(Bomb(), 2)),
    "torch bomb": lambda path: torch.save({"W_enc": Bomb()}, path),
    "zip slip": zip_slip,
    "json": lambda path: path.write_text(json.dumps({"W_enc": [1, 2]})),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_in_one_line_and_runs_nothing(
    name, damage, tmp_path, monkeypatch
):
    path = whole(name, tmp_path / "folder", monkeypatch)
    source = path if path.name in ("topk.pt", "learned_dicts.pt") else path.parent
    load_dictionary(source)  # whole, it is read
    before = set(tmp_path.rglob("*"))
    DAMAGES[damage](path)
    with pytest.raises(UserError) as caught:
        load_dictionary(source)
    line = str(caught.value)
    assert "\n" not in line and path.parent.name in line and len(line) < 400
    assert not RAN
    assert set(tmp_path.rglob("*")) == before


def test_every_format_is_damaged():
    assert {re.sub("_npz$|december_2023", "", name) for name in FILES} - {""} == set(FORMATS)

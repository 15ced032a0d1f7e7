"""The manifest states its sources, and README.md shows it."""

import json
from pathlib import Path

import pytest

from pretrained import catalogue
from pretrained.archive import safe_name
from pretrained.catalogue import MANIFEST, Dictionary, Release, find_release, releases
from sparse_coding.errors import UserError


def test_the_readme_shows_the_manifest():
    text = (MANIFEST.parent / "README.md").read_text(encoding="utf-8")
    assert catalogue.readme_section(releases().values()) in text


def test_every_entry_is_complete_and_states_its_sources():
    for release in releases().values():
        assert release.kind in catalogue.KINDS and release.about and release.facts_from
        assert release.kind != "url" or release.source.endswith("/")
        for dictionary in release.dictionaries:
            if dictionary.path != ".":
                safe_name(dictionary.path)
            for share in (dictionary.fvu, dictionary.ce_recovered):
                assert share is None or 0 <= share < 1
    kinds = {release.format for release in releases().values()}
    assert {"saelens", "dictionary_learning", "gemma_scope", "sparsify", "openai"} <= kinds


def test_published_numbers_of_one_dictionary():
    layer_3 = releases()["pythia-70m-deduped-sm"].choose(["resid_out_layer3"], [], [])[0]
    assert layer_3.path == "dictionaries/pythia-70m-deduped/resid_out_layer3/10_32768"
    assert (layer_3.l0, layer_3.fvu, layer_3.ce_recovered, layer_3.nats_lost) == (
        68, 0.04, 0.95, 0.58,
    )  # fmt: skip


def test_a_number_that_is_changed_in_the_manifest_changes_the_tables(tmp_path):
    content = json.loads(MANIFEST.read_text(encoding="utf-8"))
    content["releases"]["gpt2-small-res-jb"]["d_sae"] = 4711
    path = Path(tmp_path / "manifest.json")
    path.write_text(json.dumps(content), encoding="utf-8")
    changed = catalogue.readme_section(releases(path).values())
    assert "4,711" in changed and changed != catalogue.readme_section(releases().values())


def test_a_table_names_ranges_and_leaves_unknown_cells_empty():
    dictionaries = tuple(
        Dictionary(str(i), str(i), f"blocks.{i}.hook_mlp_out", l0=10.0 * i, variance_explained=0.9)
        for i in (1, 2, 3, 7)
    )
    release = Release("few", "hub", "", "o/n", d_in=12, dictionaries=dictionaries)
    last = catalogue.release_table([release]).splitlines()[-1]
    cells = [cell.strip() for cell in last.strip("|").split("|")]
    assert cells == ["`few`", "", "`blocks.1,2,3,7.hook_mlp_out`", "12", "", "", "", "10 to 70",
                     "0.1", "", "", "", ""]  # fmt: skip
    first = catalogue.dictionary_table(dictionaries).splitlines()[2]
    assert first == "| `1` | `blocks.1.hook_mlp_out` | 10 | 0.1 |  |  |"


@pytest.mark.parametrize("name", ("pythia-70m-deduped", "owner/name/more", "../x", ""))
def test_a_wrong_release_is_refused_in_one_line(name):
    with pytest.raises(UserError, match="there is no release") as error:
        find_release(name)
    assert "\n" not in str(error.value)
    if name.startswith("pythia"):
        assert "pythia-70m-deduped-sm" in str(error.value)


def test_a_release_that_lists_no_dictionaries_asks_for_one():
    release = find_release("sae-pythia-160m-32x")
    with pytest.raises(UserError, match="name a dictionary with --file"):
        release.choose([], [], [])
    assert [d.path for d in release.choose([], [], ["layers.3"])] == ["layers.3"]

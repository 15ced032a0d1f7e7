"""What is published: the run's own numbers, and code that loads the SAE in each library."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from pretrained import publish
from sparse_coding.formats import load_dictionary, save_sae
from sparse_coding.formats.saelens import load_saelens
from sparse_coding.sae import ARCHITECTURES, CROSSCODERS, TRAINABLE
from sparse_coding.storage import read_json, write_json
from tests.file_server import TOKEN, error_of

ROOT = Path(__file__).parents[1]
D_IN, D_SAE, K = 12, 20, 3
CHOSEN = tuple(ARCHITECTURES)

ROW = {
    "ratio": 2, "d_in": D_IN, "d_sae": D_SAE, "l1_coeff": 1.5, "seed": 7, "lm": "owner/model",
    "hook_name": "blocks.3.hook_resid_post", "n_tokens_trained": 123_456, "n_tokens_eval": 7_890,
    "n_tokens_ce": 456, "l0": 31.25, "fvu": 0.2125, "fvu_low": 0.1875, "fvu_high": 0.2375,
    "ce_clean": 3.5, "ce_sae": 3.75, "ce_mean": 9.0, "ce_zero": 11.0, "ce_recovered": 0.9688,
    "nats_lost": 0.25, "dead_fraction": 0.05,
}  # fmt: skip


def random_sae(architecture: str):
    """An SAE whose every tensor matters, as it would be after training."""
    generator = torch.Generator().manual_seed(1)
    cls = TRAINABLE[architecture]
    k = {"k": K} if cls.sparsity_is_chosen else {}
    widths = {"widths": (5, D_IN - 5)} if cls.joins_hooks else {}
    sae = cls(D_IN, D_SAE, generator, **k, **widths)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.rand(parameter.shape, generator=generator)
        if hasattr(sae, "threshold"):
            sae.threshold.fill_(0.3)
        sae.normalise()
        if sae.joins_hooks:
            sae.fold_scale(0.5, 2.0)
    return sae


def make_run(folder: Path, architecture: str = "l1", name: str = "small") -> Path:
    """A run folder with one SAE, as the main script leaves it; returns the SAE's folder."""
    sae_folder = folder / "run" / "saes" / name
    sae = random_sae(architecture)
    metadata = {"model_name": "owner/model", "dataset_path": "builtin"}
    row = {"name": name, "architecture": architecture} | ROW
    if sae.joins_hooks:
        row |= {"hook_name": "blocks.1.a+blocks.2.b", "fvu_blocks.1.a": 0.375}
    metadata["hook_name"] = row["hook_name"]
    save_sae(sae, sae_folder, metadata=metadata, density=torch.full((D_SAE,), 0.1))
    settings = {"lr": 0.002, "batch_tokens": 1024, "target_l0": [30.0]}
    environment = {"commit": "abc123", "versions": {"torch": "2.13.0"}}
    summary = {"config": settings, "environment": environment, "rows": [row]}
    write_json(folder / "run/summary.json", summary)
    (folder / "run/figures").mkdir()
    (folder / "run/figures/fig_reconstruction.png").write_bytes(b"a picture")
    return sae_folder


def written(tmp_path: Path, architecture: str = "l1", **options: str) -> Path:
    facts, run = publish.collect(make_run(tmp_path, architecture), "user/name", **options)
    return publish.write_folder(facts, run, tmp_path / "out")


def code_for(library: str, card: str) -> str | None:
    found = re.search(rf"^{library}:\n\n```python\n(.*?)```", card, re.MULTILINE | re.DOTALL)
    return found and found[1]


def run_code(library: str, folder: Path):
    """The `sae` that a card's code makes, with the downloaded file replaced by the local one."""
    code = code_for(library, (folder / "README.md").read_text(encoding="utf-8"))
    weights = folder / "small/sae_weights.safetensors"
    remote = 'hf_hub_download("user/name", "small/sae_weights.safetensors")'
    if library == "SAELens":
        remote, local = (
            'from_pretrained("user/name", "small")',
            f'load_from_disk("{folder}/small")',
        )
    elif library == "sparse_coding":
        remote, local = "load_dictionary(FOLDER)", f'load_dictionary("{folder}/small")'
    else:
        local = repr(str(weights))
    assert remote in code
    names = {}
    exec(code.replace(remote, local), names)
    return names["sae"]


def samples() -> torch.Tensor:
    return torch.randn(7, D_IN, generator=torch.Generator().manual_seed(2))


# --- the folder --------------------------------------------------------------------------------


def test_the_folder_holds_the_sae_its_row_its_figures_and_a_card(tmp_path):
    folder = written(tmp_path)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "README.md", "figures/fig_reconstruction.png", "small/cfg.json", "small/summary.json",
        "small/sae_weights.safetensors", "small/sparsity.safetensors",
    }  # fmt: skip
    assert json.loads((folder / "small/summary.json").read_text())["fvu"] == ROW["fvu"]
    x = samples()
    before, after = load_saelens(tmp_path / "run/saes/small"), load_saelens(folder / "small")
    assert torch.equal(before(x), after(x))


def test_the_card_says_what_was_measured_on_what(tmp_path):
    card = (written(tmp_path, licence="mit") / "README.md").read_text(encoding="utf-8")
    for text in ("20 features", "`blocks.3.hook_resid_post` of owner/model", "| L0 | 31.25 |",
                 "| FVU | 0.2125 [0.1875, 0.2375] |", "| nats lost | 0.25 |",
                 "| CE recovered | 0.9688 |", "On 7,890 held-out tokens", "on 456 of them",
                 "123,456 activations", "(figures/fig_reconstruction.png)",
                 "| seed | 7 |", "| lr | 0.002 |", "abc123"):  # fmt: skip
        assert text in card, text


def test_a_transcoders_card_says_from_where_to_where(tmp_path):
    sae = make_run(tmp_path)
    summary = read_json(tmp_path / "run/summary.json")
    summary["rows"][0]["hook_name_out"] = "blocks.3.hook_mlp_out"
    write_json(tmp_path / "run/summary.json", summary)
    facts, run = publish.collect(sae, "user/name")
    card = (publish.write_folder(facts, run, tmp_path / "out") / "README.md").read_text()
    assert "from `blocks.3.hook_resid_post` to `blocks.3.hook_mlp_out`" in card
    assert "A transcoder of 20 features" in card


def test_what_the_hub_reads_is_yaml_and_states_no_licence_unasked(tmp_path):
    import yaml

    stated = (written(tmp_path / "a", licence="mit") / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(stated.split("---\n")[1])
    assert (head["license"], head["base_model"]) == ("mit", "owner/model")
    assert head["library_name"] == "saelens"
    unstated = (written(tmp_path / "b") / "README.md").read_text(encoding="utf-8")
    assert "license" not in yaml.safe_load(unstated.split("---\n")[1])


def test_a_name_of_several_parts_keeps_them(tmp_path):
    sae = make_run(tmp_path, name="blocks.3.hook_mlp_out/small")
    facts, run = publish.collect(sae, "user/name")
    folder = publish.write_folder(facts, run, tmp_path / "out")
    assert (folder / "blocks.3.hook_mlp_out/small/cfg.json").is_file()


# --- the code in the card ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "library", ("SAELens", "dictionary_learning", "sparsify", "sparse_coding")
)
@pytest.mark.parametrize("architecture", CHOSEN)
def test_the_code_of_the_card_gives_the_same_sae(tmp_path, architecture, library):
    folder = written(tmp_path, architecture)
    card = (folder / "README.md").read_text(encoding="utf-8")
    if code_for(library, card) is None:
        assert library == "sparsify" and architecture != "topk"
        assert "has no counterpart in: sparsify" in card
        pytest.skip(f"{library} has no such architecture, and the card says so")
    package = {"SAELens": "sae_lens", "sparse_coding": "sparse_coding.sae"}.get(library, library)
    pytest.importorskip(package, reason=f"{library} is not installed")
    x, ours, theirs = samples(), load_saelens(folder / "small"), run_code(library, folder)
    if library == "sparsify":  # its own decode wants a GPU wherever Triton is installed
        kept = theirs.encode(x)
        f = torch.zeros(len(x), D_SAE).scatter(1, kept.top_indices, kept.top_acts)
        x_hat = f @ theirs.W_dec + theirs.b_dec
    else:
        f = theirs.encode(x)
        x_hat = theirs.decode(f)
    # float32, sums of at most 20 terms of order 1
    assert torch.allclose(f, ours.encode(x), atol=1e-5)
    assert torch.allclose(x_hat, ours(x), atol=1e-5)


@pytest.mark.parametrize("architecture", CROSSCODERS)
def test_a_crosscoders_card_has_code_for_those_without_a_library_for_it(tmp_path, architecture):
    folder = written(tmp_path, architecture)
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in ("A crosscoder of 20 features", "of `blocks.1.a` and `blocks.2.b` of owner/model",
                 "| FVU, `blocks.1.a` | 0.375 |", "- crosscoder\n", "has no counterpart in: "
                 "SAELens, dictionary_learning, sparsify."):  # fmt: skip
        assert text in card, text
    assert "saelens" not in card
    x, ours = samples(), load_dictionary(folder / "small")
    assert torch.equal(run_code("sparse_coding", folder)(x), ours(x))
    code = code_for("PyTorch alone", card)
    remote = 'hf_hub_download("user/name", "small/crosscoder.safetensors")'
    assert remote in code
    names = {"x": x}
    exec(code.replace(remote, repr(str(folder / "small/crosscoder.safetensors"))), names)
    f = ours.encode(x)
    assert 0 < f.count_nonzero() < f.numel()
    torch.testing.assert_close(names["f"], f)
    torch.testing.assert_close(torch.cat(names["of_hooks"], dim=1), ours(x))
    assert [part.shape[1] for part in names["of_hooks"]] == [5, D_IN - 5]


# --- refusals ----------------------------------------------------------------------------------


def test_a_damaged_sae_is_not_published(tmp_path):
    sae = make_run(tmp_path)
    weights = sae / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is damaged" in error_of(publish.collect, sae, "user/name")


def test_an_sae_without_measurements_is_not_published(tmp_path):
    sae = make_run(tmp_path)
    shutil.copytree(sae, sae.with_name("other"))
    assert "measured small, not other" in error_of(
        publish.collect, sae.with_name("other"), "user/name"
    )
    shutil.copytree(sae, tmp_path / "alone")
    assert "is in no finished run" in error_of(publish.collect, tmp_path / "alone", "user/name")


@pytest.mark.parametrize("repo", ("name", "a/b/c", "../x", "user/"))
def test_a_repository_has_two_parts(tmp_path, repo):
    assert "of the form user/name" in error_of(publish.collect, make_run(tmp_path), repo)


def test_nothing_is_overwritten(tmp_path):
    folder = written(tmp_path)
    facts, run = publish.collect(tmp_path / "run/saes/small", "user/name")
    assert "is not empty" in error_of(publish.write_folder, facts, run, folder)


def test_folders_of_this_machine_are_pointed_out(tmp_path):
    sae = make_run(tmp_path)
    config = json.loads((sae / "cfg.json").read_text())
    config["metadata"]["model_name"] = "/home/somebody/model"
    write_json(sae / "cfg.json", config)
    facts, _ = publish.collect(sae, "user/name")
    assert publish.local_paths(facts) == ["/home/somebody/model"]


def test_a_relative_path_is_pointed_out_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sae = make_run(tmp_path)
    texts = ["./a.txt", "../b.jsonl", "~/c", "d.txt", "e/f@centred"]
    (tmp_path / "d.txt").touch()
    (tmp_path / "e/f").mkdir(parents=True)
    others = ["", "...", "~", "gone/g", "builtin", "a" * 5000]  # the last cannot name a file
    config = json.loads((sae / "cfg.json").read_text())
    config["metadata"] = dict(enumerate([*texts, *others]))
    write_json(sae / "cfg.json", config)
    facts, _ = publish.collect(sae, "user/name")
    assert publish.local_paths(facts) == sorted(texts)


def test_a_folder_named_like_a_hub_model_is_no_base_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sae = make_run(tmp_path)
    facts, _ = publish.collect(sae, "user/name")
    assert "base_model: owner/model\n" in publish.model_card(facts)
    (tmp_path / "owner/model").mkdir(parents=True)
    facts, _ = publish.collect(sae, "user/name")
    assert "base_model" not in publish.model_card(facts)
    assert publish.local_paths(facts) == ["owner/model"]


# --- uploading ---------------------------------------------------------------------------------


class Api:
    """The hub's client; `error` is raised by the upload."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, []

    def create_repo(self, repo, *, private, exist_ok):
        self.calls.append(("create", repo, private, exist_ok))
        return f"https://hub.example/{repo}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        if self.error:
            raise self.error
        names = sorted(p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*"))
        self.calls.append(("upload", repo_id, names))


def test_one_commit_uploads_the_folder(tmp_path):
    api, folder = Api(), written(tmp_path)
    assert publish.upload(folder, "user/name", True, api) == "https://hub.example/user/name"
    (create, upload) = api.calls
    assert create == ("create", "user/name", True, True)
    assert "small/sae_weights.safetensors" in upload[2] and "README.md" in upload[2]


def refused(status: int) -> HfHubHTTPError:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    request = httpx2.Request("POST", f"https://hub.example/?token={TOKEN}", headers=headers)
    return HfHubHTTPError(f"sent {headers}", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "message"),
    (
        (refused(401), "status 401): log in with `hf auth login`"),
        (httpx2.ConnectError(f"no route, {TOKEN}"), "out of reach (ConnectError)"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
    ),
    ids=("refused", "unreachable", "offline"),
)
def test_a_failed_upload_is_one_line_without_the_login(tmp_path, error, message):
    assert message in error_of(publish.upload, written(tmp_path), "user/name", False, Api(error))


def test_the_command_writes_a_folder_and_needs_no_network(tmp_path):
    sae = make_run(tmp_path)
    command = [sys.executable, "-m", "pretrained.publish", str(sae), "--repo", "user/name"]
    command += ["--dry-run", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path / 'out'}\n"
    assert (tmp_path / "out/README.md").is_file()

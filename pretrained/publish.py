"""Publish a trained SAE on the Hugging Face hub, with a card made from what was measured.

    python -m pretrained.publish outputs/runs/NAME/saes/SAE --repo user/name --dry-run FOLDER
    python -m pretrained.publish outputs/runs/NAME/saes/SAE --repo user/name

The repository holds README.md, SAE/ (SAELens's layout; a crosscoder's own), SAE/summary.json (its
row) and figures/.
--dry-run writes that folder instead of uploading it. The login is huggingface_hub's (`hf auth
login` or HF_TOKEN) and is neither printed nor written. Several SAEs can share a repository: each
has a folder of its own, and the card is the last one's.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pretrained.card import CROSSCODER_WEIGHTS, WEIGHTS, Facts, model_card
from pretrained.catalogue import REPOSITORY
from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.settings import OutputFolder, read_settings
from sparse_coding.storage import read_object, write_json

SAE_FILES = ("cfg.json", WEIGHTS, CROSSCODER_WEIGHTS, "sparsity.safetensors")


@dataclass(frozen=True)
class PublishConfig:
    """Publish a trained SAE on the Hugging Face hub."""

    sae: Annotated[Path, tyro.conf.Positional]
    """An SAE's folder in a run, RUN/saes/NAME."""
    repo: str
    """user/name on the hub; made if it does not exist."""
    dry_run: OutputFolder | None = None
    """Write the folder here and upload nothing."""
    private: bool = False
    """Make a new repository private."""
    licence: str = ""
    """The hub's name of a licence, such as mit; stated nowhere if empty."""


def collect(sae: Path, repo: str, licence: str = "") -> tuple[Facts, Path]:
    """What the card is written from, and the run's folder; `UserError` if the SAE is not sound."""
    from sparse_coding.formats import load_dictionary

    if not REPOSITORY.fullmatch(repo):
        raise UserError(f"--repo {repo} must be of the form user/name")
    load_dictionary(sae)  # damaged weights are not published
    run = _run_of(sae)
    summary = read_object(run / "summary.json", "config", "environment")
    name = sae.resolve().relative_to(run / "saes").as_posix()
    found = summary.get("rows")
    rows = {
        str(row.get("name")): row
        for row in (found if isinstance(found, list) else [])
        if isinstance(row, dict)
    }
    if name not in rows:
        raise UserError(f"{run / 'summary.json'} measured {', '.join(rows)}, not {name}")
    facts = Facts(
        repo=repo,
        name=name,
        config=read_object(sae / "cfg.json", "metadata"),
        row=rows[name],
        run=summary["config"],
        environment=summary["environment"],
        figures=tuple(sorted(path.name for path in (run / "figures").glob("*.png"))),
        licence=licence,
        base_model=_base_model(str(rows[name].get("lm"))),
    )
    return facts, run


def _base_model(lm: str) -> str:
    """The name of a language model on the hub, or "": a folder here may be named like one."""
    name = lm.partition("@")[0]
    return name if REPOSITORY.fullmatch(name) and not _is_local(name) else ""


def _run_of(sae: Path) -> Path:
    """The run's folder; a name may have several parts (hook/NAME)."""
    for folder in sae.resolve().parents:
        if folder.name == "saes" and (folder.parent / "summary.json").is_file():
            return folder.parent
    raise UserError(f"{sae} is in no finished run: it must be RUN/saes/NAME beside summary.json")


def write_folder(facts: Facts, run: Path, folder: Path) -> Path:
    """Write the repository's content; `UserError` if `folder` holds something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; name a new folder")
    target = folder / facts.name
    target.mkdir(parents=True)
    for name in SAE_FILES:
        if (run / "saes" / facts.name / name).is_file():
            shutil.copyfile(run / "saes" / facts.name / name, target / name)
    write_json(target / "summary.json", facts.row)
    for name in facts.figures:
        (folder / "figures").mkdir(exist_ok=True)
        shutil.copyfile(run / "figures" / name, folder / "figures" / name)
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    return folder


def local_paths(facts: Facts) -> list[str]:
    """What would tell readers how this machine is laid out."""
    values = [*facts.config["metadata"].values(), *facts.row.values()]
    return sorted({v for v in values if isinstance(v, str) and _is_local(v)})


def _is_local(value: str) -> bool:
    """Whether it is a path of this machine by its form, or because something is there."""
    is_path = Path(value).is_absolute() or value.startswith(("./", "../", "~/"))
    return is_path or os.path.exists(value) or os.path.exists(value.partition("@")[0])


def upload(folder: Path, repo: str, private: bool, api: Any = None) -> str:
    """Create the repository if need be, upload the folder as one commit, return its address."""
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = api or HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Publish a sparse autoencoder"
        )
    except OfflineModeIsEnabled:
        raise UserError(
            "HF_HUB_OFFLINE is set; unset it, or write a folder with --dry-run"
        ) from None
    except HfHubHTTPError as error:
        # Its own text may repeat the request.
        status = error.response.status_code
        raise UserError(
            f"{repo} was not uploaded (status {status}): log in with `hf auth login` as somebody "
            "who may write there"
        ) from None
    except HFValidationError as error:
        raise UserError(f"--repo {repo}: {error}") from None
    except httpx2.HTTPError as error:
        raise UserError(
            f"{repo} was not uploaded: the hub is out of reach ({type(error).__name__}); "
            "--dry-run writes the folder"
        ) from None
    return str(url)


def main() -> None:
    """The command line."""
    report_user_errors_in_one_line()
    cfg = read_settings(PublishConfig, prog="python -m pretrained.publish", description=__doc__)
    facts, run = collect(cfg.sae, cfg.repo, cfg.licence)
    for value in local_paths(facts):
        print(f"note: the files name a path of this machine: {value}")
    if cfg.dry_run:
        print(write_folder(facts, run, cfg.dry_run))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_folder(facts, run, Path(temporary) / "repository")
        print(upload(folder, cfg.repo, cfg.private))


if __name__ == "__main__":
    main()

"""Which files a Hugging Face repository holds, with the sizes and hashes the hub states."""

from typing import Any

from pretrained.catalogue import nearest
from pretrained.download import Remote, Unreachable
from sparse_coding.errors import UserError


def file_url(repo: str, path: str, revision: str = "main") -> str:
    """The address of a file, below HF_ENDPOINT if that is set."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, path, revision=revision)


def page_url(repo: str, path: str) -> str:
    """The page that shows a folder of a repository."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}/tree/main/{path}"


def list_files(repo: str, path: str) -> dict[str, Remote]:
    """The file at `path`, or all files below the folder `path` ("": of the repository).

    All are of one commit, the newest. `UserError` if there is no such repository or path;
    `Unreachable` if the hub is not reached.
    """
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    api = HfApi()
    try:
        commit = api.model_info(repo, timeout=30).sha
        return _files(api, repo, path, commit)
    except OfflineModeIsEnabled:
        raise Unreachable(f"{repo} is not looked up: HF_HUB_OFFLINE is set") from None
    except GatedRepoError:
        raise UserError(
            f"{repo} asks for permission: accept the terms on its page, then `hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{api.endpoint} has no public repository {repo}; a private one needs `hf auth login`"
        ) from None
    except HfHubHTTPError as error:
        raise Unreachable(f"{api.endpoint} failed ({error.response.status_code})") from None
    except httpx2.HTTPError as error:
        raise Unreachable(f"{api.endpoint} is out of reach ({error})") from None


def _files(api: Any, repo: str, path: str, commit: str) -> dict[str, Remote]:
    from huggingface_hub.hf_api import RepoFile

    entries = api.get_paths_info(repo, [path], revision=commit) if path else []
    if not any(isinstance(entry, RepoFile) for entry in entries):
        if path and not entries:
            raise UserError(f"{repo} has no {path}{_near(api, repo, path, commit)}")
        entries = api.list_repo_tree(repo, path or None, recursive=True, revision=commit)
    return {
        entry.path: _remote(repo, entry, commit)
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def _remote(repo: str, entry: Any, commit: str) -> Remote:
    from huggingface_hub.utils import build_hf_headers

    return Remote(
        file_url(repo, entry.path, commit),
        size=entry.size,
        sha256=entry.lfs.sha256 if entry.lfs else None,
        git_sha1=None if entry.lfs else entry.blob_id,
        headers=build_hf_headers(),  # the login of this machine, if there is one
    )


def _near(api: Any, repo: str, path: str, commit: str) -> str:
    """Paths like the one that does not exist."""
    paths = [entry.path for entry in api.list_repo_tree(repo, recursive=True, revision=commit)]
    folders = {path.rpartition("/")[0] for path in paths} - {""}
    return nearest(path, [*paths, *folders])

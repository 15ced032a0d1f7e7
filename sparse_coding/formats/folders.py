"""What tells one format's folders from another's."""

from pathlib import Path


def holds_files(path: Path, names: tuple[str, ...]) -> bool:
    """Whether a folder has files of all those names."""
    return all((path / name).is_file() for name in names)

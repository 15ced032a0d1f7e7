"""What is known of the dictionaries of others: `manifest.json`, and the tables made from it.

    python -m pretrained.catalogue        # write the tables of README.md anew

A number that nobody published, or that was not read where it is published, is null.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sparse_coding.errors import UserError, report_user_errors_in_one_line
from sparse_coding.storage import atomic_path, read_json

HERE = Path(__file__).parent
MANIFEST = HERE / "manifest.json"
KINDS = ("hub", "url", "embedded")
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""A repository of the hub: owner/name."""
BEGIN, END = "<!-- made by python -m pretrained.catalogue -->\n", "<!-- end -->\n"


class Dictionary(NamedTuple):
    """One dictionary of a release: what it is, and what its authors measured."""

    name: str
    path: str
    """File or folder below the release; inside its archive where it comes as one."""
    hook_name: str | None = None
    """TransformerLens's name."""
    l0: float | None = None
    variance_explained: float | None = None
    """As published; FVU = 1 - this."""
    ce_recovered: float | None = None
    """Relative to zero-ablation."""
    nats_lost: float | None = None

    @property
    def layer(self) -> int | None:
        match = re.match(r"blocks\.(\d+)\.", self.hook_name or "")
        return int(match[1]) if match else None

    @property
    def fvu(self) -> float | None:
        """1 - variance explained, without the digits that a subtraction adds."""
        explained = self.variance_explained
        return None if explained is None else round(1 - explained, 6)


class Release(NamedTuple):
    """Dictionaries that were published together."""

    name: str
    kind: str
    """hub (a Hugging Face repository), url (plain files below an address) or embedded (here)."""
    about: str
    source: str
    """Repository, address that ends in a slash, or folder beside this file."""
    files: tuple[str, ...] = ()
    """What a dictionary's folder must hold; empty if a dictionary is one file."""
    optional: tuple[str, ...] = ()
    archive: str | None = None
    """The one file that holds all of it."""
    model: str | None = None
    format: str | None = None
    """Whose layout it is, in the names of `sparse_coding.formats`."""
    architecture: str | None = None
    d_in: int | None = None
    d_sae: int | None = None
    n_tokens: int | None = None
    licence: str | None = None
    size: int | None = None
    """Bytes of the archive, or of everything."""
    sha256: str | None = None
    """Of the archive."""
    facts_from: tuple[str, ...] = ()
    """Where the numbers were read."""
    dictionaries: tuple[Dictionary, ...] = ()

    def choose(
        self, names: Iterable[str], layers: Iterable[int], paths: Iterable[str]
    ) -> list[Dictionary]:
        """Dictionaries by name, by layer, or by any path of the release; all by default."""
        chosen = [self._named(name) for name in names]
        for layer in layers:
            there = [d for d in self.dictionaries if d.layer == layer]
            if not there:
                known = sorted({d.layer for d in self.dictionaries} - {None})
                raise UserError(f"{self.name} has no layer {layer}; known layers: {known}")
            chosen += there
        by_path = {d.path: d for d in self.dictionaries}
        chosen += [by_path.get(path, Dictionary(path, path)) for path in paths]
        if not chosen and not self.dictionaries and self.files:
            raise UserError(f"{self.name}: name a dictionary with --file. {self.about}")
        return chosen or list(self.dictionaries)

    def _named(self, name: str) -> Dictionary:
        known = {d.name: d for d in self.dictionaries}
        if name not in known:
            raise UserError(
                f"{self.name} has no dictionary {name}{nearest(name, known)}; --list "
                f"{self.name} shows the known ones, --file takes any path"
            )
        return known[name]


def releases(path: Path = MANIFEST) -> dict[str, Release]:
    """The manifest's releases by name."""
    return {
        name: Release(name=name, **_tuples(entry))
        for name, entry in read_json(path)["releases"].items()
    }


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    dictionaries = tuple(
        Dictionary(name=name, **({"path": name} | facts))
        for name, facts in entry.get("dictionaries", {}).items()
    )
    lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
    return entry | lists | {"dictionaries": dictionaries}


def find_release(name: str, path: Path = MANIFEST) -> Release:
    """A release of the manifest, or any Hugging Face repository `owner/name`."""
    known = releases(path)
    if name in known:
        return known[name]
    if REPOSITORY.fullmatch(name):
        return Release(name=name.replace("/", "--"), kind="hub", about="", source=name)
    raise UserError(
        f"there is no release {name}{nearest(name, known)}; --list shows all, and a Hugging Face "
        "repository is named owner/name"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """` (nearest: A, B)`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""


def release_table(known: Iterable[Release]) -> str:
    """One line of Markdown per release."""
    head = ("release", "model", "hooks", "d_in", "d_sae", "architecture", "tokens", "L0", "FVU",
            "CE recovered", "licence", "size", "sha256")  # fmt: skip
    return _table(head, (_release_cells(release) for release in known))


def dictionary_table(dictionaries: Iterable[Dictionary]) -> str:
    """One line of Markdown per dictionary."""
    return _table(
        ("dictionary", "hook", "L0", "FVU", "CE recovered", "nats lost"),
        (
            (f"`{d.name}`", f"`{d.hook_name}`", _number(d.l0), _number(d.fvu),
             _number(d.ce_recovered), _number(d.nats_lost))
            for d in dictionaries
        ),
    )  # fmt: skip


def _release_cells(release: Release) -> tuple[str, ...]:
    return (
        f"`{release.name}`",
        release.model or "",
        _hooks(release),
        _number(release.d_in),
        _number(release.d_sae),
        release.architecture or "",
        _number(release.n_tokens),
        _range(d.l0 for d in release.dictionaries),
        _range(d.fvu for d in release.dictionaries),
        _range(d.ce_recovered for d in release.dictionaries),
        release.licence or "",
        f"{release.size / 1e9:.1f} GB" if release.size else "",
        (release.sha256 or "")[:12],
    )


def _hooks(release: Release) -> str:
    """`blocks.0-5.hook_mlp_out` for the layers 0 to 5 of one kind of hook."""
    layers: dict[str, list[int]] = {}
    for dictionary in release.dictionaries:
        if dictionary.layer is not None:
            kind = dictionary.hook_name.split(".", 2)[2]
            layers.setdefault(kind, []).append(dictionary.layer)
    return ", ".join(f"`{_span(numbers)}.{kind}`" for kind, numbers in layers.items())


def _span(layers: list[int]) -> str:
    first, last = min(layers), max(layers)
    if first < last and sorted(layers) == [*range(first, last + 1)]:
        return f"blocks.{first}-{last}"
    return f"blocks.{','.join(map(str, sorted(set(layers))))}"


def _range(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = _number(min(known)), _number(max(known))
    return low if low == high else f"{low} to {high}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def sources_list(known: Iterable[Release]) -> str:
    """What each release is and where its facts were read."""
    return "".join(
        f"- `{release.name}`: {release.about} Facts: {'; '.join(release.facts_from)}.\n"
        for release in known
    )


def readme_section(known: Iterable[Release]) -> str:
    """The part of README.md that is made from the manifest."""
    known = list(known)
    text = f"{BEGIN}\n{release_table(known)}\n{sources_list(known)}"
    for release in known:
        if any(d.fvu is not None or d.ce_recovered is not None for d in release.dictionaries):
            text += f"\n`{release.name}`, as published:\n\n"
            text += dictionary_table(release.dictionaries)
    return text + f"\n{END}"


def main() -> None:
    """Replace the section of README.md between the two marks."""
    report_user_errors_in_one_line()
    path = HERE / "README.md"
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    with atomic_path(path) as temporary:
        temporary.write_text(before + readme_section(releases().values()) + after, "utf-8")
    print(path)


if __name__ == "__main__":
    main()

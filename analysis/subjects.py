"""Dictionaries, ours and others', with the activations they are for, and those activations.

`load_subjects` reads dictionaries and finds out what they were trained on; `Material` is the
language model and the text of one or several of them. No measurement happens here.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from analysis.program import MeasureConfig
from pretrained.catalogue import releases
from pretrained.fetch import fetched
from sparse_coding.config import hooks_of
from sparse_coding.dictionary import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.evaluation import Evaluation, take_tokens
from sparse_coding.formats import load_dictionary, training_facts
from sparse_coding.harvest import NormLimit, Rows, hook_width, norm_limit
from sparse_coding.hook_sources import side_by_side
from sparse_coding.models import (
    LanguageModel,
    check_hook,
    check_target_hook,
    choose_device,
    load_lm,
)
from sparse_coding.splice import Target
from sparse_coding.storage import read_object
from sparse_coding.text import TokenBatch, contexts, load_text


@dataclass(frozen=True)
class Origin:
    """What activations a dictionary is for: model, place, and how text becomes contexts."""

    lm: str
    hook_name: str
    """Of crosscoders all their hooks, as A+B."""
    target_hook_name: str = ""
    """Where what is decoded belongs, of transcoders."""
    text: str = "builtin"
    text_field: str = "text"
    heldout_fraction: float = 0.05
    context_length: int = 128
    bos: str = "auto"
    pack: str = "concat"
    dtype: str = "auto"


class Subject(NamedTuple):
    """One dictionary to measure."""

    name: str
    """Unique among the loaded: its folder's name, after those above it where two are alike."""
    dictionary: Dictionary
    origin: Origin
    facts: dict[str, Any]
    """What its file says of it: architecture, ratio, seed ... as far as known."""
    run: Path | None
    """Its run folder, if it belongs to one."""


FACTS = ("architecture", "ratio", "d_in", "d_sae", "l1_coeff", "target_l0", "seed",
         "n_tokens_trained")  # fmt: skip


def load_subjects(
    sources: Sequence[str], cfg: MeasureConfig, *, with_other_places: bool = False
) -> list[Subject]:
    """The dictionaries that `sources` name, in order.

    A source is a run folder (all its SAEs), a run's saes/NAME, a file or folder of any format in
    `sparse_coding.formats`, or a release as RELEASE/DICTIONARY. Settings in `cfg` that are not
    empty go before what the files say. Transcoders and crosscoders (`with_other_places`) are
    refused unless the caller does nothing with what they decode, or knows where it belongs.
    """
    if not sources:
        raise UserError("name at least one run folder, dictionary or release")
    paths = [(source, path) for source in sources for path in _dictionary_paths(source)]
    subjects = [_load(source, path, cfg) for source, path in paths]
    for subject in subjects:
        kinds = {"transcoder": subject.dictionary.is_transcoder,
                 "crosscoder": subject.dictionary.joins_hooks}  # fmt: skip
        for kind in [kind for kind, is_one in kinds.items() if is_one and not with_other_places]:
            raise UserError(
                f"{subject.name} is a {kind}, and this measurement needs a dictionary that "
                "reconstructs the one hook that it encodes; analysis.evaluate, interpret_units "
                f"and collect_dashboard take {kind}s"
            )
    names = _told_apart([subject.name for subject in subjects], [path for _, path in paths])
    return [s._replace(name=name) for s, name in zip(subjects, names, strict=True)]


def _dictionary_paths(source: str) -> list[Path]:
    folder = Path(source)
    if not (folder / "saes").is_dir():
        return [fetched(source)]
    found = sorted(path.parent for path in (folder / "saes").rglob("cfg.json"))
    if not found:
        raise UserError(f"{folder / 'saes'} holds no SAE; has the run ended?")
    return found


def _load(source: str, path: Path, cfg: MeasureConfig) -> Subject:
    dictionary = load_dictionary(path, choose_device(cfg.device)).float().requires_grad_(False)
    run = _run_folder(path)
    said: dict[str, Any] = {}
    released = _said_by_release(source)
    named = {"lm": released.get("lm")}  # as the hub has it; a file, as its library calls it
    for what in (released, training_facts(path), named, _said_by_run(run)):
        said |= {key: value for key, value in what.items() if value is not None}
    keys = Origin.__dataclass_fields__
    given = {key: getattr(cfg, key) for key in keys if getattr(cfg, key, None)}
    settings = {key: said[key] for key in keys if key in said} | given
    for key in ("lm", "hook_name"):
        if key not in settings:
            flag, module = f"--{key.replace('_', '-')}", said.get("module")
            says = f"calls its place {module!r}" if module and key != "lm" else "does not say it"
            raise UserError(f"give {flag}, as TransformerLens calls it: {path} {says}")
    if not dictionary.is_transcoder:
        if cfg.target_hook_name:
            given = f"--target-hook-name {cfg.target_hook_name}"
            raise UserError(f"{given} is for transcoders; {path} is none")
        settings.pop("target_hook_name", None)
    for key, value in settings.items():
        if type(value) is not Origin.__dataclass_fields__[key].type:
            raise UserError(f"{path}: {key} is {value!r}, which cannot be; give it as an option")
    facts = {"architecture": getattr(dictionary, "name", "unknown")}
    facts |= {key: said[key] for key in FACTS if key in said}
    facts |= {"d_in": dictionary.d_in, "d_sae": dictionary.d_sae}
    facts.setdefault("ratio", _ratio(dictionary))
    name = (
        path.name if run is None else str(path.absolute().relative_to((run / "saes").absolute()))
    )
    return Subject(name, dictionary, Origin(**settings), facts, run)


def _told_apart(names: list[str], paths: list[Path]) -> list[str]:
    """The names; those that are alike become longer by folders until they differ."""
    parts = [[part for part in path.absolute().parts if part != "saes"] for path in paths]
    for n in range(2, max(map(len, parts)) + 1):
        alike = {name for name in names if names.count(name) > 1}
        names = [
            "/".join(of[-n:]) if name in alike else name
            for name, of in zip(names, parts, strict=True)
        ]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{twice[0]} is named twice")
    return names


def _run_folder(path: Path) -> Path | None:
    for folder in path.absolute().parents:
        if folder.name == "saes" and (folder.parent / "config.json").is_file():
            here = Path.cwd()
            run = folder.parent
            return run.relative_to(here) if run.is_relative_to(here) else run
    return None


def _ratio(dictionary: Dictionary) -> int | float:
    whole, rest = divmod(dictionary.d_sae, dictionary.d_in)
    return whole if not rest else round(dictionary.d_sae / dictionary.d_in, 3)


def _said_by_run(run: Path | None) -> dict[str, Any]:
    """What only the run knows; model, hook and text are in each SAE's own file."""
    if run is None:
        return {}
    config = read_object(run / "config.json", "config")["config"]
    return {key: config.get(key) for key in ("text_field", "heldout_fraction", "pack", "dtype")}


def _said_by_release(source: str) -> dict[str, Any]:
    name, _, rest = source.partition("/")
    release = releases().get(name)
    if release is None:
        return {}
    hooks = [d.hook_name for d in release.dictionaries if not rest or rest in (d.name, d.path)]
    hook_name = hooks[0] if len(hooks) == 1 else None
    return {"lm": release.model, "hook_name": hook_name, "architecture": release.architecture}


class Material:
    """The language model and the text behind an `Origin`: contexts, norm limits, held-out rows."""

    def __init__(self, origin: Origin, device: str = "auto", lm: LanguageModel | None = None):
        self.origin = origin
        self.lm = lm or load_lm(origin.lm, device=device, dtype=origin.dtype)
        check_hook(self.lm, origin.hook_name)
        if origin.target_hook_name:
            check_target_hook(self.lm, [origin.hook_name], origin.target_hook_name)
        self.text = load_text(
            origin.text, text_field=origin.text_field, heldout_fraction=origin.heldout_fraction
        )

    def check(self, subjects: Iterable[Subject]) -> None:
        """`UserError` unless the dictionaries have the width of the hook's activations."""
        widths = tuple(self.widths.values())
        for subject in subjects:
            dictionary = subject.dictionary
            expected = dictionary.widths if dictionary.joins_hooks else (dictionary.d_in,)
            if expected != widths:
                raise UserError(
                    f"{subject.name} has d_in {' + '.join(map(str, expected))}, but "
                    f"{self.origin.hook_name} of {self.lm.name} is {' + '.join(map(str, widths))} "
                    "wide; give the --lm and --hook-name that it was trained on"
                )

    @cached_property
    def widths(self) -> dict[str, int]:
        """Of the place's hooks."""
        return {name: hook_width(self.lm, name) for name in hooks_of(self.origin.hook_name)}

    def token_batches(self, split: str) -> Iterator[TokenBatch]:
        """Contexts of one split, "train" or "heldout"."""
        origin = self.origin
        return contexts(
            self.text.documents(split),
            self.lm.tokenizer,
            context_length=origin.context_length,
            bos=origin.bos,
            pack=origin.pack,
        )

    @cached_property
    def training_rows(self) -> Rows:
        """Rows of training documents under the harvest's own norm limit."""
        target = self.origin.target_hook_name
        hook_names = [*hooks_of(self.origin.hook_name), *([target] if target else [])]
        return Rows(self.lm, partial(self.token_batches, "train"), hook_names)

    @property
    def max_norm(self) -> float | list[NormLimit]:
        """The harvest's norm limit, measured on training documents."""
        return norm_limit(self.origin.hook_name, self.training_rows.max_norms, self.widths)

    def heldout(self, n_tokens: int) -> list[TokenBatch]:
        """Held-out contexts with at least `n_tokens` valid positions, or all there are."""
        return take_tokens(self.token_batches("heldout"), n_tokens)

    def evaluation(
        self, n_tokens: int, variance: Float[Tensor, " d_out"] | None = None
    ) -> Evaluation:
        """Held-out batches, ready to measure dictionaries on."""
        batches, name = self.heldout(n_tokens), self.origin.target_hook_name
        target = Target(name, self.training_rows.max_norms[name]) if name else None
        return Evaluation(self.lm, self.origin.hook_name, batches, self.max_norm, variance, target)

    def training_moments(self, hook_name: str, n_tokens: int = 16_384) -> "Moments":
        """Mean and variance per dimension of a hook's first `n_tokens` or more training rows."""
        n, total, square = 0, 0.0, 0.0
        for rows in self.training_rows:
            x = side_by_side(rows.acts, hooks_of(hook_name)).cpu().double()
            n, total, square = n + len(x), total + x.sum(0), square + x.square().sum(0)
            if n >= n_tokens:
                break
        mean = total / n
        return Moments(mean.float(), (square / n - mean.square()).float())


class Moments(NamedTuple):
    """Of training rows, per dimension."""

    mean: Float[Tensor, " d"]
    variance: Float[Tensor, " d"]


def by_origin(subjects: Iterable[Subject]) -> dict[Origin, list[Subject]]:
    """Subjects that are measured on the same activations, together."""
    groups: dict[Origin, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.origin, []).append(subject)
    return groups

"""Every flag of every program, given something wrong: one line, status 2, and no work.

The flags are read from the programs themselves, so that a new one without a row here fails. A
number's bad values follow from its type; of a text or a path, BAD names one, and what is said of
it. Programs run in this process, for each would take seconds to start.
"""

import dataclasses
import importlib
import math
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import pytest
from build_notebook import ROOT

from sparse_coding.config import RunConfig, parse_config
from sparse_coding.errors import UserError
from sparse_coding.settings import MAX, Count, Place, Range, checked, limits, read_settings

RUN = "outputs/runs/whole"
SAE = f"{RUN}/saes/l1_x04_l0-6_s0"
ENTRY = "easy_training_base"
FOLDERS = ("analysis", "benchmarks", "data_visualization", "pretrained")
# A model and a text that are here: the defaults would be converted and built first.
READ = ["--lm", "lm", "--hook-name", "blocks.1.hook_resid_post", "--text", "text.jsonl"]
# What a program needs to get as far as its other flags.
POSITIONAL = {
    "analysis.collect_dashboard": [RUN],
    "analysis.compare_baselines": [RUN],
    "analysis.compare_dictionaries": [RUN],
    "analysis.consistency": ["--lm", "lm", "--layers", "1", "--text", "text.jsonl"],
    "analysis.evaluate": [RUN],
    "analysis.find_units": [RUN],
    "analysis.interpret_units": [
        SAE,
        "--judge-url",
        "http://127.0.0.1:9/v1",
        "--judge-model",
        "m",
    ],
    "analysis.live_features": ["outputs", "name"],
    "analysis.measure_polysemanticity": [RUN],
    "analysis.probe_concepts": [RUN],
    "analysis.validate_polysemanticity": [RUN],
    "benchmarks.harvest": READ,
    "benchmarks.ladder": READ,
    "benchmarks.quality": READ[:-2],
    "benchmarks.saebench": ["--dictionaries", RUN],
    "pretrained.fetch": ["pythia-70m-deduped-sm"],
    "pretrained.publish": [SAE, "--repo", "owner/name"],
    ENTRY: ["--text", "text.jsonl", "--lm", "lm", "--hook-name", "blocks.1.hook_resid_post"],
}
# Flags of one name mean one thing in every program: a bad value, and what is said of it. A value
# may be several; of "PROGRAM.flag" it is that program's own.
BAD: dict[str, tuple[str, str]] = {
    "activations": ("nowhere", "nowhere"),
    "architecture": ("l7", "l7"),
    "architectures": ("l7", "--architectures l7 is unknown"),
    "concepts": ("astrology magic", "astrology"),
    "device": ("abacus", "--device abacus cannot be used"),
    "dictionaries": ("nowhere", "nowhere"),
    "dictionary": ("nowhere", "has no dictionary nowhere"),
    "file": ("../../secret", "could leave its folder"),
    "folder": ("nowhere", "nowhere"),
    "target_hook_name": ("blocks.9.hook_nothing", "-hook-name blocks.9.hook_nothing"),
    "hook_name": ("blocks.99.hook_resid_post", "--hook-name blocks.99.hook_resid_post"),
    "judge_model": ("", "--judge-model"),
    "judge_url": ("ftp://judge", "--judge-url"),
    "lm": ("no_such_model", "--lm no_such_model cannot be loaded"),
    "methods": ("nobody", "nobody"),
    "name": ("nobody", "nobody"),
    f"{ENTRY}.name": ("../elsewhere", "--name ../elsewhere is not possible"),
    "other_lms": ("no_such_model", "no_such_model cannot be loaded"),
    "peers": ("nobody", "--peers nobody is unknown"),
    "phase_architecture": ("l7", "l7"),
    "phase_settings": ("odd", "odd"),
    "preset": ("huge", "--preset huge is unknown"),
    "release": ("nowhere", "there is no release nowhere"),
    "repo": ("nobody", "--repo nobody must be of the form"),
    "run": ("nowhere", "nowhere"),
    "run_folder": ("nowhere", "nowhere"),
    "sae": ("nowhere", "nowhere"),
    "sae_architecture": ("l7", "l7"),
    "saes": ("nobody", "nobody"),
    "settings": ("odd", "odd"),
    "source": ("nowhere/none", "nowhere"),
    "text": ("no_such_text.txt", "text 'no_such_text.txt' does not exist"),
    "text_field": ("body", "has no field 'body'"),
    "port": ("-1", "port"),
    "wandb": ("project", "--wandb needs its package"),
}  # fmt: skip

ANY_IS_RIGHT = {"pretrained.publish.licence"}


class Flag(NamedTuple):
    """One flag of one program."""

    program: str
    name: str
    hint: Any

    @property
    def values(self) -> Any:
        """What one value is, without `| None`, `tuple[...]` and `Annotated`."""
        hint = self.hint
        while get_args(hint) and get_origin(hint) is not Literal:
            first, *_ = [part for part in get_args(hint) if part not in (type(None), ...)]
            hint = first
        return hint

    @property
    def limit(self) -> Range | Place | None:
        return limits(config_of(self.program)).get(self.name)

    @property
    def is_positional(self) -> bool:
        return "Positional" in str(self.hint)


def programs() -> list[str]:
    """Modules that do something when run, but for figures: those share one command line."""
    paths = (path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")))
    is_run = re.compile(r'^if __name__ == "__main__":', re.MULTILINE)
    return [f"{path.parent.name}.{path.stem}" for path in paths if is_run.search(path.read_text())]


def config_of(program: str) -> type | None:
    """The dataclass that is its command line."""
    if program == ENTRY:
        return RunConfig
    module = importlib.import_module(program)
    names = [name for name in ("Config", "FetchConfig", "PublishConfig") if hasattr(module, name)]
    return getattr(module, names[0]) if names else None


ARGPARSE = [name for name in programs() if name.startswith("data_visualization.")]
TYRO = [ENTRY, *(name for name in programs() if name not in ARGPARSE and config_of(name))]
WITHOUT_FLAGS = {"pretrained.catalogue"}


def flags() -> Iterator[Flag]:
    for program in TYRO:
        hints = get_type_hints(config_of(program), include_extras=True)
        for field in dataclasses.fields(config_of(program)):
            yield Flag(program, field.name, hints[field.name])


def ids(flag: Flag) -> str:
    return f"{flag.program}.{flag.name}"


FLAGS = [flag for flag in flags() if ids(flag) not in ANY_IS_RIGHT]
NUMBERS = [flag for flag in FLAGS if flag.values in (int, float)]
CHOICES = [flag for flag in FLAGS if get_origin(flag.values) is Literal]
PLACES = [flag for flag in FLAGS if flag.values is Path and flag.limit]
WORDS = [flag for flag in FLAGS if flag.values in (str, Path) and not flag.limit]


def read(program: str, arguments: list[str]) -> Any:
    """The settings of a command line, as the program reads them."""
    if program == ENTRY:
        return parse_config(arguments)
    return read_settings(config_of(program), arguments)


def given(flag: Flag, value: str) -> list[str]:
    """A command line in which one flag has this value."""
    return [*POSITIONAL.get(flag.program, []), f"--{flag.name.replace('_', '-')}", *value.split()]


def test_every_program_is_tried():
    assert set(TYRO) | set(ARGPARSE) | WITHOUT_FLAGS == {ENTRY, *programs()}
    assert len(TYRO) > 20 and len(ARGPARSE) > 15


def test_every_flag_has_a_type_or_a_row_that_says_what_is_wrong():
    tried = {*NUMBERS, *CHOICES, *PLACES, *WORDS}
    assert {flag.values for flag in FLAGS if flag not in tried} == {bool}
    lost = [ids(flag) for flag in WORDS if not {flag.name, ids(flag)} & BAD.keys()]
    assert not lost, f"no row in BAD for {lost}"


def test_every_number_says_what_it_may_be():
    lost = [ids(flag) for flag in NUMBERS if not isinstance(flag.limit, Range)]
    assert not lost, f"an int or a float without a range: {lost}"


def outside(allowed: Range, kind: type) -> list[str]:
    """Numbers that a range does not hold, none of them written in it."""
    below = allowed.low - 1 if kind is int else allowed.low - 0.5
    if kind is int and allowed.or_zero and below == 0:
        below = -1
    numbers = [below, allowed.high + 1, 10 * MAX, -MAX]
    if kind is int:
        return [f"{number:.0f}" for number in numbers]
    ends = [allowed.low, allowed.high] if allowed.is_open and not allowed.or_zero else []
    return [repr(float(number)) for number in (*numbers, *ends)] + ["nan", "inf", "-inf"]


@pytest.mark.parametrize("flag", NUMBERS, ids=ids)
def test_a_number_out_of_its_range_is_named_with_what_is_allowed(flag):
    for value in outside(flag.limit, flag.values):
        with pytest.raises(UserError) as error:
            read(flag.program, given(flag, value))
        line = str(error.value)
        assert line.startswith(f"--{flag.name.replace('_', '-')} ") and "must be" in line
        assert "\n" not in line


WRONG_TYPE = {int: ("many", "1.5", ""), float: ("many", "")}


@pytest.mark.parametrize("flag", [*NUMBERS, *CHOICES], ids=ids)
def test_a_value_of_another_type_is_refused_with_status_2(flag, capsys):
    name = f"--{flag.name.replace('_', '-')}"
    for value in WRONG_TYPE.get(flag.values, ("nonsense",)):
        with pytest.raises(SystemExit) as end:
            read(flag.program, [*POSITIONAL.get(flag.program, []), name, value])
        assert end.value.code == 2
        assert name in capsys.readouterr().err


@pytest.mark.parametrize("program", TYRO)
def test_an_unknown_flag_is_refused_with_status_2(program, capsys):
    with pytest.raises(SystemExit) as end:
        read(program, [*POSITIONAL.get(program, []), "--no-such-flag", "1"])
    assert end.value.code == 2
    assert "no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("flag", PLACES, ids=ids)
def test_a_place_that_cannot_be_written_is_refused(flag, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    wrong = ["file/below", "x" * 300]
    for value in [*wrong, "."] if flag.limit.is_file else wrong:
        with pytest.raises(UserError, match=f"^--{flag.name.replace('_', '-')} .* must be "):
            read(flag.program, given(flag, value))
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="is not yours to write"):
        checked(RunConfig(output=tmp_path / "new"))


def test_the_limits_are_held_by_the_values_that_are_in_force():
    for program in TYRO:
        for field in dataclasses.fields(config_of(program)):
            limit = limits(config_of(program)).get(field.name)
            values = field.default if isinstance(field.default, tuple) else (field.default,)
            for value in values if isinstance(limit, Range) else ():
                assert limit.refusal(value) == "", f"{program}.{field.name}"


@dataclasses.dataclass(frozen=True)
class Planted:
    n: Count = 1
    share: Annotated[float, Range(0, 1, is_open=True, or_zero=True)] = 0.0
    some: tuple[Count, ...] = ()


def test_ranges_hold_their_ends_unless_they_are_open():
    closed, open_ = Range(2, 5), Range(2, 5, is_open=True)
    assert [closed.refusal(x) == "" for x in (1, 2, 5, 6)] == [False, True, True, False]
    assert [open_.refusal(x) == "" for x in (2, 2.1, 4.9, 5)] == [False, True, True, False]
    assert Range(2, or_zero=True).refusal(0) == "" != Range(2, or_zero=True).refusal(1)
    assert all(Range(-math.inf).refusal(x) for x in (math.nan, math.inf))
    assert (str(Range(1)), str(open_)) == ("1 or more", "between 2 and 5")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"n": 0}, "--n 0 is not possible; it must be 1 or more"),
        ({"n": 10**30}, f"--n {10**30} is not possible; it must be 1,000,000,000,000 or less"),
        ({"share": 1.0}, "--share 1.0 is not possible; it must be between 0 and 1, or 0"),
        ({"some": (3, 0)}, "--some 0 is not possible; it must be 1 or more"),
    ],
)
def test_settings_made_by_hand_are_checked_alike(changes, line):
    with pytest.raises(UserError) as error:
        checked(Planted(**changes))
    assert str(error.value) == line


class Ended(NamedTuple):
    """How a program that ran in this process ended."""

    status: int
    line: str


def ended(program: str, arguments: list[str], capsys, monkeypatch) -> Ended:
    """Run a program here. Its last line on stderr is what is said of a bad argument."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    capsys.readouterr()
    try:
        call_of(program)()
    except UserError as error:
        assert "\n" not in str(error)
        return Ended(2, str(error))  # as `report_user_errors_in_one_line` has it
    except SystemExit as end:
        return Ended(end.code, capsys.readouterr().err)
    return Ended(0, "")


def call_of(program: str) -> Callable[[], Any]:
    if program == ENTRY:
        return lambda: runpy.run_path(str(ROOT / f"{ENTRY}.py"), run_name="__main__")
    module: ModuleType = importlib.import_module(program)
    if program.startswith("analysis."):
        return lambda: module.main(read_settings(module.Config, sys.argv[1:]))
    return getattr(module, "main", lambda: runpy.run_module(program, run_name="__main__"))


def bad_words() -> Iterator[Any]:
    for flag in WORDS:
        value, said = BAD.get(ids(flag), BAD.get(flag.name, ("", "")))
        yield pytest.param(flag, value, said, id=ids(flag))


@pytest.fixture
def here(finished, place, monkeypatch):
    """A place with a model, a text and a finished run; no dictionary is measured in it."""
    monkeypatch.chdir(place)

    def worked(*_: object, **__: object) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    monkeypatch.setattr("sparse_coding.evaluation.Evaluation.__init__", worked)
    monkeypatch.setattr("sparse_coding.harvest.Rows.__init__", worked)
    return place


@pytest.mark.parametrize(("flag", "value", "said"), bad_words())
def test_a_word_that_means_nothing_is_named(flag, value, said, here, capsys, monkeypatch):
    arguments = POSITIONAL.get(flag.program, [])
    words = value.split() or [value]
    if flag.is_positional:
        arguments = [*words, *arguments[1:]]
    else:
        arguments = [*arguments, f"--{flag.name.replace('_', '-')}", *words]
    end = ended(flag.program, arguments, capsys, monkeypatch)
    assert end.status == 2 and said in end.line

"""The house rules, read from the source: imports go down, no pickle, no twins, nothing too long.

Every rule is a pure function from sources to violations, and is itself seen to fail on a planted
violation.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("sparse_coding", "analysis", "benchmarks", "data_visualization", "pretrained")
ENTRY = "easy_training_base"

FLOORS = {
    # JSON in, figures out
    -1: "data_visualization",
    # no foreign world, no mathematics
    0: "sparse_coding config dictionary errors settings storage",
    # mathematics and arrays
    1: """sae saes l0_controller dead_features baselines toy kernels metrics polysemanticity
        unit_activity token_information context_clusters probing consistency sources cache
        cache_files shared_cache processes""",
    # foreign worlds: language models, texts, other libraries' names
    2: """harvest hook_sources models builtin_text text_files text_rows text splice examples
        formats concepts concept_sources token_tags descriptions intruders judge""",
    # a run: what trains, measures, keeps and tells
    3: """ladder training checkpoint distributed evaluation runs planning
        reporting""",
    # programs
    4: f"{ENTRY} analysis benchmarks pretrained",
}
FLOOR = {unit: floor for floor, units in FLOORS.items() for unit in units.split()}

# The only units that may import a package.
HOMES = {
    "transformer_lens": {"models", "harvest", "splice", "examples"},
    "sklearn": {"baselines", "probing", "intruders", "context_clusters"},
    "matplotlib": {"data_visualization"},
}
# An import of one of these is a pickle, or reads or writes one.
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
PICKLING_CALLS = {"torch.load", "torch.save"}
# Others' checkpoints are pickles. This file reads them without running them, with torch's reader.
READS_PICKLES = "sparse_coding/formats/unpickle.py"
VAGUE_NAMES = re.compile(r"^(utils?|helpers?|misc|common|stuff|new_.*|.*_v\d+|.*_final)$")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 40
# Imported only on request, with a clear line where they are missing.
OPTIONAL = {"wandb", "tensorboard", "triton"}
# Packages whose import name is not their own.
IMPORT_NAMES = {
    "PyYAML": "yaml", "ipython": "IPython", "scikit-learn": "sklearn", "eai-sparsify": "sparsify",
}  # fmt: skip


class Source(NamedTuple):
    """One file: its path from the root with forward slashes, its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def sources(*folders: str) -> list[Source]:
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    paths += [ROOT / f"{ENTRY}.py"] * (FOLDERS[0] in folders)
    return [
        Source(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(paths)
    ]


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported, inside functions too."""
    package = source.module.split(".")
    if not source.path.endswith("/__init__.py"):
        package = package[:-1]
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def unit_of(module: str) -> str | None:
    """The unit of the house that a module belongs to: a package counts as one; None if foreign."""
    top, *rest = module.split(".")
    if top == "sparse_coding":
        return rest[0] if rest else "sparse_coding"
    return top if top in (*FOLDERS, ENTRY) else None


def inner_imports(source: Source) -> Iterator[tuple[int, str]]:
    """Line and unit of every import of another unit of the house."""
    for line, name in imports(source):
        unit = unit_of(name)
        if unit and unit != unit_of(source.module):
            yield line, unit


# --- the rules ---------------------------------------------------------------------------------


def imports_upward(found: Iterable[Source]) -> list[str]:
    violations = []
    for source in found:
        unit = unit_of(source.module)
        if unit == "sparse_coding":  # its __init__.py: what torch is told before it is loaded
            violations += [
                f"{source.path}:{line} imports {name}"
                for line, name in imports(source)
                if name != "os"
            ]
            continue
        if unit not in FLOOR:
            violations.append(f"{source.path} has no floor: give {unit} one in FLOORS")
            continue
        for line, other in inner_imports(source):
            if other not in FLOOR:
                violations.append(f"{source.path}:{line} imports {other}, which has no floor")
            elif FLOOR[other] > FLOOR[unit]:
                violations.append(f"{source.path}:{line} imports {other} from a floor above")
    return violations


def import_cycles(found: Iterable[Source]) -> list[str]:
    below: dict[str, set[str]] = defaultdict(set)
    for source in found:
        below[unit_of(source.module)] |= {unit for _, unit in inner_imports(source)}

    def reached(unit: str) -> set[str]:
        seen, waiting = set(), [unit]
        while waiting:
            new = below.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    return [
        f"{unit} imports itself through others" for unit in sorted(below) if unit in reached(unit)
    ]


def strangers(found: Iterable[Source]) -> list[str]:
    """Packages imported outside their homes; drawing that knows of torch or the library."""
    violations = []
    for source in found:
        unit = unit_of(source.module)
        for line, name in imports(source):
            top = name.split(".")[0]
            allowed = top not in HOMES or unit in HOMES[top]
            if unit == "data_visualization":
                allowed = allowed and top not in ("torch", "sparse_coding")
            if not allowed:
                violations.append(f"{source.path}:{line} imports {top}")
    return violations


def pickles(found: Iterable[Source]) -> list[str]:
    violations = []
    for source in found:
        names = list(imports(source))
        names += [
            (node.lineno, ast.unparse(node.func))
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Call)
        ]
        names += [
            (node.value.lineno, "pickle")
            for node in ast.walk(source.tree)
            if isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and not (isinstance(node.value, ast.Constant) and node.value.value is False)
        ]
        violations += [
            f"{source.path}:{line} uses {name}"
            for line, name in names
            if name.split(".")[0] in PICKLES
            or (name in PICKLING_CALLS and source.path != READS_PICKLES)
        ]
    return violations


def twins(found: Iterable[Source]) -> list[str]:
    """Functions and classes of one name and one body in two files; docstrings do not count."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for source in found:
        for node in source.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) is not None else node.body
                code = "\n".join(map(ast.dump, body))
                places[node.name, code].append(source.path)
    return [f"{name} in {' and '.join(p)}" for (name, _), p in places.items() if len(p) > 1]


def vague_names(found: Iterable[Source]) -> list[str]:
    return [source.path for source in found if VAGUE_NAMES.match(source.module.rpartition(".")[2])]


def long_files(found: Iterable[Source]) -> list[str]:
    lengths = {source.path: len(source.text.splitlines()) for source in found}
    return [f"{path} has {n} lines" for path, n in lengths.items() if n >= MAX_FILE_LINES]


def long_functions(found: Iterable[Source]) -> list[str]:
    violations = []
    for source in found:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n = node.end_lineno - node.lineno + 1
                if n >= MAX_FUNCTION_LINES:
                    violations.append(f"{source.path}:{node.lineno} {node.name} has {n} lines")
    return violations


class Requirement(NamedTuple):
    package: str
    version: str
    comment: str

    @property
    def import_name(self) -> str:
        return IMPORT_NAMES.get(self.package, self.package.replace("-", "_"))


def requirements(text: str) -> list[Requirement]:
    """The lines of a requirements file, `package==version  # comment`; anything else fails.

    A package that another one pins may be `package>=version; marker  # comment`.
    """
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            form = r"([\w.-]+)(?:==([\w.]+)|>=[\w.]+; \w.*?)(?:  # (\S.*))?"
            match = re.fullmatch(form, line)
            assert match, f"not of the form package==version: {line}"
            found.append(Requirement(match[1], match[2] or "", match[3] or ""))
    return found


def idle_requirements(found: Iterable[Source], text: str) -> list[str]:
    """Lines that nothing imports and no comment justifies."""
    imported = {name.split(".")[0] for source in found for _, name in imports(source)}
    return [
        requirement.package
        for requirement in requirements(text)
        if requirement.import_name not in imported and not requirement.comment
    ]


def unlisted_imports(found: Iterable[Source], text: str) -> list[str]:
    """Foreign packages that are imported and neither required nor optional."""
    known = {requirement.import_name for requirement in requirements(text)} | OPTIONAL
    return [
        f"{source.path}:{line} imports {name.split('.')[0]}"
        for source in found
        for line, name in imports(source)
        if name.split(".")[0] not in known | set(sys.stdlib_module_names) | {"__future__"}
        and unit_of(name) is None
    ]


# --- the house keeps them ----------------------------------------------------------------------

PEERS = ("benchmarks/requirements-peers.txt", "benchmarks/requirements-saebench.txt")
REQUIREMENTS = (
    "requirements.txt", "pretrained/requirements.txt", "tests/requirements.txt", *PEERS,
)  # fmt: skip
RULES = (imports_upward, import_cycles, strangers, pickles, twins, vague_names, long_files,
         long_functions)  # fmt: skip


def assert_none(violations: list[str]) -> None:
    assert not violations, "\n" + "\n".join(violations)


def read(*paths: str) -> str:
    return "".join((ROOT / path).read_text(encoding="utf-8") for path in paths)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule):
    assert_none(rule(sources(*FOLDERS)))


@pytest.mark.parametrize(
    "rule", (vague_names, long_files, long_functions), ids=lambda r: r.__name__
)
def test_the_tests_keep_the_rule(rule):
    assert_none(rule(sources("tests")))


def test_every_requirement_is_imported_or_justified():
    assert_none(idle_requirements(sources(*FOLDERS, "tests"), read(*REQUIREMENTS)))


def test_every_foreign_import_is_a_requirement():
    product = [folder for folder in FOLDERS if folder != "benchmarks"]
    assert_none(unlisted_imports(sources(*product), read("requirements.txt")))
    assert_none(unlisted_imports(sources("benchmarks"), read("requirements.txt", *PEERS)))


# --- each rule is seen to fail -----------------------------------------------------------------

LONG_FUNCTION = "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)
VIOLATIONS = [
    (imports_upward, {"sparse_coding/sae.py": "from sparse_coding.training import Trainer"}),
    (imports_upward, {"sparse_coding/sae.py": "from sparse_coding import training"}),
    (imports_upward, {"sparse_coding/sae.py": "from .training import Trainer"}),
    (imports_upward, {"sparse_coding/kernels/cpu.py": "from ..training import Trainer"}),
    (imports_upward, {"sparse_coding/config.py": "def f():\n    import sparse_coding.sae"}),
    (imports_upward, {"sparse_coding/training.py": "import analysis.probes"}),
    (imports_upward, {"sparse_coding/unheard_of.py": ""}),
    (imports_upward, {"sparse_coding/__init__.py": "import torch"}),
    (
        import_cycles,
        {
            "sparse_coding/sae.py": "from sparse_coding.kernels.cpu import step",
            "sparse_coding/kernels/cpu.py": "def f():\n    from sparse_coding import sae",
        },
    ),
    (
        import_cycles,
        {
            "sparse_coding/sae.py": "import sparse_coding.toy",
            "sparse_coding/toy.py": "import sparse_coding.metrics",
            "sparse_coding/metrics.py": "import sparse_coding.sae",
        },
    ),
    (strangers, {"sparse_coding/text.py": "import transformer_lens.utils"}),
    (strangers, {"sparse_coding/training.py": "from sklearn import cluster"}),
    (strangers, {"sparse_coding/metrics.py": "import matplotlib"}),
    (strangers, {"data_visualization/style.py": "from torch import nn"}),
    (strangers, {"data_visualization/style.py": "from sparse_coding import errors"}),
    (pickles, {"sparse_coding/cache.py": "import pickle"}),
    (pickles, {"sparse_coding/cache.py": "from pickle import loads"}),
    (pickles, {"sparse_coding/cache.py": "from torch import save"}),
    (pickles, {"sparse_coding/cache.py": "import torch\nx = torch.load('x.pt')"}),
    (pickles, {"sparse_coding/cache.py": "np.load(x, allow_pickle=True)"}),
    (
        twins,
        {
            "sparse_coding/a.py": "def norm(x):\n    '''One.'''\n    return x",
            "sparse_coding/b.py": "def norm(x):\n    '''Two.'''\n    return x",
        },
    ),
    (vague_names, {"sparse_coding/utils.py": ""}),
    (vague_names, {"analysis/helpers/__init__.py": ""}),
    (vague_names, {"sparse_coding/sae_v2.py": ""}),
    (long_files, {"sparse_coding/sae.py": "\n" * MAX_FILE_LINES}),
    (long_functions, {"sparse_coding/sae.py": LONG_FUNCTION}),
    (long_functions, {"sparse_coding/sae.py": "class A:\n" + indent(LONG_FUNCTION, "    ")}),
]  # fmt: skip
INNOCENT = {
    "sparse_coding/__init__.py": "",
    "sparse_coding/sae.py": "from sparse_coding.dictionary import Dictionary\nimport torch",
    "sparse_coding/kernels/__init__.py": "from sparse_coding.kernels import cpu",
    "sparse_coding/kernels/cpu.py": "from . import Step\nimport sparse_coding.sae",
    "sparse_coding/models.py": "import transformer_lens\nnp.load(x, allow_pickle=False)",
    "sparse_coding/metrics.py": "def norm(x):\n    return x\n"
    + LONG_FUNCTION.replace("    pass\n", "", 1),
    "sparse_coding/toy.py": "def norm(x):\n    return 2 * x\n",
    "data_visualization/fig.py": "from data_visualization.style import save\nimport matplotlib",
    "analysis/probes.py": "from sparse_coding import training",
    "easy_training_base.py": "from data_visualization import fig",
}


@pytest.mark.parametrize("rule, files", VIOLATIONS)
def test_a_planted_violation_is_found(rule, files):
    assert rule([Source(path, text) for path, text in files.items()]) != []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_innocent_files_pass(rule):
    assert rule([Source(path, text) for path, text in INNOCENT.items()]) == []


def test_a_requirement_that_nothing_imports_is_found():
    text = "torch==2.13.0\nPyYAML==6.0.3\nidle==1.0\ngguf==0.19.0  # read by transformers\n"
    found = [Source("sparse_coding/a.py", "import torch\nimport yaml")]
    assert idle_requirements(found, text) == ["idle"]


def test_an_import_that_no_requirement_covers_is_found():
    found = [Source("sparse_coding/a.py", "import json, torch, scipy.stats, wandb")]
    assert unlisted_imports(found, "torch==2.13.0\n") == ["sparse_coding/a.py:1 imports scipy"]


@pytest.mark.parametrize("line", ("torch", "torch>=2.13", "torch==2.13.0 # one blank", "-e ."))
def test_a_requirement_without_an_exact_pin_is_refused(line):
    with pytest.raises(AssertionError, match="not of the form"):
        requirements(line)

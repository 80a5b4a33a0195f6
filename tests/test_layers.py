"""Static checks of all sources: imports between layers, imports of Prefect, and unpickling."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCANNED = ("flows", "tasks", "compressors", "infra", "examples", "benchmarks", "tests")
MINIMUM_FILES = {"flows": 2, "tasks": 2, "compressors": 15, "infra": 12, "examples": 3, "tests": 10}

# The folders of the repository that a folder may import.
ALLOWED = {
    "compressors": ("compressors",),
    "infra": ("infra", "compressors.contracts"),
    "tasks": ("tasks", "compressors", "infra"),
    "flows": ("flows", "tasks", "compressors", "infra"),
}
WITH_PREFECT = {"flows", "tasks", "tests", "benchmarks"}
UNPICKLERS = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
LOADERS = ("torch.load", "torch.jit.load", "pandas.read_pickle", "multiprocessing.reduction")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield line and full name of each import, also in functions and by ``import_module``."""
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                module = "." * node.level + (node.module or "")
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]) if ast.unparse(
                function
            ).endswith(("import_module", "__import__")):
                yield node.lineno, name


def is_within(name: str, roots: tuple[str, ...]) -> bool:
    """Return whether a full name is one of the roots or inside of one."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def layer_faults(folder: str, tree: ast.Module) -> list[str]:
    """Return the forbidden imports of a file in ``folder``."""
    faults = []
    for line, name in imports(tree):
        if name.startswith("."):
            faults.append(f"{line}: relative import {name}")
        if folder in ALLOWED and is_within(name, SCANNED) and not is_within(name, ALLOWED[folder]):
            faults.append(f"{line}: {folder} may not import {name}")
        if folder not in WITH_PREFECT and name.startswith("prefect"):
            faults.append(f"{line}: {folder} may not import {name}")
        if folder in {"flows", "tasks"} and name == "__future__.annotations":
            # Prefect creates the form of a flow from types, which would be strings.
            faults.append(f"{line}: no postponed annotations in {folder}")
    return faults


def pickle_faults(tree: ast.Module, *, loading_only: bool) -> list[str]:
    """Return the lines of a file that unpickle or import a pickling library.

    With ``loading_only``, imports are allowed.
    """
    full_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full_names |= {item.asname: item.name for item in node.names if item.asname}
        elif isinstance(node, ast.ImportFrom):
            full_names |= {
                item.asname or item.name: f"{node.module}.{item.name}" for item in node.names
            }
    faults = []
    if not loading_only:
        faults += [
            f"{line}: imports {name}"
            for line, name in imports(tree)
            if is_within(name, UNPICKLERS) or is_within(name, LOADERS)
        ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, _, rest = ast.unparse(node.func).partition(".")
        called = f"{full_names.get(first, first)}.{rest}".rstrip(".")
        unpickles = is_within(called, UNPICKLERS) and "load" in called.lower().rpartition(".")[2]
        if unpickles or called in LOADERS or called.endswith(".read_pickle"):
            faults.append(f"{node.lineno}: calls {called}")
        faults += [
            f"{node.lineno}: {called} with {word.arg}"
            for word in node.keywords
            if (word.arg, ast.unparse(word.value))
            in {("allow_pickle", "True"), ("weights_only", "False")}
        ]
    return faults


def sources() -> list[Path]:
    """Return all Python files of the scanned folders."""
    return sorted(path for folder in SCANNED for path in (ROOT / folder).rglob("*.py"))


def scan(path: Path) -> list[str]:
    """Return the forbidden imports and calls of a file, each with its line."""
    folder = path.relative_to(ROOT).parts[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    faults = layer_faults(folder, tree) + pickle_faults(tree, loading_only=folder == "tests")
    return [f"{path.relative_to(ROOT)}:{fault}" for fault in faults]


def test_no_source_has_a_forbidden_import_or_unpickles():
    assert [fault for path in sources() for fault in scan(path)] == []


def test_sources_contains_files_of_every_folder():
    folders = [path.relative_to(ROOT).parts[0] for path in sources()]
    assert {
        folder: folders.count(folder) >= minimum for folder, minimum in MINIMUM_FILES.items()
    } == (dict.fromkeys(MINIMUM_FILES, True))


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("compressors", "import prefect"),
        ("compressors", "from infra.store.object_store import open_store"),
        ("compressors", "def late():\n    import tasks.compress"),
        ("compressors", "from ..infra import store"),
        ("infra", "import compressors"),
        ("infra", "from compressors import metrics"),
        ("infra", "from compressors.core.runner import run"),
        ("infra", "import importlib\nimportlib.import_module('compressors.core.registries')"),
        ("infra", "import prefect_dask"),
        ("infra", "from tests import s3_server"),
        ("tasks", "from flows.order import Order"),
        ("tasks", "import examples.dcnv2"),
        ("flows", "from examples import movielens"),
        ("flows", "from benchmarks import tables"),
        ("flows", "from __future__ import annotations"),
        ("examples", "from prefect import flow"),
    ],
)
def test_layer_faults_reports_a_forbidden_import(folder, source):
    assert len(layer_faults(folder, ast.parse(source))) >= 1


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("infra", "from compressors.contracts import Signature"),
        ("infra", "from compressors import contracts"),
        (
            "tasks",
            "from compressors.core.runner import run\nfrom infra.store import object_store",
        ),
        ("flows", "from prefect import flow\nfrom tasks import compress"),
        ("compressors", "import infrared, taskset"),
    ],
)
def test_layer_faults_accepts_an_allowed_import(folder, source):
    assert layer_faults(folder, ast.parse(source)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads as read\nread(b'')",
        "import torch as t\nt.load('x')",
        "from torch import load\nload('x')",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "import pickle\npickle.Unpickler(f).load()\npickle.load(f)",
    ],
)
def test_pickle_faults_reports_unpickling_in_tests(source):
    assert len(pickle_faults(ast.parse(source), loading_only=True)) >= 1


def test_pickle_faults_accepts_pickling_only_in_tests():
    tree = ast.parse("import pickle\npickle.dumps(1)")
    assert pickle_faults(tree, loading_only=True) == []
    assert len(pickle_faults(tree, loading_only=False)) == 1

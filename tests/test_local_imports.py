"""Names that functions of tests, benchmarks and examples import from the project exist.

Such an import runs only with its function. A renamed function would otherwise be noticed only by
the nightly tests that import it, or by no test.
"""

import ast
import importlib
import importlib.util
from collections.abc import Iterator

import pytest
from repository_files import ROOT, repository_files

FOLDERS = ("tests", "benchmarks", "examples")
PACKAGES = ("compressors", "tasks", "flows", "infra")


def local_imports(source: str) -> Iterator[tuple[str, str]]:
    """Yield module and name of each import from the project inside a function."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, functions)):
        for node in ast.walk(function):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is not None and module.partition(".")[0] in PACKAGES:
                yield from ((module, alias.name) for alias in node.names)


def exists(module: str, name: str) -> bool:
    """Return whether a module has a member or a submodule of this name."""
    imported = importlib.import_module(module)
    is_package = hasattr(imported, "__path__")
    return hasattr(imported, name) or (
        is_package and importlib.util.find_spec(f"{module}.{name}") is not None
    )


def test_names_imported_inside_functions_of_tests_and_benchmarks_exist():
    missing = {
        f"{path.name}: from {module} import {name}"
        for path in repository_files()
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in FOLDERS
        for module, name in local_imports(path.read_text(encoding="utf-8"))
        if not exists(module, name)
    }
    assert missing == set()


@pytest.mark.parametrize(("name", "expected"), [("format_errors", True), ("sentences", False)])
def test_local_imports_are_found_and_looked_up(name, expected):
    source = f"def f():\n    if True:\n        from flows.order_faults import {name}\n"
    (found,) = local_imports(source)
    assert found == ("flows.order_faults", name)
    assert exists(*found) is expected

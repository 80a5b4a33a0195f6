"""The digest of the code that a task runs, which is part of its cache key. No Prefect.

A task's cached result is used only if its sources are unchanged. The sources are the file of the
task's function and, transitively, every module of this project that it imports, read from the
import statements; nothing is imported. The templates of a folder count as sources of its modules.
Read this file when a task runs again after a change, or does not.
"""

import ast
import functools
import hashlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from compressors.contracts import TARGETS, digest
from infra.settings import load_settings

ROOT = Path(__file__).parents[2]
PACKAGES = ("flows", "tasks", "compressors", "infra")
TEMPLATES = "templates/*.jinja"
LIBRARIES = (
    "torch",
    "numpy",
    "safetensors",
    "pyarrow",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "great-expectations",
)
"""Distributions whose version can change results although no source of this project changes.

The libraries that targets declare also count.
"""


def code_digest(function: Callable[..., Any]) -> str:
    """Return a SHA-256 over everything except arguments that can change a function's result.

    Args:
        function: a task's function, defined in a source file.

    Returns:
        Hexadecimal digest of the sources that the function imports, the versions of
        ``LIBRARIES`` and the number of threads used for measurements.
    """
    file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
    return digest([_sources_digest(file), _library_versions(), load_settings().threads])


def recpress_version() -> str:
    """Return the installed version of recpress, such as ``0.1.0``."""
    return importlib.metadata.version("recpress")


def imported_sources(file: Path) -> tuple[Path, ...]:
    """List a source file and every project file that it imports, transitively, sorted.

    Imports inside functions and imports for type checkers count. Jinja2 templates in ``templates``
    of an imported file's folder also count: they are the text of its pages.
    """
    found: set[Path] = set()
    pending = [file]
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending += _direct_imports(source)
    folders = {source.parent for source in found}
    return tuple(sorted(found.union(*(folder.glob(TEMPLATES) for folder in folders))))


@functools.cache
def _direct_imports(file: Path) -> tuple[Path, ...]:
    """List the project's files in the import statements of one file, including packages."""
    names = set(_imported_names(ast.parse(file.read_bytes())))
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] in PACKAGES:
            for depth in range(1, len(parts) + 1):
                path = ROOT.joinpath(*parts[:depth])
                found |= {path.with_suffix(".py"), path / "__init__.py"}
    return tuple(sorted(path for path in found if path.is_file()))


def _imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield dotted names of modules and of the names imported from them, which may be modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def _sources_digest(file: Path) -> str:
    digester = hashlib.sha256()
    for source in imported_sources(file):
        inside = source.is_relative_to(ROOT)
        name = source.relative_to(ROOT).as_posix() if inside else source.name
        content = hashlib.sha256(source.read_bytes()).hexdigest()
        digester.update(f"{name}\0{content}\n".encode())
    return digester.hexdigest()


@functools.cache
def _library_versions() -> dict[str, str]:
    """Return installed versions of libraries; ``absent`` for those not installed."""
    versions = {}
    of_targets = (name for target in TARGETS.values() for name in target.libraries)
    for name in (*LIBRARIES, *of_targets):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions

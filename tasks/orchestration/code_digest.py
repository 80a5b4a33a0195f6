"""Compute the digest of the code that a task runs, which is part of its cache key. No Prefect.

A task's cached result is used only if its sources are unchanged. The sources are the file of the
task's function and every file of this project that it imports, directly or indirectly; import
statements are parsed, not executed. Templates in the folder ``templates`` next to such a file are
sources too. Read this file if a task unexpectedly runs again after a change, or does not.
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
"""Libraries whose versions can change results. The libraries that targets declare also count."""


def code_digest(function: Callable[..., Any]) -> str:
    """Return a digest of everything, except arguments, that can change a function's result.

    Args:
        function: a task's function, defined in a source file.

    Returns:
        Hexadecimal SHA-256 of the sources that the function imports, the versions of libraries, and
        the number of threads that ONNX Runtime uses.
    """
    file = Path(inspect.getsourcefile(inspect.unwrap(function)) or "")
    return digest([_hash_sources(file), _find_library_versions(), load_settings().threads])


def recpress_version() -> str:
    """Return the installed version of recpress, such as ``0.1.0``."""
    return importlib.metadata.version("recpress")


def list_imported_sources(file: Path) -> tuple[Path, ...]:
    """List a source file and every project file that it imports, directly or indirectly, sorted.

    Imports inside functions and imports for type checkers count. Jinja2 templates in the folder
    ``templates`` next to an imported file also count.
    """
    sources: set[Path] = set()
    pending = [file]
    while pending:
        source = pending.pop()
        if source not in sources:
            sources.add(source)
            pending += _list_direct_imports(source)
    folders = {source.parent for source in sources}
    return tuple(sorted(sources.union(*(folder.glob(TEMPLATES) for folder in folders))))


@functools.cache
def _list_direct_imports(file: Path) -> tuple[Path, ...]:
    """List the project files that one file imports, with the ``__init__.py`` of their packages."""
    names = set(_iterate_imported_names(ast.parse(file.read_bytes())))
    paths = set()
    for name in names:
        parts = name.split(".")
        if parts[0] in PACKAGES:
            for depth in range(1, len(parts) + 1):
                path = ROOT.joinpath(*parts[:depth])
                paths |= {path.with_suffix(".py"), path / "__init__.py"}
    return tuple(sorted(path for path in paths if path.is_file()))


def _iterate_imported_names(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names of imported modules, and of names imported from them.

    The latter may be modules too.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def _hash_sources(file: Path) -> str:
    """Return a SHA-256 over the path and contents of every source of a file."""
    hasher = hashlib.sha256()
    for source in list_imported_sources(file):
        is_in_project = source.is_relative_to(ROOT)
        name = source.relative_to(ROOT).as_posix() if is_in_project else source.name
        content = hashlib.sha256(source.read_bytes()).hexdigest()
        hasher.update(f"{name}\0{content}\n".encode())
    return hasher.hexdigest()


@functools.cache
def _find_library_versions() -> dict[str, str]:
    """Return the installed versions of libraries; ``absent`` for those that are not installed."""
    versions = {}
    of_targets = (name for target in TARGETS.values() for name in target.libraries)
    for name in (*LIBRARIES, *of_targets):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions

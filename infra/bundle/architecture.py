"""A network's class by its import path, from allow-listed modules only.

Importing a module runs it, so which modules may be imported is the operator's decision
(``RECPRESS_ALLOWED_MODULES``) and never the bundle's. An allow-listed module is trusted code:
this guards against a bundle that names something else, not against that code.
"""

import difflib
import hashlib
import importlib
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING

from compressors.contracts import is_out_of_memory
from infra.errors import BundleRefused

if TYPE_CHECKING:
    import torch

_PATH = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def network_class(path: str, allowed: Sequence[str]) -> "type[torch.nn.Module]":
    """Import an architecture.

    Args:
        path: ``module:Class``.
        allowed: modules that may be imported; what lies below them is allowed too
            (``a.b`` lets in ``a.b`` and ``a.b.c``, not ``a.bc``).

    Raises:
        BundleRefused: not allowed (then nothing was imported), not importable, or not a
            ``torch.nn.Module`` class whose own module is allowed.
    """
    module_name, class_name = _split(path, allowed)
    import torch

    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as fault:
        if fault.name is None or not _within(module_name, fault.name):
            raise BundleRefused(
                f"architecture {path!r}: {module_name} needs the module {fault.name}, which is "
                "not installed. Install it where recpress runs."
            ) from fault
        raise _not_found(path, module_name) from fault
    except (Exception, SystemExit) as fault:  # whatever that module's own code raises
        if is_out_of_memory(fault):
            raise
        raise BundleRefused(
            f"architecture {path!r}: importing {module_name} failed with "
            f"{type(fault).__name__}: {fault}. Repair it; 'python -c \"import {module_name}\"' "
            "shows the same."
        ) from fault
    found = vars(module).get(class_name)  # not getattr: a module may answer that with code
    if found is None:
        classes = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.nn.Module)
        ]
        close = difflib.get_close_matches(class_name, classes, n=3) or classes[:5]
        raise BundleRefused(
            f"architecture {path!r}: {module_name} has no class {class_name}; there is "
            f"{', '.join(close) or 'no network class in it'}."
        )
    if not isinstance(found, type) or not issubclass(found, torch.nn.Module):
        kind = f"a {type(found).__name__}" if not isinstance(found, type) else "another class"
        raise BundleRefused(
            f"architecture {path!r} is {kind}, not a torch.nn.Module class. Name the class that "
            "builds the network."
        )
    if not any(_within(found.__module__, root) for root in allowed):
        raise BundleRefused(
            f"architecture {path!r} is defined in {found.__module__}, which is not allowed: "
            f"{_how_to_allow(found.__module__, allowed)}"
        )
    return found


def source_digest(path: str, allowed: Sequence[str]) -> str:
    """SHA-256 over an architecture's source, so that caches notice when it was edited.

    Covers every ``.py`` of the innermost package the module lies in (or is), sub-packages
    included, because a network is rarely one file; a module outside any package is covered
    alone. Code that it imports from elsewhere is not covered. Nothing is imported.

    Raises:
        BundleRefused: not allowed, or there is no source file.
    """
    module_name, _ = _split(path, allowed)
    importlib.invalidate_caches()
    spec, package = _find(path, module_name)
    files: dict[str, Path] = {}
    if spec.origin is not None and spec.has_location:
        files["itself"] = Path(spec.origin)
    places = (package and package.submodule_search_locations) or ()
    for number, root in enumerate(places):  # a namespace package may have several
        for file in Path(root).rglob("*.py"):
            files[f"{number}/{file.relative_to(root).as_posix()}"] = file
    if not any(file.is_file() for file in files.values()):
        raise BundleRefused(
            f"architecture {path!r}: {module_name} has no source file, so a change in it could "
            "not be noticed. Use a module that lies on disk."
        )
    total = hashlib.sha256()
    for name in sorted(files):
        content = hashlib.sha256(files[name].read_bytes()).hexdigest()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


def _split(path: str, allowed: Sequence[str]) -> tuple[str, str]:
    """Module and class of a path; refuses before anything is imported."""
    match = _PATH.fullmatch(path)
    if match is None:
        raise BundleRefused(
            f"architecture {path[:200]!r} must be written 'package.module:Class'; it is imported "
            "as that and never evaluated."
        )
    module_name, class_name = match.groups()
    if not any(_within(module_name, root) for root in allowed):
        raise BundleRefused(
            f"architecture {path!r} is not allowed: {_how_to_allow(module_name, allowed)}"
        )
    return module_name, class_name


def _within(module_name: str, root: str) -> bool:
    return module_name == root or module_name.startswith(f"{root}.")


def _how_to_allow(module_name: str, allowed: Sequence[str]) -> str:
    return (
        f"importing a module runs its code, and only {', '.join(allowed) or 'nothing'} may be "
        f"imported. If you trust {module_name}, set "
        f"RECPRESS_ALLOWED_MODULES={','.join([*allowed, module_name])}"
    )


def _not_found(path: str, module_name: str) -> BundleRefused:
    return BundleRefused(
        f"architecture {path!r}: there is no module {module_name} to import. Put the folder that "
        f"holds {module_name.partition('.')[0]} on PYTHONPATH, or install its package."
    )


def _find(path: str, module_name: str) -> tuple[ModuleSpec, ModuleSpec | None]:
    """Where a module and its innermost package lie, asking the finders without importing."""
    spec: ModuleSpec | None = None
    package: ModuleSpec | None = None
    parts = module_name.split(".")
    for depth in range(1, len(parts) + 1):
        if depth > 1 and package is not spec:  # the part before this one is no package
            raise _not_found(path, module_name)
        places = None if package is None else package.submodule_search_locations
        name = ".".join(parts[:depth])
        specs = (finder.find_spec(name, places) for finder in sys.meta_path)
        spec = next((found for found in specs if found is not None), None)
        if spec is None:
            raise _not_found(path, module_name)
        if spec.submodule_search_locations is not None:
            package = spec
    if spec is None:
        raise _not_found(path, module_name)
    return spec, package

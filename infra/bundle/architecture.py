"""Import a network's class by its path, from allow-listed modules only.

Importing a module runs it, so which modules may be imported is the operator's decision
(``RECPRESS_ALLOWED_MODULES``) and never the bundle's. An allow-listed module is trusted code:
the check rejects bundles that name any other module, but does not sandbox allowed code.
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
    """Import a network's class from an allow-listed module.

    Args:
        path: ``module:Class``.
        allowed: modules that may be imported, with their submodules (``a.b`` allows ``a.b`` and
            ``a.b.c``, not ``a.bc``).

    Raises:
        BundleRefused: not allowed (then nothing was imported), not importable, or not a
            ``torch.nn.Module`` class that is defined in an allowed module.
    """
    module_name, class_name = _split(path, allowed)
    import torch

    importlib.invalidate_caches()
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as fault:
        if fault.name is None or not _within(module_name, fault.name):
            raise BundleRefused(
                "architecture_dependency_missing", path=path, module=module_name, missing=fault.name
            ) from fault
        raise _not_found(path, module_name) from fault
    except (Exception, SystemExit) as fault:  # the imported module may raise any exception
        if is_out_of_memory(fault):
            raise
        raise BundleRefused(
            "architecture_import_failed",
            path=path,
            module=module_name,
            kind=type(fault).__name__,
            problem=str(fault),
        ) from fault
    found = vars(module).get(class_name)  # not getattr: a module may answer that with code
    if found is None:
        classes = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, torch.nn.Module)
        ]
        if not classes:
            raise BundleRefused(
                "architecture_without_classes", path=path, module=module_name, name=class_name
            )
        close = difflib.get_close_matches(class_name, classes, n=3) or classes[:5]
        raise BundleRefused(
            "architecture_class_missing",
            path=path,
            module=module_name,
            name=class_name,
            classes=tuple(close),
        )
    if not isinstance(found, type) or not issubclass(found, torch.nn.Module):
        if isinstance(found, type):
            raise BundleRefused("architecture_no_module_class", path=path)
        raise BundleRefused("architecture_no_class", path=path, kind=type(found).__name__)
    if not any(_within(found.__module__, root) for root in allowed):
        raise BundleRefused(
            "architecture_defined_elsewhere",
            path=path,
            module=found.__module__,
            allowed=_named(allowed),
            setting=_setting(found.__module__, allowed),
        )
    return found


def source_digest(path: str, allowed: Sequence[str]) -> str:
    """Return the SHA-256 of an architecture's source, so that an edit invalidates caches.

    Covers every ``.py`` of the module's innermost package, including sub-packages, because a
    network is rarely one file. For a module outside any package only its file is covered. Code
    imported from other packages is not covered. Nothing is imported.

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
        raise BundleRefused("architecture_source_missing", path=path, module=module_name)
    total = hashlib.sha256()
    for name in sorted(files):
        content = hashlib.sha256(files[name].read_bytes()).hexdigest()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()


def _split(path: str, allowed: Sequence[str]) -> tuple[str, str]:
    """Split a path into module and class; raises before anything is imported."""
    match = _PATH.fullmatch(path)
    if match is None:
        raise BundleRefused("architecture_form", path=path[:200])
    module_name, class_name = match.groups()
    if not any(_within(module_name, root) for root in allowed):
        raise BundleRefused(
            "architecture_not_allowed",
            path=path,
            module=module_name,
            allowed=_named(allowed),
            setting=_setting(module_name, allowed),
        )
    return module_name, class_name


def _within(module_name: str, root: str) -> bool:
    return module_name == root or module_name.startswith(f"{root}.")


def _named(allowed: Sequence[str]) -> tuple[str, ...]:
    return tuple(allowed) or ("nothing",)


def _setting(module_name: str, allowed: Sequence[str]) -> str:
    """Return the value of RECPRESS_ALLOWED_MODULES that also allows this module."""
    return ",".join([*allowed, module_name])


def _not_found(path: str, module_name: str) -> BundleRefused:
    return BundleRefused(
        "architecture_module_missing",
        path=path,
        module=module_name,
        top=module_name.partition(".")[0],
    )


def _find(path: str, module_name: str) -> tuple[ModuleSpec, ModuleSpec | None]:
    """Locate a module and its innermost package through the finders, without importing."""
    spec: ModuleSpec | None = None
    package: ModuleSpec | None = None
    parts = module_name.split(".")
    for depth in range(1, len(parts) + 1):
        if depth > 1 and package is not spec:  # the previous part is not a package
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

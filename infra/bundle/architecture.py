"""Import a network's class by its path, from allow-listed modules only.

Importing a module runs its code. So the person who runs recpress decides which modules may be
imported (``RECPRESS_ALLOWED_MODULES``), and a bundle that names any other module is rejected. Code
of an allowed module is trusted: it does not run in a sandbox.
"""

import difflib
import hashlib
import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from compressors.contracts import OWN_NETWORKS, is_out_of_memory
from infra.errors import BundleRefused

if TYPE_CHECKING:
    import torch
T = TypeVar("T")

LAYERS = "torch.nn"
"""The module whose layer classes the arguments of a network's class may always name."""

OWN_PACKAGES = ("flows", "tasks", "compressors", "infra")
"""Packages of this project. Python imports only one package of a name, so a user's is refused."""

# module:Class
_PATH = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)")


def network_class(path: str, allowed: Sequence[str]) -> "type[torch.nn.Module]":
    """Import a network's class from an allow-listed module.

    Args:
        path: the class in the form ``module:Class``.
        allowed: modules that may be imported, with their submodules (``a.b`` allows ``a.b`` and
            ``a.b.c``, not ``a.bc``).

    Raises:
        BundleRefused: the module is not allowed (then nothing was imported) or cannot be imported;
            or the class is not a subclass of ``torch.nn.Module`` defined in an allowed module.
    """
    import torch

    return _import_class(path, allowed, torch.nn.Module)


def argument_classes(paths: Sequence[str], allowed: Sequence[str]) -> dict[str, type]:
    """Import the classes that the arguments of a network's class name.

    A layer class of ``torch.nn``, such as ``torch.nn:ReLU``, is always allowed.

    Args:
        paths: the classes in the form ``module:Class``.
        allowed: modules that may be imported, as in ``network_class``.

    Returns:
        The classes by path.

    Raises:
        BundleRefused: a module is not allowed or cannot be imported, or has no such class.
    """
    return {path: _import_argument_class(path, allowed) for path in paths}


def _import_argument_class(path: str, allowed: Sequence[str]) -> type:
    import torch

    module_name, _, class_name = path.partition(":")
    if module_name == LAYERS:
        layer = vars(torch.nn).get(class_name)
        if isinstance(layer, type) and issubclass(layer, torch.nn.Module):
            return layer
    return _import_class(path, allowed, object)


def _import_class(path: str, allowed: Sequence[str], base: "type[T]") -> "type[T]":
    """Import a class from an allow-listed module.

    Args:
        path: the class in the form ``module:Class``.
        allowed: modules that may be imported, as in ``network_class``.
        base: the class, or a base class of it.

    Raises:
        BundleRefused: the module is not allowed (then nothing was imported) or cannot be imported;
            or the class is not a subclass of ``base`` that is defined in an allowed module.
    """
    module = import_allowed_module(path, allowed)
    module_name, _, class_name = path.partition(":")
    # Not getattr(), which would call a __getattr__ function of the module.
    loaded = vars(module).get(class_name)
    if loaded is None:
        classes = [
            name
            for name, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, base)
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
    if not isinstance(loaded, type):
        raise BundleRefused("architecture_no_class", path=path, kind=type(loaded).__name__)
    if not issubclass(loaded, base):
        raise BundleRefused("architecture_no_module_class", path=path)
    # OWN_NETWORKS: network classes of recpress, such as the one for ONNX files.
    if path not in OWN_NETWORKS and not any(is_within(loaded.__module__, root) for root in allowed):
        raise BundleRefused(
            "architecture_defined_elsewhere",
            path=path,
            module=loaded.__module__,
            allowed=_format_allowed_modules(allowed),
            setting=_extend_setting(loaded.__module__, allowed),
        )
    return loaded


@contextmanager
def restored_anomaly_detection() -> Iterator[None]:
    """Restore the setting of torch's anomaly detection at the end of the block.

    Modules of RecBole enable it when they are imported, which slows down all training in the
    process, and replaces recpress's error for a loss that is not finite.
    """
    import torch

    is_enabled = torch.is_anomaly_enabled()
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(is_enabled)


def import_allowed_module(path: str, allowed: Sequence[str]) -> ModuleType:
    """Import the module of a path ``module:name`` if it is allowed.

    Args:
        path: a class, function or variable in the form ``module:name``.
        allowed: modules that may be imported, as in ``network_class``.

    Raises:
        BundleRefused: the module is not allowed (then nothing was imported) or cannot be imported.
    """
    module_name, _ = _split_and_check(path, allowed)
    importlib.invalidate_caches()
    try:
        with restored_anomaly_detection():
            return importlib.import_module(module_name)
    except ModuleNotFoundError as fault:
        if fault.name is None or not is_within(module_name, fault.name):
            raise BundleRefused(
                "architecture_dependency_missing", path=path, module=module_name, missing=fault.name
            ) from fault
        raise _build_module_missing(path, module_name) from fault
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


def source_digest(path: str, allowed: Sequence[str], arguments: Sequence[str] = ()) -> str:
    """Hash the source code of a network's class; cache keys contain the hash.

    The hash covers every ``.py`` file of the module's innermost package and its sub-packages,
    because the code of a network is usually in several files. For a module outside any
    package it covers only its file. Code of other packages is not covered. Nothing is imported.

    Args:
        path: the class in the form ``module:Class``.
        allowed: modules that may be imported, as in ``network_class``.
        arguments: paths of the classes that its arguments name; those of ``torch.nn`` do not count.

    Returns:
        SHA-256 as hex digits.

    Raises:
        BundleRefused: the module is not allowed, does not exist, or has no source file.
    """
    custom_classes = [item for item in arguments if item.partition(":")[0] != LAYERS]
    digests = dict.fromkeys(_hash_package(item, allowed) for item in (path, *custom_classes))
    if len(digests) == 1:
        return next(iter(digests))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _hash_package(path: str, allowed: Sequence[str]) -> str:
    """Hash the source files of the package of a class."""
    module_name, _ = _split_and_check(path, allowed)
    importlib.invalidate_caches()
    spec, package = _find_spec(path, module_name)
    files: dict[str, Path] = {}
    if spec.origin is not None and spec.has_location:
        files["itself"] = Path(spec.origin)  # the name is part of the hash
    locations = (package and package.submodule_search_locations) or ()
    for number, root in enumerate(locations):  # a namespace package may have several
        for file in Path(root).rglob("*.py"):
            files[f"{number}/{file.relative_to(root).as_posix()}"] = file
    if not any(file.is_file() for file in files.values()):
        raise BundleRefused("architecture_source_missing", path=path, module=module_name)
    digest = hashlib.sha256()
    for name in sorted(files):
        content = hashlib.sha256(files[name].read_bytes()).hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def _split_and_check(path: str, allowed: Sequence[str]) -> tuple[str, str]:
    """Split ``module:Class`` and raise ``BundleRefused`` if the module is not allowed.

    A network of recpress itself is always allowed.
    """
    match = _PATH.fullmatch(path)
    if match is None:
        raise BundleRefused("architecture_form", path=path[:200])
    module_name, class_name = match.groups()
    if path in OWN_NETWORKS:
        return module_name, class_name
    package = module_name.partition(".")[0]
    if package in OWN_PACKAGES:
        raise BundleRefused("architecture_name_taken", path=path, package=package)
    if not any(is_within(module_name, root) for root in allowed):
        raise BundleRefused(
            "architecture_not_allowed",
            path=path,
            module=module_name,
            allowed=_format_allowed_modules(allowed),
            setting=_extend_setting(module_name, allowed),
        )
    return module_name, class_name


def is_within(module_name: str, root: str) -> bool:
    """Return whether a module is ``root`` or one of its submodules."""
    return module_name == root or module_name.startswith(f"{root}.")


def _format_allowed_modules(allowed: Sequence[str]) -> tuple[str, ...]:
    """Return the allowed modules for an error message; the word "nothing" if there are none."""
    return tuple(allowed) or ("nothing",)


def _extend_setting(module_name: str, allowed: Sequence[str]) -> str:
    """Return the value of RECPRESS_ALLOWED_MODULES that also allows this module."""
    return ",".join([*allowed, module_name])


def _build_module_missing(path: str, module_name: str) -> BundleRefused:
    """Return the error for a module that does not exist; it names the top-level package too."""
    return BundleRefused(
        "architecture_module_missing",
        path=path,
        module=module_name,
        top=module_name.partition(".")[0],
    )


def _find_spec(path: str, module_name: str) -> tuple[ModuleSpec, ModuleSpec | None]:
    """Return the specs of a module and of its innermost package (or None), without an import.

    ``importlib.util.find_spec`` is not used, because it imports the parent packages.
    """
    spec: ModuleSpec | None = None
    package: ModuleSpec | None = None
    parts = module_name.split(".")
    for depth in range(1, len(parts) + 1):
        if depth > 1 and package is not spec:  # the previous part is not a package
            raise _build_module_missing(path, module_name)
        locations = None if package is None else package.submodule_search_locations
        name = ".".join(parts[:depth])
        specs = (_find(finder, name, locations) for finder in sys.meta_path)
        spec = next((candidate for candidate in specs if candidate is not None), None)
        if spec is None:
            raise _build_module_missing(path, module_name)
        if spec.submodule_search_locations is not None:
            package = spec
    if spec is None:
        raise _build_module_missing(path, module_name)
    return spec, package


def _find(finder: Any, name: str, locations: Sequence[str] | None) -> ModuleSpec | None:
    """Call a finder for a module whose parent packages are not imported."""
    spec: ModuleSpec | None
    try:
        spec = finder.find_spec(name, locations)
    except KeyError:
        # For a folder without __init__.py, PathFinder reads the path of the parent package from
        # sys.modules. Without the name of the parent, it searches only the given locations.
        spec = finder.find_spec(name.rpartition(".")[2], locations)
    return spec

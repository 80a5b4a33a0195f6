"""Objects that a declaration names, imported when they are first used."""

from importlib import import_module
from typing import Any


def named_object(reference: Any) -> Any:
    """Return the object that ``module:name`` names; anything but a text is returned unchanged."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)

"""Import an object that a text ``module:name`` names, so that callers can import it late."""

from importlib import import_module
from typing import Any


def named_object(reference: Any) -> Any:
    """Import the object that a text ``module:name`` names; other values are returned.

    Raises:
        ImportError: there is no such module.
        AttributeError: the module has no such name.
    """
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)

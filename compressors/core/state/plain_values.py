"""Find tensors, devices and texts of a module outside its parameters, buffers and submodules.

Constructors store parameters in lists (for a penalty), devices in attributes, and tensors in
settings objects. These "plain values" are not in the state dict, so loading searches for them.
"""

import functools
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MAX_ENTRIES = 10_000
"""A container with more entries is not searched: it is data, not a list of tensors."""

MAX_DEPTH = 8
"""Objects and containers nested more deeply are not searched."""
# Attributes of every module, such as its parameters, hooks and training flag.
_INTERNAL = frozenset(vars(nn.Module()))
_NOT_SEARCHED = type | ModuleType | FunctionType | BuiltinFunctionType | MethodType | np.ndarray


@dataclass(frozen=True)
class PlainValue:
    """A tensor, device or text in an attribute, or in a container or object in an attribute.

    Attributes:
        path: where the value is, such as ``tower.sizes[0]``.
        value: the tensor, device or text.
        owner: the object or container that contains the value.
        key: the value's attribute name, key or index in its owner.
    """

    path: str
    value: Any
    owner: Any
    key: Any

    @property
    def name(self) -> str:
        """The attribute name or text key of the value; the path if its key is not a text."""
        return str(self.key) if isinstance(self.key, str) else self.path

    def replace(self, value: Any) -> bool:
        """Replace the value in its owner; return False if the owner is immutable."""
        if isinstance(self.owner, dict | list):
            self.owner[self.key] = value
        elif isinstance(self.key, str) and hasattr(self.owner, "__dict__"):
            vars(self.owner)[self.key] = value
        else:
            return False
        return True


def plain_values(module: nn.Module) -> Iterator[PlainValue]:
    """Yield the plain values of a module and its submodules; each container is searched once.

    If an attribute contains a module that is not registered (in a list), all tensors of that module
    are yielded.
    """
    visited = {id(part) for part in module.modules()}
    for name, part in module.named_modules():
        yield from _iterate_attributes(name, part, visited, depth=0)


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield path and tensor of what ``load_state_dict`` does not fill.

    These are tensors among the plain values, and non-persistent buffers.
    """
    for name, part in module.named_modules():
        for buffer in part._non_persistent_buffers_set:
            value = part._buffers.get(buffer)
            if value is not None:
                yield f"{name}.{buffer}".removeprefix("."), value
    for item in plain_values(module):
        if isinstance(item.value, Tensor):
            yield item.path, item.value


def _iterate_attributes(
    path: str, owner: Any, visited: set[int], depth: int
) -> Iterator[PlainValue]:
    """Yield the plain values in the attributes of an object."""
    internal = _INTERNAL if isinstance(owner, nn.Module) else frozenset[str]()
    for key, value in list(vars(owner).items()):
        if key not in internal:
            inner = f"{path}.{key}".removeprefix(".")
            yield from _search(PlainValue(inner, value, owner, key), visited, depth)


def _search(item: PlainValue, visited: set[int], depth: int) -> Iterator[PlainValue]:
    """Yield a value if it is a tensor, device or text, or else the plain values inside of it.

    ``visited`` contains the ids of objects that have been searched; ``depth`` is the nesting depth.
    """
    value = item.value
    if isinstance(value, Tensor | torch.device | str):
        yield item
        return
    if value is None or isinstance(value, bool | int | float | bytes | _NOT_SEARCHED):
        return
    if id(value) in visited or depth == MAX_DEPTH:
        return
    visited.add(id(value))
    for key, entry, path in _iterate_entries(item):
        yield from _search(PlainValue(path, entry, value, key), visited, depth + 1)
    if isinstance(value, nn.Module):
        for entries in (value._parameters, value._buffers, value._modules):
            for key, entry in entries.items():
                inner = PlainValue(f"{item.path}.{key}", entry, entries, key)
                yield from _search(inner, visited, depth + 1)
    if hasattr(value, "__dict__"):
        yield from _iterate_attributes(item.path, value, visited, depth + 1)


def _iterate_entries(item: PlainValue) -> Iterator[tuple[Any, Any, str]]:
    """Yield the entries of a container with their keys and paths."""
    value = item.value
    if isinstance(value, functools.partial):
        yield from ((None, entry, item.path) for entry in (*value.args, *value.keywords.values()))
    elif isinstance(value, Mapping):
        if len(value) <= MAX_ENTRIES:
            for key, entry in list(value.items()):
                yield key, entry, f"{item.path}[{key!r}]"
    elif isinstance(value, list | tuple | set | frozenset | deque) and len(value) <= MAX_ENTRIES:
        for index, entry in enumerate(list(value)):
            yield index, entry, f"{item.path}[{index}]"

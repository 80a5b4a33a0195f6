"""Find tensors, devices and texts of a module outside its parameters, buffers and submodules.

Constructors store references to parameters in lists (for a penalty), devices in attributes, and
tensors in settings objects. No state dict lists them, so loading has to search for them.
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

MOST_ENTRIES = 10_000
"""A container with more entries is data, not a list of tensors: it is not searched."""

MOST_DEPTH = 8
_INTERNAL = frozenset(vars(nn.Module()))
_CLOSED = type | ModuleType | FunctionType | BuiltinFunctionType | MethodType | np.ndarray


@dataclass(frozen=True)
class PlainValue:
    """A tensor, device or text in a plain attribute, or in a container or object stored there."""

    path: str
    value: Any
    owner: Any
    key: Any

    @property
    def name(self) -> str:
        """The attribute or key of the value, or the path if the key is an index."""
        return str(self.key) if isinstance(self.key, str) else self.path

    def replace(self, value: Any) -> bool:
        """Replace the value in its owner; False if the owner is immutable, such as a tuple."""
        if isinstance(self.owner, dict | list):
            self.owner[self.key] = value
        elif isinstance(self.key, str) and hasattr(self.owner, "__dict__"):
            vars(self.owner)[self.key] = value
        else:
            return False
        return True


def plain_values(module: nn.Module) -> Iterator[PlainValue]:
    """Yield tensors, devices and texts outside a module tree's state; each container once.

    Modules that are not registered (in a plain list) count with all their tensors.
    """
    visited = {id(part) for part in module.modules()}
    for name, part in module.named_modules():
        yield from _attributes(name, part, visited, 0)


def plain_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors that ``load_state_dict`` does not fill: plain values, unsaved buffers."""
    for name, part in module.named_modules():
        for buffer in part._non_persistent_buffers_set:
            value = part._buffers.get(buffer)
            if value is not None:
                yield f"{name}.{buffer}".removeprefix("."), value
    for item in plain_values(module):
        if isinstance(item.value, Tensor):
            yield item.path, item.value


def _attributes(path: str, owner: Any, visited: set[int], depth: int) -> Iterator[PlainValue]:
    internal = _INTERNAL if isinstance(owner, nn.Module) else frozenset[str]()
    for key, value in list(vars(owner).items()):
        if key not in internal:
            inner = f"{path}.{key}".removeprefix(".")
            yield from _walk(PlainValue(inner, value, owner, key), visited, depth)


def _walk(item: PlainValue, visited: set[int], depth: int) -> Iterator[PlainValue]:
    value = item.value
    if isinstance(value, Tensor | torch.device | str):
        yield item
        return
    if value is None or isinstance(value, bool | int | float | bytes | _CLOSED):
        return
    if id(value) in visited or depth == MOST_DEPTH:
        return
    visited.add(id(value))
    for key, entry, path in _entries(item):
        yield from _walk(PlainValue(path, entry, value, key), visited, depth + 1)
    if isinstance(value, nn.Module):
        for entries in (value._parameters, value._buffers, value._modules):
            for key, entry in entries.items():
                inner = PlainValue(f"{item.path}.{key}", entry, entries, key)
                yield from _walk(inner, visited, depth + 1)
    if hasattr(value, "__dict__"):
        yield from _attributes(item.path, value, visited, depth + 1)


def _entries(item: PlainValue) -> Iterator[tuple[Any, Any, str]]:
    """Yield the entries of a container with their keys and paths."""
    value = item.value
    if isinstance(value, functools.partial):
        yield from ((None, entry, item.path) for entry in (*value.args, *value.keywords.values()))
    elif isinstance(value, Mapping):
        if len(value) <= MOST_ENTRIES:
            for key, entry in list(value.items()):
                yield key, entry, f"{item.path}[{key!r}]"
    elif isinstance(value, list | tuple | set | frozenset | deque) and len(value) <= MOST_ENTRIES:
        for place, entry in enumerate(list(value)):
            yield place, entry, f"{item.path}[{place}]"

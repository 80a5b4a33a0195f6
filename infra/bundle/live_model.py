"""Import a trained network from a user's module, and describe how it was constructed.

A bundle builds a network from its class and arguments that JSON can represent, but a network in
memory does not store its arguments. So ``import_network`` records the arguments of constructors
while the network's code runs, and ``describe_architecture`` returns the network's arguments as JSON
values, including arguments that are objects (``compressors/contracts/network.py``).

An object cannot be constructed again from its arguments if they are unknown, or if its constructor
opens files. It is described by what the network's constructor reads from it: attributes, items and
results of calls (``recorded_reads.py``).

A draft is the folder that becomes a bundle when it is packed. ``DraftRefused`` is raised if no
draft can be written.
"""

import dataclasses
import enum
import importlib
import inspect
import math
import numbers
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from compressors.contracts import ARGUMENTS, CLASS, Architecture, is_out_of_memory
from infra.bundle.architecture import (
    LAYERS,
    argument_classes,
    import_allowed_module,
    is_within,
    restored_anomaly_detection,
)
from infra.bundle.recorded_reads import record_reads
from infra.errors import DraftRefused

if TYPE_CHECKING:
    from torch import nn


@dataclass
class ConstructorCalls:
    """The objects that were constructed while the calls were recorded, with their arguments.

    Only layers and objects of allowed modules are recorded, since a bundle can name no others, and
    a script may construct many large objects.

    Attributes:
        allowed: modules that may be imported, as in ``network_class``.
        arguments: by ``id`` of an object, the object and its constructor's arguments by name. The
            object is stored so that no later object receives its ``id``.
        readers: ``id`` of each object whose constructor opened a file.
    """

    allowed: Sequence[str]
    arguments: dict[int, tuple[object, dict[str, Any]]] = field(default_factory=dict)
    readers: set[int] = field(default_factory=set)
    _running: list[tuple[FrameType, int]] = field(default_factory=list)

    def record(self, frame: FrameType, event: str, function: object) -> None:
        """Record one call of an ``__init__``, or that it opens a file, for ``sys.setprofile``."""
        if event == "c_call" and function is open:
            self.readers |= {constructed for _, constructed in self._running}
        if event == "return" and self._running and self._running[-1][0] is frame:
            self._running.pop()
        code = frame.f_code
        if event != "call" or code.co_name != "__init__" or code.co_argcount == 0:
            return
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values = dict(frame.f_locals)
        constructed = values[names[0]]
        if id(constructed) in self.arguments:  # the constructor of a base class
            return
        if not _can_be_named(type(constructed), self.allowed):
            return
        arguments = {name: values[name] for name in names[1:] if name in values}
        variadic_names = iter(code.co_varnames[len(names) :])
        if code.co_flags & inspect.CO_VARARGS and values.get(name := next(variadic_names)):
            arguments[f"*{name}"] = values[name]
        if code.co_flags & inspect.CO_VARKEYWORDS:
            arguments |= values.get(next(variadic_names), {})
        copies = {name: _copy_containers(value) for name, value in arguments.items()}
        self.arguments[id(constructed)] = (constructed, copies)
        self._running.append((frame, id(constructed)))

    def needs_recorded_reads(self, value: object) -> bool:
        """Return whether a bundle describes an object by what the network reads from it.

        It does if the object's class is in an allowed module, but a bundle cannot construct the
        object again: its arguments are unknown, or its constructor opens files, which may be
        missing when the bundle is loaded.
        """
        import torch

        # These, and dataclasses, are described by their class and arguments, or as a JSON list.
        is_described_otherwise = isinstance(value, torch.nn.Module | type | enum.Enum | tuple)
        if is_described_otherwise or dataclasses.is_dataclass(value):
            return False
        is_known = id(value) in self.arguments and id(value) not in self.readers
        return not is_known and _can_be_named(type(value), self.allowed)


def _copy_containers(value: Any) -> Any:
    """Copy nested lists and dictionaries, which a constructor may change, but not their items."""
    if type(value) is list:
        return [_copy_containers(item) for item in value]
    if type(value) is dict:
        return {key: _copy_containers(item) for key, item in value.items()}
    return value


def import_network(path: str, allowed: Sequence[str]) -> "tuple[nn.Module, ConstructorCalls]":
    """Import a trained network, or call a function without arguments that returns one.

    Args:
        path: the variable or function in the form ``module:name``.
        allowed: modules that may be imported, as in ``network_class``.

    Returns:
        The network on the CPU in evaluation mode, and the recorded constructor calls.

    Raises:
        BundleRefused: the module is not allowed or cannot be imported.
        DraftRefused: there is no such name, the function fails, or the value is no network.
    """
    import torch

    calls = ConstructorCalls(allowed)
    # Standard output has only recpress's results, so prints of the user's code go to standard
    # error. That code may also enable anomaly detection of torch.autograd for the whole process.
    with (
        _record_constructor_calls(calls),
        redirect_stdout(sys.stderr),
        restored_anomaly_detection(),
    ):
        module = import_allowed_module(path, allowed)
        name = path.partition(":")[2]
        if name not in vars(module):
            raise DraftRefused("model_missing", path=path, names=_list_candidates(vars(module)))
        value = vars(module)[name]
        if inspect.isclass(value):
            raise DraftRefused("model_is_class", path=path)
        if not isinstance(value, torch.nn.Module) and callable(value):
            try:
                value = value()
            except (Exception, SystemExit) as fault:  # the network's code may raise anything
                if is_out_of_memory(fault):
                    raise
                raise DraftRefused(
                    "model_function_failed", path=path, problem=repr(fault)
                ) from fault
    if not isinstance(value, torch.nn.Module):
        raise DraftRefused("model_no_network", path=path, kind=type(value).__name__)
    value.eval()
    return value.cpu(), calls


def _list_candidates(names: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of networks and functions that a module defines."""
    import torch

    return tuple(
        name
        for name, value in names.items()
        if isinstance(value, torch.nn.Module)
        or (inspect.isfunction(value) and value.__module__ == names.get("__name__"))
    )


def _can_be_named(of: type, allowed: Sequence[str]) -> bool:
    """Return whether a bundle may name a class as that of an argument."""
    import torch

    return issubclass(of, torch.nn.Module) or any(
        is_within(of.__module__, root) for root in allowed
    )


@contextmanager
def _record_constructor_calls(calls: ConstructorCalls) -> Iterator[None]:
    """Record constructor calls of this thread; another profile function is paused."""
    previous = sys.getprofile()
    sys.setprofile(calls.record)
    try:
        yield
    finally:
        sys.setprofile(previous)


def describe_architecture(network: "nn.Module", calls: ConstructorCalls) -> Architecture:
    """Return the class of a network and the arguments it was constructed with.

    Arguments that equal their default are left out. If an argument is described by what is read
    from it, the network is constructed once more.

    Raises:
        DraftRefused: the network was not constructed while calls were recorded, or an argument
            cannot be stored.
    """
    path = class_path(type(network))
    arguments = _select_recorded_arguments(network, calls)
    if arguments is None:
        raise DraftRefused("model_not_constructed", architecture=path)
    if variable := next((name for name in arguments if name.startswith("*")), None):
        place = f"{type(network).__name__}({variable})"
        raise DraftRefused("argument_not_stored", place=place, kind="tuple")

    def encode(value: Any, place: str) -> Any:
        if calls.needs_recorded_reads(value):
            raise DraftRefused("argument_not_stored", place=place, kind=type(value).__name__)
        return _encode(value, calls, place=place)

    names = tuple(name for name, value in arguments.items() if calls.needs_recorded_reads(value))
    reads = record_reads(type(network), arguments, names, encode) if names else {}
    config = {
        name: reads[name] if name in reads else encode(value, f"{type(network).__name__}({name})")
        for name, value in arguments.items()
    }
    return Architecture(path=path, config=config)


def class_path(of: type) -> str:
    """Return the path ``module:Class`` of a class, which for layers of torch is ``torch.nn:Class``.

    Raises:
        DraftRefused: the class cannot be imported by this path.
    """
    import torch

    if vars(torch.nn).get(of.__name__) is of:
        return f"{LAYERS}:{of.__name__}"
    module = importlib.import_module(of.__module__)
    if of.__module__ == "__main__" or vars(module).get(of.__name__) is not of:
        raise DraftRefused("class_not_importable", name=of.__qualname__, module=of.__module__)
    return f"{of.__module__}:{of.__name__}"


def _select_recorded_arguments(value: object, calls: ConstructorCalls) -> dict[str, Any] | None:
    """Return the arguments that differ from their defaults; None if no call was recorded.

    Named tuples and members of an enumeration need no recorded call: all their values are returned.
    """
    if isinstance(value, tuple) and hasattr(value, "_asdict"):  # a named tuple
        return dict(value._asdict())
    if isinstance(value, enum.Enum):
        return {"value": value.value}
    if id(value) not in calls.arguments:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # Fields may have been set after the object was constructed.
        return {
            item.name: getattr(value, item.name)
            for item in dataclasses.fields(value)
            if item.init and not _has_default(item, getattr(value, item.name))
        }
    parameters = inspect.signature(type(value)).parameters
    return {
        name: argument
        for name, argument in calls.arguments[id(value)][1].items()
        if name not in parameters or not _is_default(parameters[name].default, argument)
    }


def _has_default(item: "dataclasses.Field[Any]", value: Any) -> bool:
    """Return whether a field of a dataclass has its default value."""
    if item.default_factory is not dataclasses.MISSING:
        return bool(item.default_factory() == value)
    return item.default is value


def _is_default(default: Any, argument: Any) -> bool:
    """Return whether an argument is the default of its parameter; lists are compared by value."""
    if type(argument) in (list, dict):
        return type(default) is type(argument) and bool(default == argument)
    return default is argument


def _encode(value: Any, calls: ConstructorCalls, *, place: str) -> Any:
    """Return the JSON value that describes an argument.

    A class is ``{"$class": "module:Class"}``; an object has its arguments as ``$arguments`` too.

    Args:
        value: the argument, or a part of it.
        calls: the recorded constructor calls.
        place: where the value is, for the error message.

    Raises:
        DraftRefused: JSON and the constructors of classes cannot represent the value.
    """
    import torch

    if value is None or (isinstance(value, bool | str) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, enum.Enum):
        return int(value)
    if (
        isinstance(value, numbers.Real)
        and math.isfinite(value)
        and not isinstance(value, enum.Enum)
    ):
        return float(value)
    if isinstance(value, torch.device):
        return str(value)
    if isinstance(value, type):
        return {CLASS: class_path(value)}
    arguments = _select_recorded_arguments(value, calls)
    if arguments is not None and not any(name.startswith("*") for name in arguments):
        encoded = {
            name: _encode(item, calls, place=f"{place}.{name}") for name, item in arguments.items()
        }
        return {CLASS: class_path(type(value)), ARGUMENTS: encoded}
    if isinstance(value, list | tuple):
        return [_encode(item, calls, place=f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _encode(item, calls, place=f"{place}[{key!r}]") for key, item in value.items()}
    if dataclasses.is_dataclass(value):  # of a module that is not allowed: raises
        argument_classes((class_path(type(value)),), calls.allowed)
    raise DraftRefused("argument_not_stored", place=place, kind=type(value).__name__)

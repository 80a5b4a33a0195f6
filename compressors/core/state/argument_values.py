"""Create the objects that a network's configuration describes (``contracts/network.py``).

Which classes a configuration may name is decided before a network is built, by the allow-list of
``infra/bundle/architecture.py``. ``register_argument_classes`` receives the classes that passed;
``decode_arguments`` uses no other class, and imports nothing. The registered classes are kept for
the process, because steps build networks again with changed configurations.
"""

from collections.abc import Mapping
from typing import Any

from compressors.contracts.network import ARGUMENTS, CLASS, READS, Reads, is_class_description
from compressors.core.state.recorded_object import RecordedObject
from compressors.errors.construction import ConstructionFailed

_CLASSES: dict[str, type] = {}


def register_argument_classes(classes: Mapping[str, type]) -> None:
    """Let configurations name these classes, by their path ``module:Class``."""
    _CLASSES.update(classes)


def decode_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with objects in place of their descriptions.

    All lists and dictionaries are copied, because a constructor may change them.

    Raises:
        ConstructionFailed: a description has another form or names a class that is not registered.
    """
    return {name: _decode(value) for name, value in config.items()}


def _decode(value: Any) -> Any:
    """Return the value that a JSON value describes."""
    if isinstance(value, list | tuple):
        return [_decode(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if READS in value:
        return _decode_reads(value)
    if not is_class_description(value):
        return {key: _decode(item) for key, item in value.items()}
    path, arguments = value[CLASS], value.get(ARGUMENTS)
    if value.keys() - {CLASS, ARGUMENTS} or not isinstance(arguments, Mapping | None):
        raise ConstructionFailed("argument_form", keys=tuple(map(str, value)))
    argument_class = _CLASSES.get(path) if isinstance(path, str) else None
    if argument_class is None:
        raise ConstructionFailed("argument_class_unknown", path=str(path))
    if arguments is None:
        return argument_class
    return argument_class(**{str(name): _decode(item) for name, item in arguments.items()})


def _decode_reads(description: Mapping[str, Any]) -> RecordedObject:
    """Return an object that returns what a constructor once read from the original object.

    Raises:
        ConstructionFailed: the description has another form.
    """
    try:
        if description.keys() != {READS}:
            raise ValueError(f"expected the only key {READS}, got {sorted(description)}")
        reads = Reads.model_validate(description[READS])
    except ValueError as fault:
        raise ConstructionFailed("reads_form", problem=str(fault)) from fault
    calls = (
        call.model_copy(
            update={
                "arguments": _decode(call.arguments),
                "keywords": _decode(call.keywords),
                "value": _decode(call.value),
            }
        )
        for call in reads.calls
    )
    return RecordedObject(
        reads.model_copy(
            update={
                "attributes": _decode(reads.attributes),
                "items": _decode(reads.items),
                "calls": tuple(calls),
            }
        )
    )

"""Record what a constructor reads from an argument that a bundle cannot store.

The network is constructed once more, with a stand-in for the argument: it passes each read on to
the argument and records the result (``contracts/network.py`` shows the form). ``RecordedObject`` of
``compressors/core/state/recorded_object.py`` later returns these results.
"""

from collections.abc import Callable, Mapping
from typing import Any

from compressors.contracts import READS, Reads, RecordedCall, is_out_of_memory
from infra.errors import DraftRefused, Refused

Encode = Callable[[Any, str], Any]
"""Returns the JSON value of a value at a place; raises ``Refused`` if there is none."""


def record_reads(
    network_class: type, arguments: Mapping[str, Any], names: tuple[str, ...], encode: Encode
) -> dict[str, Any]:
    """Construct a network again, and return the JSON values of arguments that are recorded.

    Args:
        network_class: class of the network.
        arguments: the arguments of its constructor.
        names: the arguments to record.
        encode: encodes the values that are read.

    Raises:
        DraftRefused: the constructor fails, because it uses a value that JSON cannot represent for
            more than reads; contains the last one.
    """
    opaque: list[tuple[str, str]] = []
    stand_ins = {
        name: StandIn(arguments[name], f"{network_class.__name__}({name})", encode, opaque)
        for name in names
    }
    try:
        network_class(**{**arguments, **stand_ins})
    except Exception as fault:  # of the user's class
        if is_out_of_memory(fault):
            raise
        place, kind = opaque[-1] if opaque else (f"{network_class.__name__}({names[0]})", "object")
        raise DraftRefused(
            "read_not_stored", place=place, kind=kind, problem=repr(fault)
        ) from fault
    return {name: description(stand_in) for name, stand_in in stand_ins.items()}


class StandIn:
    """Passes reads on to a value and records them.

    It has no public attribute, and no other special method, so that any other use of it raises an
    error.

    Args:
        value: the value that is read.
        place: the expression that reads it, for messages.
        encode: encodes the results.
        opaque: receives the place and type of each result that JSON cannot represent.
    """

    __iter__ = None  # otherwise Python iterates over [0], [1], ...

    def __init__(
        self, value: Any, place: str, encode: Encode, opaque: list[tuple[str, str]]
    ) -> None:
        self._value, self._place, self._encode, self._opaque = value, place, encode, opaque
        self._attributes: dict[str, Any] = {}
        self._items: dict[str, Any] = {}
        self._contains: dict[str, bool] = {}
        self._calls: list[tuple[list[Any], dict[str, Any], Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_value" not in vars(self):
            raise AttributeError(name)
        if name not in self._attributes:
            value = getattr(self._value, name)
            self._attributes[name] = self._recorded(value, f"{self._place}.{name}")
        return _result(self._attributes[name])

    def __getitem__(self, key: Any) -> Any:
        place = f"{self._place}[{key!r}]"
        if not isinstance(key, str):
            raise TypeError(f"expected a text as key, got {place}")
        if key not in self._items:
            self._items[key] = self._recorded(self._value[key], place)
        return _result(self._items[key])

    def __contains__(self, key: Any) -> bool:
        if not isinstance(key, str):
            raise TypeError(f"expected a text as key, got {key!r} in {self._place}")
        return self._contains.setdefault(key, key in self._value)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        texts = [*map(repr, arguments), *(f"{name}={item!r}" for name, item in keywords.items())]
        place = f"{self._place}({', '.join(texts)})"
        encoded = [self._encode(item, place) for item in arguments]
        encoded_keywords = {name: self._encode(item, place) for name, item in keywords.items()}
        for known, known_keywords, recorded in self._calls:
            if (known, known_keywords) == (encoded, encoded_keywords):
                return _result(recorded)
        recorded = self._recorded(self._value(*arguments, **keywords), place)
        self._calls.append((encoded, encoded_keywords, recorded))
        return _result(recorded)

    def _recorded(self, value: Any, place: str) -> "tuple[Any, Any] | StandIn":
        """Return a value with its JSON value; a stand-in if it has none."""
        try:
            return value, self._encode(value, place)
        except Refused:
            if not callable(value):
                self._opaque.append((place, type(value).__name__))
            return StandIn(value, place, self._encode, self._opaque)


def _result(recorded: "tuple[Any, Any] | StandIn") -> Any:
    """Return what the constructor receives."""
    return recorded if isinstance(recorded, StandIn) else recorded[0]


def _encoded(recorded: "tuple[Any, Any] | StandIn") -> Any:
    """Return the JSON value of a result."""
    return description(recorded) if isinstance(recorded, StandIn) else recorded[1]


def description(stand_in: StandIn) -> dict[str, Any]:
    """Return the reads of a stand-in in the form of ``contracts/network.py``."""
    recorded = vars(stand_in)
    reads = Reads(
        attributes={name: _encoded(item) for name, item in recorded["_attributes"].items()},
        items={key: _encoded(item) for key, item in recorded["_items"].items()},
        contains=recorded["_contains"],
        calls=tuple(
            RecordedCall(arguments=arguments, keywords=keywords, value=_encoded(item))
            for arguments, keywords, item in recorded["_calls"]
        ),
    )
    return {READS: reads.model_dump(mode="json", exclude_defaults=True)}

"""Record what a constructor reads from an argument that a bundle cannot store.

The network is constructed once more. In place of the argument, the constructor receives a stand-in,
which reads from the argument and records the result (``contracts/network.py`` shows the form). When
the bundle is loaded, ``RecordedObject`` of ``compressors/core/state/recorded_object.py`` returns
these results.

A draft is the folder that becomes a bundle when it is packed. ``DraftRefused`` is raised if no
draft can be written.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from compressors.contracts import READS, Reads, RecordedCall, is_out_of_memory
from infra.errors import DraftRefused, Refused

Encode = Callable[[Any, str], Any]
"""Returns the JSON form of a value; raises ``Refused`` if there is none.

The second argument is the expression that reads the value, for the message.
"""


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
        DraftRefused: the constructor fails, because it does more than read from a value that JSON
            cannot represent; the error names the last such value.
    """
    opaque: list[tuple[str, str]] = []
    recordings = {
        name: _Recording(arguments[name], f"{network_class.__name__}({name})", encode, opaque)
        for name in names
    }
    stand_ins = {name: StandIn(recording) for name, recording in recordings.items()}
    try:
        network_class(**{**arguments, **stand_ins})
    except Exception as fault:  # of the user's class
        if is_out_of_memory(fault):
            raise
        place, kind = opaque[-1] if opaque else (f"{network_class.__name__}({names[0]})", "object")
        raise DraftRefused(
            "read_not_stored", place=place, kind=kind, problem=repr(fault)
        ) from fault
    return {name: recording.description() for name, recording in recordings.items()}


@dataclass
class _Recording:
    """What the constructor has read from a value: each result, and its JSON value.

    The JSON value is computed when the constructor reads the result, because the constructor may
    change a result, such as a list, afterwards.

    Attributes:
        value: the value that is read.
        place: the expression that reads it, for messages.
        encode: encodes results and the arguments of calls.
        opaque: receives the place and type of each result that JSON cannot represent.
        attributes: the attributes that were read, by name.
        items: the items that were read, by key.
        contains: for each key that was tested with ``in``, whether the value contains it.
        calls: positional arguments, keyword arguments and result of each call.
    """

    value: Any
    place: str
    encode: Encode
    opaque: list[tuple[str, str]]
    attributes: "dict[str, _Result]" = field(default_factory=dict)
    items: "dict[str, _Result]" = field(default_factory=dict)
    contains: dict[str, bool] = field(default_factory=dict)
    calls: "list[tuple[list[Any], dict[str, Any], _Result]]" = field(default_factory=list)

    def attribute(self, name: str) -> Any:
        """Return ``value.name``."""
        if name not in self.attributes:
            value = getattr(self.value, name)
            self.attributes[name] = self._record_result(value, f"{self.place}.{name}")
        return self.attributes[name].value

    def item(self, key: Any) -> Any:
        """Return ``value[key]``."""
        place = f"{self.place}[{self._require_text(key)!r}]"
        if key not in self.items:
            self.items[key] = self._record_result(self.value[key], place)
        return self.items[key].value

    def has(self, key: Any) -> bool:
        """Return whether ``key in value``."""
        return self.contains.setdefault(self._require_text(key), key in self.value)

    def call(self, *arguments: Any, **keywords: Any) -> Any:
        """Return ``value(...)``."""
        texts = [*map(repr, arguments), *(f"{name}={item!r}" for name, item in keywords.items())]
        place = f"{self.place}({', '.join(texts)})"
        encoded = [self.encode(item, place) for item in arguments]
        encoded_keywords = {name: self.encode(item, place) for name, item in keywords.items()}
        for known, known_keywords, result in self.calls:
            if (known, known_keywords) == (encoded, encoded_keywords):
                return result.value
        result = self._record_result(self.value(*arguments, **keywords), place)
        self.calls.append((encoded, encoded_keywords, result))
        return result.value

    def description(self) -> dict[str, Any]:
        """Return the reads in the form of ``contracts/network.py``."""
        reads = Reads(
            attributes={name: result.description() for name, result in self.attributes.items()},
            items={key: result.description() for key, result in self.items.items()},
            contains=self.contains,
            calls=tuple(
                RecordedCall(arguments=arguments, keywords=keywords, value=result.description())
                for arguments, keywords, result in self.calls
            ),
        )
        return {READS: reads.model_dump(mode="json", exclude_defaults=True)}

    def _require_text(self, key: Any) -> str:
        """Return a key; raise ``TypeError`` if it is no text, which JSON requires of keys."""
        if not isinstance(key, str):
            raise TypeError(f"expected a text as key of {self.place}, got {key!r}")
        return key

    def _record_result(self, value: Any, place: str) -> "_Result":
        """Return a result; a value that JSON cannot represent is read through a stand-in."""
        try:
            encoded = self.encode(value, place)
            return _Result(value, lambda: encoded)
        except Refused:
            if not callable(value):
                self.opaque.append((place, type(value).__name__))
            recording = _Recording(value, place, self.encode, self.opaque)
            return _Result(StandIn(recording), recording.description)


@dataclass(frozen=True)
class _Result:
    """What the constructor receives, and a function that returns its JSON value."""

    value: Any
    description: Callable[[], Any]


class StandIn:
    """What a constructor receives in place of a value; any other use of it raises an error."""

    __iter__ = None  # otherwise Python iterates over [0], [1], ...

    def __init__(self, recording: _Recording) -> None:
        self.__recording = recording

    def __getattr__(self, name: str) -> Any:
        # Python itself looks up special attributes. While ``copy`` creates a copy, the private
        # attribute ``__recording`` is missing, and reading it below would recurse without end.
        if name.startswith(("__", "_StandIn__")):
            raise AttributeError(name)
        return self.__recording.attribute(name)

    def __getitem__(self, key: Any) -> Any:
        return self.__recording.item(key)

    def __contains__(self, key: Any) -> bool:
        return self.__recording.has(key)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.__recording.call(*arguments, **keywords)

"""Write protocol buffers in text format: the subset that a Triton configuration uses.

A message is a mapping from field names to values; fields are written in the order of the mapping.
This module has no message definitions, so it cannot check field names. Tests parse the text with
the definitions of Triton's client.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_INTEGERS = range(-(2**63), 2**64)


class Enum(str):
    """The name of an enumeration value, which is written without quotes.

    Raises:
        ValueError: the name is not an identifier.
    """

    __slots__ = ()

    def __new__(cls, name: str) -> "Enum":
        return super().__new__(cls, _require_identifier(name))


def entries(pairs: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Convert a mapping to a protobuf map field: one message with ``key`` and ``value`` each."""
    return tuple({"key": key, "value": value} for key, value in pairs.items())


def format_message(message: Mapping[str, Any]) -> str:
    """Format a message as text, one field per line, nested messages indented.

    Args:
        message: field name -> ``str``, ``bool``, ``int``, ``float``, ``Enum``, a mapping (a
            nested message), or a list or tuple of one of these (a repeated field).

    Raises:
        ValueError: a field's name is not an identifier, a number does not fit into 64 bits, or a
            text is not valid Unicode.
        TypeError: a value has none of these types.
    """
    return "".join(f"{line}\n" for line in _format_lines(message))


def _format_lines(message: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of a message, without line ends."""
    for field, value in message.items():
        name = _require_identifier(field)
        if isinstance(value, Mapping):
            yield from _format_nested(name, value)
        elif isinstance(value, list | tuple):
            if any(isinstance(item, Mapping) for item in value):
                for item in value:
                    if not isinstance(item, Mapping):
                        raise TypeError(f"field {name!r} mixes messages with {item!r}")
                    yield from _format_nested(name, item)
            else:
                yield f"{name}: [{', '.join(_format_scalar(name, item) for item in value)}]"
        else:
            yield f"{name}: {_format_scalar(name, value)}"


def _format_nested(name: str, message: Mapping[str, Any]) -> Iterable[str]:
    """Yield the lines of a field whose value is a message."""
    yield f"{name} {{"
    yield from (f"  {line}" for line in _format_lines(message))
    yield "}"


def _format_scalar(name: str, value: object) -> str:
    """Format a value that is not a message; ``name`` is its field, for the error."""
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, str):
        return _quote(name, value)
    if isinstance(value, bool):  # before int, of which it is a subclass
        return "true" if value else "false"
    if isinstance(value, int):
        if value not in _INTEGERS:
            raise ValueError(f"field {name!r}: expected an integer of 64 bits, got {value}")
        return str(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "nan"
        return repr(value) if math.isfinite(value) else ("inf" if value > 0 else "-inf")
    raise TypeError(f"field {name!r}: cannot write a value of this type: {value!r}")


def _quote(name: str, text: str) -> str:
    """Quote and escape a text; ``name`` is its field, for the error."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"field {name!r}: text is not valid Unicode: {text!r}") from None
    escaped = (
        _ESCAPES.get(char) or (f"\\{ord(char):03o}" if _is_control(char) else char) for char in text
    )
    return f'"{"".join(escaped)}"'


def _is_control(char: str) -> bool:
    return ord(char) < 32 or ord(char) == 127


def _require_identifier(name: str) -> str:
    """Return ``name`` if it is an identifier; raise ``ValueError`` otherwise."""
    if not _IDENTIFIER.fullmatch(name):
        raise ValueError(f"expected an identifier (letters, digits, underscores), got {name!r}")
    return name

"""Size limits for untrusted JSON text, checked before it is parsed.

A JSON value of two bytes takes 50 to 200 bytes in Python, so the size of a file does not bound
the memory that parsing needs. One pass over the bytes counts values, depth, and the longest
number, in blocks, before any value is created. Every reader of stored or named JSON calls
``check_limits`` or ``validated``.
"""

from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel

from compressors.contracts.value_errors import value_error

MIB = 2**20
MAX_JSON_BYTES = 24 * MIB
"""A safetensors header of 100,000 tensors with names of 150 characters, or a ``model.json`` of
10,000 compressed tables, fits twice."""

MAX_JSON_VALUES = 1_500_000
"""Values and names: a header of 100,000 tensors has 1.2 million."""

MAX_JSON_DEPTH = 64
MAX_NUMBER_CHARACTERS = 400
"""The longest finite float, written without an exponent, has 325 digits and signs."""

_BLOCK = MIB
_OPEN, _CLOSE, _SEPARATOR, _NUMBER = 1, 2, 3, 4
_KINDS = np.zeros(256, np.uint8)
_KINDS[list(b"[{")] = _OPEN
_KINDS[list(b"]}")] = _CLOSE
_KINDS[list(b",:")] = _SEPARATOR
_KINDS[list(b"0123456789+-.eE")] = _NUMBER
_QUOTE = ord('"')

AnyModel = TypeVar("AnyModel", bound=BaseModel)


class JsonSize(NamedTuple):
    """Counts from one pass over JSON text; ``values`` is an upper bound that includes names."""

    values: int
    depth: int
    longest_number: int


def check_limits(raw: bytes, most_bytes: int = MAX_JSON_BYTES) -> None:
    """Check that JSON text is small enough to be parsed.

    Args:
        raw: UTF-8 text, well-formed or not.
        most_bytes: the largest size allowed.

    Raises:
        ValueError: it has too many bytes or values, is nested too deep, or has a number of too
            many characters.
    """
    if len(raw) > most_bytes:
        raise value_error("json_too_large", bytes=len(raw), most_bytes=most_bytes)
    size = measure(raw)
    if size.depth > MAX_JSON_DEPTH:
        raise value_error("json_too_deep", most_levels=MAX_JSON_DEPTH)
    if size.values > MAX_JSON_VALUES:
        raise value_error("json_too_many_values", most_values=MAX_JSON_VALUES)
    if size.longest_number > MAX_NUMBER_CHARACTERS:
        raise value_error("json_number_too_long", most_characters=MAX_NUMBER_CHARACTERS)


def measure(raw: bytes) -> JsonSize:
    """Count values, depth and the longest number of JSON text, without parsing it."""
    if b"\\" in raw:  # left to right, so that every remaining quote begins or ends a string
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    values, depth, deepest, run, longest = 1, 0, 0, 0, 0
    inside = 0
    for begin in range(0, len(raw), _BLOCK):
        block = np.frombuffer(raw, np.uint8, min(_BLOCK, len(raw) - begin), begin)
        quotes = np.cumsum(block == _QUOTE, dtype=np.uint32)
        kinds = np.where((quotes + inside) & 1, 0, _KINDS[block])
        inside = (inside + int(quotes[-1])) & 1
        values += int(np.count_nonzero((kinds == _OPEN) | (kinds == _SEPARATOR)))
        steps = (kinds == _OPEN).astype(np.int32) - (kinds == _CLOSE)
        levels = depth + np.cumsum(steps)
        depth, deepest = int(levels[-1]), max(deepest, int(levels.max()))
        others = np.flatnonzero(kinds != _NUMBER)
        ends = np.concatenate(([-1 - run], others, [len(block)]))
        longest = max(longest, int(np.diff(ends).max()) - 1)
        run = len(block) - 1 - int(ends[-2])
    return JsonSize(values, deepest, longest)


def validated(kind: type[AnyModel], raw: bytes, most_bytes: int = MAX_JSON_BYTES) -> AnyModel:
    """Parse JSON text within the limits and validate it.

    Raises:
        ValueError: it is beyond a limit; a ``ValidationError`` if it does not fit ``kind``.
    """
    check_limits(raw, most_bytes)
    return kind.model_validate_json(raw)


def read_bounded(path: Path, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a file of at most ``most_bytes``; the limit also holds for devices and pipes.

    Raises:
        ValueError: it has more than ``most_bytes``.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise value_error("json_file_too_large", most_bytes=most_bytes)
    return raw

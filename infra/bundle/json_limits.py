"""Size limits for untrusted JSON text, checked before it is parsed.

A JSON value of two bytes becomes a Python object of 50 to 200 bytes, so a small file can exhaust
the memory when it is parsed. ``check_limits`` therefore counts values, nesting depth and the
length of numbers first, in one pass over the bytes that creates no values. Code that parses stored
JSON, or a JSON file that a user named, first calls ``check_limits``. ``validate_json`` calls it
itself.
"""

from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel

from compressors.contracts.value_errors import value_error

MIB = 2**20
MAX_JSON_BYTES = 24 * MIB
"""Twice the size of a safetensors header of 100,000 tensors with names of 150 characters, or of a
``model.json`` with 10,000 compressed tables."""

MAX_JSON_VALUES = 1_500_000
"""Values and names together. A safetensors header of 100,000 tensors has 1.2 million."""

MAX_JSON_DEPTH = 64
MAX_NUMBER_CHARACTERS = 400
"""The longest finite float, written without an exponent and with a sign, has 327 characters."""

_BLOCK = MIB
_OPEN, _CLOSE, _SEPARATOR, _NUMBER = 1, 2, 3, 4
# The kind of each byte value; 0 for all other bytes.
_KINDS = np.zeros(256, np.uint8)
_KINDS[list(b"[{")] = _OPEN
_KINDS[list(b"]}")] = _CLOSE
_KINDS[list(b",:")] = _SEPARATOR
_KINDS[list(b"0123456789+-.eE")] = _NUMBER
_QUOTE = ord('"')

AnyModel = TypeVar("AnyModel", bound=BaseModel)


class JsonSize(NamedTuple):
    """Counts over a JSON text.

    Attributes:
        values: upper bound of the number of values and names.
        depth: greatest number of nested arrays and objects.
        longest_number: characters of the longest number.
    """

    values: int
    depth: int
    longest_number: int


def check_limits(
    raw: bytes, most_bytes: int = MAX_JSON_BYTES, most_values: int = MAX_JSON_VALUES
) -> None:
    """Check that JSON text is small enough to be parsed.

    Args:
        raw: UTF-8 text, well-formed or not.
        most_bytes: largest allowed size.
        most_values: largest allowed number of values and names.

    Raises:
        ValueError: the text has too many bytes or values, is nested too deep, or contains a number
            of too many characters.
    """
    if len(raw) > most_bytes:
        raise value_error("json_too_large", bytes=len(raw), most_bytes=most_bytes)
    size = measure(raw)
    if size.depth > MAX_JSON_DEPTH:
        raise value_error("json_too_deep", most_levels=MAX_JSON_DEPTH)
    if size.values > most_values:
        raise value_error("json_too_many_values", most_values=most_values)
    if size.longest_number > MAX_NUMBER_CHARACTERS:
        raise value_error("json_number_too_long", most_characters=MAX_NUMBER_CHARACTERS)


def measure(raw: bytes) -> JsonSize:
    """Count values, nesting depth and the longest number of a JSON text without parsing it."""
    if b"\\" in raw:  # replaced left to right, so every remaining quote begins or ends a string
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    values, depth, deepest, number_length, longest = 1, 0, 0, 0, 0
    is_in_string = 0  # 1 if the block begins inside a string
    for start in range(0, len(raw), _BLOCK):
        block = np.frombuffer(raw, np.uint8, min(_BLOCK, len(raw) - start), start)
        quotes = np.cumsum(block == _QUOTE, dtype=np.uint32)
        kinds = np.where((quotes + is_in_string) & 1, 0, _KINDS[block])
        is_in_string = (is_in_string + int(quotes[-1])) & 1
        values += int(np.count_nonzero((kinds == _OPEN) | (kinds == _SEPARATOR)))
        level_changes = (kinds == _OPEN).astype(np.int32) - (kinds == _CLOSE)
        levels = depth + np.cumsum(level_changes)
        depth, deepest = int(levels[-1]), max(deepest, int(levels.max()))
        # A number is what is between two bytes of another kind. The first number of a block may
        # have begun in the previous block, where it has ``number_length`` bytes.
        other_positions = np.flatnonzero(kinds != _NUMBER)
        ends = np.concatenate(([-1 - number_length], other_positions, [len(block)]))
        longest = max(longest, int(np.diff(ends).max()) - 1)
        number_length = len(block) - 1 - int(ends[-2])
    return JsonSize(values, deepest, longest)


def validate_json(kind: type[AnyModel], raw: bytes, most_bytes: int = MAX_JSON_BYTES) -> AnyModel:
    """Check the size of JSON text, parse it and validate it.

    Args:
        kind: the pydantic model to return.
        raw: UTF-8 text, well-formed or not.
        most_bytes: largest allowed size.

    Raises:
        ValueError: the text exceeds a limit of ``check_limits``.
        ValidationError: the text is not JSON, or does not fit ``kind``.
    """
    check_limits(raw, most_bytes)
    return kind.model_validate_json(raw)


def read_bounded(path: Path, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Read a file of at most ``most_bytes``.

    The limit also holds for devices and pipes, because the size in the file's status is not used.

    Raises:
        ValueError: the file has more than ``most_bytes``.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise value_error("json_file_too_large", most_bytes=most_bytes)
    return raw

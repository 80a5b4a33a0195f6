"""Protocol buffers in text format: formatted values can be read back, others are refused.

``pbtxt_reader`` parses a value without quotes as a ``Word``: the name of an enumeration value,
true, false, inf or nan. ``Word`` and ``Enum`` are strings, so an ``Enum`` equals the ``Word`` with
its name. ``entries`` converts a mapping to a map field: messages with ``key`` and ``value``.
"""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pbtxt_reader import Word, parse_message

from infra.triton.pbtxt import Enum, entries, format_message

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    NAMES.map(Enum),
)
MESSAGES = st.recursive(
    st.dictionaries(NAMES, st.one_of(SCALARS, st.lists(SCALARS, max_size=3)), max_size=4),
    lambda inner: st.dictionaries(
        NAMES, st.one_of(SCALARS, inner, st.lists(inner, min_size=1, max_size=3)), max_size=4
    ),
    max_leaves=12,
)


def parsed_field(value: Any) -> list[Any]:
    """Return a field's value as a reader without message definitions parses it: as a list."""
    values = value if isinstance(value, list | tuple) else [value]
    return [parsed_value(item) for item in values]


def parsed_value(value: Any) -> Any:
    """Return one value as such a reader parses it."""
    if isinstance(value, dict):
        return {name: parsed_field(item) for name, item in value.items()}
    if isinstance(value, bool):
        return Word("true" if value else "false")
    if isinstance(value, float) and math.isinf(value):
        # The reader parses a value that begins with a sign as a number.
        return Word("inf") if value > 0 else float("-inf")
    return value


@given(MESSAGES)
def test_formatted_message_is_read_back_unchanged(message: dict[str, Any]) -> None:
    text = format_message(message)
    assert parse_message(text) == parsed_value(message)
    for char in text:  # each field is on one line, so text contains no other control character
        assert char == "\n" or ord(char) >= 32


def test_format_message_writes_one_field_per_line() -> None:
    message = {
        "name": 'a "quoted"\tname\\',
        "kind": Enum("KIND_CPU"),
        "dims": [-1, 4],
        "none": [],
        "specific": {"versions": (3,)},
        "parameters": entries({"threads": {"string_value": "1"}}),
        "on": True,
        "share": 0.5,
    }
    assert format_message(message) == (
        'name: "a \\"quoted\\"\\tname\\\\"\n'
        "kind: KIND_CPU\n"
        "dims: [-1, 4]\n"
        "none: []\n"
        "specific {\n  versions: [3]\n}\n"
        'parameters {\n  key: "threads"\n  value {\n    string_value: "1"\n  }\n}\n'
        "on: true\n"
        "share: 0.5\n"
    )


def test_nan_is_written_as_a_word() -> None:
    assert parse_message(format_message({"x": [math.nan, 1]})) == {"x": [Word("nan"), 1]}


@pytest.mark.parametrize(
    ("message", "exception", "message_part"),
    [
        ({"a b": 1}, ValueError, "identifier"),
        ({"": 1}, ValueError, "identifier"),
        ({"x\n": 1}, ValueError, "identifier"),
        ({"x": 2**64}, ValueError, "64 bits"),
        ({"x": -(2**63) - 1}, ValueError, "64 bits"),
        ({"x": "\ud800"}, ValueError, "Unicode"),
        ({"x": None}, TypeError, "None"),
        ({"x": b"bytes"}, TypeError, "bytes"),
        ({"x": [{"y": 1}, 2]}, TypeError, "mixes"),
        ({"x": [[1]]}, TypeError, r"\[1\]"),
    ],
)
def test_value_or_field_name_that_cannot_be_written_is_refused(
    message: dict[str, Any], exception: type[Exception], message_part: str
) -> None:
    with pytest.raises(exception, match=message_part):
        format_message(message)


def test_enum_value_that_is_not_an_identifier_is_refused() -> None:
    with pytest.raises(ValueError, match="identifier"):
        Enum('A } name: "x"')

"""Protocol buffers as text: every written value reads back, and nothing else is written."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pbtxt_reader import Word, read

from infra.triton.pbtxt import Enum, entries, written

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


def as_read(value: Any) -> list[Any]:
    """A field's value as a reader without the signature parses it."""
    values = value if isinstance(value, list | tuple) else [value]
    return [read_back(item) for item in values]


def read_back(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: as_read(item) for name, item in value.items()}
    if isinstance(value, bool):
        return Word("true" if value else "false")
    if isinstance(value, float) and math.isinf(value):
        return Word("inf") if value > 0 else float("-inf")
    return value


@given(MESSAGES)
def test_what_is_written_reads_back(message: dict[str, Any]) -> None:
    text = written(message)
    assert read(text) == read_back(message)
    for letter in text:  # one line a field: no control character but the line's end
        assert letter == "\n" or ord(letter) >= 32


def test_a_message_looks_as_people_write_it() -> None:
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
    assert written(message) == (
        'name: "a \\"quoted\\"\\tname\\\\"\n'
        "kind: KIND_CPU\n"
        "dims: [-1, 4]\n"
        "none: []\n"
        "specific {\n  versions: [3]\n}\n"
        'parameters {\n  key: "threads"\n  value {\n    string_value: "1"\n  }\n}\n'
        "on: true\n"
        "share: 0.5\n"
    )


def test_not_a_number_is_a_word() -> None:
    assert read(written({"x": [math.nan, 1]})) == {"x": [Word("nan"), 1]}


@pytest.mark.parametrize(
    ("message", "fault", "said"),
    [
        ({"a b": 1}, ValueError, "no name"),
        ({"": 1}, ValueError, "no name"),
        ({"x\n": 1}, ValueError, "no name"),
        ({"x": 2**64}, ValueError, "64 bits"),
        ({"x": -(2**63) - 1}, ValueError, "64 bits"),
        ({"x": "\ud800"}, ValueError, "Unicode"),
        ({"x": None}, TypeError, "None"),
        ({"x": b"bytes"}, TypeError, "bytes"),
        ({"x": [{"y": 1}, 2]}, TypeError, "mixes"),
        ({"x": [[1]]}, TypeError, r"\[1\]"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    message: dict[str, Any], fault: type[Exception], said: str
) -> None:
    with pytest.raises(fault, match=said):
        written(message)


def test_an_enumerations_name_cannot_smuggle_anything_in() -> None:
    with pytest.raises(ValueError, match="no name"):
        Enum('A } name: "x"')

"""Read and validate untrusted JSON strictly, within the limits of ``json_limits``.

A file that cannot be used raises ``BundleRefused`` or ``RecordRefused``, whose message lists the
problems for the user.
"""

import json
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, get_args

from pydantic import ValidationError

from compressors.contracts.inputs import DataInput, MatrixInput
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import SENTENCES, value_error
from infra.bundle.json_limits import (
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    AnyModel,
    check_limits,
    read_bounded,
)
from infra.errors import BundleRefused, RecordRefused
from infra.printable import truncate_sentence

PROBLEMS_SHOWN = 20
"""Most problems that one error lists."""

INPUT_KINDS = tuple(
    input_class.model_fields["kind"].default for input_class in (*get_args(DataInput), MatrixInput)
)
"""Kinds of a signature's inputs; pydantic adds an input's kind to the location of its errors."""

_END = object()
_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxstring = _SHORT_REPR.maxother = 120


def shorten(value: object) -> str:
    """Format an untrusted value as its ``repr``, truncated."""
    return _SHORT_REPR.repr(value)


def escape_message(message: object) -> str:
    """Return the first 300 characters of a library's message, with unprintable ones escaped."""
    return repr(str(message)[:300])[1:-1]


def _truncate_sentences(problems: Iterable[str]) -> tuple[str, ...]:
    """Return the first ``PROBLEMS_SHOWN`` sentences, each truncated, and "and more." if needed."""
    messages = [truncate_sentence(problem) for problem in islice(problems, PROBLEMS_SHOWN + 1)]
    if len(messages) > PROBLEMS_SHOWN:
        messages[-1] = "and more."
    return tuple(messages)


def raise_if_any(place: Path | str, problems: Iterable[Reason]) -> None:
    """Raise ``BundleRefused`` if there is any problem; the error contains the first 20.

    Args:
        place: what the problems refer to, such as a folder; it begins the message.
        problems: the reasons. Their fields have bounded length; ``shorten`` truncates a value.
    """
    messages = list(islice(problems, PROBLEMS_SHOWN + 1))
    if len(messages) > PROBLEMS_SHOWN:
        messages[-1] = Reason("more_problems")
    if messages:
        raise BundleRefused("unusable", place=str(place), problems=tuple(messages))


def read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read a file; return its bytes and the JSON object that they contain.

    Raises:
        BundleRefused: the file is missing, too large, or not one plain JSON object.
    """
    if not path.is_file():
        if os.path.lexists(path):
            raise BundleRefused("json_no_plain_file", path=str(path))
        raise BundleRefused("json_missing", path=str(path))
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise BundleRefused("json_too_large", path=str(path), size=size, most_bytes=MAX_JSON_BYTES)
    raw = path.read_bytes()
    return raw, decode(raw, path)


def decode(raw: bytes, path: Path) -> dict[str, Any]:
    """Decode one JSON object, and reject JSON that other parsers may read differently.

    Such JSON contains a duplicate name in one object, NaN or an infinite number, or half of a
    surrogate pair.

    Args:
        raw: UTF-8 text.
        path: path of the file, for the error message.

    Raises:
        BundleRefused: the text is not one such JSON object, or exceeds a limit of ``json_limits``.
    """
    try:
        check_limits(raw)
        document = json.loads(
            raw.decode(),
            object_pairs_hook=_build_object,
            parse_constant=_reject_constant,
            parse_float=_parse_finite,
        )
        _check_strings(document)
    except RecursionError as fault:
        raise BundleRefused("json_too_deep", path=str(path)) from fault
    except ValueError as fault:
        raise BundleRefused(
            "json_unusable", path=str(path), problem=escape_message(fault)
        ) from fault
    if not isinstance(document, dict):
        raise BundleRefused("json_no_object", path=str(path), kind=type(document).__name__)
    return document


def parse(
    kind: type[AnyModel],
    document: Mapping[str, Any],
    path: Path,
    *,
    stored: bool = False,
    source_locations: Mapping[str, str] | None = None,
) -> AnyModel:
    """Validate a decoded JSON object.

    Args:
        kind: the pydantic model to return.
        document: the decoded object.
        path: path of its file, for the error message.
        stored: whether recpress wrote the document. Rules that later versions added for documents
            of users do not apply to it.
        source_locations: for a migrated document, maps a location in it, such as
            ``signature.outputs[0].kind``, to the location in the file.

    Raises:
        BundleRefused: fields are missing, unknown or invalid; the error has a sentence for each.
    """
    try:
        return kind.model_validate(document, context={"stored": stored})
    except ValidationError as fault:
        sentences = (
            _format_error(error, source_locations or {})
            for error in fault.errors(include_url=False)
        )
        raise BundleRefused(
            "fields_unusable", path=str(path), problems=_truncate_sentences(sentences)
        ) from fault


def read_limited(path: Path) -> bytes:
    """Read a stored JSON document as bytes, and check that it is small enough to be parsed.

    Raises:
        RecordRefused: the document exceeds a limit of ``json_limits``.
        OSError: the file cannot be read.
    """
    try:
        raw = read_bounded(path)
        check_limits(raw)
    except ValueError as fault:
        raise RecordRefused(
            "document_unusable", path=str(path), problem=escape_message(fault)
        ) from fault
    return raw


def read_document(kind: type[AnyModel], path: Path) -> AnyModel:
    """Read and validate a stored JSON document.

    Raises:
        RecordRefused: the document exceeds a limit of ``json_limits``.
        ValidationError: the document does not fit ``kind``.
        OSError: the file cannot be read.
    """
    return kind.model_validate_json(read_limited(path))


def to_json_value(value: object) -> Any:
    """Convert tuples to lists, and check that all other values have an exact JSON form.

    pydantic's JSON mode would write NaN as null, and ``json`` would write a number that is a
    dictionary key as a string.

    Raises:
        ValueError: a value has no exact JSON form.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [to_json_value(item) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: to_json_value(item) for name, item in value.items()}
    raise ValueError(f"{shorten(value)} has no JSON form")


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build the dict of a JSON object; raise ``ValueError`` if a name occurs twice."""
    document: dict[str, Any] = {}
    for name, value in pairs:
        if name in document:
            raise ValueError(f"duplicate name {shorten(name)} in one object; keep one")
        document[name] = value
    return document


def _reject_constant(text: str) -> NoReturn:
    """Raise ``ValueError`` for ``NaN`` and ``Infinity``, which Python's parser accepts."""
    raise ValueError(f"{text} is not a JSON number")


def _parse_finite(text: str) -> float:
    """Parse a number; raise ``ValueError`` if it is too large for a float."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{shorten(text)} is too large for a number")
    return number


def _check_strings(document: object) -> None:
    """Raise ``ValueError`` for strings with half of a surrogate pair, and for deep nesting."""
    iterators: list[Iterator[object]] = [iter((document,))]
    while iterators:
        value = next(iterators[-1], _END)
        if value is _END:
            iterators.pop()
        elif isinstance(value, str):
            value.encode()  # half of a surrogate pair raises UnicodeEncodeError, a ValueError
        elif isinstance(value, dict):
            iterators.append(item for pair in value.items() for item in pair)
        elif isinstance(value, list):
            iterators.append(iter(value))
        if len(iterators) > MAX_JSON_DEPTH + 2:
            raise value_error("json_too_deep", most_levels=MAX_JSON_DEPTH)


def _format_error(error: Mapping[str, Any], source_locations: Mapping[str, str]) -> str:
    """Format one error of pydantic as a sentence.

    Args:
        error: an item of ``ValidationError.errors()``.
        source_locations: for a migrated document, maps a location in it to the location in the
            file.
    """
    location = ""
    # Pydantic adds the kind of an input after its index, and "[key]" after the key of a dictionary
    # if the key is invalid.
    is_after_index = False
    for part in error["loc"]:
        if isinstance(part, int):
            location += f"[{part}]"
        elif part != "[key]" and not (is_after_index and part in INPUT_KINDS):
            location += f".{part if part.isprintable() and len(part) < 80 else shorten(part)}"
        is_after_index = isinstance(part, int)
    location = location.removeprefix(".") or "the document"
    location = source_locations.get(location, location)
    if error["type"] == "missing":
        return f"{location} is missing; add it."
    if error["type"] == "extra_forbidden":
        return f"{location} is not a field of this format; remove it or correct its spelling."
    if error["type"] in SENTENCES or error["type"] == "value_error":
        # The messages of this project's validators already contain the value.
        return f"{location}: {error['msg'].removeprefix('Value error, ')}."
    return f"{location}: {error['msg']}; found {shorten(error['input'])}."

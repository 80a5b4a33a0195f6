"""Strict reader for untrusted JSON, with the limits of ``json_limits``.

Unusable files raise ``BundleRefused`` or ``RecordRefused`` with a reason for the user.
"""

import json
import math
import os
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

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
from infra.printable import bounded

PROBLEMS_SHOWN = 20

INPUT_KINDS = ("id", "dense", "padded_bag", "jagged_bag")

_END = object()
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 120


def short(value: object) -> str:
    """Format an untrusted value as printable text of bounded length."""
    return _BRIEF.repr(value)


def clean(message: object) -> str:
    """Return the message of a library's error, printable and of bounded length."""
    return repr(str(message)[:300])[1:-1]


def _first_sentences(problems: Iterable[str]) -> tuple[str, ...]:
    """Return the sentences an error shows, each of bounded length; consumes few more than those."""
    shown = [bounded(problem) for problem in islice(problems, PROBLEMS_SHOWN + 1)]
    if len(shown) > PROBLEMS_SHOWN:
        shown[-1] = "and more."
    return tuple(shown)


def refuse_if(place: Path | str, problems: Iterable[Reason]) -> None:
    """Raise ``BundleRefused`` if there is any problem, with the first of them.

    Args:
        place: the file or field they refer to.
        problems: reasons whose fields are of bounded length.
    """
    shown = list(islice(problems, PROBLEMS_SHOWN + 1))
    if len(shown) > PROBLEMS_SHOWN:
        shown[-1] = Reason("more_problems")
    if shown:
        raise BundleRefused("unusable", place=str(place), problems=tuple(shown))


def read_json(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return a file's bytes and the JSON object they contain.

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
    """Decode JSON; reject input on which parsers differ: repeated names, NaN, lone surrogates.

    Args:
        raw: UTF-8 text.
        path: its file, for the error message.

    Raises:
        BundleRefused: it is not one plain JSON object, or it is larger or deeper than allowed.
    """
    try:
        check_limits(raw)
        document = json.loads(
            raw.decode(),
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        _check_texts(document)
    except RecursionError as fault:
        raise BundleRefused("json_too_deep", path=str(path)) from fault
    except ValueError as fault:
        raise BundleRefused("json_unusable", path=str(path), problem=clean(fault)) from fault
    if not isinstance(document, dict):
        raise BundleRefused("json_no_object", path=str(path), kind=type(document).__name__)
    return document


def parse(
    kind: type[AnyModel],
    document: Mapping[str, Any],
    path: Path,
    *,
    stored: bool = False,
    places: Mapping[str, str] | None = None,
) -> AnyModel:
    """Validate a document.

    Args:
        kind: the type to validate it as.
        document: its fields.
        path: its file, for the error message.
        stored: whether recpress wrote it: rules added in later versions do not apply.
        places: what to call places of the document in errors, if it was migrated.

    Raises:
        BundleRefused: fields are missing, unknown or wrong; a sentence for each.
    """
    try:
        return kind.model_validate(document, context={"stored": stored})
    except ValidationError as fault:
        sentences = (_sentence(e, places or {}) for e in fault.errors(include_url=False))
        raise BundleRefused(
            "fields_unusable", path=str(path), problems=_first_sentences(sentences)
        ) from fault


def read_limited(path: Path) -> bytes:
    """Read the bytes of a stored JSON document that is small enough to be parsed.

    Raises:
        RecordRefused: it is beyond the limits of ``json_limits``.
    """
    try:
        raw = read_bounded(path)
        check_limits(raw)
    except ValueError as fault:
        raise RecordRefused("document_unusable", path=str(path), problem=clean(fault)) from fault
    return raw


def read_document(kind: type[AnyModel], path: Path) -> AnyModel:
    """Read and validate a stored JSON document.

    Raises:
        RecordRefused: it is beyond the limits of ``json_limits``.
        ValidationError: it does not fit ``kind``.
    """
    return kind.model_validate_json(read_limited(path))


def plain(value: object) -> Any:
    """Convert a value to plain JSON types, or raise ``ValueError``; no value is changed.

    Only tuples become lists. (pydantic's JSON mode writes NaN as null, and ``json`` writes number
    keys as strings.)
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: plain(item) for name, item in value.items()}
    raise ValueError(f"{short(value)} has no JSON form")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for name, value in pairs:
        if name in document:
            raise ValueError(f"duplicate name {short(name)} in one object; keep one")
        document[name] = value
    return document


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{short(text)} is too large for a number")
    return number


def _check_texts(document: object) -> None:
    """Refuse text that is not Unicode, such as half of a surrogate pair, and deep nesting."""
    waiting: list[Iterator[object]] = [iter((document,))]
    while waiting:
        value = next(waiting[-1], _END)
        if value is _END:
            waiting.pop()
        elif isinstance(value, str):
            value.encode()
        elif isinstance(value, dict):
            waiting.append(item for pair in value.items() for item in pair)
        elif isinstance(value, list):
            waiting.append(iter(value))
        if len(waiting) > MAX_JSON_DEPTH + 2:
            raise value_error("json_too_deep", most_levels=MAX_JSON_DEPTH)


def _sentence(error: Mapping[str, Any], places: Mapping[str, str]) -> str:
    """Format one pydantic validation error as a sentence."""
    where = ""
    tag_may_follow = False  # pydantic adds the kind of a union's member to the location
    for part in error["loc"]:
        if isinstance(part, int):
            where += f"[{part}]"
        elif part != "[key]" and not (tag_may_follow and part in INPUT_KINDS):
            where += f".{part if part.isprintable() and len(part) < 80 else short(part)}"
        tag_may_follow = isinstance(part, int)
    where = where.removeprefix(".") or "the document"
    where = places.get(where, where)
    if error["type"] == "missing":
        return f"{where} is missing; add it."
    if error["type"] == "extra_forbidden":
        return f"{where} is not a field of this format; remove it or correct its spelling."
    if error["type"] in SENTENCES or error["type"] == "value_error":
        # The messages of our validators already contain the value.
        return f"{where}: {error['msg'].removeprefix('Value error, ')}."
    return f"{where}: {error['msg']}; found {short(error['input'])}."

"""The class ``Reason``: why a decision was made, as a code and fields.

A program reads ``code`` and ``fields``; a person reads the sentence, ``str(reason)``. Each other
file of this folder has the table of sentences of one subject; ``docs/reasons.md`` is generated from
these tables.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar, Union

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from compressors.contracts.coded_error import SentenceFormatter, require_fields
from compressors.contracts.reasons import (
    baseline,
    bundles,
    dense,
    limits,
    pruning,
    recipe,
    rewriting,
    selection,
    tables,
    training,
    verdicts,
)

SUBJECTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "Selection of units": selection.SENTENCES,
        "Steps of a recipe": recipe.SENTENCES,
        "Embedding tables": tables.SENTENCES,
        "Formats of dense layers": dense.SENTENCES,
        "Pruning": pruning.SENTENCES,
        "Rewriting": rewriting.SENTENCES,
        "Training": training.SENTENCES,
        "Files and paths of a bundle": bundles.SENTENCES,
        "Labels and scores of a bundle": baseline.SENTENCES,
        "Limits and metrics of an order": limits.SENTENCES,
        "Verdicts": verdicts.SENTENCES,
    }
)
"""The tables of sentences, by subject. A table maps a code to a sentence with fields in braces."""

SENTENCES: Mapping[str, str] = MappingProxyType(
    {code: text for table in SUBJECTS.values() for code, text in table.items()}
)
"""The sentence of each code, of all subjects."""

Value: TypeAlias = Union[str, int, float, bool, "Reason", tuple["Value", ...]]
"""Type of a field. A field can contain the reasons of another decision, such as why it was made."""

Model = TypeVar("Model", bound=BaseModel)

_NOT_FINITE = ("nan", "inf", "-inf")


class _ReasonFormatter(SentenceFormatter):
    """Formats fields as its base class does, and also non-finite numbers and tuples of reasons.

    Reasons are joined by ``join_reasons``, or by commas if the format specification is ``,``.
    """

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, tuple) and value and all(isinstance(v, Reason) for v in value):
            return ", ".join(map(str, value)) if format_spec == "," else join_reasons(value)
        if value in _NOT_FINITE:  # a text, which does not accept the format of a number
            return str(value)
        return super().format_field(value, format_spec)


@dataclass(frozen=True, init=False)
class Reason:
    """Why a decision was made.

    In JSON it is ``{"code": ..., "fields": {...}}``. Non-finite floats, which JSON does not
    support, are stored as ``"nan"``, ``"inf"`` and ``"-inf"``.

    Attributes:
        code: a key of ``SENTENCES``.
        fields: the values of the names in its sentence.
    """

    code: str
    fields: Mapping[str, Value]

    def __init__(self, code: str, /, **fields: Value) -> None:
        """Create a reason.

        Args:
            code: a key of ``SENTENCES``.
            fields: a value for each name in the sentence, and for no other.

        Raises:
            TypeError: there is no such code, it has other fields, or a field has a wrong type.
        """
        sentence = SENTENCES.get(code)
        if sentence is None:
            raise TypeError(f"no reason has the code {code!r}")
        require_fields(code, sentence, fields)
        object.__setattr__(self, "code", code)
        object.__setattr__(
            self, "fields", {name: _to_plain_value(name, value) for name, value in fields.items()}
        )
        try:
            str(self)
        except ValueError as fault:  # the format specification does not fit the value's type
            raise TypeError(f"code {code!r} cannot be formatted: {fault}") from fault

    def __str__(self) -> str:
        return _ReasonFormatter().vformat(SENTENCES[self.code], (), self.fields)

    def __hash__(self) -> int:
        return hash((self.code, *sorted(self.fields.items(), key=lambda item: item[0])))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return partial(type(self), **self.fields), (self.code,)

    def walk(self) -> Iterator["Reason"]:
        """Yield this reason and those in its fields, outermost first."""
        yield self
        for value in self.fields.values():
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Reason):
                    yield from item.walk()

    def to_json(self) -> dict[str, Any]:
        """Return an object ``{"code": ..., "fields": {...}}`` of JSON values."""
        return {
            "code": self.code,
            "fields": {n: _convert_to_json(v) for n, v in self.fields.items()},
        }

    @classmethod
    def from_json(cls, value: Any) -> "Reason":
        """Build a reason from the result of ``to_json``; a ``Reason`` is returned unchanged.

        Raises:
            ValueError: the value has another form, or this version of recpress does not know its
                code or fields.
        """
        if isinstance(value, Reason):
            return value
        match value:
            case {"code": str(code), "fields": Mapping() as fields} if len(value) == 2:
                pass
            case _:
                raise ValueError(
                    "expected an object with the keys 'code' (a string) and 'fields' (an object)"
                )
        try:
            return cls(
                code, **{str(name): _convert_from_json(item) for name, item in fields.items()}
            )
        except TypeError as fault:
            raise ValueError(str(fault)) from fault

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.from_json,
            serialization=core_schema.plain_serializer_function_ser_schema(cls.to_json),
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, signature: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        properties = {"code": {"type": "string"}, "fields": {"type": "object"}}
        return {"type": "object", "properties": properties, "required": ["code", "fields"]}


def join_reasons(reasons: Iterable[Reason]) -> str:
    """Join the sentences of several reasons with semicolons."""
    return "; ".join(map(str, reasons))


def read_reasons(
    value: Any, validate: Callable[[Any], Model], sentence: str, reasons: str
) -> Model:
    """Validate a stored object that has reasons, their sentence, or both.

    An object that an earlier version of recpress stored has only the sentence. One that a later
    version stored may have codes that this version does not know. In both cases, the sentence is
    read as one reason with code ``as_written``. If an object has no reasons, they are not in
    ``model_fields_set`` of the result, so that storing the object again does not change it.

    Args:
        value: the object to validate, usually a mapping; other values are validated unchanged.
        validate: function that validates the object after reasons have replaced their sentence.
        sentence: key of the sentence in the object, or of a list or mapping of sentences.
        reasons: key of the reasons in the object.

    Returns:
        The validated object.

    Raises:
        ValidationError: raised by ``validate``.
    """
    result = validate(_replace_sentence_by_reasons(value, sentence, reasons))
    if isinstance(value, Mapping) and reasons not in value:
        result.model_fields_set.discard(reasons)
    return result


def _replace_sentence_by_reasons(value: Any, sentence: str, reasons: str) -> Any:
    """Replace the sentence of a mapping by reasons, as ``read_reasons`` describes.

    Values that have another form are returned unchanged; validating them reports the error.
    """
    if not isinstance(value, Mapping) or sentence not in value:
        return value
    others = {name: item for name, item in value.items() if name != sentence}
    if reasons in value and _are_known(value[reasons]):
        return others
    text = value[sentence]
    if isinstance(text, Mapping):
        if not all(isinstance(item, str) for item in text.values()):
            return value
        return {**others, reasons: {key: Reason("as_written", text=text[key]) for key in text}}
    texts = text if isinstance(text, list | tuple) else [] if text is None else [text]
    if not all(isinstance(item, str) for item in texts):
        return value
    return {**others, reasons: tuple(Reason("as_written", text=item) for item in texts)}


def _are_known(stored: Any) -> bool:
    """Return whether this version can read all stored reasons."""
    try:
        for item in stored.values() if isinstance(stored, Mapping) else stored:
            Reason.from_json(item)
    except (TypeError, ValueError):
        return False
    return True


def _to_plain_value(name: str, value: Any) -> Value:
    """Convert a field's value to plain Python types; non-finite floats to text."""
    if isinstance(value, bool | str | Reason):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else f"{value:g}"
    if isinstance(value, tuple):
        return tuple(_to_plain_value(name, item) for item in value)
    raise TypeError(
        f"expected text, a number, a Reason or a tuple of them as field {name!r}, got "
        f"{type(value).__name__}"
    )


def _convert_to_json(value: Value) -> Any:
    """Convert a field's value to a JSON value; a tuple to a list, a reason to an object."""
    if isinstance(value, Reason):
        return value.to_json()
    return [_convert_to_json(item) for item in value] if isinstance(value, tuple) else value


def _convert_from_json(value: Any) -> Any:
    """Convert a JSON value to a field's value: the inverse of ``_convert_to_json``."""
    if isinstance(value, Mapping):
        return Reason.from_json(value)
    return (
        tuple(_convert_from_json(item) for item in value)
        if isinstance(value, list | tuple)
        else value
    )

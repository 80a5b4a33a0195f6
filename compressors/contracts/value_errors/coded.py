"""The function ``value_error``, which creates an error with a code and fields.

A validator of a pydantic model raises the error, and pydantic reports it. A program reads ``type``
(the code) and ``ctx`` (the fields) of an entry of ``ValidationError.errors()``; a person reads
``msg``, the sentence. Each other file of this folder has the table of sentences of one subject;
``docs/errors.md`` is generated from these tables.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic_core import PydanticCustomError

from compressors.contracts.coded_error import SentenceFormatter, require_fields
from compressors.contracts.value_errors import (
    bundles,
    limits,
    orders,
    serving,
    signature,
    steps,
    storage,
)

SUBJECTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "Inputs and signature": signature.SENTENCES,
        "Limits and measured numbers": limits.SENTENCES,
        "Settings of steps": steps.SENTENCES,
        "Orders and data rules": orders.SENTENCES,
        "Paths and JSON of bundles": bundles.SENTENCES,
        "Stored artifacts and RECPRESS_HOME": storage.SENTENCES,
        "Engine profiles and Triton models": serving.SENTENCES,
    }
)
"""The tables of sentences, by subject. A table maps a code to a sentence with fields in braces."""

SENTENCES: Mapping[str, str] = MappingProxyType(
    {code: text for table in SUBJECTS.values() for code, text in table.items()}
)
"""The sentence of each code, of all subjects."""


def value_error(code: str, /, **fields: Any) -> PydanticCustomError:
    """Create a ``ValueError`` with a code and fields, which pydantic reports unchanged.

    ``ctx`` has the fields and the formatted ``sentence``. Pydantic replaces the names in braces of
    a message one after the other, in the order of ``ctx``, also inside values that it has just
    inserted. The message is therefore only ``{sentence}``, and ``sentence`` is last in ``ctx``, so
    that user text in braces is not replaced. Pydantic stores text as UTF-8, which cannot encode
    surrogates (undecodable bytes of an argument or file name); these are replaced by escapes.

    Args:
        code: a key of ``SENTENCES``.
        fields: a value for each name in the sentence, and for no other.

    Returns:
        The error, for the caller to raise.

    Raises:
        TypeError: there is no such code, or it has other fields.
    """
    sentence = SENTENCES.get(code)
    if sentence is None:
        raise TypeError(f"no value error has the code {code!r}")
    require_fields(code, sentence, fields)
    context = {**fields, "sentence": SentenceFormatter().vformat(sentence, (), fields)}
    return PydanticCustomError(
        code, "{sentence}", {name: _escape_surrogates(value) for name, value in context.items()}
    )


def _escape_surrogates(value: Any) -> Any:
    """Replace the surrogates of a text by escapes; return other values unchanged."""
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return value

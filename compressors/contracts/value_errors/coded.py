"""The function ``value_error``: an error with a code and fields that pydantic reports. Types only.

A validator raises it. A program reads ``type`` (the code) and ``ctx`` (the fields) of an entry of
``ValidationError.errors()``; a person reads ``msg``, the sentence. Each subject has one table of
sentences, in a separate file next to this one; ``docs/errors.md`` is generated from them.
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
"""Tables of sentences by subject: from a code to a clause with the fields in braces."""

SENTENCES: Mapping[str, str] = MappingProxyType(
    {code: text for table in SUBJECTS.values() for code, text in table.items()}
)


def value_error(code: str, /, **fields: Any) -> PydanticCustomError:
    """Create a ``ValueError`` with a code and fields, which pydantic reports unchanged.

    ``ctx`` has the fields and the derived ``sentence``. Pydantic replaces the names in braces of a
    message one after the other, in the order of ``ctx``, also inside values that it has just
    inserted. ``sentence`` is therefore the only such name, and the last: user text that looks
    like a field is not replaced. Pydantic stores text as UTF-8, which has no surrogates: those of
    an argument or a file name are written as escapes.

    Args:
        code: a key of ``SENTENCES``.
        fields: a value for each name in the sentence, and for no other.

    Raises:
        TypeError: there is no such code, or it has other fields.
    """
    sentence = SENTENCES.get(code)
    if sentence is None:
        raise TypeError(f"no value error has the code {code!r}")
    require_fields(code, sentence, fields)
    context = {**fields, "sentence": SentenceFormatter().vformat(sentence, (), fields)}
    return PydanticCustomError(
        code, "{sentence}", {name: _encodable(value) for name, value in context.items()}
    )


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode(errors="backslashreplace").decode()
    return value

"""The base class of errors with a code and fields, from which their sentence is formatted.

A program reads ``code`` and ``fields``; a person reads the sentence, ``str(error)``. Subclasses in
``compressors/errors`` and ``infra/errors`` list their codes and sentences; ``docs/errors.md`` is
generated from them.
"""

import string
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar


class SentenceFormatter(string.Formatter):
    """Formats the fields of a sentence, also sequences and mappings.

    A sequence is formatted as ``a, b, c``, a mapping as ``a: 1, b: 2``, and an empty one as
    ``none``. Items of a sequence in a mapping are separated by ``; ``.

    The format specification of a sequence, the text after the colon in ``{names:; }``, is its
    separator, with three exceptions: ``list`` writes one line per item, ``lines`` does so only if
    there are several items, and ``[]`` writes the items in brackets, also if there are none.
    """

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, Mapping):
            value = [f"{name}: {self._format_item(item)}" for name, item in value.items()]
        if not isinstance(value, list | tuple):
            return str(super().format_field(value, format_spec))
        if format_spec == "lines" and len(value) == 1:
            return f" {value[0]}"
        if format_spec in {"list", "lines"}:
            return "".join(f"\n- {item}" for item in value)
        if format_spec == "[]":
            return f"[{', '.join(map(str, value))}]"
        return (format_spec or ", ").join(map(str, value)) or "none"

    def _format_item(self, value: Any) -> str:
        """Format a value of a mapping."""
        return self.format_field(value, "; ") if isinstance(value, list | tuple) else str(value)


class CodedError(Exception):
    """An error with a code and fields.

    Attributes:
        sentences: the sentence of each code of the class, with the fields in braces.
        code: a key of ``sentences``; it selects this error's sentence.
        fields: a value for each field of the sentence, by name.
    """

    sentences: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, code: str, /, **fields: Any) -> None:
        """Create an error.

        Args:
            code: a key of ``sentences``.
            fields: a value for each name in the sentence, and for no other.

        Raises:
            TypeError: the class has no such code, or the code has other fields.
        """
        sentence = type(self).sentences.get(code)
        if sentence is None:
            raise TypeError(f"{type(self).__name__} has no code {code!r}")
        require_fields(code, sentence, fields)
        super().__init__(code)
        self.code = code
        self.fields = fields

    def __str__(self) -> str:
        return SentenceFormatter().vformat(type(self).sentences[self.code], (), self.fields)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Let ``copy`` and ``pickle`` keep the code, the fields and all other attributes."""
        return partial(type(self), **self.fields), (self.code,), vars(self)


def field_names(sentence: str) -> set[str]:
    """Return the names of the fields in braces of a sentence."""
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name is not None}


def require_fields(code: str, sentence: str, fields: Mapping[str, Any]) -> None:
    """Raise unless there is a value for each name in a sentence, and for no other.

    Raises:
        TypeError: the names of the sentence and of ``fields`` differ.
    """
    names = field_names(sentence)
    if names != fields.keys():
        expected = ", ".join(sorted(names)) or "none"
        got = ", ".join(sorted(fields)) or "none"
        raise TypeError(f"Expected the fields {expected} for code {code!r}, got {got}")

"""Errors that carry a code and fields, from which their sentence is made. Types only.

A program reads ``code`` and ``fields``; a person reads the sentence. The classes list their codes
and sentences in one place each (``compressors/errors/compression.py``, ``infra/errors.py``), and
``docs/errors.md`` is generated from them.
"""

import string
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar


class _SentenceFormatter(string.Formatter):
    """Formats sequences: ``{x}`` as ``a, b, c``, ``{x:list}`` with a line for each item.

    ``{x:lines}`` is the same, except that a single item stays on the line.
    """

    def format_field(self, value: Any, format_spec: str) -> str:
        if not isinstance(value, list | tuple):
            return str(super().format_field(value, format_spec))
        if not format_spec:
            return ", ".join(map(str, value))
        if format_spec == "lines" and len(value) == 1:
            return f" {value[0]}"
        if format_spec in {"list", "lines"}:
            return "".join(f"\n- {item}" for item in value)
        raise ValueError(f"Expected 'list' or 'lines' for a sequence, got {format_spec!r}.")


class CodedError(Exception):
    """An error with a code and fields.

    Attributes:
        sentences: the sentence of each code of the class, with the fields in braces.
        code: which of them it is.
        fields: the values of its fields.
    """

    sentences: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, code: str, /, **fields: Any) -> None:
        """Create an error.

        Args:
            code: a key of ``sentences``.
            fields: a value for each name in the sentence, and for no other.

        Raises:
            TypeError: the class has no such code, or it has other fields.
        """
        sentence = type(self).sentences.get(code)
        if sentence is None:
            raise TypeError(f"{type(self).__name__} has no code {code!r}")
        if field_names(sentence) != fields.keys():
            expected = ", ".join(sorted(field_names(sentence))) or "none"
            got = ", ".join(sorted(fields)) or "none"
            raise TypeError(f"{code!r} has the fields {expected}, got {got}")
        super().__init__(code)
        self.code = code
        self.fields = fields

    def __str__(self) -> str:
        return _SentenceFormatter().vformat(type(self).sentences[self.code], (), self.fields)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return partial(type(self), **self.fields), (self.code,)


def field_names(sentence: str) -> set[str]:
    """The names in braces of a sentence."""
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name is not None}

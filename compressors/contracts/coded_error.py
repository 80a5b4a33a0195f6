"""Errors that carry a code and fields, from which their sentence is made. Types only.

A program reads ``code`` and ``fields``; a person reads the sentence. The classes list their codes
and sentences in the files of ``compressors/errors`` and ``infra/errors``, from which
``docs/errors.md`` is generated.
"""

import string
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar


class SentenceFormatter(string.Formatter):
    """Formats a sequence as ``a, b, c``, a mapping as ``a: 1, b: 2``, an empty one as ``none``.

    A sequence in a mapping has ``; `` between its items.
    A format specification of a sequence is the separator instead of ``, ``, except for ``list``,
    which gives each item a line, ``lines``, which does so for more than one item, and ``[]``, which
    writes brackets, also around nothing.
    """

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, Mapping):
            value = [f"{name}: {self._item(item)}" for name, item in value.items()]
        if not isinstance(value, list | tuple):
            return str(super().format_field(value, format_spec))
        if format_spec == "lines" and len(value) == 1:
            return f" {value[0]}"
        if format_spec in {"list", "lines"}:
            return "".join(f"\n- {item}" for item in value)
        if format_spec == "[]":
            return f"[{', '.join(map(str, value))}]"
        return (format_spec or ", ").join(map(str, value)) or "none"

    def _item(self, value: Any) -> str:
        return self.format_field(value, "; ") if isinstance(value, list | tuple) else str(value)


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
        return SentenceFormatter().vformat(type(self).sentences[self.code], (), self.fields)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        """Copies and pickles have the code, the fields and all other attributes."""
        return partial(type(self), **self.fields), (self.code,), vars(self)


def field_names(sentence: str) -> set[str]:
    """The names in braces of a sentence."""
    return {name for _, name, _, _ in string.Formatter().parse(sentence) if name is not None}

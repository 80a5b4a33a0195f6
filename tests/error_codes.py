"""Errors by class, code and fields; and the table of all codes: ``python -m tests.error_codes``."""

import importlib
import re
import string
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from compressors.contracts.coded_error import CodedError
from compressors.contracts.reasons import Reason
from compressors.contracts.value_errors import SUBJECTS

TABLE = Path(__file__).parent.parent / "docs" / "errors.md"
MODULES = (
    "compressors.errors.construction",
    "compressors.errors.compression",
    "compressors.errors.metrics",
    "compressors.errors.orders",
    "compressors.errors.steps",
    "infra.errors.base",
    "infra.errors.bundles",
    "infra.errors.commands",
    "infra.errors.processes",
    "infra.errors.registry",
    "infra.errors.runtimes",
    "infra.errors.settings",
    "infra.errors.store",
    "flows.cli.doctor_errors",
)
"""Every class of errors with codes is in one of these."""


class Text:
    """Equal to a text, and to a sequence of texts, in which a regular expression is found."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __eq__(self, other: object) -> bool:
        texts = other if isinstance(other, list | tuple) else (other,)
        return any(isinstance(text, str) and re.search(self.pattern, text) for text in texts)

    def __hash__(self) -> int:
        return hash(self.pattern)

    def __repr__(self) -> str:
        return f"Text({self.pattern!r})"


class HasReason:
    """Equal to a reason, and to a sequence of reasons, with one of this code and these fields.

    The reason may be in a field of another one, and have more fields.
    """

    def __init__(self, code: str, **fields: Any) -> None:
        self.code, self.fields = code, fields

    def __eq__(self, other: object) -> bool:
        reasons = other if isinstance(other, list | tuple) else (other,)
        return any(
            inner.code == self.code
            and all(inner.fields.get(name) == value for name, value in self.fields.items())
            for reason in reasons
            if isinstance(reason, Reason)
            for inner in reason.walk()
        )

    def __hash__(self) -> int:
        return hash(self.code)

    def __repr__(self) -> str:
        return f"HasReason({self.code!r}, {self.fields!r})"


@contextmanager
def raises_code(
    kind: type[CodedError], code: str | None, /, **fields: Any
) -> Iterator[pytest.ExceptionInfo[CodedError]]:
    """Require an error of this class and code (None: any), with at least these fields.

    The value of a field may be a ``Text`` or ``HasReason``.
    """
    with pytest.raises(kind) as caught:
        yield caught
    assert code in {None, caught.value.code}, caught.value
    got = {name: caught.value.fields.get(name) for name in fields}
    assert got == fields, caught.value


def value_errors(
    fault: ValidationError | PydanticCustomError,
) -> list[tuple[str, Mapping[str, Any]]]:
    """Code and fields of each error that pydantic found, or of the one that a function raised."""
    if isinstance(fault, PydanticCustomError):
        return [(fault.type, fault.context or {})]
    return [(error["type"], error.get("ctx", {})) for error in fault.errors()]


@contextmanager
def raises_value_error(
    code: str, /, **fields: Any
) -> Iterator[pytest.ExceptionInfo[ValidationError | PydanticCustomError]]:
    """Require one error in a value, of this code, with at least these fields.

    It may be of pydantic's own codes. The value of a field may be a ``Text`` or ``HasReason``.
    """
    with pytest.raises((ValidationError, PydanticCustomError)) as caught:
        yield caught
    found = value_errors(caught.value)
    assert [known for known, _ in found] == [code], caught.value
    got = {name: found[0][1].get(name) for name in fields}
    assert got == fields, caught.value


def coded_classes() -> tuple[type[CodedError], ...]:
    """Every class of errors that lists codes."""
    members = [vars(importlib.import_module(name)).values() for name in MODULES]
    kinds = {kind for found in members for kind in found if isinstance(kind, type)}
    coded = [kind for kind in kinds if issubclass(kind, CodedError) and "sentences" in vars(kind)]
    return tuple(sorted((kind for kind in coded if kind.sentences), key=lambda kind: kind.__name__))


def example_of(kind: type[CodedError], code: str | None = None) -> CodedError:
    """An error of a class, by default of its first code, with a value in each field."""
    chosen = code or next(iter(kind.sentences))
    values = {
        name: "x" if not spec else 1 if spec == "," or spec[-1] in "fg" else ("x",)
        for _, name, spec, _ in string.Formatter().parse(kind.sentences[chosen])
        if name is not None
    }
    return kind(chosen, **values)


def page() -> str:
    """The documentation page: one table for each class."""
    lines = [
        "# Error codes",
        "",
        "Errors carry a code and fields, so that a program need not read the sentence:",
        "`fault.code`, `fault.fields`. This page lists every code with its sentence; names in",
        "braces are the fields, and after a colon follows how one is written: `.3g` is three",
        "digits, any other text separates the items of a list. Generated by",
        "`python -m tests.error_codes`.",
        "",
        "The last section lists the codes of values that a document, an order or a setting cannot",
        "have. They are the `type` of an entry of pydantic's `ValidationError.errors()`; `ctx` has",
        "the fields, and the derived `sentence`.",
    ]
    for kind in coded_classes():
        summary = (kind.__doc__ or "").splitlines()[0]
        lines += ["", f"## {kind.__name__}", "", summary, "", "| code | sentence |", "|---|---|"]
        lines += [f"| `{code}` | {text} |" for code, text in kind.sentences.items()]
    lines += ["", "## Fields of documents and settings"]
    for subject, sentences in SUBJECTS.items():
        lines += ["", f"### {subject}", "", "| code | sentence |", "|---|---|"]
        lines += [f"| `{code}` | {text} |" for code, text in sentences.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(page())

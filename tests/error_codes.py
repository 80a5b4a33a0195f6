"""Helpers that check errors by class, code and fields, and write the table of all codes.

``python -m tests.error_codes`` writes ``docs/errors.md``.
"""

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
    "compressors.errors.inspection",
    "compressors.errors.metrics",
    "compressors.errors.onnx_graphs",
    "compressors.errors.orders",
    "compressors.errors.steps",
    "compressors.errors.text_encoders",
    "infra.errors.base",
    "infra.errors.bundles",
    "infra.errors.commands",
    "infra.errors.drafts",
    "infra.errors.processes",
    "infra.errors.registry",
    "infra.errors.runtimes",
    "infra.errors.settings",
    "infra.errors.store",
    "flows.cli.doctor_errors",
)
"""The modules that define error classes with codes."""


class TextMatching:
    """Equal to a text that matches a pattern, and to a sequence with at least one such text."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern

    def __eq__(self, other: object) -> bool:
        texts = other if isinstance(other, list | tuple) else (other,)
        return any(isinstance(text, str) and re.search(self.pattern, text) for text in texts)

    def __hash__(self) -> int:
        return hash(self.pattern)

    def __repr__(self) -> str:
        return f"TextMatching({self.pattern!r})"


class HasReason:
    """Equal to a reason with this code and these fields, and to a sequence that contains one.

    The reason may be nested in a field of another reason, and may have more fields.
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
    error_class: type[CodedError], code: str | None, /, **fields: Any
) -> Iterator[pytest.ExceptionInfo[CodedError]]:
    """Require an error of this class and code (None: any code), with at least these fields.

    The value of a field may be a ``TextMatching`` or ``HasReason``.
    """
    with pytest.raises(error_class) as caught:
        yield caught
    assert code in {None, caught.value.code}, caught.value
    actual = {name: caught.value.fields.get(name) for name in fields}
    assert actual == fields, caught.value


def value_errors(
    fault: ValidationError | PydanticCustomError,
) -> list[tuple[str, Mapping[str, Any]]]:
    """Return code and fields of each error of pydantic, or of the error that a validator raised."""
    if isinstance(fault, PydanticCustomError):
        return [(fault.type, fault.context or {})]
    return [(error["type"], error.get("ctx", {})) for error in fault.errors()]


@contextmanager
def raises_value_error(
    code: str, /, **fields: Any
) -> Iterator[pytest.ExceptionInfo[ValidationError | PydanticCustomError]]:
    """Require exactly one validation error, of this code, with at least these fields.

    The code may be one of pydantic. A field's value may be a ``TextMatching`` or ``HasReason``.
    """
    with pytest.raises((ValidationError, PydanticCustomError)) as caught:
        yield caught
    errors = value_errors(caught.value)
    assert [known for known, _ in errors] == [code], caught.value
    actual = {name: errors[0][1].get(name) for name in fields}
    assert actual == fields, caught.value


def coded_classes() -> tuple[type[CodedError], ...]:
    """Return all error classes that define codes, sorted by name."""
    module_members = [vars(importlib.import_module(name)).values() for name in MODULES]
    classes = {
        error_class
        for errors in module_members
        for error_class in errors
        if isinstance(error_class, type)
    }
    coded_ones = [
        error_class
        for error_class in classes
        if issubclass(error_class, CodedError) and "sentences" in vars(error_class)
    ]
    return tuple(
        sorted(
            (error_class for error_class in coded_ones if error_class.sentences),
            key=lambda error_class: error_class.__name__,
        )
    )


def example_of(error_class: type[CodedError], code: str | None = None) -> CodedError:
    """Return an error of a class with a value in each field, by default with the first code."""
    chosen_code = code or next(iter(error_class.sentences))
    # After the colon, ``,`` or ``.3g`` formats a number; other text separates list items.
    values = {
        name: "x" if not spec else 1 if spec == "," or spec[-1] in "fg" else ("x",)
        for _, name, spec, _ in string.Formatter().parse(error_class.sentences[chosen_code])
        if name is not None
    }
    return error_class(chosen_code, **values)


def page() -> str:
    """Return the text of ``docs/errors.md``: one table per class."""
    lines = [
        "# Error codes",
        "",
        "Errors carry a code and fields, so that a program need not read the sentence:",
        "`fault.code`, `fault.fields`. This page lists every code with its sentence; names in",
        "braces are the fields. After a colon follows the format of a field: for a number or text",
        "as in Python, such as `.3g` (three significant digits), and for a list the text between",
        "its items (`lines` and `list`: one line for each item; `[]`: brackets around them).",
        "Generated by `python -m tests.error_codes`.",
        "",
        "The last section lists the codes of invalid values in documents (such as `model.json`),",
        "orders and settings. They are the `type` of an entry of pydantic's",
        "`ValidationError.errors()`; `ctx` has the fields, and the formatted `sentence`.",
    ]
    for error_class in coded_classes():
        summary = (error_class.__doc__ or "").splitlines()[0]
        lines += [
            "",
            f"## {error_class.__name__}",
            "",
            summary,
            "",
            "| code | sentence |",
            "|---|---|",
        ]
        lines += [f"| `{code}` | {text} |" for code, text in error_class.sentences.items()]
    lines += ["", "## Fields of documents and settings"]
    for subject, sentences in SUBJECTS.items():
        lines += ["", f"### {subject}", "", "| code | sentence |", "|---|---|"]
        lines += [f"| `{code}` | {text} |" for code, text in sentences.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(page())

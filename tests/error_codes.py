"""Errors by class, code and fields; and the table of all codes: ``python -m tests.error_codes``."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compressors.contracts.coded_error import CodedError

TABLE = Path(__file__).parent.parent / "docs" / "errors.md"
MODULES = ("compressors.errors.compression", "infra.errors")
"""Every class of errors with codes is in one of these."""


@contextmanager
def raises_code(
    kind: type[CodedError], code: str, **fields: Any
) -> Iterator[pytest.ExceptionInfo[CodedError]]:
    """Require an error of this class and code, with at least these fields."""
    with pytest.raises(kind) as caught:
        yield caught
    assert caught.value.code == code, caught.value
    got = {name: caught.value.fields.get(name) for name in fields}
    assert got == fields, caught.value


def coded_classes() -> tuple[type[CodedError], ...]:
    """Every class of errors that lists codes."""
    members = [vars(importlib.import_module(name)).values() for name in MODULES]
    kinds = {kind for found in members for kind in found if isinstance(kind, type)}
    coded = [kind for kind in kinds if issubclass(kind, CodedError) and "sentences" in vars(kind)]
    return tuple(sorted((kind for kind in coded if kind.sentences), key=lambda kind: kind.__name__))


def page() -> str:
    """The documentation page: one table for each class."""
    lines = [
        "# Error codes",
        "",
        "Errors carry a code and fields, so that a program need not read the sentence:",
        "`fault.code`, `fault.fields`. This page lists every code with its sentence; names in",
        "braces are the fields. It is generated: `python -m tests.error_codes`.",
    ]
    for kind in coded_classes():
        summary = (kind.__doc__ or "").splitlines()[0]
        lines += ["", f"## {kind.__name__}", "", summary, "", "| code | sentence |", "|---|---|"]
        lines += [f"| `{code}` | {text} |" for code, text in kind.sentences.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(page())

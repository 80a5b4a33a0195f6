"""Helpers that check reasons by code and fields, and write the table of all codes.

A reason explains a decision of a plan or verdict: a code and fields, from which a sentence follows.
``python -m tests.reason_codes`` writes ``docs/reasons.md``.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compressors.contracts.reasons import SUBJECTS, Reason

TABLE = Path(__file__).parent.parent / "docs" / "reasons.md"


def codes_of(reasons: Iterable[Reason]) -> list[str]:
    """Return the code of each reason, in order."""
    return [reason.code for reason in reasons]


def require_reason(reasons: Iterable[Reason], code: str, **fields: Any) -> Reason:
    """Require exactly one reason with this code and at least these fields, and return it.

    Reasons nested in fields of other reasons are included.
    """
    all_reasons = list(reasons)
    matching = [inner for reason in all_reasons for inner in reason.walk() if inner.code == code]
    assert len(matching) == 1, f"{len(matching)} of code {code!r} in {all_reasons}"
    actual = {name: matching[0].fields.get(name) for name in fields}
    assert actual == fields, matching[0]
    return matching[0]


def page() -> str:
    """Return the text of ``docs/reasons.md``: one table per subject."""
    lines = [
        "# Reason codes",
        "",
        "Plans and verdicts carry their reasons as a code and fields, so that a program need not",
        "read the sentence. In JSON, `reasons` holds objects of `code` and `fields`, and `reason`",
        "holds the derived sentence. A plan has `reasons` and `remarks` about whole steps, and its",
        "lines have `warnings` and `warning` in the same way. Fields of errors (`errors.md`) hold",
        "reasons too: problems of a bundle, of its labels and scores, and of the limits of an",
        "order.",
        "",
        "This page lists every code with its sentence; names in braces are the fields. A field",
        "can be the reason of another decision. Documents of earlier versions have sentences only:",
        "they are read as code `as_written`.",
        "",
        "The page is generated: `python -m tests.reason_codes`.",
    ]
    for subject, sentences in SUBJECTS.items():
        lines += ["", f"## {subject}", "", "| code | sentence |", "|---|---|"]
        lines += [f"| `{code}` | {text} |" for code, text in sentences.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(page())

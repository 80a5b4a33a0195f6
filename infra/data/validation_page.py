"""Render a validation result as one HTML file that needs no network and no script.

The pages of Great Expectations load their style over the network and cannot be read offline. This
file selects and formats the texts; the template escapes them.
"""

from dataclasses import dataclass

from infra.data.expectations import Finding, Validation
from infra.pages.html import many, render

TEMPLATE = "infra/pages/templates/validation.html.jinja"


@dataclass(frozen=True)
class Summary:
    """The result of a validation in a few words.

    Attributes:
        word: the verdict.
        reason: one sentence.
        tone: class of the colour, ``held`` or ``broken``.
    """

    word: str
    reason: str
    tone: str


@dataclass(frozen=True)
class CheckLine:
    """One check as text.

    Attributes:
        split: name of the split.
        column: name of the column; None for a check of the whole split.
        rule: what the check requires.
        result: ``passed``, ``failed`` or ``not evaluated``.
        tone: class of the result's colour.
        observed: the observed value, as text.
        rows: numbers of the first failing rows, with one failing value of each.
        more: how many failing values are not in ``rows``, in words; empty if none.
    """

    split: str
    column: str | None
    rule: str
    result: str
    tone: str
    observed: str
    rows: tuple[tuple[int, str], ...]
    more: str


@dataclass(frozen=True)
class SplitChecks:
    """All checks of one split; ``passed`` is their count in words, ``tone`` its colour."""

    name: str
    tone: str
    passed: str
    checks: tuple[CheckLine, ...]


@dataclass(frozen=True)
class CheckLists:
    """The lists of the template ``checks.html.jinja``.

    Attributes:
        warnings: about the model, a sentence each.
        failing: checks that did not pass, those that were not evaluated last.
        splits: every check by split.
    """

    warnings: tuple[str, ...]
    failing: tuple[CheckLine, ...]
    splits: tuple[SplitChecks, ...]


def validation_page(validation: Validation, title: str) -> str:
    """Render a validation as one self-contained HTML page.

    Args:
        validation: the results of the checks.
        title: the page's heading, as plain text.

    Returns:
        HTML with inline style only: verdict, counts, the failing checks with their rows, then
        every check by split.
    """
    return render(
        TEMPLATE,
        title=title,
        verdict=summary(validation),
        counts=_counts(validation),
        lists=check_lists(validation),
    )


def summary(validation: Validation) -> Summary:
    """Return the verdict of the checks, its reason and its colour."""
    unknown = validation.intended - validation.evaluated
    broken = sum(found.evaluated for found in validation.findings if not found.success)
    if validation.success:
        why = "Every intended check was evaluated, and every one held."
        return Summary("Data passed", why, "held")
    if validation.intended == 0:
        why = "No check was intended, so nothing is known."
        return Summary("Nothing was checked", why, "broken")
    if broken == 0:
        why = f"{many(unknown, 'check')} could not be evaluated, and so did not pass."
        return Summary("Data was not fully checked", why, "broken")
    rest = f"; {unknown} more could not be evaluated" if unknown else ""
    return Summary("Data failed", f"{many(broken, 'check')} did not hold{rest}.", "broken")


def check_lists(validation: Validation) -> CheckLists:
    """Select the warnings, the checks that did not pass, and all checks by split."""
    failing = [found for found in validation.findings if not found.success]
    # Failed checks first: they are often the cause of checks that could not be evaluated.
    ordered = sorted(failing, key=lambda found: not found.evaluated)
    splits = dict.fromkeys(found.split for found in validation.findings)
    return CheckLists(
        warnings=validation.warnings,
        failing=tuple(map(_check_line, ordered)),
        splits=tuple(_split_checks(validation, split) for split in splits),
    )


def _counts(validation: Validation) -> tuple[tuple[str, str], ...]:
    splits = {found.split for found in validation.findings}
    return (
        ("Checks evaluated", f"{validation.evaluated} of {validation.intended}"),
        ("Not passed", str(sum(not found.success for found in validation.findings))),
        ("Splits", str(len(splits))),
        ("Time", f"{validation.seconds:.1f} s"),
    )


def _split_checks(validation: Validation, split: str) -> SplitChecks:
    findings = [found for found in validation.findings if found.split == split]
    passed = sum(found.success for found in findings)
    return SplitChecks(
        name=split,
        tone="good" if passed == len(findings) else "bad",
        passed=f"{passed} of {many(len(findings), 'check')} passed",
        checks=tuple(map(_check_line, findings)),
    )


def _check_line(found: Finding) -> CheckLine:
    failed = "failed" if found.evaluated else "not evaluated"
    rows = tuple(zip(found.failing_rows, found.failing_values, strict=True))
    more = found.failing_count - len(rows)
    return CheckLine(
        split=found.split,
        column=found.column,
        rule=found.rule,
        result="passed" if found.success else failed,
        tone="good" if found.success else "bad",
        observed=found.observed,
        rows=rows,
        more=f"and {many(more, 'more value')}" if more > 0 else "",
    )

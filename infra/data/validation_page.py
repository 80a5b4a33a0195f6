"""Render a validation result as one HTML page that needs no network and no script.

Great Expectations' own pages load their style over the network, so they cannot be read offline.
This file selects and formats the texts of the page; the template escapes them.
"""

from dataclasses import dataclass

from infra.data.expectations import Finding, Validation
from infra.pages.html import format_count, render

TEMPLATE = "infra/pages/templates/validation.html.jinja"


@dataclass(frozen=True)
class Summary:
    """The result of a validation in a few words.

    Attributes:
        word: the result, such as "Data passed".
        reason: one sentence.
        tone: CSS class of the colour: ``held`` if the data passed, else ``broken``.
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
        tone: CSS class of the result's colour, ``good`` or ``bad``.
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
    """All checks of one split.

    Attributes:
        name: name of the split.
        tone: CSS class of the colour, ``good`` if all checks passed, else ``bad``.
        passed: how many checks passed, as text.
        checks: the checks.
    """

    name: str
    tone: str
    passed: str
    checks: tuple[CheckLine, ...]


@dataclass(frozen=True)
class CheckLists:
    """The lists that the template ``checks.html.jinja`` shows.

    Attributes:
        warnings: ``Validation.warnings``.
        failing: the failed checks, followed by those that were not evaluated.
        splits: all checks by split.
    """

    warnings: tuple[str, ...]
    failing: tuple[CheckLine, ...]
    splits: tuple[SplitChecks, ...]


def validation_page(validation: Validation, title: str) -> str:
    """Render a validation as one self-contained HTML page.

    Args:
        validation: the results of the checks.
        title: heading of the page, as plain text.

    Returns:
        HTML with inline style only. It shows the summary, counts, the failing checks with their
        rows, and all checks by split.
    """
    return render(
        TEMPLATE,
        title=title,
        verdict=summary(validation),
        counts=_format_counts(validation),
        lists=check_lists(validation),
    )


def summary(validation: Validation) -> Summary:
    """Return the result of all checks in a few words, its reason and its colour."""
    not_evaluated = validation.intended - validation.evaluated
    failed = sum(item.evaluated for item in validation.findings if not item.success)
    if validation.success:
        why = "Every planned check was evaluated and passed."
        return Summary("Data passed", why, "held")
    if validation.intended == 0:
        why = "No split was given, so no check was run."
        return Summary("Nothing was checked", why, "broken")
    if failed == 0:
        why = f"{format_count(not_evaluated, 'check')} could not be evaluated, and so did not pass."
        return Summary("Data was not fully checked", why, "broken")
    more = f"; {not_evaluated} more could not be evaluated" if not_evaluated else ""
    return Summary("Data failed", f"{format_count(failed, 'check')} failed{more}.", "broken")


def check_lists(validation: Validation) -> CheckLists:
    """Select the warnings, the checks that did not pass, and all checks by split."""
    failing = [finding for finding in validation.findings if not finding.success]
    # Failed checks first, because they are often why other checks could not be evaluated.
    ordered = sorted(failing, key=lambda finding: not finding.evaluated)
    splits = dict.fromkeys(finding.split for finding in validation.findings)
    return CheckLists(
        warnings=validation.warnings,
        failing=tuple(map(_describe_check, ordered)),
        splits=tuple(_describe_split(validation, split) for split in splits),
    )


def _format_counts(validation: Validation) -> tuple[tuple[str, str], ...]:
    """Return the labels and values of the page's counts."""
    splits = {finding.split for finding in validation.findings}
    return (
        ("Checks evaluated", f"{validation.evaluated} of {validation.intended}"),
        ("Not passed", str(sum(not finding.success for finding in validation.findings))),
        ("Splits", str(len(splits))),
        ("Time", f"{validation.seconds:.1f} s"),
    )


def _describe_split(validation: Validation, split: str) -> SplitChecks:
    """Return the checks of one split as text."""
    findings = [finding for finding in validation.findings if finding.split == split]
    passed = sum(finding.success for finding in findings)
    return SplitChecks(
        name=split,
        tone="good" if passed == len(findings) else "bad",
        passed=f"{passed} of {format_count(len(findings), 'check')} passed",
        checks=tuple(map(_describe_check, findings)),
    )


def _describe_check(finding: Finding) -> CheckLine:
    """Return one check as text."""
    not_passed = "failed" if finding.evaluated else "not evaluated"
    rows = tuple(zip(finding.failing_rows, finding.failing_values, strict=True))
    more = finding.failing_count - len(rows)
    return CheckLine(
        split=finding.split,
        column=finding.column,
        rule=finding.rule,
        result="passed" if finding.success else not_passed,
        tone="good" if finding.success else "bad",
        observed=finding.observed,
        rows=rows,
        more=f"and {format_count(more, 'more value')}" if more > 0 else "",
    )

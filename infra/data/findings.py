"""The results of data checks, and the error that is raised if a check failed."""

from compressors.contracts import Frozen
from infra.errors import DataRefused

ROWS_REPORTED = 10
"""Most failing rows in one line of an error; the HTML page lists 20."""


class Finding(Frozen):
    """The result of one check.

    Attributes:
        split: the split that was checked.
        column: the column that was checked; None for the number of rows.
        rule: the requirement, as text.
        success: whether the check was evaluated and passed.
        observed: the observed value, or why the check was not evaluated, as text.
        failing_rows: numbers of the first failing rows, at most 20. They start at 0 and continue
            through all part files. Empty for a check of a whole split: its number of rows, column
            types or label rate.
        failing_count: number of all failing values.
        failing_values: one failing value of each row in ``failing_rows``.
        evaluated: whether Great Expectations evaluated the check.
    """

    split: str
    column: str | None
    rule: str
    success: bool
    observed: str
    failing_rows: tuple[int, ...] = ()
    failing_count: int = 0
    failing_values: tuple[str, ...] = ()
    evaluated: bool = True


class Validation(Frozen):
    """The results of all checks of a data set.

    Attributes:
        success: whether there are checks, and all were evaluated and passed.
        evaluated: number of evaluated checks.
        intended: number of planned checks.
        findings: one result per planned check.
        seconds: wall time of reading and checking.
        warnings: sentences about the scores of the uncompressed model on its test rows. They do
            not affect ``success``.
    """

    success: bool
    evaluated: int
    intended: int
    findings: tuple[Finding, ...]
    seconds: float
    warnings: tuple[str, ...] = ()


def refuse_failures(validation: Validation) -> None:
    """Raise if a check failed or was not evaluated.

    Raises:
        DataRefused: a check failed or was not evaluated; the error has one line for each, with
            split, column, rule and rows. Or no check was planned.
    """
    if validation.intended == 0:
        raise DataRefused("checks_missing")
    failed = [item for item in validation.findings if not item.success and item.evaluated]
    not_evaluated = [item for item in validation.findings if not item.evaluated]
    lines = [
        f"{_format_location(item)}: needs {item.rule}; found {_format_failure(item)}."
        for item in failed
    ]
    lines += [f"{_format_location(item)}: {item.rule}: {item.observed}." for item in not_evaluated]
    if validation.evaluated < validation.intended:
        lines.append(
            f"Only {validation.evaluated} of {validation.intended} intended checks could be "
            "evaluated, and a check that was not evaluated did not pass."
        )
    if lines or not validation.success:
        raise DataRefused("checks_failed", problems=tuple(lines))


def _format_location(finding: Finding) -> str:
    """Format the split and the column of a finding."""
    column = "" if finding.column is None else f", column {finding.column!r}"
    return f"split {finding.split!r}{column}"


def _format_failure(finding: Finding) -> str:
    """Format what was observed, with the first failing rows and values."""
    if not finding.failing_rows:
        return finding.observed
    pairs = list(zip(finding.failing_rows, finding.failing_values, strict=True))[:ROWS_REPORTED]
    rows = ", ".join(f"{row} ({value})" for row, value in pairs)
    more = " and more" if finding.failing_count > len(pairs) else ""
    return f"{finding.observed}, row(s) {rows}{more}"

"""Validate the splits of a data set with Great Expectations suites built from a signature.

A check that raises inside Great Expectations was not evaluated and never counts as passed: a
validation succeeds only if every planned check was evaluated and passed.
"""

import datetime as dt
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from compressors.contracts import Frozen, Signature
from infra.data.checks import BEFORE, COUNT, LENGTHS, TYPES, Check, Rules, plan
from infra.data.parquet import (
    MOMENTS,
    ROWS_SHOWN,
    Survey,
    batches,
    flat,
    needs,
    plain_times,
    survey,
)
from infra.data.parquet_inspection import kind_of
from infra.errors import DataRefused

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Finding", "Rules", "Validation", "refuse_failures", "validate"]

# Great Expectations lists failing entries in order; one row may have several.
ENTRIES_REQUESTED = 10 * ROWS_SHOWN

FRAMES = "frames"

# Rows listed in one line of an error; the page lists the first 20.
ROWS_REPORTED = 10

# Great Expectations keeps its context in a global, so validations of one process run in turn.
_TURN = threading.Lock()


class Finding(Frozen):
    """The result of one check.

    ``failing_rows`` are the parquet row numbers, from 0 through all parts, of the first
    failing rows (at most 20) and ``failing_values`` one failing value of each;
    ``failing_count`` counts all failing values. A check of a whole split (rows, types, label
    rate) names no rows, only ``observed``. A check that was not ``evaluated`` is never a
    ``success``.
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
    """The results of all checks.

    ``seconds`` is the wall time of reading and checking. ``warnings`` are about the uncompressed
    model on its test rows; they do not check the data and never fail a validation.
    """

    success: bool
    evaluated: int
    intended: int
    findings: tuple[Finding, ...]
    seconds: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Facts:
    """Facts about a split, collected before its rows are checked."""

    found: Survey
    kinds: dict[str, str]
    usable: frozenset[str]


def validate(
    splits: dict[str, Path],
    signature: Signature,
    rows_of_table: dict[str, int],
    rules: Rules | None = None,
) -> Validation:
    """Check every split against the signature, and the time order of the splits.

    Each split is read into memory: its plain columns together, its list columns one by one.

    Args:
        splits: parquet file or folder by split name (train, calibration, validation, test; items).
        signature: the bundle's signature.
        rows_of_table: rows of every table an input reads, by table name.
        rules: minimum rows and label rate; ``Rules()`` if not given.

    Raises:
        DataRefused: a file cannot be read, or an input's table is unknown. Failing checks do not
            raise here; call ``refuse_failures``.
    """
    begun = time.perf_counter()
    read = {split: signature.of_split(split) for split in splits}
    facts = {split: _facts(path, read[split]) for split, path in splits.items()}
    kinds = {split: known.kinds for split, known in facts.items()}
    checks = {
        split: plan(split, read[split], kinds, rows_of_table, rules or Rules()) for split in splits
    }
    starts = {split: _start(known, read[split].time) for split, known in facts.items()}
    findings: list[Finding] = []
    with _TURN, _quiet_frames() as frames:
        for split, known in facts.items():
            findings += _check_split(frames, known, checks[split], starts)
    intended = sum(map(len, checks.values()))
    evaluated = sum(finding.evaluated for finding in findings)
    held = all(finding.success for finding in findings)
    return Validation(
        success=held and evaluated == intended and intended > 0,
        evaluated=evaluated,
        intended=intended,
        findings=tuple(findings),
        seconds=time.perf_counter() - begun,
    )


def refuse_failures(validation: Validation) -> None:
    """Raise if a check failed or was not evaluated.

    Raises:
        DataRefused: one line per failing check with split, column, rule and rows; or fewer checks
            were evaluated than planned; or none was planned.
    """
    if validation.intended == 0:
        raise DataRefused("checks_missing")
    failed = [found for found in validation.findings if not found.success and found.evaluated]
    unknown = [found for found in validation.findings if not found.evaluated]
    lines = [
        f"{_place(found)}: needs {found.rule}; found {_failure_text(found)}." for found in failed
    ]
    lines += [f"{_place(found)}: {found.rule}: {found.observed}." for found in unknown]
    if validation.evaluated < validation.intended:
        lines.append(
            f"Only {validation.evaluated} of {validation.intended} intended checks could be "
            "evaluated, and a check that was not evaluated did not pass."
        )
    if lines or not validation.success:
        raise DataRefused("checks_failed", problems=tuple(lines))


def _place(found: Finding) -> str:
    column = "" if found.column is None else f", column {found.column!r}"
    return f"split {found.split!r}{column}"


def _failure_text(found: Finding) -> str:
    if not found.failing_rows:
        return found.observed
    pairs = list(zip(found.failing_rows, found.failing_values, strict=True))[:ROWS_REPORTED]
    rows = ", ".join(f"{row} ({value})" for row, value in pairs)
    more = " and more" if found.failing_count > len(pairs) else ""
    return f"{found.observed}, row(s) {rows}{more}"


def _facts(parquet: Path, signature: Signature) -> _Facts:
    found = survey(parquet, signature)
    kinds = {
        name: "there more than once" if name in found.repeated else kind
        for name, kind in found.kinds.items()
    }
    usable = {need.column for need in needs(signature)}
    for column, _, allowed, _ in needs(signature):
        if kinds.get(column) not in allowed:
            usable.discard(column)
    return _Facts(found, kinds, frozenset(usable))


def _start(known: _Facts, column: str | None) -> Any:
    """Return the first time of a split; None without a time column, rows or a usable time."""
    if column is None or column not in known.usable:
        return None
    least = [
        pc.min(pc.if_else(pc.is_finite(times), times, pa.scalar(None, times.type))).as_py()
        for _, batch in batches(known.found, (column,))
        for times in [plain_times(batch.column(column))]
    ]
    return min((moment for moment in least if moment is not None), default=None)


def _check_split(
    frames: Any, known: _Facts, checks: list[Check], starts: dict[str, Any]
) -> list[Finding]:
    """Run a split's checks, one suite per frame; returns findings in the order of the checks."""
    findings: dict[int, Finding] = {}
    suites: dict[tuple[str, str | None], list[int]] = {}
    for place, check in enumerate(checks):
        obstacle = _obstacle(check, known, starts)
        if obstacle:
            findings[place] = _not_evaluated(check, obstacle)
        else:
            suites.setdefault(check.frame, []).append(place)
    for frame, places in suites.items():
        suite = [checks[place] for place in places]
        entries = _frame(frame, suite, known, starts)
        findings |= zip(places, _run(frames, entries, suite, known, starts), strict=True)
    return [findings[place] for place in range(len(checks))]


def _obstacle(check: Check, known: _Facts, starts: dict[str, Any]) -> str:
    """Return why a check cannot be evaluated, or ''."""
    if check.view == COUNT or check.expects == "ExpectColumnToExist":
        return ""
    if check.column not in known.kinds:
        return "the column is missing"
    if check.view == TYPES:
        return ""
    if check.column not in known.usable:
        return "the column has the wrong type"
    if known.found.rows == 0:
        return "the split has no rows"
    if check.view == BEFORE and starts[str(check.against)] is None:
        return f"split {check.against!r} has no moment to compare with"
    return ""


def _frame(
    frame: tuple[str, str | None], suite: list[Check], known: _Facts, starts: dict[str, Any]
) -> "pd.DataFrame":
    """Build the frame that a suite reads; the index is the row number in the split."""
    import pandas as pd

    view, listed = frame
    if view == TYPES:
        return pd.DataFrame({name: [kind] for name, kind in known.kinds.items()})
    if listed is not None:
        values, rows, _ = flat(_whole(known.found, (listed,))[listed])
        return pd.DataFrame({listed: _series(values).set_axis(rows)})
    wanted = {check.entry: check for check in suite if check.column is not None}
    whole = _whole(known.found, {str(check.column) for check in wanted.values()})
    columns = {}
    for entry, check in wanted.items():
        column = whole[str(check.column)]
        if check.view == LENGTHS:
            column = pc.list_value_length(column)
        elif check.view == BEFORE:
            column = pc.subtract(plain_times(column), starts[str(check.against)])
        columns[entry] = _series(column)
    return pd.DataFrame(columns, index=pd.RangeIndex(known.found.rows))


def _whole(found: Survey, columns: Iterable[str]) -> dict[str, pa.Array]:
    """Read some columns of a split, each as one array."""
    wanted = sorted(columns)
    if not wanted:
        return {}
    table = pa.concat_tables(
        [pa.Table.from_batches([batch]) for _, batch in batches(found, wanted)],
        promote_options="permissive",
    )
    whole = {name: table.column(name).combine_chunks() for name in wanted}
    broken = [name for name, column in whole.items() if isinstance(column, pa.ChunkedArray)]
    if broken:
        raise DataRefused("column_too_long", column=broken[0])
    return whole


def _series(column: pa.Array) -> "pd.Series[Any]":
    """Convert a column to pandas: nullable integers stay integers, times become microseconds."""
    import pandas as pd

    kind = kind_of(column.type)
    if kind == "boolean":
        column = column.cast(pa.int8())
    elif kind == "float":
        column = column.cast(pa.float64())
    elif kind in MOMENTS:
        column = plain_times(column)
    if pa.types.is_integer(column.type) and column.null_count:
        wide = pd.UInt64Dtype() if pa.types.is_uint64(column.type) else pd.Int64Dtype()
        return pd.Series(column.to_pandas(types_mapper={column.type: wide}.get))
    return pd.Series(column.to_pandas())


@contextmanager
def _quiet_frames() -> Iterator[Any]:
    """Yield a definition of whole-frame batches, in an in-memory context.

    Inside the block Great Expectations writes no files, telemetry, progress bars or log lines.
    """
    import great_expectations as gx

    # Exceptions inside an expectation are in its result and then in the finding, so their log lines
    # are redundant. Its loggers set their levels themselves; only a global level silences them.
    log, wall = logging.getLogger("great_expectations"), logging.NullHandler()
    passes_on = log.propagate
    log.propagate = False
    log.addHandler(wall)
    try:
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False, "metric_calculations": False}
        asset = context.data_sources.add_pandas(FRAMES).add_dataframe_asset(FRAMES)
        yield asset.add_batch_definition_whole_dataframe(FRAMES)
    finally:
        log.removeHandler(wall)
        log.propagate = passes_on


def _run(
    frames: Any,
    entries: "pd.DataFrame",
    suite: list[Check],
    known: _Facts,
    starts: dict[str, Any],
) -> list[Finding]:
    """Evaluate one suite on one frame."""
    import great_expectations as gx
    from great_expectations.exceptions import GreatExpectationsError

    wanted = [_expectation(check, place) for place, check in enumerate(suite)]
    try:
        ran = frames.get_batch({"dataframe": entries}).validate(
            gx.ExpectationSuite(FRAMES, expectations=wanted),
            result_format={
                "result_format": "SUMMARY",
                "partial_unexpected_count": ENTRIES_REQUESTED,
            },
        )
    except GreatExpectationsError as fault:
        return [_not_evaluated(check, f"Great Expectations failed: {fault}") for check in suite]
    results = {item.expectation_config.meta["place"]: item for item in ran.results}
    return [_finding(check, results.get(place), known, starts) for place, check in enumerate(suite)]


def _expectation(check: Check, place: int) -> Any:
    """Build the expectation that a check names."""
    import great_expectations.expectations as gxe

    column = {} if check.entry is None else {"column": check.entry}
    return getattr(gxe, check.expects)(**column, **check.settings, meta={"place": place})


def _finding(check: Check, answer: Any, known: _Facts, starts: dict[str, Any]) -> Finding:
    if answer is None:
        return _not_evaluated(check, "Great Expectations gave no result for it")
    raised = _raised(answer.exception_info)
    if raised:
        return _not_evaluated(check, f"it raised inside Great Expectations: {raised}")
    result = answer.result
    observed = _observed(check, result, known)
    rows: dict[int, str] = {}
    count = 0
    if check.view not in (COUNT, TYPES):
        count = int(result.get("unexpected_count") or 0)
        kind = known.kinds.get(str(check.column), "")
        pairs = zip(
            result.get("partial_unexpected_index_list") or (),
            result.get("partial_unexpected_list") or (),
            strict=True,
        )
        for row, value in pairs:
            rows.setdefault(int(row), _value(check, value, kind, starts))
    shown = sorted(rows)[:ROWS_SHOWN]
    return Finding(
        split=check.split,
        column=check.column,
        rule=check.rule,
        success=bool(answer.success),
        observed=observed,
        failing_rows=tuple(shown),
        failing_count=count,
        failing_values=tuple(rows[row] for row in shown),
    )


def _raised(info: dict[str, Any]) -> str:
    """Return the message of an exception inside an expectation, or ''.

    Args:
        info: Great Expectations' record of it: one record, or one per metric.
    """
    records = [info] if "raised_exception" in info else list(info.values())
    messages = [
        str(record.get("exception_message")) for record in records if record["raised_exception"]
    ]
    return "; ".join(dict.fromkeys(messages))


def _observed(check: Check, result: dict[str, Any], known: _Facts) -> str:
    if check.view == TYPES:
        kind = known.kinds.get(str(check.column))
        if kind is None:
            return "no such column"
        fits = check.expects == "ExpectColumnToExist" or kind in check.settings["value_set"]
        return kind if fits else f"{kind}. {check.remedy.removesuffix('.')}"
    if "observed_value" in result:
        value = result["observed_value"]
        return "nothing to measure" if value is None else f"{value:.6g}"
    total, wrong = int(result["element_count"]), int(result["unexpected_count"])
    return f"{wrong} of {total} value(s) failing" if wrong else f"all {total} value(s)"


def _value(check: Check, value: Any, kind: str, starts: dict[str, Any]) -> str:
    """Format one failing value; for a BEFORE view, the time instead of the difference."""
    import pandas as pd

    if pd.isna(value):
        return "null or NaN"
    if check.view == BEFORE:
        value = starts[str(check.against)] + value
        if kind in MOMENTS:
            moment = dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=int(value))
            return moment.isoformat(sep=" ")
    return str(value.item() if isinstance(value, np.generic) else value)


def _not_evaluated(check: Check, why: str) -> Finding:
    return Finding(
        split=check.split,
        column=check.column,
        rule=check.rule,
        success=False,
        observed=f"not evaluated: {why}",
        evaluated=False,
    )

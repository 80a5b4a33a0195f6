"""Run the planned checks of a data set (``checks.py``) with Great Expectations.

A validation succeeds only if every planned check was evaluated and passed. A check that raises
inside Great Expectations counts as not evaluated.
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

from compressors.contracts import Signature
from infra.data.checks import BEFORE, COUNT, LENGTHS, TYPES, Check, Rules, plan
from infra.data.findings import Finding, Validation, refuse_failures
from infra.data.parquet import (
    MOMENTS,
    ROWS_SHOWN,
    SplitContents,
    batches,
    column_uses,
    flatten,
    inspect_split,
    to_plain_times,
)
from infra.data.parquet_inspection import kind_of
from infra.errors import DataRefused

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Finding", "Rules", "Validation", "refuse_failures", "validate"]

# Failing values requested per check. More than the rows shown, because a row may have several.
ENTRIES_REQUESTED = 10 * ROWS_SHOWN

FRAMES = "frames"

# Great Expectations has one global context, so only one thread may validate at a time.
_LOCK = threading.Lock()


@dataclass(frozen=True)
class _Facts:
    """The inspected files of a split, the type of each column, and columns of a usable type."""

    contents: SplitContents
    kinds: dict[str, str]
    usable: frozenset[str]


def validate(
    splits: dict[str, Path],
    signature: Signature,
    rows_of_table: dict[str, int],
    rules: Rules | None = None,
) -> Validation:
    """Check every split against the signature, and the time order of the splits.

    Columns of plain values are read into memory together, list columns one after another.

    Args:
        splits: parquet file or folder by split name (train, calibration, validation, test; items).
        signature: signature of the bundle.
        rows_of_table: number of rows of every table that an input refers to, by table name.
        rules: requirements beyond the signature; ``Rules()`` by default.

    Raises:
        DataRefused: a file cannot be read, or an input's table is unknown. A failing check does not
            raise; pass the result to ``refuse_failures``.
    """
    start = time.perf_counter()
    signatures = {split: signature.of_split(split) for split in splits}
    splits_facts = {split: _facts(path, signatures[split]) for split, path in splits.items()}
    kinds = {split: facts.kinds for split, facts in splits_facts.items()}
    checks = {
        split: plan(split, signatures[split], kinds, rows_of_table, rules or Rules())
        for split in splits
    }
    starts = {
        split: _first_time(facts, signatures[split].time) for split, facts in splits_facts.items()
    }
    findings: list[Finding] = []
    with _LOCK, _quiet_frames() as frames:
        for split, facts in splits_facts.items():
            findings += _check_split(frames, facts, checks[split], starts)
    intended = sum(map(len, checks.values()))
    evaluated = sum(finding.evaluated for finding in findings)
    all_passed = all(finding.success for finding in findings)
    return Validation(
        success=all_passed and evaluated == intended and intended > 0,
        evaluated=evaluated,
        intended=intended,
        findings=tuple(findings),
        seconds=time.perf_counter() - start,
    )


def _facts(parquet: Path, signature: Signature) -> _Facts:
    """Inspect the files of a split and find the columns whose type fits all their uses."""
    contents = inspect_split(parquet, signature)
    kinds = {
        name: "there more than once" if name in contents.repeated else kind
        for name, kind in contents.kinds.items()
    }
    usable = {use.column for use in column_uses(signature)}
    for use in column_uses(signature):
        if kinds.get(use.column) not in use.kinds:
            usable.discard(use.column)
    return _Facts(contents, kinds, frozenset(usable))


def _first_time(facts: _Facts, column: str | None) -> Any:
    """Return the smallest finite value of the time column of a split; None if there is none."""
    if column is None or column not in facts.usable:
        return None
    minima = [
        pc.min(pc.if_else(pc.is_finite(times), times, pa.scalar(None, times.type))).as_py()
        for _, batch in batches(facts.contents, (column,))
        for times in [to_plain_times(batch.column(column))]
    ]
    return min((minimum for minimum in minima if minimum is not None), default=None)


def _check_split(
    frames: Any, facts: _Facts, checks: list[Check], starts: dict[str, Any]
) -> list[Finding]:
    """Run all checks of one split, as one suite per frame.

    Args:
        frames: the batch definition of ``_quiet_frames``.
        facts: the inspected files of the split.
        checks: the planned checks of the split.
        starts: first time of each split by name.

    Returns:
        One finding per check, in the order of ``checks``.
    """
    findings: dict[int, Finding] = {}
    suites: dict[tuple[str, str | None], list[int]] = {}
    for index, check in enumerate(checks):
        obstacle = _obstacle(check, facts, starts)
        if obstacle:
            findings[index] = _not_evaluated(check, obstacle)
        else:
            suites.setdefault(check.frame, []).append(index)
    for frame_key, indices in suites.items():
        suite = [checks[index] for index in indices]
        frame = _build_frame(frame_key, suite, facts, starts)
        findings |= zip(indices, _run_suite(frames, frame, suite, facts, starts), strict=True)
    return [findings[index] for index in range(len(checks))]


def _obstacle(check: Check, facts: _Facts, starts: dict[str, Any]) -> str:
    """Return why a check cannot be evaluated; an empty string if it can."""
    if check.view == COUNT or check.expects == "ExpectColumnToExist":
        return ""
    if check.column not in facts.kinds:
        return "the column is missing"
    if check.view == TYPES:
        return ""
    if check.column not in facts.usable:
        return "the column has the wrong type"
    if facts.contents.rows == 0:
        return "the split has no rows"
    if check.view == BEFORE and starts[str(check.against)] is None:
        return f"split {check.against!r} has no moment to compare with"
    return ""


def _build_frame(
    key: tuple[str, str | None], suite: list[Check], facts: _Facts, starts: dict[str, Any]
) -> "pd.DataFrame":
    """Build the frame that a suite reads, with row numbers of the split as the index.

    Args:
        key: ``Check.frame`` of the checks.
        suite: the checks.
        facts: the inspected files of the split.
        starts: first time of each split by name.
    """
    import pandas as pd

    view, list_column = key
    if view == TYPES:
        return pd.DataFrame({name: [kind] for name, kind in facts.kinds.items()})
    if list_column is not None:
        values, rows, _ = flatten(_read_columns(facts.contents, (list_column,))[list_column])
        return pd.DataFrame({list_column: _series(values).set_axis(rows)})
    by_entry = {check.entry: check for check in suite if check.column is not None}
    names = {str(check.column) for check in by_entry.values()}
    arrays = _read_columns(facts.contents, names)
    columns = {}
    for entry, check in by_entry.items():
        column = arrays[str(check.column)]
        if check.view == LENGTHS:
            column = pc.list_value_length(column)
        elif check.view == BEFORE:
            column = pc.subtract(to_plain_times(column), starts[str(check.against)])
        columns[entry] = _series(column)
    return pd.DataFrame(columns, index=pd.RangeIndex(facts.contents.rows))


def _read_columns(contents: SplitContents, columns: Iterable[str]) -> dict[str, pa.Array]:
    """Read some columns of a split, each as one array.

    Raises:
        DataRefused: a column has too many bytes for one array.
    """
    names = sorted(columns)
    if not names:
        return {}
    table = pa.concat_tables(
        [pa.Table.from_batches([batch]) for _, batch in batches(contents, names)],
        promote_options="permissive",
    )
    arrays = {name: table.column(name).combine_chunks() for name in names}
    too_long = [name for name, array in arrays.items() if isinstance(array, pa.ChunkedArray)]
    if too_long:
        raise DataRefused("column_too_long", column=too_long[0])
    return arrays


def _series(column: pa.Array) -> "pd.Series[Any]":
    """Convert a column to pandas: nullable integers remain integers, times become microseconds."""
    import pandas as pd

    kind = kind_of(column.type)
    if kind == "boolean":
        column = column.cast(pa.int8())
    elif kind == "float":
        column = column.cast(pa.float64())
    elif kind in MOMENTS:
        column = to_plain_times(column)
    if pa.types.is_integer(column.type) and column.null_count:
        wide = pd.UInt64Dtype() if pa.types.is_uint64(column.type) else pd.Int64Dtype()
        return pd.Series(column.to_pandas(types_mapper={column.type: wide}.get))
    return pd.Series(column.to_pandas())


@contextmanager
def _quiet_frames() -> Iterator[Any]:
    """Yield a batch definition of Great Expectations that validates a whole pandas frame.

    Its context is in memory. Inside the block, Great Expectations writes no files, telemetry,
    progress bars or log lines.
    """
    import great_expectations as gx

    # An exception inside an expectation becomes part of the finding, so its log lines are
    # redundant. The library's loggers set their levels themselves, so a level would not hide them.
    log, null_handler = logging.getLogger("great_expectations"), logging.NullHandler()
    earlier_propagate = log.propagate
    log.propagate = False
    log.addHandler(null_handler)
    try:
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = {"globally": False, "metric_calculations": False}
        asset = context.data_sources.add_pandas(FRAMES).add_dataframe_asset(FRAMES)
        yield asset.add_batch_definition_whole_dataframe(FRAMES)
    finally:
        log.removeHandler(null_handler)
        log.propagate = earlier_propagate


def _run_suite(
    frames: Any,
    frame: "pd.DataFrame",
    suite: list[Check],
    facts: _Facts,
    starts: dict[str, Any],
) -> list[Finding]:
    """Evaluate the checks of one suite on one frame; returns one finding per check."""
    import great_expectations as gx
    from great_expectations.exceptions import GreatExpectationsError

    expectations = [_expectation(check, index) for index, check in enumerate(suite)]
    try:
        validation = frames.get_batch({"dataframe": frame}).validate(
            gx.ExpectationSuite(FRAMES, expectations=expectations),
            result_format={
                "result_format": "SUMMARY",
                "partial_unexpected_count": ENTRIES_REQUESTED,
            },
        )
    except GreatExpectationsError as fault:
        return [_not_evaluated(check, f"Great Expectations failed: {fault}") for check in suite]
    results = {item.expectation_config.meta["index"]: item for item in validation.results}
    return [_finding(check, results.get(index), facts, starts) for index, check in enumerate(suite)]


def _expectation(check: Check, index: int) -> Any:
    """Build the expectation of a check; ``index`` identifies its result."""
    import great_expectations.expectations as gxe

    column = {} if check.entry is None else {"column": check.entry}
    return getattr(gxe, check.expects)(**column, **check.settings, meta={"index": index})


def _finding(check: Check, gx_result: Any, facts: _Facts, starts: dict[str, Any]) -> Finding:
    """Convert the result of Great Expectations for one check; None is a missing result."""
    if gx_result is None:
        return _not_evaluated(check, "Great Expectations gave no result for it")
    message = _exception_message(gx_result.exception_info)
    if message:
        return _not_evaluated(check, f"it raised inside Great Expectations: {message}")
    result = gx_result.result
    observed = _observed(check, result, facts)
    rows: dict[int, str] = {}
    count = 0
    if check.view not in (COUNT, TYPES):
        count = int(result.get("unexpected_count") or 0)
        kind = facts.kinds.get(str(check.column), "")
        pairs = zip(
            result.get("partial_unexpected_index_list") or (),
            result.get("partial_unexpected_list") or (),
            strict=True,
        )
        for row, value in pairs:
            rows.setdefault(int(row), _value_text(check, value, kind, starts))
    shown_rows = sorted(rows)[:ROWS_SHOWN]
    return Finding(
        split=check.split,
        column=check.column,
        rule=check.rule,
        success=bool(gx_result.success),
        observed=observed,
        failing_rows=tuple(shown_rows),
        failing_count=count,
        failing_values=tuple(rows[row] for row in shown_rows),
    )


def _exception_message(info: dict[str, Any]) -> str:
    """Return the message of an exception inside an expectation; an empty string if none.

    Args:
        info: ``exception_info`` of the result: one record, or one record per metric by name.
    """
    records = [info] if "raised_exception" in info else list(info.values())
    messages = [
        str(record.get("exception_message")) for record in records if record["raised_exception"]
    ]
    return "; ".join(dict.fromkeys(messages))


def _observed(check: Check, result: dict[str, Any], facts: _Facts) -> str:
    """Format what a check observed."""
    if check.view == TYPES:
        kind = facts.kinds.get(str(check.column))
        if kind is None:
            return "no such column"
        fits = check.expects == "ExpectColumnToExist" or kind in check.settings["value_set"]
        return kind if fits else f"{kind}. {check.remedy.removesuffix('.')}"
    if "observed_value" in result:
        value = result["observed_value"]
        return "nothing to measure" if value is None else f"{value:.6g}"
    total, failing = int(result["element_count"]), int(result["unexpected_count"])
    return f"{failing} of {total} value(s) failing" if failing else f"all {total} value(s)"


def _value_text(check: Check, value: Any, kind: str, starts: dict[str, Any]) -> str:
    """Format one failing value; in the view ``BEFORE``, the time instead of the difference."""
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
    """Return the finding of a check that could not be evaluated."""
    return Finding(
        split=check.split,
        column=check.column,
        rule=check.rule,
        success=False,
        observed=f"not evaluated: {why}",
        evaluated=False,
    )

"""Run the planned checks of a data set (``checks.py``) with Great Expectations.

A validation succeeds only if every planned check was evaluated and passed. A check that raises
inside Great Expectations counts as not evaluated.

A check has a view: the values that it is evaluated on, such as the lengths of lists (``LENGTHS``)
or each time minus the first time of a later split (``BEFORE``). ``COUNT`` is the number of rows,
``TYPES`` the type of each column, ``LABELLED`` the values in the rows whose label is used. Checks
that read the same pandas frame run as one suite; ``Check.frame_column`` is the column of the frame
that a check reads. The result of a check is a finding (``findings.py``).
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
from infra.data.checks import BEFORE, COUNT, LABELLED, LENGTHS, TYPES, Check, Rules, plan
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
from infra.data.parquet_inspection import get_kind
from infra.errors import DataRefused

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Finding", "Rules", "Validation", "refuse_failures", "validate"]

# Failing values requested per check: more than the rows shown, because a row may have several.
REQUESTED_VALUES = 10 * ROWS_SHOWN

# Great Expectations needs a name for its data source, asset, batch definition and suite.
GX_NAME = "frames"

# Great Expectations has one global context, so only one thread may validate at a time.
_LOCK = threading.Lock()


@dataclass(frozen=True)
class _InspectedSplit:
    """The inspected files of a split, and the types of its columns.

    Attributes:
        contents: counts and column types of the files.
        kinds: type of each column, as ``get_kind`` names it.
        usable_columns: names of the columns whose type fits all their uses.
    """

    contents: SplitContents
    kinds: dict[str, str]
    usable_columns: frozenset[str]


def validate(
    splits: dict[str, Path],
    signature: Signature,
    rows_of_table: dict[str, int],
    rules: Rules | None = None,
) -> Validation:
    """Check every split against the signature, and the time order of the splits.

    All columns without lists are in memory at the same time; list columns are read one after
    another.

    Args:
        splits: parquet file or folder by split name, such as ``train``.
        signature: signature of the bundle.
        rows_of_table: number of rows of every table that an input refers to, by table name.
        rules: requirements beyond the signature; ``Rules()`` by default.

    Returns:
        One finding per planned check, and whether all passed.

    Raises:
        DataRefused: a file cannot be read, or an input's table is unknown. A failing check does not
            raise; pass the result to ``refuse_failures``.
    """
    start = time.perf_counter()
    signatures = {split: signature.of_split(split) for split in splits}
    inspections = {
        split: _inspect_columns(path, signatures[split]) for split, path in splits.items()
    }
    kinds = {split: inspection.kinds for split, inspection in inspections.items()}
    checks = {
        split: plan(split, signatures[split], kinds, rows_of_table, rules or Rules())
        for split in splits
    }
    starts = {
        split: _find_first_time(inspection, signatures[split].time)
        for split, inspection in inspections.items()
    }
    findings: list[Finding] = []
    with _LOCK, _open_batch_definition() as batch_definition:
        for split, inspection in inspections.items():
            findings += _check_split(batch_definition, inspection, checks[split], starts)
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


def _inspect_columns(parquet: Path, signature: Signature) -> _InspectedSplit:
    """Inspect the files of a split and find the columns whose type fits all their uses."""
    contents = inspect_split(parquet, signature)
    kinds = {
        # A column that is there more than once fits no use.
        name: "there more than once" if name in contents.repeated else kind
        for name, kind in contents.kinds.items()
    }
    usable = {use.column for use in column_uses(signature)}
    for use in column_uses(signature):
        if kinds.get(use.column) not in use.kinds:
            usable.discard(use.column)
    return _InspectedSplit(contents, kinds, frozenset(usable))


def _find_first_time(inspection: _InspectedSplit, column: str | None) -> Any:
    """Return the smallest finite value of the time column of a split; None if there is none."""
    if column is None or column not in inspection.usable_columns:
        return None
    minima = [
        pc.min(pc.if_else(pc.is_finite(times), times, pa.scalar(None, times.type))).as_py()
        for _, batch in batches(inspection.contents, (column,))
        for times in [to_plain_times(batch.column(column))]
    ]
    return min((minimum for minimum in minima if minimum is not None), default=None)


def _check_split(
    batch_definition: Any, inspection: _InspectedSplit, checks: list[Check], starts: dict[str, Any]
) -> list[Finding]:
    """Run all checks of one split, as one suite per frame.

    Args:
        batch_definition: the result of ``_open_batch_definition``.
        inspection: the inspected files of the split.
        checks: the planned checks of the split.
        starts: first time of each split by name.

    Returns:
        One finding per check, in the order of ``checks``.
    """
    findings: dict[int, Finding] = {}
    suites: dict[tuple[str, str | None], list[int]] = {}
    for index, check in enumerate(checks):
        reason = _explain_no_evaluation(check, inspection, starts)
        if reason:
            findings[index] = _build_unevaluated(check, reason)
        else:
            suites.setdefault(check.frame, []).append(index)
    for frame_key, indices in suites.items():
        suite = [checks[index] for index in indices]
        frame = _build_frame(frame_key, suite, inspection, starts)
        results = _run_suite(batch_definition, frame, suite, inspection, starts)
        findings |= zip(indices, results, strict=True)
    return [findings[index] for index in range(len(checks))]


def _explain_no_evaluation(
    check: Check, inspection: _InspectedSplit, starts: dict[str, Any]
) -> str:
    """Return why a check cannot be evaluated; an empty string if it can."""
    if check.view == COUNT or check.expectation == "ExpectColumnToExist":
        return ""
    if check.column not in inspection.kinds:
        return "the column is missing"
    if check.view == TYPES:
        return ""
    if check.column not in inspection.usable_columns:
        return "the column has the wrong type"
    if (
        check.condition_column is not None
        and check.condition_column not in inspection.usable_columns
    ):
        return f"column {check.condition_column!r} is missing, or has the wrong type"
    if inspection.contents.rows == 0:
        return "the split has no rows"
    if check.view == BEFORE and starts[str(check.later_split)] is None:
        return f"split {check.later_split!r} has no time to compare with"
    return ""


def _build_frame(
    key: tuple[str, str | None],
    suite: list[Check],
    inspection: _InspectedSplit,
    starts: dict[str, Any],
) -> "pd.DataFrame":
    """Build the pandas frame that a suite reads, with row numbers of the split as its index.

    Args:
        key: ``Check.frame`` of the checks.
        suite: the checks.
        inspection: the inspected files of the split.
        starts: first time of each split by name.
    """
    import pandas as pd

    view, key_column = key  # None, a column of lists, or a condition column
    if view == TYPES:
        return pd.DataFrame({name: [kind] for name, kind in inspection.kinds.items()})
    if view == LABELLED:
        return _build_labelled_frame(str(key_column), suite, inspection)
    if key_column is not None:
        values, rows, _ = flatten(_read_columns(inspection.contents, (key_column,))[key_column])
        return pd.DataFrame({key_column: _to_series(values).set_axis(rows)})
    by_frame_column = {check.frame_column: check for check in suite if check.column is not None}
    names = {str(check.column) for check in by_frame_column.values()}
    arrays = _read_columns(inspection.contents, names)
    columns = {}
    for frame_column, check in by_frame_column.items():
        column = arrays[str(check.column)]
        if check.view == LENGTHS:
            column = pc.list_value_length(column)
        elif check.view == BEFORE:
            column = pc.subtract(to_plain_times(column), starts[str(check.later_split)])
        columns[frame_column] = _to_series(column)
    return pd.DataFrame(columns, index=pd.RangeIndex(inspection.contents.rows))


def _build_labelled_frame(
    condition_column: str, suite: list[Check], inspection: _InspectedSplit
) -> "pd.DataFrame":
    """Build the frame of the rows for which ``condition_column`` is 1."""
    import pandas as pd

    names = {str(check.column) for check in suite}
    arrays = _read_columns(inspection.contents, names | {condition_column})
    is_used = pc.equal(arrays[condition_column].cast(pa.float64(), safe=False), 1.0).fill_null(
        False
    )
    rows = np.flatnonzero(is_used.to_numpy(zero_copy_only=False))
    return pd.DataFrame(
        {name: _to_series(arrays[name].filter(is_used)).set_axis(rows) for name in sorted(names)}
    )


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


def _to_series(column: pa.Array) -> "pd.Series[Any]":
    """Convert a column to pandas: nullable integers remain integers, times become microseconds."""
    import pandas as pd

    kind = get_kind(column.type)
    if kind == "boolean":
        column = column.cast(pa.int8())
    elif kind == "float":
        column = column.cast(pa.float64())
    elif kind in MOMENTS:  # timestamps and dates
        column = to_plain_times(column)
    if pa.types.is_integer(column.type) and column.null_count:
        wide = pd.UInt64Dtype() if pa.types.is_uint64(column.type) else pd.Int64Dtype()
        return pd.Series(column.to_pandas(types_mapper={column.type: wide}.get))
    return pd.Series(column.to_pandas())


@contextmanager
def _open_batch_definition() -> Iterator[Any]:
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
        asset = context.data_sources.add_pandas(GX_NAME).add_dataframe_asset(GX_NAME)
        yield asset.add_batch_definition_whole_dataframe(GX_NAME)
    finally:
        log.removeHandler(null_handler)
        log.propagate = earlier_propagate


def _run_suite(
    batch_definition: Any,
    frame: "pd.DataFrame",
    suite: list[Check],
    inspection: _InspectedSplit,
    starts: dict[str, Any],
) -> list[Finding]:
    """Evaluate the checks of one suite on one frame; return one finding per check, in order."""
    import great_expectations as gx
    from great_expectations.exceptions import GreatExpectationsError

    expectations = [_build_expectation(check, index) for index, check in enumerate(suite)]
    try:
        validation = batch_definition.get_batch({"dataframe": frame}).validate(
            gx.ExpectationSuite(GX_NAME, expectations=expectations),
            result_format={
                "result_format": "SUMMARY",
                "partial_unexpected_count": REQUESTED_VALUES,
            },
        )
    except GreatExpectationsError as fault:
        return [_build_unevaluated(check, f"Great Expectations failed: {fault}") for check in suite]
    results = {item.expectation_config.meta["index"]: item for item in validation.results}
    return [
        _to_finding(check, results.get(index), inspection, starts)
        for index, check in enumerate(suite)
    ]


def _build_expectation(check: Check, index: int) -> Any:
    """Build the Great Expectations expectation of a check; ``index`` identifies its result."""
    import great_expectations.expectations as gxe

    column = {} if check.frame_column is None else {"column": check.frame_column}
    return getattr(gxe, check.expectation)(**column, **check.settings, meta={"index": index})


def _to_finding(
    check: Check, gx_result: Any, inspection: _InspectedSplit, starts: dict[str, Any]
) -> Finding:
    """Convert the result of Great Expectations for one check; ``gx_result`` is None if missing."""
    if gx_result is None:
        return _build_unevaluated(check, "Great Expectations returned no result for it")
    message = _join_exception_messages(gx_result.exception_info)
    if message:
        return _build_unevaluated(check, f"it raised inside Great Expectations: {message}")
    result = gx_result.result
    observed = _format_observed(check, result, inspection)
    rows: dict[int, str] = {}
    count = 0
    if check.view not in (COUNT, TYPES):
        count = int(result.get("unexpected_count") or 0)
        kind = inspection.kinds.get(str(check.column), "")
        pairs = zip(
            result.get("partial_unexpected_index_list") or (),
            result.get("partial_unexpected_list") or (),
            strict=True,
        )
        for row, value in pairs:
            rows.setdefault(int(row), _format_value(check, value, kind, starts))
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


def _join_exception_messages(info: dict[str, Any]) -> str:
    """Return the message of an exception inside an expectation; an empty string if none.

    Args:
        info: ``exception_info`` of the result: one record, or one record per metric by name.
    """
    records = [info] if "raised_exception" in info else list(info.values())
    messages = [
        str(record.get("exception_message")) for record in records if record["raised_exception"]
    ]
    return "; ".join(dict.fromkeys(messages))


def _format_observed(check: Check, result: dict[str, Any], inspection: _InspectedSplit) -> str:
    """Format what a check observed, such as ``3 of 120 value(s) failing``."""
    if check.view == TYPES:
        kind = inspection.kinds.get(str(check.column))
        if kind is None:
            return "no such column"
        fits = check.expectation == "ExpectColumnToExist" or kind in check.settings["value_set"]
        return kind if fits else f"{kind}. {check.remedy.removesuffix('.')}"
    if "observed_value" in result:
        value = result["observed_value"]
        return "nothing to measure" if value is None else f"{value:.6g}"
    total, failing = int(result["element_count"]), int(result["unexpected_count"])
    return f"{failing} of {total} value(s) failing" if failing else f"all {total} value(s)"


def _format_value(check: Check, value: Any, kind: str, starts: dict[str, Any]) -> str:
    """Format one failing value; in the view ``BEFORE``, the time instead of the difference."""
    import pandas as pd

    if pd.isna(value):
        return "null or NaN"
    if check.view == BEFORE:
        value = starts[str(check.later_split)] + value
        if kind in MOMENTS:
            moment = dt.datetime(1970, 1, 1) + dt.timedelta(microseconds=int(value))
            return moment.isoformat(sep=" ")
    return str(value.item() if isinstance(value, np.generic) else value)


def _build_unevaluated(check: Check, why: str) -> Finding:
    """Return the finding of a check that could not be evaluated."""
    return Finding(
        split=check.split,
        column=check.column,
        rule=check.rule,
        success=False,
        observed=f"not evaluated: {why}",
        evaluated=False,
    )

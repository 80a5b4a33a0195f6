"""Plan the data checks that a signature requires, before any row is read.

A planned check is a plain value that ``expectations.py`` runs. The plan depends only on the
signature, the column types, the tables and the rules, so the number of planned checks can be
compared with the number of evaluated checks.

Of the inputs, a ``BoundedInput`` has a range of valid integers, such as the rows of a table; a
``KeyInput`` identifies an item and is not passed to the model. A ``use`` is what a signature reads
a column for, such as an input or the time; a column may have several.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

from pydantic import Field, model_validator

from compressors.contracts import (
    ITEMS,
    BoundedInput,
    DataInput,
    DenseInput,
    Frozen,
    KeyInput,
    ListInput,
    Output,
    SequenceInput,
    Signature,
    TokensInput,
    all_tables,
    value_ranges,
)
from compressors.contracts.value_errors import value_error
from infra.data.column_arrays import FLOAT32_MAX, INT32
from infra.data.parquet import SCALARS, column_uses
from infra.data.split_statistics import requires_known_values
from infra.errors import DataRefused

FLOAT64_MAX = 1.7976931348623157e308

# The splits that follow each split in time. No time of a split may be later than the first time of
# such a split; they may be equal.
LATER = {
    "train": ("validation", "test"),
    "validation": ("test",),
    "calibration": ("test",),
    "traffic": ("test",),
}

# The view of a check: the values that the check is evaluated on.
COUNT = "count"  # the number of rows
TYPES = "types"  # the type of each column
ROWS = "rows"  # the values of a column without lists
LENGTHS = "lengths"  # the lengths of the lists of a column
BEFORE = "before"  # each time minus the first time of a later split
VALUES = "values"  # the elements of the lists of a column
LABELLED = "labelled"  # the values of a column in the rows whose label is used


class Rules(Frozen):
    """Requirements on the data beyond its signature.

    By default, the test split needs 100 rows, because fewer support no decision, every other split
    needs one row, and every split of a ``ctr`` model needs both classes.
    """

    min_rows: int | dict[str, int] = Field(
        default_factory=lambda: {"test": 100},
        description="Least number of rows: one number, or by split (default: test 100, others 1).",
    )
    label_rate: tuple[float, float] | None = Field(
        None,
        description="Bounds of a ctr label's mean, inclusive (default: strictly between 0 and 1).",
    )

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        counts = self.min_rows.values() if isinstance(self.min_rows, dict) else [self.min_rows]
        if min(counts, default=1) < 1:
            raise value_error("min_rows_not_positive")
        if self.label_rate and not 0 <= self.label_rate[0] <= self.label_rate[1] <= 1:
            raise value_error("label_rate_order", got=self.label_rate)
        return self

    def rows_needed(self, split: str) -> int:
        """Return the minimum number of rows of one split."""
        if isinstance(self.min_rows, int):
            return self.min_rows
        return self.min_rows.get(split, 100 if split == "test" else 1)


@dataclass(frozen=True)
class Check:
    """One planned check, which is one expectation of Great Expectations.

    Attributes:
        split: the split that is checked.
        column: the column that is checked; None for the number of rows.
        rule: the requirement, as text for people.
        view: the values that the check is evaluated on, such as ``ROWS``.
        expectation: name of a class in ``great_expectations.expectations``.
        settings: arguments of that class, without the column.
        later_split: in the view ``BEFORE``, the later split whose first time is the bound.
        remedy: what to do if the check fails.
        condition_column: in the view ``LABELLED``, the column that is 1 in these rows.
    """

    split: str
    column: str | None
    rule: str
    view: str
    expectation: str
    settings: dict[str, Any] = field(default_factory=dict)
    later_split: str | None = None
    remedy: str = ""
    condition_column: str | None = None

    @property
    def frame(self) -> tuple[str, str | None]:
        """Key of the pandas frame that the check reads; checks with the same key run as one suite.

        - ``(VALUES, column)`` in the view ``VALUES``: one frame per list column.
        - ``(TYPES, None)`` in the view ``TYPES``: one frame with the types of all columns.
        - ``(LABELLED, column)`` in the view ``LABELLED``: one frame per condition column.
        - ``(ROWS, None)`` in all other views: one frame with one line per row of the split.
        """
        if self.view == LABELLED:
            return (LABELLED, self.condition_column)
        if self.view in (TYPES, VALUES):
            return (self.view, self.column if self.view == VALUES else None)
        return (ROWS, None)

    @property
    def frame_column(self) -> str | None:
        """Name of the frame's column that the check reads; None for the number of rows."""
        return f"@before/{self.later_split}" if self.view == BEFORE else self.column


def plan(
    split: str,
    signature: Signature,
    kinds: dict[str, dict[str, str]],
    rows_of_table: dict[str, int],
    rules: Rules,
) -> list[Check]:
    """Plan all checks of one split.

    Args:
        split: name of the split.
        signature: the inputs, outputs and columns of this split.
        kinds: column types of every split, as ``{split: {column: type}}``. They only decide whether
            a dense input of width 1 is stored as numbers or lists, and which type a time must have
            to equal that of the test split.
        rows_of_table: number of rows by table name.
        rules: requirements beyond the signature.

    Raises:
        DataRefused: the table of an input is not in ``rows_of_table``.
    """
    min_rows = rules.rows_needed(split)
    checks = [
        Check(
            split,
            None,
            f"at least {min_rows} row(s)",
            COUNT,
            "ExpectTableRowCountToBeBetween",
            {"min_value": min_rows},
        )
    ]
    for use in column_uses(signature):
        allowed, rule = use.kinds, f"type is {_format_types(use.kinds)}"
        reference = kinds.get("test", {}).get(use.column)
        if use.purpose == "the time" and split != "test" and reference in use.kinds:
            allowed, rule = (reference,), f"type is {reference}, as in test"
        checks += [
            Check(split, use.column, "column is there", TYPES, "ExpectColumnToExist"),
            Check(
                split,
                use.column,
                rule,
                TYPES,
                "ExpectColumnValuesToBeInSet",
                {"value_set": list(allowed)},
                remedy=use.remedy,
            ),
        ]
    for item in signature.data_inputs:
        for column in item.columns:
            kind = kinds[split].get(column, "")
            checks += _plan_input_checks(split, item, column, kind, rows_of_table)
            if split == ITEMS and item.name == signature.item:
                rule, expectation = "each item once", "ExpectColumnValuesToBeUnique"
                checks.append(Check(split, column, rule, ROWS, expectation))
    for output in signature.outputs:
        checks += _plan_label_checks(split, output, rules)
    if signature.group is not None:
        checks.append(_plan_not_null(split, signature.group, ROWS))
    if signature.time is not None:
        checks += _plan_time_checks(split, signature.time, kinds)
    unique = {
        (check.frame_column, check.rule, check.view, check.condition_column): check
        for check in checks
    }
    return list(unique.values())


def _plan_input_checks(
    split: str, item: DataInput, column: str, kind: str, rows_of_table: dict[str, int]
) -> list[Check]:
    """Plan the checks of one column of an input; ``kind`` is the column's type."""
    if isinstance(item, TokensInput):
        return [_plan_not_null(split, column, ROWS)]
    if isinstance(item, DenseInput):
        has_lists = len(item.columns) == 1 and (item.shape[0] > 1 or kind.startswith("list of "))
        view = VALUES if has_lists else ROWS
        rule, low, high = "finite in float32", -FLOAT32_MAX, FLOAT32_MAX
    elif isinstance(item, KeyInput):
        has_lists, view = False, ROWS
        rule, low, high = "fits int32", int(INT32.min), int(INT32.max)
    else:
        has_lists = isinstance(item, ListInput)
        view = VALUES if has_lists else ROWS
        tables = all_tables(item)
        for table in tables:
            if table not in rows_of_table:
                known = tuple(sorted(rows_of_table)) or ("none",)
                raise DataRefused("table_unknown", input=item.name, table=table, tables=known)
        if requires_known_values(split, item):  # values out of range are an error in this split
            rule, low, high = _describe_range(item, column, rows_of_table)
        else:  # ``item.out_of_range`` says how they are replaced: only the type is checked
            low, high = int(INT32.min), int(INT32.max)
            place, what = ("the table", "id") if tables else ("the range", "value")
            rule = f"{what} fits int32 (outside {place}: {item.out_of_range})"
    checks = [
        _plan_not_null(split, column, view),
        _plan_between(split, column, rule, view, low, high),
    ]
    if not has_lists:
        return checks
    size = item.shape[0]
    if isinstance(item, DenseInput):
        length = _plan_between(split, column, f"lists of {size} value(s)", LENGTHS, size, size)
    else:
        shortest = item.min_length if isinstance(item, SequenceInput) else 0
        counts = f"{shortest} to" if shortest else "at most"
        rule = f"lists of {counts} {size} id(s)"
        length = _plan_between(split, column, rule, LENGTHS, shortest, size)
    return [_plan_not_null(split, column, LENGTHS), length, *checks]


def _describe_range(
    item: BoundedInput, column: str, rows_of_table: dict[str, int]
) -> tuple[str, int, int]:
    """Return the rule for the values of a column, their smallest and their largest value."""
    ranges = value_ranges(item, rows_of_table)  # one per column, or one for all columns
    first, last, _ = ranges[item.columns.index(column) if len(ranges) > 1 else 0]
    names = " and ".join(repr(table) for table in all_tables(item))
    if not names:
        return f"value from {first} to {last}", first, last
    return f"id in table {names} ({first} to {last})", first, last


def _plan_label_checks(split: str, output: Output, rules: Rules) -> list[Check]:
    """Plan the checks of an output's label; none if the output has no label.

    With ``label_where``, only labels of rows for which that column is 1 are checked.
    """
    label, where = output.label, output.label_where
    if label is None:
        return []
    checks = []
    if where is not None:
        settings = {"value_set": [0, 1]}
        checks += [
            _plan_not_null(split, where, ROWS),
            Check(split, where, "0 or 1", ROWS, "ExpectColumnValuesToBeInSet", settings),
        ]
    view = ROWS if where is None else LABELLED
    if output.task_kind.labels == "grades":  # graded relevance; else clicks, 0 or 1
        planned = [
            _plan_not_null(split, label, view),
            _plan_between(split, label, "at least 0, finite in float32", view, 0, FLOAT32_MAX),
            Check(
                split,
                label,
                "some label is above 0",
                view,
                "ExpectColumnMaxToBeBetween",
                {"min_value": 0, "strict_min": True},
            ),
        ]
    else:
        low, high = rules.label_rate or (0.0, 1.0)
        strict = rules.label_rate is None
        range_text = "strictly between 0 and 1" if strict else f"from {low:g} to {high:g}"
        bounds = {"min_value": low, "max_value": high, "strict_min": strict, "strict_max": strict}
        flags = {"value_set": [0, 1]}
        planned = [
            _plan_not_null(split, label, view),
            Check(split, label, "0 or 1", view, "ExpectColumnValuesToBeInSet", flags),
            Check(
                split,
                label,
                f"label rate {range_text}",
                view,
                "ExpectColumnMeanToBeBetween",
                bounds,
            ),
        ]
    if where is None:
        return planned
    return checks + [
        replace(check, rule=f"{check.rule} (rows where {where!r} is 1)", condition_column=where)
        for check in planned
    ]


def _plan_time_checks(split: str, time: str, kinds: dict[str, dict[str, str]]) -> list[Check]:
    """Plan the checks of the column ``time``."""
    checks = [
        _plan_not_null(split, time, ROWS),
        _plan_between(split, time, "finite", ROWS, -FLOAT64_MAX, FLOAT64_MAX),
    ]
    # A difference of times is compared with 0, because Great Expectations converts a bound to
    # float64, which is too coarse for nanoseconds since 1970.
    checks += [
        Check(
            split,
            time,
            f"not later than the start of {later}",
            BEFORE,
            "ExpectColumnValuesToBeBetween",
            {"max_value": 0},
            later_split=later,
        )
        for later in LATER.get(split, ())
        if later in kinds
    ]
    return checks


def _plan_not_null(split: str, column: str, view: str) -> Check:
    rule = {
        ROWS: "no null or NaN",
        LABELLED: "no null or NaN",
        LENGTHS: "no null list",
        VALUES: "no null or NaN in a list",
    }
    return Check(split, column, rule[view], view, "ExpectColumnValuesToNotBeNull")


def _plan_between(split: str, column: str, rule: str, view: str, low: float, high: float) -> Check:
    bounds = {"min_value": low, "max_value": high}
    return Check(split, column, rule, view, "ExpectColumnValuesToBeBetween", bounds)


def _format_types(kinds: tuple[str, ...]) -> str:
    """Format the allowed column types as text."""
    return "one plain value a row" if kinds == SCALARS else " or ".join(kinds)

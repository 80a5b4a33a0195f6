"""Plan the data checks of a signature, as plain values, before any row is read.

The plan depends only on the signature, the tables and the rules, so that planned and evaluated
checks can be compared. ``expectations.py`` runs them.
"""

from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import Field, model_validator

from compressors.contracts import ITEMS, AnyInput, DenseInput, Frozen, IdInput, Output, Signature
from compressors.contracts.value_errors import value_error
from infra.data.parquet import SCALARS, needs
from infra.data.splits import FLOAT32_MAX, INT32, policed
from infra.errors import DataRefused

FLOAT64_MAX = 1.7976931348623157e308

# Split -> later splits; its times may equal but not exceed their first time.
LATER = {
    "train": ("validation", "test"),
    "validation": ("test",),
    "calibration": ("test",),
    "traffic": ("test",),
}

# Views: what a check reads.
COUNT = "count"  # number of rows
TYPES = "types"  # the type of every column
ROWS = "rows"  # a column of plain values
LENGTHS = "lengths"  # the lengths of a list column
BEFORE = "before"  # time minus the first time of a later split
VALUES = "values"  # the elements of a list column


class Rules(Frozen):
    """Requirements on the data beyond its signature.

    The defaults are weak: 100 test rows (fewer support no decision), one row elsewhere, and both
    classes present in every split of a ``ctr`` model.
    """

    min_rows: int | dict[str, int] = Field(
        default_factory=lambda: {"test": 100},
        description="Fewest rows: one number, or by split (default: test 100, others 1).",
    )
    label_rate: tuple[float, float] | None = Field(
        None, description="Bounds of a ctr label's mean, both ends allowed (default: open 0 to 1)."
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
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
    """One expectation: its view and column, its class and arguments, and its text for people.

    ``expects`` is the class in ``great_expectations.expectations``, ``settings`` its arguments
    except the column. ``against`` is the later split of a ``BEFORE`` view.
    """

    split: str
    column: str | None
    rule: str
    view: str
    expects: str
    settings: dict[str, Any] = field(default_factory=dict)
    against: str | None = None
    remedy: str = ""

    @property
    def frame(self) -> tuple[str, str | None]:
        """Key of the frame; checks with the same key run as one suite."""
        if self.view in (TYPES, VALUES):
            return (self.view, self.column if self.view == VALUES else None)
        return (ROWS, None)

    @property
    def entry(self) -> str | None:
        """Name of the column in the frame."""
        return f"@before/{self.against}" if self.view == BEFORE else self.column


def plan(
    split: str,
    signature: Signature,
    kinds: dict[str, dict[str, str]],
    rows_of_table: dict[str, int],
    rules: Rules,
) -> list[Check]:
    """Plan all checks of one split.

    Args:
        split: its name; ``kinds`` holds the column types of every split given, by name.
        signature: the columns that are read from this split, and their types.
        kinds: they decide two things only: whether a dense input of width 1 is stored as numbers or
            as lists, and that all splits store time in the same type.
        rows_of_table: by table name.
        rules: minimum rows and label rate.

    Raises:
        DataRefused: an input's table is not among ``rows_of_table``.
    """
    least = rules.rows_needed(split)
    checks = [
        Check(
            split,
            None,
            f"at least {least} row(s)",
            COUNT,
            "ExpectTableRowCountToBeBetween",
            {"min_value": least},
        )
    ]
    for need in needs(signature):
        allowed, rule = need.kinds, f"type is {_or(need.kinds)}"
        reference = kinds.get("test", {}).get(need.column)
        if need.use == "the time" and split != "test" and reference in need.kinds:
            allowed, rule = (reference,), f"type is {reference}, as in test"
        checks += [
            Check(split, need.column, "column is there", TYPES, "ExpectColumnToExist"),
            Check(
                split,
                need.column,
                rule,
                TYPES,
                "ExpectColumnValuesToBeInSet",
                {"value_set": list(allowed)},
                remedy=need.remedy,
            ),
        ]
    for item in signature.inputs:
        for column in item.columns:
            kind = kinds[split].get(column, "")
            checks += _of_input(split, item, column, kind, rows_of_table)
            if split == ITEMS and item.name == signature.item:
                rule, expects = "each item once", "ExpectColumnValuesToBeUnique"
                checks.append(Check(split, column, rule, ROWS, expects))
    for output in signature.outputs:
        checks += _of_label(split, output, rules)
    if signature.group is not None:
        checks.append(_not_null(split, signature.group, ROWS))
    if signature.time is not None:
        checks += _of_time(split, signature.time, kinds)
    unique = {(check.entry, check.rule, check.view): check for check in checks}
    return list(unique.values())


def _of_input(
    split: str, item: AnyInput, column: str, kind: str, rows_of_table: dict[str, int]
) -> list[Check]:
    if isinstance(item, DenseInput):
        listed = len(item.columns) == 1 and (item.shape[0] > 1 or kind.startswith("list of "))
        view = VALUES if listed else ROWS
        rule, low, high = "finite in float32", -FLOAT32_MAX, FLOAT32_MAX
    else:
        listed = not isinstance(item, IdInput)
        view = VALUES if listed else ROWS
        rows = rows_of_table.get(item.table)
        if rows is None:
            known = tuple(sorted(rows_of_table)) or ("none",)
            raise DataRefused("table_unknown", input=item.name, table=item.table, tables=known)
        if policed(split, item):
            rule, low, high = f"id in table {item.table!r} (0 to {rows - 1})", 0, rows - 1
        else:
            low, high = int(INT32.min), int(INT32.max)
            rule = f"id fits int32 (outside the table: {item.out_of_range})"
    checks = [_not_null(split, column, view), _between(split, column, rule, view, low, high)]
    if not listed:
        return checks
    limit = item.shape[0]
    if isinstance(item, DenseInput):
        length = _between(split, column, f"lists of {limit} value(s)", LENGTHS, limit, limit)
    else:
        length = _between(split, column, f"lists of at most {limit} id(s)", LENGTHS, 0, limit)
    return [_not_null(split, column, LENGTHS), length, *checks]


def _of_label(split: str, output: Output, rules: Rules) -> list[Check]:
    label = output.label
    if label is None:
        return []
    if output.task_kind.labels == "grades":
        return [
            _not_null(split, label, ROWS),
            _between(split, label, "at least 0, finite in float32", ROWS, 0, FLOAT32_MAX),
            Check(
                split,
                label,
                "some label is above 0",
                ROWS,
                "ExpectColumnMaxToBeBetween",
                {"min_value": 0, "strict_min": True},
            ),
        ]
    low, high = rules.label_rate or (0.0, 1.0)
    strict = rules.label_rate is None
    words = "strictly between 0 and 1" if strict else f"from {low:g} to {high:g}"
    return [
        _not_null(split, label, ROWS),
        Check(split, label, "0 or 1", ROWS, "ExpectColumnValuesToBeInSet", {"value_set": [0, 1]}),
        Check(
            split,
            label,
            f"label rate {words}",
            ROWS,
            "ExpectColumnMeanToBeBetween",
            {"min_value": low, "max_value": high, "strict_min": strict, "strict_max": strict},
        ),
    ]


def _of_time(split: str, time: str, kinds: dict[str, dict[str, str]]) -> list[Check]:
    checks = [
        _not_null(split, time, ROWS),
        _between(split, time, "finite", ROWS, -FLOAT64_MAX, FLOAT64_MAX),
    ]
    # Differences are compared with 0, not moments with each other: Great Expectations turns
    # bounds into float64, which is too coarse for nanoseconds since 1970.
    checks += [
        Check(
            split,
            time,
            f"not later than the start of {later}",
            BEFORE,
            "ExpectColumnValuesToBeBetween",
            {"max_value": 0},
            against=later,
        )
        for later in LATER.get(split, ())
        if later in kinds
    ]
    return checks


def _not_null(split: str, column: str, view: str) -> Check:
    rule = {ROWS: "no null or NaN", LENGTHS: "no null list", VALUES: "no null or NaN in a list"}
    return Check(split, column, rule[view], view, "ExpectColumnValuesToNotBeNull")


def _between(split: str, column: str, rule: str, view: str, low: float, high: float) -> Check:
    bounds = {"min_value": low, "max_value": high}
    return Check(split, column, rule, view, "ExpectColumnValuesToBeBetween", bounds)


def _or(words: tuple[str, ...]) -> str:
    return "one plain value a row" if words == SCALARS else " or ".join(words)

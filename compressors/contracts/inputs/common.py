"""Fields and checks that several kinds of inputs share."""

from typing import Any, Literal, Protocol

from pydantic import Field

from compressors.contracts.frozen import Frozen
from compressors.contracts.value_errors import value_error

MAX_ROW_VALUES = 65_536
"""Largest number of values that one input may have in one row, so that a batch fits in memory."""

OutOfRange = Literal["error", "clamp", "default_row"]
"""What a graph does with an id that is not a row of the table.

With ``error``, the score is NaN. With ``clamp``, the id becomes the first or last row. With
``default_row``, it becomes the input's ``default_row``.
"""

IntegerType = Literal["int64", "int32"]
"""The dtype of an input's tensor."""


class IdField(Frozen):
    """The ids of one column whose rows are a part of a table that several columns share.

    Attributes:
        rows: number of valid ids.
        first: the smallest valid id.
        offset: what the network adds to an id; the sum is the row of the table.
        default_row: the id that replaces one out of range, if ``out_of_range`` is ``default_row``.
    """

    rows: int = Field(ge=1)
    first: int = Field(0, ge=0)
    offset: int = 0
    default_row: int = Field(0, ge=0)


class Input(Protocol):
    """What every kind of input has."""

    @property
    def name(self) -> str:
        """The name of the input, and of the argument of ``forward``."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that the input reads."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one row."""


def set_default_columns(data: Any) -> Any:
    """Return the data of an input with its name as ``columns`` if it has none.

    Each kind of input that reads columns registers this function as a validator.
    """
    if isinstance(data, dict) and not data.get("columns") and isinstance(data.get("name"), str):
        return {**data, "columns": (data["name"],)}
    return data


def check_values(item: Input) -> None:
    """Raise if a row of an input has more than ``MAX_ROW_VALUES`` values or columns."""
    row_values = max(1, *item.shape, len(item.columns))
    if row_values > MAX_ROW_VALUES:
        raise value_error("row_too_large", name=item.name, values=row_values, most=MAX_ROW_VALUES)


def check_scalar_shape(item: Input) -> None:
    """Raise unless the shape is ``()`` for one column, and ``(columns,)`` for several."""
    check_values(item)
    expected = () if len(item.columns) == 1 else (len(item.columns),)
    if item.shape != expected:
        raise value_error(
            "input_shape_differs",
            name=item.name,
            columns=len(item.columns),
            expected=list(expected),
            got=list(item.shape),
        )


def check_list_shape(item: Input) -> None:
    """Raise if an input of lists does not have a shape ``(length,)`` and one column."""
    if len(item.shape) != 1 or item.shape[0] < 1:
        raise value_error("bag_shape_form", name=item.name)
    check_values(item)
    if len(item.columns) != 1:
        raise value_error("bag_columns_count", name=item.name)

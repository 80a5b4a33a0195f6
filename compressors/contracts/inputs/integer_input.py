"""Bounded integers that are not looked up in a table, such as counts or positions.

``common.py`` explains the fields that all kinds of inputs have, and ``out_of_range``.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.inputs.common import (
    IntegerType,
    check_scalar_shape,
    set_default_columns,
)
from compressors.contracts.value_errors import value_error


class IntegerInput(Frozen):
    """One integer per row, or one for each of several columns, from ``low`` to ``high``.

    The tensor is int ``(rows,)`` or ``(rows, columns)``; ``shape`` is ``()`` or ``(columns,)``.

    Attributes:
        low: smallest valid value.
        high: largest valid value.
        out_of_range: what a graph does with another value: with ``error``, the score is NaN; with
            ``clamp``, the value becomes ``low`` or ``high``.
    """

    kind: Literal["integer"] = "integer"
    name: str
    columns: tuple[str, ...] = ()
    dtype: IntegerType = "int64"
    shape: tuple[int, ...] = ()
    low: int = Field(0, ge=-(2**31), lt=2**31)
    high: int = Field(ge=-(2**31), lt=2**31)
    out_of_range: Literal["error", "clamp"] = "error"

    _columns_default_to_the_name = model_validator(mode="before")(set_default_columns)

    @model_validator(mode="after")
    def _require_valid_shape_and_bounds(self) -> Self:
        check_scalar_shape(self)
        if self.low > self.high:
            raise value_error("integer_bounds", name=self.name, low=self.low, high=self.high)
        return self

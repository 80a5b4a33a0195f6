"""Ids: one per row, or one for each of several columns.

``common.py`` explains the fields that all kinds of inputs have, and ``out_of_range``.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.inputs.common import (
    IdField,
    IntegerType,
    OutOfRange,
    check_scalar_shape,
    set_default_columns,
)
from compressors.contracts.value_errors import value_error


class IdInput(Frozen):
    """One id per row, or one id for each of several columns.

    The tensor is int ``(rows,)`` or ``(rows, columns)``; ``shape`` is ``()`` or ``(columns,)``.

    Attributes:
        table: the table in which the ids are looked up.
        more_tables: other tables in which the same ids are looked up.
        fields: the valid ids of each column, if each reads a part of the table. Empty: every row
            of the table is valid.
    """

    kind: Literal["id"] = "id"
    name: str
    columns: tuple[str, ...] = ()
    dtype: IntegerType = "int64"
    shape: tuple[int, ...] = ()
    table: str
    more_tables: tuple[str, ...] = ()
    fields: tuple[IdField, ...] = ()
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    _columns_default_to_the_name = model_validator(mode="before")(set_default_columns)

    @model_validator(mode="after")
    def _require_valid_shape(self) -> Self:
        check_scalar_shape(self)
        if self.fields and len(self.fields) != len(self.columns):
            raise value_error(
                "id_fields_count",
                name=self.name,
                columns=len(self.columns),
                fields=len(self.fields),
            )
        return self

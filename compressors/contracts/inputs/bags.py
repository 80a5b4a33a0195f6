"""Bags: a list of ids per row whose order does not matter, padded or concatenated.

``common.py`` explains the fields that all kinds of inputs have, and ``out_of_range``.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.inputs.common import (
    IntegerType,
    OutOfRange,
    check_list_shape,
    set_default_columns,
)


class PaddedBag(Frozen):
    """A list of ids per row, padded at the end with ``padding_id``; ``shape`` is ``(length,)``.

    The tensor is int ``(rows, length)``. ``more_tables`` are other tables in which the same ids are
    looked up.
    """

    kind: Literal["padded_bag"] = "padded_bag"
    name: str
    columns: tuple[str, ...] = ()
    dtype: IntegerType = "int64"
    shape: tuple[int, ...]
    table: str
    more_tables: tuple[str, ...] = ()
    padding_id: int = Field(0, ge=0)
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    _columns_default_to_the_name = model_validator(mode="before")(set_default_columns)

    @model_validator(mode="after")
    def _require_valid_shape(self) -> Self:
        check_list_shape(self)
        return self


class JaggedBag(Frozen):
    """A list of ids per row, all lists concatenated.

    The model receives two tensors: ``name``, the ids of all rows, int ``(ids,)``; and
    ``name_offsets``, the index of each row's first id, int ``(rows,)``, or ``name_lengths``, the
    number of ids per row, int ``(rows,)``. ``shape`` is ``(longest,)``: the longest list that a
    request may contain, because a served graph pads lists to this length. A row with a longer list
    has the score NaN; lists are never silently truncated. ``more_tables`` are other tables in
    which the same ids are looked up.
    """

    kind: Literal["jagged_bag"] = "jagged_bag"
    name: str
    columns: tuple[str, ...] = ()
    dtype: IntegerType = "int64"
    shape: tuple[int, ...]
    table: str
    more_tables: tuple[str, ...] = ()
    layout: Literal["offsets", "lengths"] = "offsets"
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    _columns_default_to_the_name = model_validator(mode="before")(set_default_columns)

    @model_validator(mode="after")
    def _require_valid_shape(self) -> Self:
        check_list_shape(self)
        return self

"""Sequences: a list of ids per row whose order matters, padded to the longest list of a batch.

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
from compressors.contracts.value_errors import value_error


class SequenceInput(Frozen):
    """A list of ids per row, padded to the longest list of the batch; ``shape`` is ``(longest,)``.

    The tensor is int ``(rows, length)``. ``length`` is that of the longest list in the batch and
    differs from batch to batch, from 1 to ``longest``. The model may receive more tensors, each
    under the name that is given here:

    Attributes:
        table: the table in which the ids are looked up.
        more_tables: other tables in which the same ids are looked up.
        min_length: smallest number of ids in a list.
        padding: the side on which shorter lists are padded.
        padding_id: the id of padded positions.
        mask: name of the tensor ``(rows, length)`` that is 1 (or True) at ids and 0 at padding.
        mask_dtype: dtype of the mask.
        lengths: name of the tensor int64 ``(rows,)`` with the number of ids in each list.
        positions: name of the tensor int64 ``(rows, length)`` with the position of each id in its
            list: ``first_position``, ``first_position + 1``, ...; 0 at padding.
        first_position: position of the first id.
        same_length_as: name of another sequence whose lists have the same length in every row,
            such as the categories of the same items.
    """

    kind: Literal["sequence"] = "sequence"
    name: str
    columns: tuple[str, ...] = ()
    dtype: IntegerType = "int64"
    shape: tuple[int, ...]
    table: str
    more_tables: tuple[str, ...] = ()
    min_length: int = Field(1, ge=0)
    padding: Literal["left", "right"] = "right"
    padding_id: int = Field(0, ge=0)
    mask: str | None = None
    mask_dtype: Literal["bool", "float32", "int64"] = "float32"
    lengths: str | None = None
    positions: str | None = None
    first_position: int = Field(0, ge=0)
    same_length_as: str | None = None
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    _columns_default_to_the_name = model_validator(mode="before")(set_default_columns)

    @model_validator(mode="after")
    def _require_valid_shape(self) -> Self:
        check_list_shape(self)
        if self.min_length > self.shape[0]:
            raise value_error(
                "sequence_lengths", name=self.name, low=self.min_length, high=self.shape[0]
            )
        return self

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors: the ids, and the mask, lengths and positions if declared."""
        optional = (self.mask, self.lengths, self.positions)
        return (self.name, *(name for name in optional if name is not None))

    @property
    def tensors_of_ids(self) -> tuple[str, ...]:
        """Names of the tensors with one value for each id, ``(rows, length)``."""
        return tuple(name for name in self.tensors if name != self.lengths)

    @property
    def shortest(self) -> int:
        """Smallest length of the tensors: empty lists have one padded position."""
        return max(1, self.min_length)

    @property
    def is_dynamic(self) -> bool:
        """Whether the length of the tensors differs between batches."""
        return self.shortest < self.shape[0]

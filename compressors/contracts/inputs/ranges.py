"""The tables and valid integers of inputs, which data checks and served graphs enforce."""

from collections.abc import Mapping
from typing import NamedTuple

from compressors.contracts.inputs.bags import JaggedBag, PaddedBag
from compressors.contracts.inputs.dense_input import DenseInput
from compressors.contracts.inputs.id_input import IdInput
from compressors.contracts.inputs.integer_input import IntegerInput
from compressors.contracts.inputs.key_input import KeyInput
from compressors.contracts.inputs.matrix_input import MatrixInput
from compressors.contracts.inputs.sequence_input import SequenceInput

BoundedInput = IdInput | PaddedBag | JaggedBag | SequenceInput | IntegerInput
"""An input whose integers have a valid range."""


def all_tables(item: BoundedInput | DenseInput | KeyInput | MatrixInput) -> tuple[str, ...]:
    """Return the attribute paths of the tables in which the ids of an input are looked up."""
    if isinstance(item, MatrixInput):
        return tuple(table for field in item.fields for table in all_tables(field))
    if isinstance(item, DenseInput | IntegerInput | KeyInput):
        return ()
    return (item.table, *item.more_tables)


class ValueRange(NamedTuple):
    """The valid integers of one column of an input: ``first`` to ``last``, both included.

    ``default`` replaces other integers if ``out_of_range`` of the input is ``default_row``.
    """

    first: int
    last: int
    default: int = 0


def value_ranges(item: BoundedInput, rows_of_table: Mapping[str, int]) -> tuple[ValueRange, ...]:
    """Return the valid integers of each column, or one range if all columns have the same.

    An id that is looked up in several tables must be a row of the smallest.

    Args:
        item: the input.
        rows_of_table: number of rows by table name.

    Raises:
        KeyError: a table of the input is not in ``rows_of_table``.
    """
    if isinstance(item, IntegerInput):
        return (ValueRange(item.low, item.high),)
    if isinstance(item, IdInput) and item.fields:
        return tuple(
            ValueRange(field.first, field.first + field.rows - 1, field.default_row)
            for field in item.fields
        )
    rows = min(rows_of_table[table] for table in all_tables(item))
    return (ValueRange(0, rows - 1, item.default_row),)

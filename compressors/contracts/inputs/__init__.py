"""The kinds of inputs of a model.

``columns`` names the columns of the data that an input reads; by default, the one column with the
input's name. ``shape`` is the shape of one row. ``table`` is the attribute path of the embedding
table in which ids are looked up.

common.py          fields and checks that several kinds share
id_input.py        one id per row, or one for each of several columns
dense_input.py     a vector of floats per row
bags.py            lists of ids whose order does not matter, padded or concatenated
sequence_input.py  ordered lists of ids, padded to the longest of a batch
tokens_input.py    texts, which the bundle's tokenizer turns into sequences of ids
integer_input.py   bounded integers that are not looked up in a table
key_input.py       the identity of an item, which is not passed to the model
matrix_input.py    one tensor whose columns hold several of these inputs
ranges.py          the tables and the valid integers of an input
"""

from typing import Annotated

from pydantic import Field

from compressors.contracts.inputs.bags import JaggedBag as JaggedBag
from compressors.contracts.inputs.bags import PaddedBag as PaddedBag
from compressors.contracts.inputs.common import MAX_ROW_VALUES as MAX_ROW_VALUES
from compressors.contracts.inputs.common import IdField as IdField
from compressors.contracts.inputs.common import OutOfRange as OutOfRange
from compressors.contracts.inputs.dense_input import DenseInput as DenseInput
from compressors.contracts.inputs.id_input import IdInput as IdInput
from compressors.contracts.inputs.integer_input import IntegerInput as IntegerInput
from compressors.contracts.inputs.key_input import KeyInput as KeyInput
from compressors.contracts.inputs.matrix_input import MatrixInput as MatrixInput
from compressors.contracts.inputs.ranges import BoundedInput as BoundedInput
from compressors.contracts.inputs.ranges import ValueRange as ValueRange
from compressors.contracts.inputs.ranges import all_tables as all_tables
from compressors.contracts.inputs.ranges import value_ranges as value_ranges
from compressors.contracts.inputs.sequence_input import SequenceInput as SequenceInput
from compressors.contracts.inputs.tokens_input import TokensInput as TokensInput

DataInput = (
    IdInput
    | DenseInput
    | PaddedBag
    | JaggedBag
    | SequenceInput
    | TokensInput
    | IntegerInput
    | KeyInput
)
"""An input that reads columns of the data; a ``MatrixInput`` consists of several of them."""

ListInput = PaddedBag | JaggedBag | SequenceInput
"""An input with a list of ids per row; ``shape`` is ``(longest,)``."""

RAGGED = (JaggedBag, SequenceInput)
"""Kinds whose lists are stored one after another, with the bounds of each row's list."""

AnyInput = Annotated[DataInput | MatrixInput, Field(discriminator="kind")]


def tensor_names(item: AnyInput) -> tuple[str, ...]:
    """Return the names of an input's tensors: one, except for jagged bags and sequences."""
    if isinstance(item, JaggedBag):
        return (item.name, f"{item.name}_{item.layout}")
    if isinstance(item, SequenceInput):
        return item.tensors
    return (item.name,)


def data_inputs(item: AnyInput) -> tuple[DataInput, ...]:
    """Return the inputs that read the data: the fields of a matrix, or else the input itself."""
    return item.fields if isinstance(item, MatrixInput) else (item,)

"""Matrices: one tensor whose columns hold several inputs, such as ids next to numbers.

``common.py`` explains the fields that all kinds of inputs have.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.inputs.bags import PaddedBag
from compressors.contracts.inputs.common import check_values
from compressors.contracts.inputs.dense_input import DenseInput
from compressors.contracts.inputs.id_input import IdInput
from compressors.contracts.inputs.integer_input import IntegerInput
from compressors.contracts.value_errors import value_error

MatrixField = Annotated[
    IdInput | DenseInput | PaddedBag | IntegerInput, Field(discriminator="kind")
]
"""A part of a matrix: an input whose tensor fills one or several columns of the matrix."""


class MatrixInput(Frozen):
    """A matrix whose columns hold several inputs, which the network slices itself.

    The tensor is ``(rows, width)``: the tensors of ``fields``, converted to ``dtype`` and
    concatenated in their order. A field of shape ``()`` fills one column. For example, the models
    of DeepCTR-Torch take one float32 matrix with ids, numbers and padded lists of ids.
    """

    kind: Literal["matrix"] = "matrix"
    name: str
    dtype: Literal["float32", "int64", "int32"] = "float32"
    fields: tuple[MatrixField, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _require_valid_fields(self) -> Self:
        check_values(self)
        if self.dtype != "float32":
            floats = tuple(field.name for field in self.fields if field.kind == "dense")
            if floats:
                raise value_error("matrix_floats", name=self.name, dtype=self.dtype, fields=floats)
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data that the fields read, in order."""
        return tuple(column for field in self.fields for column in field.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(width,)``, the number of columns of all fields."""
        return (self.slices[-1].stop,)

    @property
    def slices(self) -> tuple[slice, ...]:
        """The columns of the matrix that each field fills."""
        result, begin = [], 0
        for field in self.fields:
            end = begin + (field.shape[0] if field.shape else 1)
            result.append(slice(begin, end))
            begin = end
        return tuple(result)

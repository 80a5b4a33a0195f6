"""Dense vectors: a fixed number of floats per row.

``common.py`` explains the fields that all kinds of inputs have.
"""

from typing import Literal, Self

from pydantic import model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.inputs.common import check_values, set_default_columns
from compressors.contracts.value_errors import value_error


class DenseInput(Frozen):
    """A dense vector per row; ``shape`` is ``(width,)``.

    The tensor is float32 ``(rows, width)``. ``columns`` names either ``width`` columns of scalars
    or one column of lists of that length.
    """

    kind: Literal["dense"] = "dense"
    name: str
    columns: tuple[str, ...] = ()
    dtype: Literal["float32"] = "float32"
    shape: tuple[int, ...]

    _columns_default_to_the_name = model_validator(mode="before")(set_default_columns)

    @model_validator(mode="after")
    def _require_valid_shape(self) -> Self:
        if len(self.shape) != 1 or self.shape[0] < 1:
            raise value_error("dense_shape_form", name=self.name)
        check_values(self)
        if len(self.columns) not in (1, self.shape[0]):
            raise value_error(
                "dense_columns_count",
                name=self.name,
                width=self.shape[0],
                columns=len(self.columns),
            )
        return self

"""Keys: integers that identify an item and are not passed to the model.

``common.py`` explains the fields that all kinds of inputs have.
"""

from typing import Literal, Self

from pydantic import model_validator

from compressors.contracts.frozen import Frozen
from compressors.contracts.inputs.common import check_scalar_shape, set_default_columns
from compressors.contracts.value_errors import value_error


class KeyInput(Frozen):
    """One integer per row that identifies an item of the catalogue and enters no tower.

    The tensor is int64 ``(rows,)``. Any value that fits int32 is valid.
    """

    kind: Literal["key"] = "key"
    name: str
    columns: tuple[str, ...] = ()
    dtype: Literal["int64"] = "int64"
    shape: tuple[()] = ()

    _columns_default_to_the_name = model_validator(mode="before")(set_default_columns)

    @model_validator(mode="after")
    def _require_one_column(self) -> Self:
        if len(self.columns) != 1:
            raise value_error("key_columns_count", name=self.name, columns=len(self.columns))
        check_scalar_shape(self)
        return self

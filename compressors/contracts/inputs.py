"""Kinds of model inputs: ids, dense vectors, padded and jagged bags (lists of ids).

``columns`` names the columns of the data that an input reads; by default, the one column with the
input's name. ``shape`` is the shape of one row. ``table`` is the attribute path of the embedding
table in which ids are looked up.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from compressors.contracts.value_errors import value_error

MAX_ROW_VALUES = 65_536
"""Largest number of values that one input may have in one row, so that a batch fits in memory."""

OutOfRange = Literal["error", "clamp", "default_row"]
"""What a graph does with an id that is not a row of the table.

With ``error``, the score is NaN. With ``clamp``, the id becomes the first or last row. With
``default_row``, it becomes the input's ``default_row``.
"""


class Frozen(BaseModel):
    """Base class of immutable values, which are equal if their fields are equal."""

    # Non-finite floats are written as text: by default, NaN is written as null.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class IdInput(Frozen):
    """One id per row, or one id for each of several fields of one table.

    The tensor is int ``(rows,)`` or ``(rows, fields)``; ``shape`` is ``()`` or ``(fields,)``.
    """

    kind: Literal["id"] = "id"
    name: str
    columns: tuple[str, ...] = ()
    dtype: Literal["int64", "int32"] = "int64"
    shape: tuple[int, ...] = ()
    table: str
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _columns_default_to_the_name(cls, data: Any) -> Any:
        return _with_columns(data)

    @model_validator(mode="after")
    def _require_valid_shape(self) -> Self:
        _check_values(self)
        expected = () if len(self.columns) == 1 else (len(self.columns),)
        if self.shape != expected:
            raise value_error(
                "input_shape_differs",
                name=self.name,
                columns=len(self.columns),
                expected=list(expected),
                got=list(self.shape),
            )
        return self


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

    @model_validator(mode="before")
    @classmethod
    def _columns_default_to_the_name(cls, data: Any) -> Any:
        return _with_columns(data)

    @model_validator(mode="after")
    def _require_valid_shape(self) -> Self:
        if len(self.shape) != 1 or self.shape[0] < 1:
            raise value_error("dense_shape_form", name=self.name)
        _check_values(self)
        if len(self.columns) not in (1, self.shape[0]):
            raise value_error(
                "dense_columns_count",
                name=self.name,
                width=self.shape[0],
                columns=len(self.columns),
            )
        return self


class PaddedBag(Frozen):
    """A list of ids per row, padded at the end with ``padding_id``; ``shape`` is ``(length,)``.

    The tensor is int ``(rows, length)``.
    """

    kind: Literal["padded_bag"] = "padded_bag"
    name: str
    columns: tuple[str, ...] = ()
    dtype: Literal["int64", "int32"] = "int64"
    shape: tuple[int, ...]
    table: str
    padding_id: int = Field(0, ge=0)
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _columns_default_to_the_name(cls, data: Any) -> Any:
        return _with_columns(data)

    @model_validator(mode="after")
    def _require_valid_shape(self) -> Self:
        _check_bag(self)
        return self


class JaggedBag(Frozen):
    """A list of ids per row, all lists concatenated.

    The model receives two tensors: ``name``, the ids of all rows, int ``(ids,)``; and
    ``name_offsets``, the index of each row's first id, int ``(rows,)``, or ``name_lengths``, the
    number of ids per row, int ``(rows,)``. ``shape`` is ``(longest,)``: the longest list that a
    request may contain, because a served graph pads lists to this length. A row with a longer list
    has the score NaN; lists are never silently truncated.
    """

    kind: Literal["jagged_bag"] = "jagged_bag"
    name: str
    columns: tuple[str, ...] = ()
    dtype: Literal["int64", "int32"] = "int64"
    shape: tuple[int, ...]
    table: str
    layout: Literal["offsets", "lengths"] = "offsets"
    out_of_range: OutOfRange = "error"
    default_row: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _columns_default_to_the_name(cls, data: Any) -> Any:
        return _with_columns(data)

    @model_validator(mode="after")
    def _require_valid_shape(self) -> Self:
        _check_bag(self)
        return self


def _with_columns(data: Any) -> Any:
    """Return the data of an input with its name as ``columns`` if it has none."""
    if isinstance(data, dict) and not data.get("columns") and isinstance(data.get("name"), str):
        return {**data, "columns": (data["name"],)}
    return data


def _check_values(item: "IdInput | DenseInput | PaddedBag | JaggedBag") -> None:
    """Raise if a row of an input has more than ``MAX_ROW_VALUES`` values or columns."""
    row_values = max(1, *item.shape, len(item.columns))
    if row_values > MAX_ROW_VALUES:
        raise value_error("row_too_large", name=item.name, values=row_values, most=MAX_ROW_VALUES)


def _check_bag(bag: PaddedBag | JaggedBag) -> None:
    """Raise if a bag does not have a shape ``(length,)`` and one column."""
    if len(bag.shape) != 1 or bag.shape[0] < 1:
        raise value_error("bag_shape_form", name=bag.name)
    _check_values(bag)
    if len(bag.columns) != 1:
        raise value_error("bag_columns_count", name=bag.name)


AnyInput = Annotated[IdInput | DenseInput | PaddedBag | JaggedBag, Field(discriminator="kind")]


def tensor_names(item: AnyInput) -> tuple[str, ...]:
    """Return the names of the arguments of ``forward`` for one input: two for a jagged bag."""
    if isinstance(item, JaggedBag):
        return (item.name, f"{item.name}_{item.layout}")
    return (item.name,)

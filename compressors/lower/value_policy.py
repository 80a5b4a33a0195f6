"""The policy for out-of-range integers, as basic operators of the served graph.

The policy ``clamp`` replaces such an integer by the first or last valid one, and ``default_row`` by
a default. A graph cannot raise an error for an id out of range: for -1, ONNX Runtime returns the
last row, and TensorRT does not check. So with the policy ``error`` the graph refuses the row: its
score or vector is NaN, which valid rows never have.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compressors.contracts import (
    AnyInput,
    BoundedInput,
    DenseInput,
    IdInput,
    JaggedBag,
    KeyInput,
    MatrixInput,
    ValueRange,
    tensor_names,
    value_ranges,
)
from compressors.core.modules.formats import gather_padded, pad_positions


def apply_policy(
    item: AnyInput, inputs: dict[str, Tensor], rows_of_table: Mapping[str, int]
) -> Tensor | None:
    """Replace the out-of-range integers of one input, and return which rows to refuse.

    Args:
        item: the input.
        inputs: the graph's tensors by name; the tensor of ``item`` is replaced.
        rows_of_table: number of rows by table name.

    Returns:
        Bool ``(rows,)``: rows with an integer out of range if the policy is ``error``, and rows
        with too long a list. None if this input refuses no row.
    """
    if isinstance(item, DenseInput | KeyInput):
        return None
    if isinstance(item, MatrixInput):
        return _apply_to_matrix(item, inputs, rows_of_table)
    values = inputs[item.name]
    inside, default = _clamp_to_range(values, value_ranges(item, rows_of_table))
    outside = inside != values  # one operator less than comparing with both bounds
    if item.out_of_range == "default_row":
        inside = torch.where(outside, default, values)
    inputs[item.name] = inside
    return _find_refused_rows(item, outside, inputs)


def apply_policy_to_joined(
    items: Sequence[IdInput], inputs: dict[str, Tensor], rows_of_table: Mapping[str, int]
) -> Tensor | None:
    """Apply ``apply_policy`` to several inputs at once, with fewer operators.

    Args:
        items: inputs with one id per row, of equal type and policy.
        inputs: the graph's tensors by name; those of ``items`` become columns of one matrix.
        rows_of_table: number of rows by table name.

    Returns:
        Bool ``(rows,)``: rows to refuse; None if the policy refuses none.
    """
    ids: Tensor = torch.ops.recpress.join_ids([inputs[item.name] for item in items])
    ranges = tuple(only for item in items for only in value_ranges(item, rows_of_table))
    inside, default = _clamp_to_range(ids, ranges)  # at least two ranges, one for each column
    outside = inside != ids  # (rows, inputs)
    if items[0].out_of_range == "default_row":
        inside = torch.where(outside, default, ids)
    inputs.update((item.name, inside[:, index]) for index, item in enumerate(items))
    return _find_refused_rows(items[0], outside, inputs)


@torch.library.custom_op("recpress::join_ids", mutates_args=())
def join_ids(ids: list[Tensor]) -> Tensor:
    """Stack the ids of several inputs, ``(rows,)`` each, into ``(rows, inputs)``."""
    return torch.stack(ids, dim=1)


@join_ids.register_fake
def _(ids: list[Tensor]) -> Tensor:
    return ids[0].new_empty((ids[0].shape[0], len(ids)))


def _clamp_to_range(
    values: Tensor, ranges: tuple[ValueRange, ...]
) -> tuple[Tensor, float | Tensor]:
    """Return values clamped to their range, and the default of each column.

    Args:
        values: int ``(rows,)``, ``(rows, columns)`` or ``(ids,)``.
        ranges: one range for all values, or one for each column.
    """
    if len(ranges) == 1:
        only = ranges[0]
        return values.clamp(only.first, only.last), only.default
    first, last, default = (
        _create_row_like(values, bounds) for bounds in zip(*ranges, strict=True)
    )
    return torch.minimum(torch.maximum(values, first), last), default


def _create_row_like(values: Tensor, numbers: Sequence[float]) -> Tensor:
    """Return one number per column, ``(columns,)``, with the dtype and device of ``values``."""
    return torch.tensor(numbers, dtype=values.dtype, device=values.device)


def _find_refused_rows(
    item: BoundedInput, outside: Tensor, inputs: Mapping[str, Tensor]
) -> Tensor | None:
    """Return which rows to refuse, bool ``(rows,)``; None if this input refuses none.

    ``outside`` marks integers out of range; ``inputs`` are the graph's tensors by name.
    """
    if isinstance(item, JaggedBag):
        bounds = inputs[tensor_names(item)[1]]  # the offsets of the lists, or their lengths
        first_id = bounds if item.layout == "offsets" else bounds.cumsum(0) - bounds
        count = outside.shape[0]
        end_id = torch.cat([first_id[1:], first_id.new_full((1,), count)])
        is_refused = (end_id - first_id) > item.shape[0]
        if item.out_of_range == "error":
            inside, position = pad_positions(first_id, end_id, count, item.shape[0])
            # As floats: not every target can gather or reduce booleans.
            outside_in_list = gather_padded(outside.to(torch.float32), position) * inside
            is_refused = is_refused | (outside_in_list.sum(dim=1) > 0)
        return is_refused
    if item.out_of_range != "error":
        return None
    return outside if outside.dim() == 1 else outside.to(torch.float32).sum(dim=1) > 0


def _apply_to_matrix(
    item: MatrixInput, inputs: dict[str, Tensor], rows_of_table: Mapping[str, int]
) -> Tensor | None:
    """Apply the policy of each field to its columns of a matrix, as ``apply_policy`` does to an id.

    Columns of numbers have the range from minus to plus infinity, so their values stay the same.
    """
    matrix = inputs[item.name]
    first: list[float] = []
    last: list[float] = []
    default: list[float] = []
    is_refusing: list[bool] = []
    has_default: list[bool] = []
    for field, columns in zip(item.fields, item.slices, strict=True):
        width = columns.stop - columns.start
        policy = "clamp" if isinstance(field, DenseInput) else field.out_of_range
        is_refusing += [policy == "error"] * width
        has_default += [policy == "default_row"] * width
        if isinstance(field, DenseInput):
            first += [-math.inf] * width
            last += [math.inf] * width
            default += [math.nan] * width
            continue
        ranges = value_ranges(field, rows_of_table)  # one for all columns, or one for each
        for column in ranges * (width if len(ranges) == 1 else 1):
            first.append(column.first)
            last.append(column.last)
            default.append(column.default)
    inside = torch.minimum(
        torch.maximum(matrix, _create_row_like(matrix, first)), _create_row_like(matrix, last)
    )
    outside = inside != matrix  # (rows, width)
    if any(has_default):
        mask = torch.tensor(has_default, device=matrix.device)
        inside = torch.where(outside & mask, _create_row_like(matrix, default), inside)
    inputs[item.name] = inside
    if not any(is_refusing):
        return None
    weight = torch.tensor(is_refusing, dtype=torch.float32, device=matrix.device)
    return (outside.to(torch.float32) * weight).sum(dim=1) > 0

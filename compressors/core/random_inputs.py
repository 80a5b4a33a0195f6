"""Generate random inputs of a model, with valid ids or with ids out of range."""

from typing import Literal

import torch
from torch import Tensor

from compressors.contracts import (
    RAGGED,
    BoundedInput,
    DenseInput,
    KeyInput,
    ListInput,
    PaddedBag,
    SequenceInput,
    Signature,
    ValueRange,
    value_ranges,
)
from compressors.core.batches import bounds_name, concatenate_inputs, model_inputs

ListLengths = Literal["random", "shortest", "longest"]


def generate_inputs(
    signature: Signature,
    rows_of_table: dict[str, int],
    rows: int,
    seed: int = 0,
    *,
    with_largest: bool = False,
) -> dict[str, Tensor]:
    """Generate random inputs with valid ids, on which a network or a step can be checked.

    Args:
        signature: describes the inputs to generate.
        rows_of_table: number of rows of each table, by name; ids are below it.
        rows: number of rows to generate.
        seed: seed of the random numbers.
        with_largest: whether the last row (of a jagged bag, the last id) has the largest valid
            integers, so that a lookup beyond the end of a table raises an error.

    Returns:
        The inputs by the name of the model's forward argument. Lists have random lengths, up to the
        longest of the signature. Those of a sequence have at least ``min_length`` ids, and its
        first one has the longest length.
    """
    data = generate_data(signature, rows_of_table, rows, seed)
    for item in _select_bounded_inputs(signature) if with_largest else ():
        largest = [column.last for column in value_ranges(item, rows_of_table)]
        values = data[item.name]
        values[-1:] = torch.tensor(largest, dtype=values.dtype)
    return model_inputs(data, signature)


def generate_data(
    signature: Signature,
    rows_of_table: dict[str, int],
    rows: int,
    seed: int = 0,
    lengths: ListLengths = "random",
) -> dict[str, Tensor]:
    """Generate random rows in the layout of prepared data (``core/batches.py``).

    Arguments as in ``generate_inputs``; ``lengths`` says whether lists have random, the
    shortest or the longest lengths.
    """
    generator = torch.Generator().manual_seed(seed)
    data: dict[str, Tensor] = {}
    shared_lengths: dict[str, Tensor] = {}
    for item in signature.data_inputs:
        if isinstance(item, DenseInput):
            data[item.name] = torch.randn((rows, *item.shape), generator=generator)
        elif not isinstance(item, KeyInput):
            data |= _generate_integers(
                item, value_ranges(item, rows_of_table), rows, generator, lengths, shared_lengths
            )
    return data


def _generate_integers(
    item: BoundedInput,
    ranges: tuple[ValueRange, ...],
    rows: int,
    generator: torch.Generator,
    lengths: ListLengths,
    shared_lengths: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Generate the tensors of one input of integers.

    ``shared_lengths`` has the lengths of the sequences so far, by the name of the sequence whose
    lists have the same lengths.
    """
    dtype = getattr(torch, item.dtype)
    if not isinstance(item, RAGGED):
        ids = _draw_integers(ranges, (rows, *item.shape), dtype, generator)
        if isinstance(item, PaddedBag):
            list_lengths = _generate_lengths(item, (rows, 1), generator, lengths)
            ids[torch.arange(item.shape[0]) >= list_lengths] = item.padding_id
        return {item.name: ids}
    list_lengths = _generate_lengths(item, (rows,), generator, lengths)
    if isinstance(item, SequenceInput):
        if lengths == "random":
            list_lengths[:1] = item.shape[0]  # so that a batch has the largest tensor
        list_lengths = shared_lengths.setdefault(item.same_length_as or item.name, list_lengths)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), list_lengths.cumsum(0)])
    values = _draw_integers(ranges, (int(bounds[-1]),), dtype, generator)
    return {item.name: values, bounds_name(item): bounds}


def _draw_integers(
    ranges: tuple[ValueRange, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """Return random integers: of one range, or of one range per column (last dimension)."""
    if len(ranges) > 1:
        columns = [_draw_integers((column,), shape[:-1], dtype, generator) for column in ranges]
        return torch.stack(columns, dim=-1)
    first, last, _ = ranges[0]
    return torch.randint(first, last + 1, shape, generator=generator, dtype=dtype)


def _generate_lengths(
    item: ListInput, shape: tuple[int, ...], generator: torch.Generator, lengths: ListLengths
) -> Tensor:
    """Return the length of each list, int64 of a given shape."""
    shortest = item.min_length if isinstance(item, SequenceInput) else 0
    longest = item.shape[0]
    if lengths == "random":
        return torch.randint(shortest, longest + 1, shape, generator=generator)
    return torch.full(shape, shortest if lengths == "shortest" else longest)


def generate_edge_inputs(
    signature: Signature, rows_of_table: dict[str, int], rows: int, seed: int = 1
) -> dict[str, Tensor]:
    """Generate inputs with integers below and above their valid range, to compare two graphs.

    A graph handles such integers by a policy, for example by refusing the row (its score is NaN).
    Each row has out-of-range integers in at most one input: if the row is refused because of one
    input, the effect of another input cannot be observed. Two rows per input with integers are
    needed. If there are at least two more (``edge_rows``), all lists of the second-last row have
    the shortest length, which is 0 for bags, and all lists of the last row have the longest length.

    Raises:
        ValueError: ``rows`` is less than two per input with integers.
    """
    bounded = _select_bounded_inputs(signature)
    extremes: tuple[ListLengths, ...] = ()
    if rows >= edge_rows(signature):
        extremes = ("shortest", "longest")
    if rows < 2 * len(bounded):
        raise ValueError(f"{len(bounded)} inputs need {2 * len(bounded)} rows; found {rows}")
    data = generate_data(signature, rows_of_table, rows - len(extremes), seed)
    for index, item in enumerate(bounded):
        ranges = value_ranges(item, rows_of_table)
        below, above = ranges[0].first - 1, ranges[-1].last + 1
        for row, value in ((2 * index, below), (2 * index + 1, above)):
            _write_out_of_range(item, data, row, value, at_start=value == below)
    inputs = model_inputs(data, signature)
    last_rows = [
        model_inputs(generate_data(signature, rows_of_table, 1, seed, lengths), signature)  # 1 row
        for lengths in extremes
    ]
    return concatenate_inputs([inputs, *last_rows], signature)


def edge_rows(signature: Signature) -> int:
    """Return the number of rows with which ``generate_edge_inputs`` covers all its cases."""
    return 2 * len(_select_bounded_inputs(signature)) + 2


def _select_bounded_inputs(signature: Signature) -> list[BoundedInput]:
    """Return the inputs whose integers have a valid range."""
    return [item for item in signature.data_inputs if not isinstance(item, DenseInput | KeyInput)]


def _write_out_of_range(
    item: BoundedInput, data: dict[str, Tensor], row: int, value: int, *, at_start: bool
) -> None:
    """Write an out-of-range integer into one row of an input, as its first or last value."""
    values = data[item.name]
    if not isinstance(item, RAGGED):
        values[row].reshape(-1)[0 if at_start else -1] = value
        return
    begin, end = data[bounds_name(item)][row : row + 2].tolist()
    if end > begin:  # an empty list has no position to write to
        values[begin if at_start else end - 1] = value

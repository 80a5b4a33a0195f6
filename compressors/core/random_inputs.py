"""Generate random inputs of a model, with valid ids or with ids out of range."""

import torch
from torch import Tensor

from compressors.contracts import (
    BoundedInput,
    DataInput,
    DenseInput,
    JaggedBag,
    KeyInput,
    PaddedBag,
    Signature,
    ValueRange,
    tensor_names,
    value_ranges,
)
from compressors.core.batches import concatenate_inputs, jagged, model_inputs


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
            integers, so that ids beyond a table are found.

    Returns:
        The inputs by the name of the model's forward argument. Lists have random lengths from 0 to
        the longest of the signature.
    """
    data = generate_data(signature, rows_of_table, rows, seed)
    for item in _bounded_inputs(signature) if with_largest else ():
        largest = [column.last for column in value_ranges(item, rows_of_table)]
        values = data[item.name]
        values[-1:] = torch.tensor(largest, dtype=values.dtype)
    return model_inputs(data, signature)


def generate_data(
    signature: Signature, rows_of_table: dict[str, int], rows: int, seed: int = 0
) -> dict[str, Tensor]:
    """Generate random data for ``model_inputs``; arguments as for ``generate_inputs``."""
    return _generate_data(signature, rows_of_table, rows, seed)


def _generate_data(
    signature: Signature,
    rows_of_table: dict[str, int],
    rows: int,
    seed: int,
    share: int | None = None,
) -> dict[str, Tensor]:
    """Generate random data; ``share`` sets the lengths of lists, as in ``_generate_input``."""
    generator = torch.Generator().manual_seed(seed)
    data: dict[str, Tensor] = {}
    for item in signature.data_inputs:
        data.update(_generate_input(item, rows_of_table, rows, generator, share))
    return data


def _generate_input(
    item: DataInput,
    rows_of_table: dict[str, int],
    rows: int,
    generator: torch.Generator,
    share: int | None = None,
) -> dict[str, Tensor]:
    """Generate one input; ``share`` sets the lengths of lists: 0 empty, 1 longest, None random."""
    if isinstance(item, DenseInput):
        return {item.name: torch.randn((rows, *item.shape), generator=generator)}
    if isinstance(item, KeyInput):
        return {}
    dtype, ranges = getattr(torch, item.dtype), value_ranges(item, rows_of_table)
    if not isinstance(item, JaggedBag):
        ids = _random_integers(ranges, (rows, *item.shape), dtype, generator)
        if isinstance(item, PaddedBag):
            lengths = _lengths(item, (rows, 1), generator, share)
            ids[torch.arange(item.shape[0]) >= lengths] = item.padding_id
        return {item.name: ids}
    lengths = _lengths(item, (rows,), generator, share)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    values = _random_integers(ranges, (int(bounds[-1]),), dtype, generator)
    return jagged(item, values, bounds)


def _random_integers(
    ranges: tuple[ValueRange, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
) -> Tensor:
    """Return random integers: of one range, or of one range per column (last dimension)."""
    if len(ranges) > 1:
        columns = [_random_integers((column,), shape[:-1], dtype, generator) for column in ranges]
        return torch.stack(columns, dim=-1)
    first, last, _ = ranges[0]
    return torch.randint(first, last + 1, shape, generator=generator, dtype=dtype)


def _lengths(
    item: PaddedBag | JaggedBag,
    shape: tuple[int, ...],
    generator: torch.Generator,
    share: int | None,
) -> Tensor:
    """Return the length of each list, int64: random, or ``share`` (0 or 1) times the longest."""
    if share is not None:
        return torch.full(shape, share * item.shape[0])
    return torch.randint(item.shape[0] + 1, shape, generator=generator)


def generate_edge_inputs(
    signature: Signature, rows_of_table: dict[str, int], rows: int, seed: int = 1
) -> dict[str, Tensor]:
    """Generate inputs with integers below and above their valid range, to compare two graphs.

    A graph handles such integers by a policy, for example by refusing the row. Each row has
    out-of-range integers in at most one input: if the row is refused because of one input, the
    effect of another input cannot be observed. Two rows per input with integers are needed. If
    there are at least two more, all lists of the second-last row are empty, and all lists of the
    last row have the longest length.

    Raises:
        ValueError: ``rows`` is less than ``edge_rows``.
    """
    bounded = _bounded_inputs(signature)
    shares = (0, 1) if rows >= 2 * len(bounded) + 2 else ()
    if rows < 2 * len(bounded):
        raise ValueError(f"{len(bounded)} inputs need {2 * len(bounded)} rows; found {rows}")
    data = generate_data(signature, rows_of_table, rows - len(shares), seed)
    for index, item in enumerate(bounded):
        ranges = value_ranges(item, rows_of_table)
        below, above = ranges[0].first - 1, ranges[-1].last + 1
        for row, value in ((2 * index, below), (2 * index + 1, above)):
            _write_out_of_range(item, data, row, value, at_start=value == below)
    inputs = model_inputs(data, signature)
    last_rows = [
        model_inputs(_generate_data(signature, rows_of_table, 1, seed, share), signature)
        for share in shares
    ]
    return concatenate_inputs([inputs, *last_rows], signature)


def edge_rows(signature: Signature) -> int:
    """Return the number of rows with which ``generate_edge_inputs`` covers all its cases."""
    return 2 * len(_bounded_inputs(signature)) + 2


def _bounded_inputs(signature: Signature) -> list[BoundedInput]:
    """Return the inputs whose integers have a valid range."""
    return [item for item in signature.data_inputs if not isinstance(item, DenseInput | KeyInput)]


def _write_out_of_range(
    item: BoundedInput, data: dict[str, Tensor], row: int, value: int, *, at_start: bool
) -> None:
    """Write an out-of-range integer into one row of an input, as its first or last value."""
    values = data[item.name]
    if not isinstance(item, JaggedBag):
        values[row].reshape(-1)[0 if at_start else -1] = value
        return
    second = data[tensor_names(item)[1]]
    begin = second if item.layout == "offsets" else second.cumsum(0) - second
    end = torch.cat([begin[1:], begin.new_full((1,), values.shape[0])])
    if end[row] > begin[row]:  # an empty list has no position to write to
        values[begin[row] if at_start else end[row] - 1] = value

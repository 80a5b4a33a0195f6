"""Derive the inputs of a signature from a trained network and rows of its data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from compressors.contracts import (
    FORWARD,
    AnyInput,
    DenseInput,
    IdField,
    IdInput,
    IntegerInput,
    MatrixInput,
    PaddedBag,
    SequenceInput,
)
from compressors.errors.inspection import InspectionFailed
from compressors.inspection.first_call import first_call
from compressors.inspection.forward_arguments import (
    Argument,
    Call,
    Layout,
    layouts,
)
from compressors.inspection.list_inputs import (
    ListCall,
    describe_list,
    find_equal_lengths,
    find_padding_id,
)
from compressors.inspection.lookups import (
    Reading,
    read_column,
    tensors_in,
)
from compressors.inspection.observed_call import (
    Tensors,
)
from compressors.inspection.sample import Sample, SampleColumn

MatrixPart = IdInput | DenseInput | PaddedBag | IntegerInput


@dataclass(frozen=True)
class DerivedInputs:
    """The inputs of a network.

    Attributes:
        call: how the network is called with them.
        inputs: the inputs of the signature.
        reasons: by input, why it has its kind.
        unused: the columns that fill an input and change no output.
        tensors: the input tensors of the sampled rows.
        returned: what the network returned for them.
    """

    call: Call
    inputs: tuple[AnyInput, ...]
    reasons: Mapping[str, str]
    unused: tuple[str, ...]
    tensors: Tensors
    returned: object


def derive_inputs(
    network: nn.Module,
    sample: Sample,
    given: Mapping[str, Sequence[str]],
    excluded: Sequence[str],
    method: str = FORWARD,
) -> DerivedInputs:
    """Derive the inputs of a network.

    Args:
        network: the trained network, in evaluation mode.
        sample: the sampled columns of the data.
        given: columns by argument, as the user named them; a column may be a pattern.
        excluded: columns that are no inputs unless the user names them, such as labels.
        method: its method that returns the outputs, or the attribute path of a submodule.

    Raises:
        InspectionFailed: no column is known for an argument; the network fails on the rows; or an
            input has no kind that a signature can express.
    """
    candidates = layouts(network, method, sample, given, excluded)
    layout, tensors, observation = first_call(network, candidates, sample)
    _require_finite(network, layout, sample, observation.returned)
    readings = {
        argument.name: {
            column: read_column(
                network, layout.call, argument, column, sample, tensors, observation
            )
            for column in argument.columns
        }
        for argument in layout.arguments
    }
    _require_integers(readings, sample)
    table_rows = _TableRows(network, readings, sample)
    inputs: list[AnyInput] = []
    reasons: dict[str, str] = {}
    for argument in layout.arguments:
        columns = [sample[name] for name in argument.columns]
        of_argument = readings[argument.name]
        described: tuple[AnyInput, str]
        if len(columns) == 1 and columns[0].is_list:
            equal = find_equal_lengths(argument, layout.arguments, sample)
            lists = ListCall(network, layout.call, equal, sample, tensors, observation.lookups)
            described = _describe_list_input(lists, of_argument[columns[0].name])
        else:
            described = _describe_numbers_input(
                table_rows, argument, columns, of_argument, tensors[argument.name]
            )
        inputs.append(described[0])
        reasons[argument.name] = described[1]
    unused = [
        column
        for of_argument in readings.values()
        for column, reading in of_argument.items()
        if not (reading.changes_output or reading.offsets or reading.is_computed)
    ]
    return DerivedInputs(
        call=layout.call,
        inputs=_link_equal_sequences(inputs, layout.arguments, sample),
        reasons=reasons,
        unused=tuple(unused),
        tensors=tensors,
        returned=observation.returned,
    )


def _link_equal_sequences(
    inputs: Sequence[AnyInput], arguments: Sequence[Argument], sample: Sample
) -> tuple[AnyInput, ...]:
    """Return inputs in which a sequence names the first one whose lists have the same lengths."""
    sequences = {item.name: item for item in inputs if isinstance(item, SequenceInput)}
    argument_of = {argument.name: argument for argument in arguments}
    result: list[AnyInput] = []
    for item in inputs:
        equal = (
            find_equal_lengths(argument_of[item.name], arguments, sample)
            if item.name in sequences
            else ()
        )
        first = next((a.name for a in arguments if a in equal and a.name in sequences), item.name)
        result.append(
            item if first == item.name else item.model_copy(update={"same_length_as": first})
        )
    return tuple(result)


def _list_tables(readings: Mapping[str, Reading]) -> tuple[str, ...]:
    """Return the tables that any column of an argument is looked up in, in order."""
    return tuple(dict.fromkeys(table for reading in readings.values() for table in reading.offsets))


def _require_finite(network: nn.Module, layout: Layout, sample: Sample, returned: object) -> None:
    """Raise if a column that fills an input, or an output, is not finite."""
    for name in dict.fromkeys(name for item in layout.arguments for name in item.columns):
        column = sample[name]
        values = np.concatenate(column.values) if column.is_list else column.values
        if not np.isfinite(values).all():
            raise InspectionFailed("values_not_finite", column=name)
    for tensor in tensors_in(returned):
        if not tensor.dim():
            continue  # a scalar is no output: ``named_scores`` refuses it
        broken = ~tensor.reshape(len(tensor), -1).isfinite().all(dim=1)
        if bool(broken.any()):
            raise InspectionFailed(
                "outputs_not_finite",
                architecture=type(network).__name__,
                count=int(broken.sum()),
                rows=len(tensor),
            )


def _require_integers(readings: Mapping[str, Mapping[str, Reading]], sample: Sample) -> None:
    """Raise if floats are looked up in a table."""
    for of_argument in readings.values():
        for name, reading in of_argument.items():
            if not sample[name].is_integer and (reading.is_computed or reading.offsets):
                raise InspectionFailed("float_ids", column=name)


class _TableRows:
    """The rows of each table, and where the rows of each column begin in it.

    A column has an offset in a table: the number that the network adds to an id to get the row.

    Args:
        network: the network.
        readings: by argument and column, how the network reads the column.
        sample: the sampled columns.
    """

    def __init__(
        self, network: nn.Module, readings: Mapping[str, Mapping[str, Reading]], sample: Sample
    ) -> None:
        self.network, self.sample = network, sample
        # By table and offset, the smallest and largest id of all columns that are read with it.
        self._ranges: dict[str, dict[int, tuple[int, int]]] = {}
        for of_argument in readings.values():
            for name, reading in of_argument.items():
                low, high = sample[name].low, sample[name].high
                for table, offset in reading.offsets.items():
                    ranges = self._ranges.setdefault(table, {})
                    lowest, highest = ranges.get(offset, (low, high))
                    ranges[offset] = min(lowest, low), max(highest, high)

    def field(self, column: str, reading: Reading) -> IdField | None:
        """Return the valid ids of a column; None if they are all rows of its tables.

        Columns with different offsets may share a table. The rows of this column end where those
        of the next offset begin. They begin at the row of id 0; but if this column looks up that
        row or a later one, they begin at the row of the smallest id.

        Raises:
            InspectionFailed: the network adds different numbers for different tables.
        """
        if len(set(reading.offsets.values())) > 1:
            raise InspectionFailed("offsets_differ", column=column, offsets=dict(reading.offsets))
        table, offset = next(iter(reading.offsets.items()))
        ranges = self._ranges[table]
        if not any(ranges):  # every offset is 0
            return None
        rows: int = self.network.get_submodule(table).num_embeddings  # type: ignore[assignment]
        last = offset + ranges[offset][1]
        begins = (
            begin
            for other, (low, _) in ranges.items()
            for begin in (max(0, other), other + low)
            if other != offset and begin > last
        )
        end = min(begins, default=rows)
        first = max(0, -offset)
        return IdField(rows=end - offset - first, first=first, offset=offset)


def _describe_list_input(lists: ListCall, reading: Reading) -> tuple[AnyInput, str]:
    """Return the input of an argument that one column of lists fills, and the reason for its kind.

    Raises:
        InspectionFailed: rows of a table are computed from the lists, or the lists have different
            lengths, and no table reads them or padding changes the outputs.
    """
    column, tables = lists.column, tuple(reading.offsets)
    if tables:
        return describe_list(lists, tables, find_padding_id(lists.network, tables[0]))
    if reading.is_computed:
        raise InspectionFailed("list_computed", column=column.name)
    tensor = lists.tensors[lists.argument.name]
    if column.shortest != column.longest or not tensor.is_floating_point():
        raise InspectionFailed(
            "list_unused", column=column.name, shortest=column.shortest, longest=column.longest
        )
    item = DenseInput(
        name=lists.argument.name, columns=lists.argument.columns, shape=(column.longest,)
    )
    return item, "numbers that are not looked up in a table"


def _describe_numbers_input(
    table_rows: _TableRows,
    argument: Argument,
    columns: Sequence[SampleColumn],
    readings: Mapping[str, Reading],
    tensor: Tensor,
) -> tuple[AnyInput, str]:
    """Return the input of an argument that columns of numbers fill, and the reason for its kind."""
    tables = _list_tables(readings)
    if not tables and tensor.is_floating_point():
        width = tensor.shape[1]
        item = DenseInput(name=argument.name, columns=argument.columns, shape=(width,))
        return item, "numbers that are not looked up in a table"
    if not tables:
        return _describe_integer_input(
            argument.name, columns
        ), "integers that are not looked up in a table"
    same_tables = all(tuple(reading.offsets) == tables for reading in readings.values())
    if same_tables and not tensor.is_floating_point():
        return (
            _describe_id_input(table_rows, argument.name, argument.columns, readings),
            f"looked up in {', '.join(tables)}",
        )
    parts = tuple(
        _describe_matrix_part(table_rows, column, width, readings[column.name])
        for column, width in zip(columns, argument.widths, strict=True)
    )
    dtype = "float32" if tensor.is_floating_point() else "int64"
    item_of_parts = MatrixInput(name=argument.name, dtype=dtype, fields=parts)
    return item_of_parts, f"its columns are looked up in {', '.join(tables)}"


def _describe_matrix_part(
    table_rows: _TableRows, column: SampleColumn, width: int, reading: Reading
) -> MatrixPart:
    """Return the part of a matrix that one column fills."""
    if column.is_list and reading.is_computed:
        raise InspectionFailed("list_computed", column=column.name)
    if reading.offsets and column.is_list:
        table, *more = reading.offsets
        return PaddedBag(
            name=column.name,
            shape=(width,),
            table=table,
            more_tables=tuple(more),
            padding_id=find_padding_id(table_rows.network, table),
        )
    if reading.offsets:
        return _describe_id_input(table_rows, column.name, (column.name,), {column.name: reading})
    if reading.is_computed:
        return _describe_integer_input(column.name, [column])
    return DenseInput(name=column.name, shape=(max(1, width),))


def _describe_integer_input(name: str, columns: Sequence[SampleColumn]) -> IntegerInput:
    """Return the input of integers, with the bounds of the data."""
    return IntegerInput(
        name=name,
        columns=tuple(column.name for column in columns),
        shape=(len(columns),) if len(columns) > 1 else (),
        low=min(column.low for column in columns),
        high=max(column.high for column in columns),
    )


def _describe_id_input(
    table_rows: _TableRows, name: str, columns: Sequence[str], readings: Mapping[str, Reading]
) -> IdInput:
    """Return the input of ids."""
    tables = tuple(readings[columns[0]].offsets)
    fields = [table_rows.field(column, readings[column]) for column in columns]
    return IdInput(
        name=name,
        columns=tuple(columns),
        shape=(len(columns),) if len(columns) > 1 else (),
        table=tables[0],
        more_tables=tables[1:],
        fields=tuple(field for field in fields if field is not None),
    )

"""Derive the inputs of a signature from a trained network and rows of the user's data."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compressors.contracts import (
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
from compressors.inspection.forward_arguments import (
    Argument,
    CallForm,
    Layout,
    MaskType,
    layouts,
)
from compressors.inspection.list_inputs import (
    ListCall,
    describe_list,
    padding_id_of,
    with_equal_lengths,
)
from compressors.inspection.lookups import Reading, is_looked_up, read_column, same_outputs
from compressors.inspection.observed_call import (
    CallFailed,
    Lookup,
    Observation,
    Tensors,
    accessed_keys,
    argument_tensors,
    observe,
)
from compressors.inspection.sample import Sample, SampleColumn

MatrixPart = IdInput | DenseInput | PaddedBag | IntegerInput


@dataclass(frozen=True)
class DerivedInputs:
    """The inputs of a network.

    Attributes:
        call: how ``forward`` receives them.
        inputs: the inputs of the signature.
        reasons: by input, why it has its kind.
        unused: the columns that fill an input and change no output.
        tensors: the input tensors of the sampled rows.
        returned: what the network returned for them.
    """

    call: CallForm
    inputs: tuple[AnyInput, ...]
    reasons: Mapping[str, str]
    unused: tuple[str, ...]
    tensors: Tensors
    returned: object


def derive_inputs(
    network: nn.Module, sample: Sample, given: Mapping[str, Sequence[str]], excluded: Sequence[str]
) -> DerivedInputs:
    """Derive the inputs of a network.

    Args:
        network: the trained network, in evaluation mode.
        sample: the sampled columns of the data.
        given: columns by argument, as the user named them; a column may be a pattern.
        excluded: columns that are no inputs unless the user names them, such as labels.

    Raises:
        InspectionFailed: no column is known for an argument; the network fails on the rows; or an
            input has no kind that a signature can express.
    """
    layout, tensors, before = _first_call(
        network, layouts(network, sample, given, excluded), sample
    )
    inputs: list[AnyInput] = []
    reasons: dict[str, str] = {}
    unused: list[str] = []
    for argument in layout.arguments:
        readings = {
            column: read_column(network, layout.call, argument, column, sample, tensors, before)
            for column in argument.columns
        }
        columns = [sample[name] for name in argument.columns]
        unused += [
            name
            for name, reading in readings.items()
            if not (reading.changes_output or reading.offsets or reading.is_computed)
        ]
        if len(columns) == 1 and columns[0].is_list and (tables := _tables(readings)):
            _require_no_offset(columns[0], readings[columns[0].name])
            equal = with_equal_lengths(argument, layout.arguments, sample)
            lists = ListCall(network, layout.call, equal, sample, tensors, before.lookups)
            described: tuple[AnyInput, str] = describe_list(
                lists, tables, padding_id_of(network, tables[0])
            )
        else:
            tensor = tensors[argument.name]
            described = _numbers_input(network, argument, columns, readings, tensor)
        inputs.append(described[0])
        reasons[argument.name] = described[1]
    return DerivedInputs(
        call=layout.call,
        inputs=_with_equal_sequences(inputs, layout.arguments, sample),
        reasons=reasons,
        unused=tuple(unused),
        tensors=tensors,
        returned=before.returned,
    )


def _with_equal_sequences(
    inputs: Sequence[AnyInput], arguments: Sequence[Argument], sample: Sample
) -> tuple[AnyInput, ...]:
    """Return inputs in which a sequence names the first one whose lists have the same lengths."""
    sequences = {item.name: item for item in inputs if isinstance(item, SequenceInput)}
    argument_of = {argument.name: argument for argument in arguments}
    result: list[AnyInput] = []
    for item in inputs:
        equal = (
            with_equal_lengths(argument_of[item.name], arguments, sample)
            if item.name in sequences
            else ()
        )
        first = next((a.name for a in arguments if a in equal and a.name in sequences), item.name)
        result.append(
            item if first == item.name else item.model_copy(update={"same_length_as": first})
        )
    return tuple(result)


def _first_call(
    network: nn.Module, candidates: Iterator[Layout], sample: Sample
) -> tuple[Layout, Tensors, Observation]:
    """Return the first layout with which the network runs, its tensors and the result.

    Raises:
        InspectionFailed: the network fails with all layouts.
    """
    failure: tuple[CallFailed, Layout] | None = None
    for candidate in candidates:
        layout = candidate
        if layout.call == "mapping":
            tensors = _tensors(layout, sample, {})
            accessed = accessed_keys(network, tensors)
            layout = replace(
                layout, arguments=tuple(a for a in layout.arguments if a.name in accessed)
            )
            if not layout.arguments:
                continue
        for with_mask in _mask_dtypes(layout):
            try:
                return with_mask, *_call_with_dtypes(network, with_mask, sample)
            except CallFailed as fault:
                failure = failure or (fault, layout)
    if failure is None:
        raise InspectionFailed(
            "arguments_unknown",
            architecture=type(network).__name__,
            names=("its only argument",),
            first="NAME",
            columns=tuple(sample),
        )
    last, layout = failure
    raise InspectionFailed(
        "network_fails",
        architecture=type(network).__name__,
        rows=len(next(iter(sample.values())).values),
        problem=repr(last.problem),
        inputs=tuple(f"{a.name} ({', '.join(a.columns)})" for a in layout.arguments),
    ) from last.problem


def _mask_dtypes(layout: Layout) -> Iterator[Layout]:
    """Yield a layout with each dtype that its masks may have."""
    yield layout
    others: tuple[MaskType, ...] = ("bool", "int64")
    for dtype in others if any(argument.mask for argument in layout.arguments) else ():
        arguments = tuple(replace(argument, mask_dtype=dtype) for argument in layout.arguments)
        yield replace(layout, arguments=arguments)


def _tensors(layout: Layout, sample: Sample, floats: Mapping[str, bool]) -> Tensors:
    """Return the input tensors; integers are int64 unless ``floats`` says float32."""
    tensors: Tensors = {}
    for argument in layout.arguments:
        is_integer = all(sample[name].is_integer for name in argument.columns)
        as_float = floats.get(argument.name, not is_integer)
        dtype = torch.float32 if as_float else torch.int64
        tensors |= argument_tensors(argument, sample, dtype)
    return tensors


def _call_with_dtypes(
    network: nn.Module, layout: Layout, sample: Sample
) -> tuple[Tensors, Observation]:
    """Find which columns of integers the network receives as floats, and call it.

    Integers that are looked up remain integers. Other ones become floats if the network then runs,
    or returns the same.

    Raises:
        CallFailed: the network fails with all dtypes.
    """
    floats: dict[str, bool] = {}
    while True:
        tensors = _tensors(layout, sample, floats)
        try:
            before = observe(network, layout.call, tensors)
            break
        except CallFailed as fault:
            floats = _with_one_more_float(network, layout, sample, floats, fault)
    for argument in layout.arguments:
        if not _may_be_float(argument, sample, tensors, before.lookups):
            continue
        converted = {**floats, argument.name: True}
        other = _tensors(layout, sample, converted)
        try:
            after = observe(network, layout.call, other)
        except CallFailed:
            continue
        if same_outputs(before.returned, after.returned):
            floats, tensors, before = converted, other, after
    return tensors, before


def _with_one_more_float(
    network: nn.Module,
    layout: Layout,
    sample: Sample,
    floats: Mapping[str, bool],
    fault: CallFailed,
) -> dict[str, bool]:
    """Return the dtypes with one more argument as floats, with which the network comes further.

    Raises:
        CallFailed: there is none; contains the first error.
    """
    tensors = _tensors(layout, sample, floats)
    for argument in layout.arguments:
        if not _may_be_float(argument, sample, tensors, fault.lookups):
            continue
        converted = {**floats, argument.name: True}
        try:
            observe(network, layout.call, _tensors(layout, sample, converted))
        except CallFailed as other:
            if other.operations <= fault.operations:
                continue
        return converted
    raise fault


def _may_be_float(
    argument: Argument, sample: Sample, tensors: Tensors, lookups: tuple[Lookup, ...]
) -> bool:
    """Return whether an argument has integers that are in no lookup."""
    tensor = tensors[argument.name]
    is_list = len(argument.columns) == 1 and sample[argument.columns[0]].is_list
    return not tensor.is_floating_point() and not is_list and not is_looked_up(tensor, lookups)


def _tables(readings: Mapping[str, Reading]) -> tuple[str, ...]:
    """Return the tables that any column of an argument is looked up in, in order."""
    return tuple(dict.fromkeys(table for reading in readings.values() for table in reading.offsets))


def _require_no_offset(column: SampleColumn, reading: Reading) -> None:
    """Raise if the network adds a number to the ids of lists, which a signature cannot express."""
    if offset := next((value for value in reading.offsets.values() if value), 0):
        raise InspectionFailed(
            "list_with_offset", column=column.name, tables=tuple(reading.offsets), offset=offset
        )


def _numbers_input(
    network: nn.Module,
    argument: Argument,
    columns: Sequence[SampleColumn],
    readings: Mapping[str, Reading],
    tensor: Tensor,
) -> tuple[AnyInput, str]:
    """Return the input of an argument that columns of numbers fill, and the reason for its kind."""
    tables = _tables(readings)
    if not tables and tensor.is_floating_point():
        width = tensor.shape[1]
        item = DenseInput(name=argument.name, columns=argument.columns, shape=(width,))
        return item, "numbers that are not looked up in a table"
    if not tables:
        return _integer_input(argument.name, columns), "integers that are not looked up in a table"
    same_tables = all(tuple(reading.offsets) == tables for reading in readings.values())
    if same_tables and not tensor.is_floating_point():
        return (
            _id_input(network, argument.name, argument.columns, readings),
            f"looked up in {', '.join(tables)}",
        )
    parts = tuple(
        _matrix_part(network, column, width, readings[column.name])
        for column, width in zip(columns, argument.widths, strict=True)
    )
    dtype = "float32" if tensor.is_floating_point() else "int64"
    item_of_parts = MatrixInput(name=argument.name, dtype=dtype, fields=parts)
    return item_of_parts, f"its columns are looked up in {', '.join(tables)}"


def _matrix_part(
    network: nn.Module, column: SampleColumn, width: int, reading: Reading
) -> MatrixPart:
    """Return the part of a matrix that one column fills."""
    if reading.offsets and column.is_list:
        _require_no_offset(column, reading)
        table, *more = reading.offsets
        return PaddedBag(
            name=column.name,
            shape=(width,),
            table=table,
            more_tables=tuple(more),
            padding_id=padding_id_of(network, table),
        )
    if reading.offsets:
        return _id_input(network, column.name, (column.name,), {column.name: reading})
    if reading.is_computed:
        return _integer_input(column.name, [column])
    return DenseInput(name=column.name, shape=(max(1, width),))


def _integer_input(name: str, columns: Sequence[SampleColumn]) -> IntegerInput:
    """Return the input of integers, with the bounds of the data."""
    return IntegerInput(
        name=name,
        columns=tuple(column.name for column in columns),
        shape=(len(columns),) if len(columns) > 1 else (),
        low=min(column.low for column in columns),
        high=max(column.high for column in columns),
    )


def _id_input(
    network: nn.Module, name: str, columns: Sequence[str], readings: Mapping[str, Reading]
) -> IdInput:
    """Return the input of ids.

    In a table that several columns share, the rows of one end where those of the next begin.
    """
    tables = tuple(readings[columns[0]].offsets)
    offsets = [readings[column].offsets[tables[0]] for column in columns]
    fields: tuple[IdField, ...] = ()
    if any(offsets):
        rows: int = network.get_submodule(tables[0]).num_embeddings  # type: ignore[assignment]
        ends = [min((o for o in offsets if o > offset), default=rows) for offset in offsets]
        fields = tuple(
            IdField(rows=end - offset, offset=offset)
            for offset, end in zip(offsets, ends, strict=True)
        )
    return IdInput(
        name=name,
        columns=tuple(columns),
        shape=(len(columns),) if len(columns) > 1 else (),
        table=tables[0],
        more_tables=tables[1:],
        fields=fields,
    )

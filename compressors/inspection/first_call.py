"""Find a layout and dtypes with which a network runs, and call it with the sampled rows.

A layout says which columns of the data fill which argument, and how the network is called.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from compressors.errors.inspection import InspectionFailed
from compressors.inspection.forward_arguments import Argument, Layout, MaskType
from compressors.inspection.lookups import is_looked_up, same_outputs
from compressors.inspection.observed_call import (
    CallFailed,
    Lookup,
    Observation,
    Tensors,
    argument_tensors,
    observe,
)
from compressors.inspection.sample import Sample


def first_call(
    network: nn.Module, candidates: Iterator[Layout], sample: Sample
) -> tuple[Layout, Tensors, Observation]:
    """Return the first layout with which the network runs, its tensors and the result.

    Raises:
        InspectionFailed: the network fails with all layouts; or no column is known for its
            argument, because there is no layout, or only mappings of which it reads no key.
    """
    failure: tuple[CallFailed, Layout] | None = None
    method = ""
    for layout in candidates:
        method = layout.call.method
        for with_mask in _mask_dtypes(layout):
            try:
                tensors, observation = _call_with_dtypes(network, with_mask, sample)
            except CallFailed as fault:
                # A network that reads no key of a mapping does not expect a mapping.
                if layout.call.form != "mapping" or fault.accessed:
                    failure = failure or (fault, layout)
                continue
            if layout.call.form == "mapping":
                return *_keep_accessed(with_mask, tensors, observation.accessed), observation
            return with_mask, tensors, observation
    if failure is None:
        raise InspectionFailed(  # the sentence lists ``names``, and shows ``first`` in an example
            "arguments_unknown",
            architecture=type(network).__name__,
            method=method,
            names=("its only argument",),
            first="NAME",
            columns=tuple(sample),
        )
    first_fault, failed_layout = failure
    raise InspectionFailed(
        "network_fails",
        architecture=type(network).__name__,
        rows=len(next(iter(sample.values())).values),
        problem=repr(first_fault.problem),
        inputs=tuple(f"{a.name} ({', '.join(a.columns)})" for a in failed_layout.arguments),
    ) from first_fault.problem


def _keep_accessed(
    layout: Layout, tensors: Tensors, accessed: frozenset[str]
) -> tuple[Layout, Tensors]:
    """Return the arguments of a mapping that the network reads, and their tensors."""
    arguments = tuple(
        replace(item, lengths=item.lengths if item.lengths in accessed else None)
        for item in layout.arguments
        if item.name in accessed
    )
    kept = {name: tensor for name, tensor in tensors.items() if name in accessed}
    return replace(layout, arguments=arguments), kept


def _mask_dtypes(layout: Layout) -> Iterator[Layout]:
    """Yield a layout with each dtype that its masks may have."""
    yield layout
    others: tuple[MaskType, ...] = ("bool", "int64")
    for dtype in others if any(argument.mask for argument in layout.arguments) else ():
        arguments = tuple(replace(argument, mask_dtype=dtype) for argument in layout.arguments)
        yield replace(layout, arguments=arguments)


def _build_tensors(layout: Layout, sample: Sample, floats: Mapping[str, bool]) -> Tensors:
    """Return the input tensors; integers are int64, or float32 for the arguments in ``floats``."""
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

    Integers that are looked up in a table remain integers. Other ones become floats if the network
    fails without that, or returns the same with it.

    Raises:
        CallFailed: the network fails with all dtypes.
    """
    floats: dict[str, bool] = {}
    while True:
        tensors = _build_tensors(layout, sample, floats)
        try:
            before = observe(network, layout.call, tensors)
            break
        except CallFailed as fault:
            floats = _try_one_more_float(network, layout, sample, floats, fault)
    for argument in layout.arguments:
        if not _may_be_float(argument, sample, tensors, before.lookups):
            continue
        converted = {**floats, argument.name: True}
        other = _build_tensors(layout, sample, converted)
        try:
            after = observe(network, layout.call, other)
        except CallFailed:
            continue
        if same_outputs(before.returned, after.returned):
            floats, tensors, before = converted, other, after
    return tensors, before


def _try_one_more_float(
    network: nn.Module,
    layout: Layout,
    sample: Sample,
    floats: Mapping[str, bool],
    fault: CallFailed,
) -> dict[str, bool]:
    """Pass one more argument as floats, so that the network fails later or not at all.

    It fails later if it runs more tensor operations before the error than in the call that raised
    ``fault``.

    Returns:
        ``floats`` with this argument: whether each argument is passed as floats.

    Raises:
        CallFailed: ``fault`` itself, if there is no such argument.
    """
    tensors = _build_tensors(layout, sample, floats)
    numbers = [a for a in layout.arguments if _may_be_float(a, sample, tensors, fault.lookups)]
    # A network that takes ids and numbers in one float matrix casts its ids to integers itself. So
    # a matrix whose columns are all looked up may have to be float too.
    matrices = [
        argument
        for argument in layout.arguments
        if len(argument.columns) > 1
        and not tensors[argument.name].is_floating_point()
        and argument not in numbers
    ]
    for argument in (*numbers, *matrices):
        converted = {**floats, argument.name: True}
        try:
            observe(network, layout.call, _build_tensors(layout, sample, converted))
        except CallFailed as other:
            if other.operations <= fault.operations:
                continue
        return converted
    raise fault


def _may_be_float(
    argument: Argument, sample: Sample, tensors: Tensors, lookups: tuple[Lookup, ...]
) -> bool:
    """Return whether an argument has integers that are not looked up in a table.

    Lists of different lengths stay integers: the result for them is False.
    """
    tensor = tensors[argument.name]
    columns = [sample[name] for name in argument.columns]
    has_one_length = all(column.shortest == column.longest for column in columns)
    is_integer = not tensor.is_floating_point()
    return is_integer and has_one_length and not is_looked_up(tensor, lookups)

"""Find how a network treats the lists of one column: their padding, and the order of their ids.

A padded bag (``PaddedBag``) has lists that are padded on the right to one fixed length, a sequence
lists that are padded to the longest list of a batch, and a jagged bag concatenated lists with
offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from compressors.contracts import JaggedBag, PaddedBag, SequenceInput
from compressors.errors.inspection import InspectionFailed
from compressors.inspection.forward_arguments import Argument, Call
from compressors.inspection.lookups import same_outputs
from compressors.inspection.observed_call import (
    CallFailed,
    Lookup,
    PaddingSpec,
    Tensors,
    argument_tensors,
    observe,
)
from compressors.inspection.sample import Padding, Sample, SampleColumn

MORE_PADDING = 3
"""Positions that are added to find whether the length of the tensor affects the output."""


@dataclass(frozen=True)
class ListCall:
    """One call of a network whose lists are to be described.

    Attributes:
        network: the network.
        call: how it is called with the tensors.
        arguments: first the argument to describe, then the arguments whose lists have the same
            lengths; all are padded together.
        sample: the sampled columns.
        tensors: all input tensors.
        lookups: the lookups of the call with ``tensors``.
    """

    network: nn.Module
    call: Call
    arguments: tuple[Argument, ...]
    sample: Sample
    tensors: Tensors
    lookups: tuple[Lookup, ...]

    @property
    def argument(self) -> Argument:
        """The argument to be described."""
        return self.arguments[0]

    @property
    def column(self) -> SampleColumn:
        """The column of lists that fills the argument."""
        return self.sample[self.argument.columns[0]]

    def outputs(self, sample: Sample, padded: PaddingSpec) -> Any:
        """Return the outputs for another sample or padding; None if the network fails."""
        tensors = dict(self.tensors)
        for argument in self.arguments:
            dtype = self.tensors[argument.name].dtype
            tensors |= argument_tensors(argument, sample, dtype, padded)
        try:
            return observe(self.network, self.call, tensors).returned
        except CallFailed:
            return None


def find_equal_lengths(
    argument: Argument, others: Sequence[Argument], sample: Sample
) -> tuple[Argument, ...]:
    """Return an argument, and the other ones whose lists are as long as its lists in every row.

    An argument whose lists all have one length is returned alone: equal lengths may result from
    padding in the data.
    """
    lengths = _list_lengths(argument, sample)
    if len(set(lengths)) < 2 or argument.offsets is not None:
        return (argument,)
    equal = [
        other
        for other in others
        if other != argument and other.offsets is None and _list_lengths(other, sample) == lengths
    ]
    return (argument, *equal)


def _list_lengths(argument: Argument, sample: Sample) -> tuple[int, ...]:
    """Return the shortest and longest length in all data, and the length of each sampled list.

    The result is empty if the argument has no single column of lists.
    """
    column = sample[argument.columns[0]]
    if len(argument.columns) > 1 or not column.is_list:
        return ()
    return (column.shortest, column.longest, *(len(values) for values in column.values))


def describe_list(
    lists: ListCall, tables: tuple[str, ...], padding_id: int
) -> tuple[PaddedBag | JaggedBag | SequenceInput, str]:
    """Return the input of an argument that one column of lists fills, and the reason for its kind.

    If all lists have one length, the input is a padded bag. Otherwise padding must not change the
    outputs: the input is a padded bag if the order of the ids does not matter either, and else a
    sequence. Concatenated lists are a jagged bag.

    Args:
        lists: the call of the network.
        tables: the tables in which the ids are looked up.
        padding_id: the id of padding.

    Raises:
        InspectionFailed: the lists have different lengths, and padding changes the outputs.
    """
    argument, column = lists.argument, lists.column
    common: dict[str, Any] = {
        "name": argument.name,
        "columns": argument.columns,
        "table": tables[0],
        "more_tables": tables[1:],
    }
    longest = max(1, column.longest)
    if argument.offsets is not None:
        return JaggedBag(**common, shape=(longest,)), "concatenated lists with offsets"
    bag = PaddedBag(**common, shape=(longest,), padding_id=padding_id)
    # ``companions`` are the mask, lengths and positions that accompany the lists.
    if column.shortest == column.longest and not argument.padding_companions:
        return bag, f"every list has {longest} ids"
    side = _find_padding_side(lists, padding_id)
    if side is None:
        raise InspectionFailed(
            "padding_matters",
            column=column.name,
            shortest=column.shortest,
            longest=column.longest,
            padding_id=padding_id,
        )
    is_alone = len(lists.arguments) == 1 and not argument.padding_companions
    if side == "right" and is_alone and _is_unordered(lists, padding_id):
        return bag, "the order of the ids does not change the output"
    first_position = _find_first_position(lists)
    sequence = SequenceInput(
        **common,
        shape=(longest,),
        min_length=column.shortest,
        padding=side,
        padding_id=padding_id,
        mask=argument.mask,
        mask_dtype=argument.mask_dtype,
        lengths=argument.lengths,
        positions=argument.positions,
        first_position=first_position,
    )
    reason = f"padding on the {side} does not change the output"
    return sequence, f"{reason}; positions from {first_position}" if argument.positions else reason


def _find_padding_side(lists: ListCall, padding_id: int) -> Padding | None:
    """Return the side on which more padding changes no output; None if there is none."""
    length = _find_longest(lists)
    sides: tuple[Padding, ...] = ("right", "left")
    for side in sides:
        sample, shorter = lists.sample, length
        longer = lists.outputs(sample, PaddingSpec(length + MORE_PADDING, side, padding_id))
        if longer is None:  # the network accepts no longer lists: pad shorter ones
            shorter = max(1, length - MORE_PADDING)
            sample = _shorten_lists(lists, shorter)
            longer = lists.outputs(sample, PaddingSpec(length, side, padding_id))
        outputs = lists.outputs(sample, PaddingSpec(shorter, side, padding_id))
        if outputs is not None and longer is not None and same_outputs(outputs, longer):
            return side
    return None


def _shorten_lists(lists: ListCall, length: int) -> Sample:
    """Return the sample with at most ``length`` ids in each list of the described arguments."""
    columns = [lists.sample[argument.columns[0]] for argument in lists.arguments]
    shortened = {
        column.name: replace(column, values=tuple(values[:length] for values in column.values))
        for column in columns
    }
    return {**lists.sample, **shortened}


def _is_unordered(lists: ListCall, padding_id: int) -> bool:
    """Return whether the outputs stay the same if the ids of each list are reversed."""
    column = lists.column
    reverse = replace(column, values=tuple(values[::-1].copy() for values in column.values))
    padded = PaddingSpec(_find_longest(lists), "right", padding_id)
    outputs = lists.outputs(lists.sample, padded)
    reversed_outputs = lists.outputs({**lists.sample, column.name: reverse}, padded)
    return reversed_outputs is not None and same_outputs(outputs, reversed_outputs)


def _find_first_position(lists: ListCall) -> int:
    """Return the position of the first id.

    It is 1 if positions are looked up in a table with one row more than the longest list, because
    position 0 is then that of padding.
    """
    argument = lists.argument
    if argument.positions is None or argument.first_position == 1:
        return argument.first_position
    positions = lists.tensors[argument.positions]
    tables = {lookup.table for lookup in lists.lookups if torch.equal(lookup.ids, positions)}
    rows = {getattr(lists.network.get_submodule(table), "num_embeddings", 0) for table in tables}
    return int(rows == {lists.column.longest + 1})


def _find_longest(lists: ListCall) -> int:
    """Return the length of the longest list in the sample, at least 1."""
    return max(1, *(len(values) for values in lists.column.values))


def find_padding_id(network: nn.Module, table: str) -> int:
    """Return the ``padding_idx`` of a table, or 0 if it has none."""
    padding = getattr(network.get_submodule(table), "padding_idx", None)
    return 0 if padding is None else int(padding)

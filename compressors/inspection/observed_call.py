"""Call a network with sampled rows, and record the ids that it looks up in its tables."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressors.contracts import JaggedBag, SequenceInput, is_out_of_memory
from compressors.core.batches import build_jagged_arguments, pad_sequence
from compressors.core.scores import scoring_method
from compressors.errors.onnx_graphs import OnnxRefused
from compressors.inspection.forward_arguments import Argument, Call
from compressors.inspection.sample import Padding, Sample, SampleColumn, stack_columns

Tensors = dict[str, Tensor]

ANY_TABLE = "table"
"""Name of the table of inputs that are only used to convert lists to tensors: it has no effect."""


@dataclass(frozen=True)
class Lookup:
    """The ids that one call of a table received, in any shape, and the table's path."""

    table: str
    ids: Tensor


@dataclass(frozen=True)
class Observation:
    """What a call of the network returned, its lookups in order, and the keys that it read.

    Keys are those of the mapping that it received; there are none if it received keywords.
    """

    returned: Any
    lookups: tuple[Lookup, ...]
    accessed: frozenset[str]


class CallFailed(Exception):
    """The network raised an error.

    Attributes:
        problem: the error.
        lookups: the lookups before the error.
        accessed: the keys of the mapping that it read before the error.
        operations: number of tensor operations before the error.
    """

    def __init__(
        self,
        problem: Exception,
        lookups: tuple[Lookup, ...],
        accessed: frozenset[str],
        operations: int,
    ) -> None:
        super().__init__(repr(problem))
        self.problem = problem
        self.lookups = lookups
        self.accessed = accessed
        self.operations = operations


class _CountedOperations(TorchDispatchMode):
    """Counts the tensor operations of a call."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        self.count += 1
        return result


class _AccessedKeys(dict[str, Tensor]):
    """A mapping of tensors that records the keys a network reads."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.accessed: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.accessed.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.accessed.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.accessed.add(key)
        return super().pop(key, *default)

    def items(self) -> Any:
        self.accessed.update(self)
        return super().items()

    def values(self) -> Any:
        self.accessed.update(self)
        return super().values()


def observe(network: nn.Module, call: Call, tensors: Tensors) -> Observation:
    """Call a network with copies of tensors, and record what it looks up and reads.

    Raises:
        CallFailed: the network raised an error.
        OnnxRefused: the network was read from an ONNX graph, and cannot compute one of its nodes.
    """
    lookups: list[Lookup] = []
    operations = _CountedOperations()
    copies = _AccessedKeys({name: tensor.clone() for name, tensor in tensors.items()})
    method = scoring_method(network, call.method)
    with _record_lookups(network, lookups), torch.no_grad(), operations:
        try:
            returned = method(copies) if call.form == "mapping" else method(**dict(copies))
        except Exception as fault:
            if is_out_of_memory(fault) or isinstance(fault, OnnxRefused):
                raise
            accessed = frozenset(copies.accessed)
            raise CallFailed(fault, tuple(lookups), accessed, operations.count) from fault
    return Observation(returned, tuple(lookups), frozenset(copies.accessed))


@contextmanager
def _record_lookups(network: nn.Module, lookups: list[Lookup]) -> Iterator[None]:
    """Append the ids of each call of a table."""

    def record(name: str) -> Any:
        def append_ids(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs["input"]
            lookups.append(Lookup(name, ids.detach().clone()))

        return append_ids

    hooks = [
        module.register_forward_pre_hook(record(name), with_kwargs=True)
        for name, module in network.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class PaddingSpec:
    """How the lists of an argument become a tensor: length, side and id of the padding."""

    length: int
    side: Padding = "right"
    padding_id: int = 0


def argument_tensors(
    argument: Argument, sample: Sample, dtype: torch.dtype, padded: PaddingSpec | None = None
) -> Tensors:
    """Return the tensors of one argument and of its offsets, lengths, mask and positions, if any.

    Args:
        argument: the argument.
        sample: the sampled columns.
        dtype: dtype of the tensor.
        padded: how lists are padded; None for the longest list of the sample, on the right, with 0.
    """
    columns = [sample[name] for name in argument.columns]
    if not any(column.is_list for column in columns):
        return {argument.name: stack_columns(columns, dtype)}
    if len(columns) > 1:  # a matrix
        parts = [
            _pad_lists(
                # Width 0: the lists are padded as if they filled a tensor alone.
                Argument(argument.name, (column.name,), widths=(0,)),
                column,
                PaddingSpec(width),
            )[argument.name]
            if column.is_list
            else torch.from_numpy(column.values)[:, None]
            for column, width in zip(columns, argument.widths, strict=True)
        ]
        return {argument.name: torch.cat([part.to(dtype) for part in parts], dim=1)}
    (column,) = columns
    if argument.offsets is not None:
        item = JaggedBag(name=argument.name, table=ANY_TABLE, shape=(max(1, column.longest),))
        tensors = build_jagged_arguments(item, *_concatenate_lists(column))
    else:
        longest = max(1, *(len(values) for values in column.values))
        tensors = _pad_lists(argument, column, padded or PaddingSpec(longest))
    return {**tensors, argument.name: tensors[argument.name].to(dtype)}


def _pad_lists(argument: Argument, column: SampleColumn, padded: PaddingSpec) -> Tensors:
    """Return lists padded to one length, with their lengths, mask and positions, if any."""
    item = SequenceInput(
        name=argument.name,
        table=ANY_TABLE,
        shape=(padded.length,),
        min_length=padded.length,  # so that the tensor has this length
        padding=padded.side,
        padding_id=padded.padding_id,
        mask=argument.mask,
        mask_dtype=argument.mask_dtype,
        lengths=argument.lengths,
        positions=argument.positions,
        first_position=argument.first_position,
    )
    return pad_sequence(item, *_concatenate_lists(column))


def _concatenate_lists(column: SampleColumn) -> tuple[Tensor, Tensor]:
    """Return the values of all lists, and where each begins, int64 ``(rows + 1,)``."""
    lengths = torch.tensor([0, *(len(values) for values in column.values)])
    return torch.from_numpy(np.concatenate(column.values)), lengths.cumsum(0)

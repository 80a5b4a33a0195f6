"""Call a network with sampled rows, and record the ids that it looks up in its tables."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressors.contracts import is_out_of_memory
from compressors.inspection.forward_arguments import Argument, CallForm
from compressors.inspection.sample import Padding, Sample, pad_lists, scalar_tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Lookup:
    """The ids that one call of a table received, in any shape, and the table's path."""

    table: str
    ids: Tensor


@dataclass(frozen=True)
class Observation:
    """What a call of the network returned, and its lookups in order."""

    returned: Any
    lookups: tuple[Lookup, ...]


class CallFailed(Exception):
    """The network raised an error.

    Attributes:
        problem: the error.
        lookups: the lookups before the error.
        operations: number of tensor operations before the error.
    """

    def __init__(self, problem: Exception, lookups: tuple[Lookup, ...], operations: int) -> None:
        super().__init__(repr(problem))
        self.problem = problem
        self.lookups = lookups
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


def observe(network: nn.Module, call: CallForm, tensors: Tensors) -> Observation:
    """Call a network and record its lookups.

    Raises:
        CallFailed: the network raised an error.
    """
    lookups: list[Lookup] = []
    operations = _CountedOperations()
    with _recorded_lookups(network, lookups), torch.no_grad(), operations:
        try:
            copies = {name: tensor.clone() for name, tensor in tensors.items()}
            returned = network(copies) if call == "mapping" else network(**copies)
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
            raise CallFailed(fault, tuple(lookups), operations.count) from fault
    return Observation(returned, tuple(lookups))


def accessed_keys(network: nn.Module, tensors: Tensors) -> set[str]:
    """Return the keys of the mapping that a network reads until it returns or raises an error."""
    mapping = _AccessedKeys(tensors)
    with torch.no_grad():
        try:
            network(mapping)
        except Exception as fault:
            if is_out_of_memory(fault):
                raise
    return mapping.accessed


@contextmanager
def _recorded_lookups(network: nn.Module, lookups: list[Lookup]) -> Iterator[None]:
    """Append the ids of each call of a table."""

    def record(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = args[0] if args else kwargs["input"]
            lookups.append(Lookup(name, ids.detach().clone()))

        return before

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
class Padded:
    """How the lists of an argument become a tensor: length, side and id of the padding."""

    length: int
    side: Padding = "right"
    padding_id: int = 0


def argument_tensors(
    argument: Argument, sample: Sample, dtype: torch.dtype, padded: Padded | None = None
) -> Tensors:
    """Return the tensors of one argument and of the arguments that accompany it.

    Args:
        argument: the argument.
        sample: the sampled columns.
        dtype: dtype of the tensor.
        padded: how lists are padded; None for the longest list of the sample, on the right, with 0.
    """
    columns = [sample[name] for name in argument.columns]
    if not any(column.is_list for column in columns):
        return {argument.name: scalar_tensor(columns, dtype)}
    if len(columns) > 1:  # a matrix
        parts = [
            pad_lists(column.values, width, 0)
            if column.is_list
            else torch.from_numpy(column.values)[:, None]
            for column, width in zip(columns, argument.widths, strict=True)
        ]
        return {argument.name: torch.cat([part.to(dtype) for part in parts], dim=1)}
    (column,) = columns
    lengths = torch.tensor([len(values) for values in column.values])
    if argument.offsets is not None:
        offsets = torch.cumsum(lengths, 0) - lengths
        ids = torch.cat([torch.from_numpy(values) for values in column.values])
        return {argument.name: ids.to(dtype), argument.offsets: offsets}
    padded = padded or Padded(max(1, int(lengths.max())))
    tensors = {
        argument.name: pad_lists(column.values, padded.length, padded.padding_id, padded.side).to(
            dtype
        )
    }
    places = torch.arange(padded.length)
    first = padded.length - lengths[:, None] if padded.side == "left" else 0
    is_id = (places >= first) & (places < first + lengths[:, None])
    if argument.mask is not None:
        tensors[argument.mask] = is_id.to(getattr(torch, argument.mask_dtype))
    if argument.lengths is not None:
        tensors[argument.lengths] = lengths
    if argument.positions is not None:
        tensors[argument.positions] = torch.where(
            is_id, places - first + argument.first_position, 0
        )
    return tensors

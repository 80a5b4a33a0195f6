"""Call a network, and convert what it returns to scores: one column for each output.

The method that is called is ``forward``, or another one that the signature names. With one output,
it returns the output, float ``(rows,)`` or ``(rows, 1)``, or a tuple or mapping with only it. With
``n`` outputs, it returns one of these, in the order of the signature's outputs:

- a tensor ``(rows, n)``;
- a tuple or list of ``n`` tensors, ``(rows,)`` or ``(rows, 1)`` each;
- a mapping from the outputs' names to such tensors, in any order; other entries are ignored.

Its *scores* are then a tensor, float ``(rows,)`` for one output and ``(rows, n)`` for several.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from compressors.contracts import FORWARD, Attributes, Signature, tensor_names
from compressors.core.batches import SampledItems, concatenate_inputs
from compressors.core.modules.output_calibration import without_recalibration

Value = TypeVar("Value")
"""A tensor, or an array of a runtime."""


def call_network(module: nn.Module, inputs: Mapping[str, Tensor], signature: Signature) -> Any:
    """Call a network, or a tower, with its inputs in the way that ``signature.call`` names.

    Args:
        module: the network or tower.
        inputs: its input tensors by name; others are ignored.
        signature: the signature, restricted to the inputs of the network or tower. With its field
            ``repeat_single_row``, a batch of one row is passed as two equal rows, and the second
            row of each returned tensor is removed.
    """
    if signature.repeat_single_row and _count_rows(inputs, signature) == 1:
        repeated = concatenate_inputs([inputs, inputs], signature)
        return _keep_first_row(_call_once(module, repeated, signature))
    return _call_once(module, inputs, signature)


def _call_once(module: nn.Module, inputs: Mapping[str, Tensor], signature: Signature) -> Any:
    """Call the method that the signature names, or both towers and multiply their vectors."""
    if signature.scored_by == "towers" and signature.towers is not None:
        names = signature.towers.named()
        query, item = (tower_vectors(module, inputs, signature, name) for name in names)
        return (query * item).sum(dim=1)
    with temporary_attributes(module, signature.attributes):
        if signature.method == FORWARD:  # a forward hook applies the calibration maps
            return _call_method(module, inputs, signature)
        with without_recalibration(module) as recalibrate:
            return recalibrate(_call_method(module, inputs, signature))


@contextmanager
def temporary_attributes(module: nn.Module, attributes: Attributes) -> Iterator[None]:
    """Give a module these attributes inside the context, and then their earlier values again."""
    earlier = {name: getattr(module, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in earlier.items():
            setattr(module, name, value)


def _call_method(module: nn.Module, inputs: Mapping[str, Tensor], signature: Signature) -> Any:
    arguments = {name: inputs[name] for name in _list_tensor_names(signature)}
    method = scoring_method(module, signature.method)
    match signature.call:
        case "positions":
            return method(*arguments.values())
        case "mapping":
            return method(arguments)
        case _:
            return method(**arguments)


def _count_rows(inputs: Mapping[str, Tensor], signature: Signature) -> int:
    """Return the number of rows of a batch."""
    # Only the first tensor of a jagged bag, the ids of all rows, has another length. During an
    # export, the size is symbolic, and ``len`` would fix it to the size of the traced batch.
    return inputs[tensor_names(signature.model_inputs[0])[-1]].shape[0]


def _keep_first_row(returned: Any) -> Any:
    """Return what a network returned for one row, from what it returned for two equal rows."""
    if isinstance(returned, Tensor):
        return returned[:1]
    if isinstance(returned, Mapping):
        return {name: _keep_first_row(value) for name, value in returned.items()}
    if isinstance(returned, tuple | list):
        return tuple(_keep_first_row(value) for value in returned)
    return returned


def scoring_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """Return a method of a network; for ``forward`` the network, so that its hooks run too.

    Args:
        module: the network.
        name: the method, or an attribute path to a submodule or its method.

    Raises:
        AttributeError: the network has no such method.
    """
    method: Callable[..., Any] = module if name == FORWARD else operator.attrgetter(name)(module)
    return method


def network_scores(module: nn.Module, inputs: Mapping[str, Tensor], signature: Signature) -> Tensor:
    """Call a network with its inputs and return its scores; raises what ``scores_of`` raises."""
    return scores_of(call_network(module, inputs, signature), signature)


def training_output(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    signature: Signature,
    sampled: SampledItems | None = None,
) -> Tensor:
    """Call a network and return what its loss compares.

    Args:
        module: the network.
        inputs: its input tensors by name.
        signature: its signature.
        sampled: for a model with two towers, items that were drawn from the catalogue; None if none
            were drawn. The item tower computes them in one call with the items of the rows, so that
            batch norm treats all items alike.

    Returns:
        The scores; for a model with two towers, the vectors of the query and of the item of each
        row, float ``(rows, 2, dim)``. Drawn items are further rows, with a query vector of zeros.

    Raises:
        TypeError, ValueError: the network's output is not what the signature declares.
    """
    if signature.towers is None:
        return network_scores(module, inputs, signature)
    query, item = signature.towers.named()
    queries = tower_vectors(module, inputs, signature, query)
    if sampled is None:
        return torch.stack([queries, tower_vectors(module, inputs, signature, item)], dim=1)
    both = concatenate_inputs([inputs, sampled.inputs], signature.of_tower(item))
    items = tower_vectors(module, both, signature, item)
    no_query = queries.new_zeros(len(items) - len(queries), queries.shape[1])
    return torch.stack([torch.cat([queries, no_query]), items], dim=1)


def tower_vectors(
    module: nn.Module, inputs: Mapping[str, Tensor], signature: Signature, name: str
) -> Tensor:
    """Call the tower ``query`` or ``item`` of a network; return its vectors ``(rows, dim)``.

    A tower may also return them as ``(rows, 1, dim)``.
    """
    if signature.towers is None:
        raise ValueError("expected a signature with towers")
    called_as = "query" if signature.shares_tower else name
    returned = call_network(
        module.get_submodule(signature.towers.named()[name].module),
        tower_arguments(inputs, signature, name),
        signature.of_tower(called_as),
    )
    vectors: Tensor = row_vectors(returned)
    return vectors


def row_vectors(returned: Any) -> Any:
    """Convert what a tower returned from ``(rows, 1, dim)`` to vectors ``(rows, dim)``.

    A value of another type or shape is returned unchanged.
    """
    is_column = isinstance(returned, Tensor) and returned.dim() == 3 and returned.shape[1] == 1
    return returned.squeeze(1) if is_column else returned


def tower_arguments(
    inputs: Mapping[str, Value], signature: Signature, name: str
) -> dict[str, Value]:
    """Return the input tensors of a tower by the names under which the tower receives them.

    If both towers are one module, the tensors of the item tower get the names of the query tower's
    tensors, in the order of the inputs.

    Args:
        inputs: tensors or arrays by name; those of the tower's inputs are used.
        signature: signature of a model with two towers.
        name: ``query`` or ``item``.
    """
    called_as = "query" if signature.shares_tower else name
    return {
        argument: inputs[tensor]
        for argument, tensor in zip(
            _list_tensor_names(signature.of_tower(called_as)),
            _list_tensor_names(signature.of_tower(name)),
            strict=True,
        )
    }


def _list_tensor_names(signature: Signature) -> list[str]:
    """Return the names of all input tensors, in order."""
    return [name for item in signature.model_inputs for name in tensor_names(item)]


def scores_of(returned: Any, signature: Signature) -> Tensor:
    """Return the scores in what a network returned.

    Raises:
        TypeError, ValueError: the network's output is not what the signature declares.
    """
    tensors = output_tensors(returned, signature)
    if isinstance(returned, Tensor) and signature.has_several_outputs:
        return returned  # its columns need not be copied
    return join_columns(tensors)


def output_tensors(returned: Any, signature: Signature) -> tuple[Tensor, ...]:
    """Return the tensor ``(rows,)`` of each output in what a network returned.

    The only tensor of a network with one output is flattened, regardless of its shape, which
    ``smoke_test.py`` checks.

    Raises:
        TypeError: the network returned another type, such as None.
        ValueError: it returned another number of outputs than the signature has, an output that is
            not one value per row, or no output that the signature names.
    """
    names = [output.name for output in signature.outputs]
    if isinstance(returned, Tensor) and len(names) == 1:
        return (returned.reshape(-1),)
    if isinstance(returned, Tensor):
        if returned.dim() != 2 or returned.shape[1] != len(names):
            raise ValueError(f"expected (rows, {len(names)}), got {tuple(returned.shape)}")
        return returned.unbind(dim=1)
    if isinstance(returned, Mapping):
        if missing := [name for name in names if name not in returned]:
            raise ValueError(f"expected outputs {names}, got {list(returned)}: no {missing[0]!r}")
        tensors = [returned[name] for name in names]
    elif isinstance(returned, tuple | list):
        tensors = list(returned)
    else:
        raise TypeError(f"expected a tensor, tuple or mapping, got {type(returned).__name__}")
    if len(tensors) != len(names):
        raise ValueError(f"expected {len(names)} output(s), got {len(tensors)}")
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, Tensor) or tuple(tensor.shape[1:]) not in ((), (1,)):
            shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"expected one value per row in output {name!r}, got {shape}")
    return tuple(tensor.reshape(-1) for tensor in tensors)


def score_columns(scores: Tensor) -> tuple[Tensor, ...]:
    """Split scores ``(rows,)`` or ``(rows, outputs)`` into one tensor ``(rows,)`` per output."""
    return (scores,) if scores.dim() == 1 else scores.unbind(dim=1)


def join_columns(columns: Sequence[Tensor]) -> Tensor:
    """Join the tensors of the outputs, the inverse of ``score_columns``; one is unchanged."""
    return columns[0] if len(columns) == 1 else torch.stack(tuple(columns), dim=1)

"""Find the stored tensors that a graph of a model reads, and layers that affect no output."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from compressors.contracts import FORWARD
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import rows_of_tables
from compressors.core.scores import call_network, output_tensors
from compressors.lower.serving_wrapper import ServedGraph

ROWS = 2
"""Batch size of the generated inputs."""


def weights_of_graph(model: nn.Module, served_graph: ServedGraph) -> tuple[Tensor, ...]:
    """Return the stored tensors that a graph reads, each once.

    If the graph runs a submodule, these are all tensors of the submodule. A tower that is a method
    of the network shares the network with the other tower. So the method is called, and the result
    is the tensors that its operators receive.

    Args:
        model: the loaded network.
        served_graph: the graph.
    """
    part = served_graph.part(model)
    tensors = {id(tensor): tensor for tensor in part.state_dict(keep_vars=True).values()}
    if not served_graph.is_tower or served_graph.signature.method == FORWARD:
        return tuple(tensors.values())
    signature = served_graph.signature
    inputs = generate_inputs(signature, rows_of_tables(model, signature), ROWS)
    read = _ReadTensors()
    with torch.no_grad(), read:
        call_network(part, inputs, signature)
    return tuple(tensor for tensor in tensors.values() if tensor.data_ptr() in read.addresses)


def find_unused_layers(
    model: nn.Module, served_graph: ServedGraph, names: Iterable[str]
) -> tuple[str, ...]:
    """Return those of some dense layers on which no output of a graph depends.

    Some networks compute more than they return: in PLE (progressive layered extraction), for
    example, the gate of the shared experts in the last level. Such a layer is not in the graph. Its
    outputs are replaced by NaN here, and the outputs of the graph must not change.

    Args:
        model: the loaded network.
        served_graph: the graph.
        names: attribute paths of the dense layers in question.
    """
    part, signature = served_graph.part(model), served_graph.signature
    inputs = generate_inputs(signature, rows_of_tables(model, signature), ROWS)

    def compute_outputs() -> list[Tensor]:
        with torch.no_grad():
            returned = call_network(part, inputs, signature)
        scores = returned if served_graph.is_tower else output_tensors(returned, signature)
        return [leaf for leaf in tree_iter(scores) if isinstance(leaf, Tensor)]

    expected, unused = compute_outputs(), []
    for name in names:
        layer = model.get_submodule(name)
        with layer.register_forward_hook(lambda _, __, output: torch.full_like(output, torch.nan)):
            outputs = compute_outputs()
        if all(map(torch.equal, outputs, expected)):
            unused.append(name)
    return tuple(unused)


class _ReadTensors(TorchDispatchMode):
    """Records the memory addresses of the tensors that operators receive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.addresses: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        arguments = tree_iter((args, kwargs or {}))
        self.addresses |= {item.data_ptr() for item in arguments if isinstance(item, Tensor)}
        return func(*args, **(kwargs or {}))

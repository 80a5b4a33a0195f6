"""Find the stored tensors that a graph of a model reads."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from compressors.contracts import FORWARD
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import rows_of_tables
from compressors.core.scores import call_network
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

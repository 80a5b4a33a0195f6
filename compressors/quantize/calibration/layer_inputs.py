"""Capture the inputs of dense layers while a network runs on data."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.batches import batches
from compressors.core.scores import call_network
from compressors.core.units import Unit

BATCH = 1024
"""Rows per batch, for steps that have no setting for it."""

Receive = Callable[[Unit, Tensor], None]
"""Callback for each call of a layer: receives the layer and its input, float ``(*, in)``."""


@torch.no_grad()
def read_layer_inputs(
    module: nn.Module,
    layers: Collection[Unit],
    rows: Split,
    signature: Signature,
    *,
    batch: int,
    limit: int,
    receive: Receive,
) -> None:
    """Run a network on some rows and pass the inputs of its layers to a callback.

    Args:
        module: the network in evaluation mode; it is not changed.
        layers: dense layers of the module.
        rows: data of which the first ``limit`` rows are read.
        signature: inputs of the network.
        batch: rows per batch.
        limit: largest number of rows that are read.
        receive: called with the layer and its inputs, once for each call of a layer.
    """

    def hook_of(unit: Unit) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            receive(unit, (args[0] if args else named["input"]).detach())

        return hook

    handles = [
        unit.module.register_forward_pre_hook(hook_of(unit), with_kwargs=True) for unit in layers
    ]
    try:
        for row_batch in batches(rows, signature, batch, limit):
            call_network(module, row_batch.inputs, signature)
    finally:
        for handle in handles:
            handle.remove()


def input_vectors(inputs: Tensor) -> Tensor:
    """Reshape inputs ``(*, in)`` to ``(vectors, in)``: each position of a sequence is a vector."""
    return inputs.reshape(-1, inputs.shape[-1])

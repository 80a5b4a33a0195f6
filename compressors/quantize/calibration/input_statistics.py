"""What dense layers are given on calibration rows."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.batches import batches
from compressors.core.units import Unit

See = Callable[[Unit, Tensor], None]
"""Told which layer it was, and its input float ``(*, in)``."""


@torch.no_grad()
def observe(
    module: nn.Module,
    layers: Collection[Unit],
    rows: Split,
    signature: Signature,
    *,
    batch: int,
    limit: int,
    see: See,
) -> None:
    """Run a network on some rows and look at what its layers read, batch by batch.

    Args:
        module: in evaluation mode; left as it is.
        layers: of the module.
        rows: the first ``limit`` of them are read.
        signature: inputs of the network.
        batch: rows of one run.
        limit: rows in all.
        see: called once for each call of a layer; nothing is kept for it.
    """

    def watch(unit: Unit) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            see(unit, (args[0] if args else named["input"]).detach())

        return hook

    handles = [
        unit.module.register_forward_pre_hook(watch(unit), with_kwargs=True) for unit in layers
    ]
    try:
        for part in batches(rows, signature, batch, limit):
            module(**part.inputs)
    finally:
        for handle in handles:
            handle.remove()

"""What dense layers see on rows of data: looked at in one pass, held as small sums."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.batches import batches
from compressors.core.units import Unit
from compressors.errors.compression import CompressionError

Look = Callable[[str, Tensor], None]
"""Takes a layer's name and some of its inputs, float32 ``(rows, in)``."""


def look_at_inputs(
    module: nn.Module,
    layers: Collection[Unit],
    rows: Split,
    signature: Signature,
    batch: int,
    most: int,
    look: Look,
) -> None:
    """Run a network on rows of data and look at what its dense layers are given.

    Args:
        module: in evaluation mode; left as it is.
        layers: those looked at.
        rows: a prepared split.
        signature: of its columns.
        batch: rows of one run.
        most: rows of the split that are read, at most.
        look: called at every run of a layer; a layer of lists has more than ``batch`` inputs.
    """

    def hook(name: str) -> Any:
        def seen(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = args[0] if args else named["input"]
            look(name, x.detach().float().reshape(-1, x.shape[-1]))

        return seen

    handles = [
        unit.module.register_forward_pre_hook(hook(unit.name), with_kwargs=True) for unit in layers
    ]
    try:
        with torch.no_grad():
            for each in batches(rows, signature, batch, most):
                module(**each.inputs)
    finally:
        for handle in handles:
            handle.remove()


def grams(
    module: nn.Module,
    layers: Collection[Unit],
    rows: Split,
    signature: Signature,
    batch: int,
    most: int,
) -> dict[str, Tensor]:
    """``x.T @ x`` over all inputs of every layer: float64 ``(in, in)``, by the layer's name.

    With it ``trace(d @ gram @ d.T)`` is the squared error of a layer's outputs, summed over rows
    and channels, where its weight ``(out, in)`` is off by ``d``.

    Args:
        module: see ``look_at_inputs``, as for all others.
        layers: those looked at.
        rows: a prepared split.
        signature: of its columns.
        batch: rows of one run.
        most: rows that are read, at most.

    Raises:
        CompressionError: a layer never ran, or saw nothing but zeros.
    """
    found: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        wide = x.double()
        found[name] = found.get(name, torch.zeros((), dtype=torch.float64)) + wide.T @ wide

    look_at_inputs(module, layers, rows, signature, batch, most, add)
    for unit in layers:
        if unit.name not in found or not bool(found[unit.name].any()):
            raise CompressionError(
                f"Dense layer {unit.name!r} saw no input but zeros on the calibration rows, so "
                f"what its weights do there is unknown. Leave it out of 'layers'."
            )
    return found


def squared_error(off: Tensor, gram: Tensor) -> Tensor:
    """What weights that are off by ``(out, in)`` change of each output: float64 ``(out,)``.

    Squared and summed over the rows that a gram matrix ``(in, in)`` is of.
    """
    wide = off.double()
    return (wide @ gram * wide).sum(dim=1).clamp(min=0)

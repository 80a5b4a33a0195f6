"""Second moments of the inputs of dense layers, and the output error that they imply."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.units import Unit
from compressors.errors.steps import StepRefused
from compressors.quantize.calibration.layer_inputs import input_vectors, read_layer_inputs


def grams(
    module: nn.Module,
    layers: Collection[Unit],
    rows: Split,
    signature: Signature,
    batch: int,
    most: int,
) -> dict[str, Tensor]:
    """Compute ``x.T @ x`` over the inputs of every layer: float64 ``(in, in)``, by layer name.

    ``trace(d @ gram @ d.T)`` is the squared error of a layer's outputs, summed over rows and
    channels, if its weight ``(out, in)`` changes by ``d``.

    Args:
        module: the network in evaluation mode; it is not changed.
        layers: dense layers of the module.
        rows: data of which the first ``most`` rows are read.
        signature: inputs of the network.
        batch: rows per batch.
        most: largest number of rows that are read.

    Raises:
        CompressionError: a layer never ran, or all its inputs are zero.
    """
    result: dict[str, Tensor] = {}

    def add(unit: Unit, x: Tensor) -> None:
        wide = input_vectors(x).float().double()
        sums = result.get(unit.name, torch.zeros((), dtype=torch.float64))
        result[unit.name] = sums + wide.T @ wide

    read_layer_inputs(module, layers, rows, signature, batch=batch, limit=most, receive=add)
    for unit in layers:
        if unit.name not in result or not bool(result[unit.name].any()):
            raise StepRefused("layer_inputs_zero", layer=unit.name)
    return result


def squared_error(off: Tensor, gram: Tensor) -> Tensor:
    """Squared error of each output for a change ``(out, in)`` of the weights: float64 ``(out,)``.

    It is summed over the rows of which ``gram`` ``(in, in)`` is the Gram matrix.
    """
    wide = off.double()
    return (wide @ gram * wide).sum(dim=1).clamp(min=0)

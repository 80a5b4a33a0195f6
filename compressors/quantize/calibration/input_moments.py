"""Gram matrices of the inputs of dense layers, and the output errors computed from them."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.core.units import Unit
from compressors.errors.steps import StepRefused
from compressors.quantize.calibration.layer_inputs import input_vectors, read_layer_inputs


def gram_matrices(
    module: nn.Module,
    layers: Collection[Unit],
    rows: Split,
    signature: Signature,
    batch: int,
    max_rows: int,
) -> dict[str, Tensor]:
    """Compute ``x.T @ x`` over the inputs of every layer: float64 ``(in, in)``, by layer name.

    ``trace(d @ gram @ d.T)`` is the squared error of a layer's outputs, summed over rows and
    channels, if its weight ``(out, in)`` changes by ``d``.

    Args:
        module: the network in evaluation mode; it is not changed.
        layers: dense layers of the module.
        rows: the data; its first ``max_rows`` rows are read.
        signature: inputs of the network.
        batch: rows per batch.
        max_rows: largest number of rows that are read.

    Raises:
        StepRefused: a layer never ran, or all its inputs are zero.
    """
    result: dict[str, Tensor] = {}

    def add(unit: Unit, x: Tensor) -> None:
        vectors = input_vectors(x).float().double()
        gram = result.get(unit.name, torch.zeros((), dtype=torch.float64))
        result[unit.name] = gram + vectors.T @ vectors

    read_layer_inputs(module, layers, rows, signature, batch=batch, limit=max_rows, receive=add)
    for unit in layers:
        if unit.name not in result or not bool(result[unit.name].any()):
            raise StepRefused("layer_inputs_zero", layer=unit.name)
    return result


def squared_error(change: Tensor, gram: Tensor) -> Tensor:
    """Return the squared error of each output after a change of the weights, summed over rows.

    Args:
        change: change of the weights, ``(out, in)``.
        gram: Gram matrix of the layer's inputs, ``x.T @ x`` over the rows, ``(in, in)``.

    Returns:
        float64 ``(out,)``.
    """
    change = change.double()
    return (change @ gram * change).sum(dim=1).clamp(min=0)

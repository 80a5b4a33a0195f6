"""Tensors that have a shape and no weight of their own: what a prediction is made with.

A placeholder is one zero, expanded to a whole tensor. A network over placeholders runs and its
bytes can be counted, but no weight is read, trained or kept in memory.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressors.core.model import Model
from compressors.core.modules.formats import (
    LinearFormat,
    PackedLinear,
    PackedTable,
    TableFormat,
    TensorSpec,
)
from compressors.core.units import Choice, Unit, pack_table, swap
from compressors.errors.steps import StepRefused


def placeholder(spec: TensorSpec) -> Tensor:
    """One number, zero for most, in the shape of a tensor."""
    return torch.full((), spec.first, dtype=spec.dtype).expand(spec.shape)


def is_placeholder(tensor: Tensor) -> bool:
    """Whether a tensor is one number seen as many: its values say nothing."""
    return tensor.numel() > 1 and not any(tensor.stride())


def with_placeholders(module: nn.Module) -> nn.Module:
    """Replace parameters that were built without weights (on the meta device)."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.is_meta:
                zero = placeholder(TensorSpec(tuple(parameter.shape), parameter.dtype))
                setattr(part, name, nn.Parameter(zero, requires_grad=False))
    return module


def dry_run_packed(
    model: Model,
    choices: Mapping[str, Choice],
    *,
    table: TableFormat | None = None,
    linear: LinearFormat | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """The model with every chosen unit in another format, over placeholders.

    Args:
        model: of a private tree; its units are replaced.
        choices: by unit; what is not named stays.
        table: the format of tables.
        linear: the format of dense layers.
        settings: of the format.
    """
    for unit in Unit.of(model.module):
        if unit.name not in choices or not choices[unit.name].take:
            continue
        first, second = unit.weight.shape  # (rows, dim) or (out, in)
        if unit.role == "table" and table is not None:
            laid = table.layout(first, second, settings or {})
            stored = {name: placeholder(spec) for name, spec in laid.items()}
            packed = PackedTable(table, first, second, settings or {}, stored)
            swap(model.module, unit.name, pack_table(unit.module, packed))
        elif unit.role == "dense" and linear is not None:
            bias = unit.bias is not None
            laid = linear.layout(second, first, settings or {}, bias=bias)
            stored = {name: placeholder(spec) for name, spec in laid.items()}
            layer = PackedLinear(linear, second, first, bias=bias, settings=settings, stored=stored)
            swap(model.module, unit.name, layer)
        else:
            raise StepRefused("format_missing", role=unit.role, unit=unit.name)
    return model

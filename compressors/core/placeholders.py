"""Placeholders: tensors of full shape that take almost no memory, for dry runs of a recipe.

A placeholder is one number, in most cases zero, expanded to the shape of a tensor. A network of
placeholders runs and its bytes can be counted, but no weight is read, trained or allocated.
"""

from collections.abc import Iterable, Mapping
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
from compressors.core.units import Unit, pack_table, swap
from compressors.errors.steps import StepRefused


def placeholder(spec: TensorSpec) -> Tensor:
    """Return a tensor of ``spec.shape`` that stores one number: ``spec.first``, its fill value."""
    return torch.full((), spec.first, dtype=spec.dtype).expand(spec.shape)


def is_placeholder(tensor: Tensor) -> bool:
    """Return whether a tensor with several entries stores only one number (its strides are 0)."""
    return tensor.numel() > 1 and not any(tensor.stride())


def insert_placeholders(module: nn.Module) -> nn.Module:
    """Replace a module's parameters on the meta device by placeholders, and return the module."""
    for submodule in module.modules():
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            if parameter.is_meta:
                zero = placeholder(TensorSpec(tuple(parameter.shape), parameter.dtype))
                setattr(submodule, name, nn.Parameter(zero, requires_grad=False))
    return module


def dry_run_packed(
    model: Model,
    units: Iterable[Unit],
    *,
    table: TableFormat | None = None,
    linear: LinearFormat | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """Replace units by packed (compressed) ones of placeholders, and return the model.

    Args:
        model: a copy that may be changed; its units are replaced in place.
        units: the units of the model to replace.
        table: the new format of tables.
        linear: the new format of dense layers.
        settings: settings of the format, such as a block size, from which its ``layout`` computes
            the shapes of the stored tensors.

    Raises:
        StepRefused: a unit has a role for which no format is given.
    """
    for unit in units:
        rows, columns = unit.weight.shape  # (rows, dim) of a table, (out, in) of a layer
        if unit.role == "table" and table is not None:
            layout = table.layout(rows, columns, settings or {})
            stored = {name: placeholder(spec) for name, spec in layout.items()}
            packed = PackedTable(table, rows, columns, settings or {}, stored)
            swap(model.module, unit.name, pack_table(unit.module, packed))
        elif unit.role == "dense" and linear is not None:
            bias = unit.bias is not None
            layout = linear.layout(columns, rows, settings or {}, bias=bias)
            stored = {name: placeholder(spec) for name, spec in layout.items()}
            layer = PackedLinear(linear, columns, rows, bias=bias, settings=settings, stored=stored)
            swap(model.module, unit.name, layer)
        else:
            raise StepRefused("format_missing", role=unit.role, unit=unit.name)
    return model

"""Find the inputs of dense layers that are rows of int8 tables with one scale.

If a layer rounds such an input by the scale of its table, the result is the table's code. So the
weight is rounded once, and a graph can pass the code to the layer directly
(``compressors/lower/lookups/codes_into_layers.py``).
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, fx, nn

from compressors.contracts import Bench, Signature
from compressors.core.modules.formats import PackedLinear, PackedTable
from compressors.core.units import Unit
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.lower.lookups.find_lookups import find_lookups
from compressors.lower.lookups.layout import Labels
from compressors.lower.lookups.merged_scales import has_one_scale
from compressors.lower.lookups.program_editor import row_shape, shape_of
from compressors.quantize.calibration.calibrators import LEVELS
from compressors.quantize.calibration.layer_inputs import input_vectors, read_layer_inputs
from compressors.quantize.dense.calibrated import CalibratedLayer, squared_error
from compressors.rewrite.dataflow import export_graphs, find_called_modules, find_owners


def find_table_scales(module: nn.Module, signature: Signature) -> dict[str, Tensor]:
    """Return the scale of each input channel of the dense layers that read int8 tables.

    Args:
        module: the network in evaluation mode; it is not changed.
        signature: its inputs.

    Returns:
        Float32 ``(in,)`` by layer name: the scale of the table from which the channel comes in
        every call of the layer; NaN if there is no such table. Layers that read no such table are
        left out.

    Raises:
        StepRefused: ``torch.export`` cannot trace the network.
    """
    tables = [
        part for part in module.modules() if isinstance(part, PackedTable) and has_one_scale(part)
    ]
    if not tables:
        return {}
    owners = find_owners(module)
    scales = [table.get_buffer("scale").float().reshape(()) for table in tables]
    sources: dict[str, Tensor] = {}  # by layer, the number of each channel's table
    for graph, stored in export_graphs(module, signature, functional=True):
        numbers: dict[fx.Node, Tensor] = {}
        for lookup in find_lookups(graph, stored, module):
            shape = row_shape(lookup.node)
            if shape and any(lookup.table is table for table in tables):
                number = [lookup.table is table for table in tables].index(True)
                numbers[lookup.node] = torch.full((1, *shape), float(number))
        labels = Labels(numbers.get, lambda shape: torch.full(shape, torch.nan))
        called = find_called_modules(
            graph, {node: owners.get(key, set()) for node, key in stored.items()}
        )
        for node, name in called.items():
            source, weight = node.args[0], node.args[1]
            if node.target is not torch.ops.aten.linear.default:
                continue
            assert isinstance(source, fx.Node)  # noqa: S101 - arguments of a linear operator
            assert isinstance(weight, fx.Node)  # noqa: S101
            found = labels.of(source)
            if found is None:  # rows cannot be followed to the layer
                found = torch.full((1, shape_of(weight)[1]), torch.nan)
            vectors = found.reshape(-1, found.shape[-1])  # one per position of a row
            by_channel = torch.where((vectors == vectors[0]).all(dim=0), vectors[0], torch.nan)
            earlier = sources.get(name, by_channel)
            sources[name] = torch.where(earlier == by_channel, by_channel, torch.nan)
    by_number = torch.stack([*scales, torch.tensor(torch.nan)])  # the last one for no table
    return {
        name: by_number[torch.nan_to_num(numbers_of_channels, nan=len(scales)).long()]
        for name, numbers_of_channels in sources.items()
        if not bool(numbers_of_channels.isnan().all())
    }


def calibrate_table_layers(
    module: nn.Module,
    layers: Collection[Unit],
    table_scales: Mapping[str, Tensor],
    bench: Bench,
    pack: Callable[[nn.Linear, Tensor], PackedLinear],
    *,
    rows: int,
    batch: int,
    measure_error: bool,
) -> dict[str, CalibratedLayer]:
    """Quantize layers that read tables; other inputs get one scale for each channel.

    Args:
        module: the network in evaluation mode; it is not changed.
        layers: the layers to replace, each an ``nn.Linear``.
        table_scales: the result of ``find_table_scales``.
        bench: provides the calibration rows.
        pack: builds a layer; the arguments are the float32 layer and its input scales, ``(in,)``.
        rows: largest number of rows that are read.
        batch: rows per batch.
        measure_error: measure the output error, on a second pass.

    Returns:
        By layer name, the quantized layer. A layer that is not called on the rows is left out.

    Raises:
        RowsMissing: there are no calibration rows.
        StepRefused: some inputs of a layer are not finite.
    """
    if not layers:
        return {}
    split = bench.calibration
    if split is None:
        raise RowsMissing("input_scales_need_rows")

    def read(receive: Callable[[Unit, Tensor], None]) -> None:
        read_layer_inputs(
            module, layers, split, bench.signature, batch=batch, limit=rows, receive=receive
        )

    largest: dict[str, Tensor] = {}

    def record(unit: Unit, x: Tensor) -> None:
        vectors = input_vectors(x)
        if len(vectors):
            maxima = vectors.abs().amax(dim=0)
            largest[unit.name] = torch.maximum(maxima, largest.get(unit.name, maxima))

    read(record)
    packed: dict[str, PackedLinear] = {}
    linears: dict[str, nn.Linear] = {}
    for unit in layers:
        if unit.name not in largest or not isinstance(unit.module, nn.Linear):
            continue
        if not bool(torch.isfinite(largest[unit.name]).all()):
            value = float(largest[unit.name].max())
            raise StepRefused("layer_inputs_not_finite", layer=unit.name, value=value)
        calibrated = largest[unit.name].float() / LEVELS
        known = table_scales[unit.name]
        scale = torch.where(known.isnan(), calibrated, known)
        # An input that is always zero may have any scale.
        scale = torch.where(scale > torch.finfo(torch.float32).tiny, scale, 1.0)
        linears[unit.name] = unit.module
        packed[unit.name] = pack(unit.module, scale)
    errors = dict.fromkeys(packed, 0.0)
    outputs = dict.fromkeys(packed, 0.0)

    def compare(unit: Unit, x: Tensor) -> None:
        if unit.name in packed:
            error, output = squared_error(linears[unit.name], packed[unit.name], x)
            errors[unit.name] += error
            outputs[unit.name] += output

    if measure_error:
        read(compare)
    return {
        name: CalibratedLayer(
            layer,
            "min_max",
            ((errors[name] / outputs[name]) ** 0.5 if outputs[name] else 0.0)
            if measure_error
            else None,
        )
        for name, layer in packed.items()
    }

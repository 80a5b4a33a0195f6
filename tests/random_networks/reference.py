"""A reference for a compressed network: the original modules with decoded weights.

Every packed or composed table is replaced by its original class (``nn.Embedding``,
``nn.EmbeddingBag``) with decoded weights, and every factored layer by an ``nn.Linear``. A packed
dense layer, which may quantize its inputs, is replaced by an independent implementation of the
format's documented arithmetic.

Packed modules store their weights in a compressed format, a composed table consists of smaller
tables, and a factored layer is a product of two matrices. ``private_copy`` copies modules and
shares their tensors. A ``Bag`` pools rows of a packed table, and a ``TiedHead`` is a dense layer
whose weight is a table. Codes are the stored integers, or the bits of 8-bit floats.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.core.modules.composed import ComposedTable
from compressors.core.modules.factored import FactoredLinear
from compressors.core.modules.formats import Bag, PackedLinear, PackedTable
from compressors.core.modules.table_weight import TiedHead
from compressors.core.units import private_copy
from compressors.quantize.dense.weight_only import LayoutSettings

# Largest root mean square error of a decoded table or layer, as a share of its root mean square.
# Formats whose error an outlier row or a large bias can dominate have no limit.
MAX_DECODED_ERROR = {
    "rowwise_int8": 0.3,
    "rowwise_int4": 0.95,
    "float8_e4m3": 0.06,
    "bfloat16": 0.004,
    "float16": 0.002,
    "weight_int8": 0.06,
    "weight_int4": 0.6,
    "float8_dense": 0.06,
}


class QuantizedInputLinear(nn.Module):
    """A dense layer with decoded weights; quantizes its inputs if its format documents that."""

    def __init__(self, layer: PackedLinear) -> None:
        super().__init__()
        stored = {name: value.detach().clone() for name, value in layer.named_buffers()}
        self.layer, self.stored, self.format_name = layer, stored, layer.storage.name
        self.weight = decode_layer(layer)
        self.bias = stored["bias"].float() if "bias" in stored else None
        if self.format_name == "static_int8":
            # The format rounds the bias to a multiple of the weight scale times the input scale.
            # With a scale for each input, the weights contain the input scales.
            input_scale = stored["input_scale"] if stored["input_scale"].ndim == 0 else 1.0
            bias_scale = stored["weight_scale"] * input_scale
            self.bias = torch.round(self.bias / bias_scale) * bias_scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self._quantize(x), self.weight, self.bias)

    def _quantize(self, x: Tensor) -> Tensor:
        if self.format_name == "static_int8":
            scale = self.stored["input_scale"]
            return torch.clamp(torch.round(x / scale), -128, 127) * scale
        if self.format_name == "float8_dense":
            scale = self.stored["input_scale"]
            return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        if self.format_name in ("weight_int8", "weight_int4"):
            layout = LayoutSettings.from_settings(self.layer.settings)
            if layout.activations == "int8":
                return _quantize_blocks(x, self._block_width(layout.block))
        return x

    def _block_width(self, block: int) -> int:
        """Return the number of inputs that are quantized with one scale.

        Without blocks of weights (``block`` 0), it is the largest of 128, 64, 32 and 16 that
        divides the padded number of inputs.
        """
        if block:
            return block
        length = -(-self.layer.in_features // 16) * 16
        return next(width for width in (128, 64, 32, 16) if length % width == 0)


def _quantize_blocks(x: Tensor, width: int) -> Tensor:
    blocks = [x[..., start : start + width] for start in range(0, x.shape[-1], width)]
    rounded = []
    for block in blocks:
        largest = block.abs().amax(dim=-1, keepdim=True)
        inverse_scale = torch.where(largest > 1e-36, 127 / largest, torch.zeros_like(largest))
        rounded.append(torch.round(block * inverse_scale) * (largest / 127))
    return torch.cat(rounded, dim=-1)


@torch.no_grad()
def decode_table(table: nn.Module, rows: int) -> Tensor:
    """Return all rows of a packed or composed table, float32 ``(rows, dim)``."""
    weight: Tensor = table(torch.arange(rows))
    return weight


@torch.no_grad()
def decode_layer(layer: nn.Module) -> Tensor:
    """Return the weight ``(out, in)`` of a packed layer.

    If the layer quantizes its inputs, the weight is decoded from the stored tensors; otherwise it
    is the layer's output for unit vectors.
    """
    if isinstance(layer, PackedLinear) and layer.storage.name in ("static_int8", "float8_dense"):
        codes = layer.get_buffer("codes")
        if layer.storage.name == "float8_dense":
            codes = codes.view(torch.float8_e4m3fn)
        weight = codes.float() * layer.get_buffer("weight_scale").reshape(-1, 1)
        # With a scale for each input, the stored weights are multiplied by it.
        by_input = layer.settings.get("input_scales") == "channel"
        return weight / layer.get_buffer("input_scale") if by_input else weight
    if isinstance(layer, FactoredLinear):
        # Outputs for unit vectors would lose digits of a weight that is smaller than its bias.
        return decode_layer(layer.expand) @ decode_layer(layer.reduce)
    if isinstance(layer, nn.Linear):
        return layer.weight
    inputs = layer.in_features
    bias = layer(torch.zeros(1, inputs))
    weight: Tensor = (layer(torch.eye(inputs)) - bias).T
    return weight


PACKED = (Bag, PackedTable, ComposedTable, PackedLinear, FactoredLinear)
"""Modules of compressed units."""


def decode_network(packed: nn.Module, plain: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return a copy of ``plain`` with the decoded weights of ``packed``.

    Args:
        packed: the compressed network.
        plain: the network before compression.

    Returns:
        The copy, and one message for each unit whose decoding error exceeds its limit.
    """
    reference, faults = private_copy(plain).eval(), []
    _copy_other_tensors(packed, reference)
    modules = dict(packed.named_modules())
    replaced: set[str] = set()
    for name, module in modules.items():
        if any(name.startswith(f"{owner}.") for owner in replaced):
            continue
        table = module.table if isinstance(module, Bag) else module
        if isinstance(table, PackedTable | ComposedTable):
            replaced.add(name)
            old = reference.get_submodule(name)
            weight = decode_table(table, table.rows)
            if isinstance(table, PackedTable):
                faults += _error_over_limit(name, table.storage.name, old.weight.detach(), weight)
            old.weight = nn.Parameter(weight, requires_grad=False)
        elif isinstance(module, TiedHead):
            table = module.table.table if isinstance(module.table, Bag) else module.table
            if isinstance(table, PackedTable | ComposedTable):
                weight = decode_table(table, table.rows)
                head = reference.get_submodule(name)
                head.weight = nn.Parameter(weight, requires_grad=False)
        elif isinstance(module, PackedLinear | FactoredLinear):
            replaced.add(name)
            old = reference.get_submodule(name)
            if isinstance(module, PackedLinear):
                new: nn.Module = QuantizedInputLinear(module)
                format_name = module.storage.name
                faults += _error_over_limit(name, format_name, old.weight.detach(), new.weight)
            else:
                new = nn.Linear(module.in_features, module.out_features)
                new.weight = nn.Parameter(decode_layer(module), requires_grad=False)
                zero = torch.zeros(1, module.in_features)
                new.bias = nn.Parameter(module(zero)[0].detach(), requires_grad=False)
            _replace(reference, old, new)
    return reference.eval(), faults


def _copy_other_tensors(packed: nn.Module, reference: nn.Module) -> None:
    """Copy tensors outside of packed units, such as norms that a training step changed too."""
    state = packed.state_dict(keep_vars=True)
    units = [name for name, module in packed.named_modules() if isinstance(module, PACKED)]
    for name, owner in reference.named_modules():
        if any(name == unit or name.startswith(f"{unit}.") for unit in units):
            continue
        for kind in (owner._parameters, owner._buffers):
            for key, value in list(kind.items()):
                new = state.get(f"{name}.{key}" if name else key)
                if value is not None and new is not None and new.shape == value.shape:
                    is_parameter = isinstance(value, nn.Parameter)
                    new = new.detach()
                    kind[key] = nn.Parameter(new, requires_grad=False) if is_parameter else new


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(network.modules()):
        for key, child in list(parent._modules.items()):
            if child is old:
                parent._modules[key] = new


def _error_over_limit(name: str, format_name: str, weight: Tensor, decoded: Tensor) -> list[str]:
    limit = MAX_DECODED_ERROR.get(format_name)
    size = float(weight.square().mean().sqrt())
    error = float((decoded - weight).square().mean().sqrt())
    if limit is None or error <= limit * size + 1e-7:
        return []
    ratio = error / max(size, 1e-30)
    return [f"{name} decoded from {format_name} differs by {ratio:.2g} of its size"]

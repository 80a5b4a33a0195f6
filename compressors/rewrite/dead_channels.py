"""Detect dead channels, fold their constant output into the next layers, and remove them.

A channel is dead if its output is the same for every input, or if all weights that are applied to
it are zero. A row of zeros in the weight that computes it proves that its output is constant: only
the bias remains. Optionally, a channel that is constant on all calibration rows, such as a Relu
that is never active, also counts as dead. That is not a proof, so removing it may change
predictions.

A *width* is a number in the network's configuration that sets the number of channels of one or more
layers (``prune/structure/config_widths.py``). Its *producers* are the dense layers that output
these channels, its *consumers* the layers and norms that take them as inputs.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.batches import batches, change_columns, dense_columns
from compressors.core.model import Model
from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import call_network
from compressors.core.units import replace_parameter, table_rows
from compressors.errors.steps import StepRefused
from compressors.errors.widths import NotAWidth
from compressors.prune.structure.channel_consumers import (
    WidthConsumers,
    channel_layouts,
    find_consumers,
    trace,
)
from compressors.prune.structure.config_widths import Width, find_widths
from compressors.prune.structure.narrowing import (
    SCALES,
    WidthCut,
    remove_channels,
    require_narrowable,
)

EXAMPLE_ROWS = 256  # synthetic rows for each factor of dense inputs in ``SCALES``
BATCH = 1024  # calibration rows of one batch

Sample = tuple[Split, int]
"""Calibration rows, and the largest number of them to read."""


@dataclass(frozen=True)
class DeadChannels:
    """The dead channels of one width.

    Attributes:
        cut: the width to reduce.
        kept_channels: by producer, which channels are not removed: bool ``(channels,)``.
        offsets: by dense consumer, the constant that the removed channels add to each of its
            outputs, float64 ``(outputs,)``.
    """

    cut: WidthCut
    kept_channels: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]

    def reasons(self, step: str) -> dict[str, Reason]:
        """Return the reason for the plan line of each dense layer that becomes smaller, by name."""
        width = self.cut.width
        dead = Reason(
            "dead_channels",
            step=step,
            count=width.value - self.cut.count,  # ``cut.count`` channels remain
            channels=width.value,
            width=width.description(),
        )
        result = dict.fromkeys(width.producers, dead)
        for producer, consumer in self.cut.consumers.connections:
            if consumer in self.offsets:
                result.setdefault(consumer, Reason("dead_inputs", step=step, producers=(producer,)))
        return result


def find_dead_channels(
    model: Model, signature: Signature, changeable_layers: Collection[str], sample: Sample | None
) -> tuple[DeadChannels, ...]:
    """Find the dead channels that can be removed.

    Args:
        model: the network; it is not changed.
        signature: describes its inputs.
        changeable_layers: names of the dense layers that may change.
        sample: calibration rows; a channel that is constant on them counts as dead. If None, a
            channel is dead only if the weights prove it.
    """
    widths, _ = find_widths(model)
    result = []
    for width in widths.values():
        if max(width.producers.values()) > 1:  # groups of channels (heads) are not searched
            continue
        layers = {*width.producers, *_list_dense_layers(model.module, width.consumers)}
        if not layers <= set(changeable_layers) or not (
            sample or _may_have_dead_channels(model.module, width)
        ):
            continue
        try:
            traces = trace(model.module, signature, table_rows(model.module), width)
            layout = next(channel_layouts(width))  # the only one: each channel is a group
            consumers = find_consumers(width, traces, layout)
            dead = _find_dead_channels(model, signature, consumers, sample)
            if dead is not None:
                require_narrowable(model, signature, dead.cut)
                result.append(dead)
        except NotAWidth:
            continue  # the width cannot be reduced, so its dead channels stay
    return tuple(result)


def remove_dead_channels(
    model: Model, signature: Signature, dead_channels: Sequence[DeadChannels]
) -> Model:
    """Remove dead channels and add their constants to biases; ``model`` is changed in place.

    Args:
        model: a private copy: it may share tensors, which are replaced instead of changed.
        signature: describes its inputs.
        dead_channels: the dead channels of each width.

    Raises:
        StepRefused: the scores of the narrower network differ from those of the old one.
    """
    if not dead_channels:
        return model
    kept_channels: dict[str, Tensor] = {}
    for dead in dead_channels:
        kept_channels |= dead.kept_channels
        for name, offset in dead.offsets.items():
            layer = model.module.get_submodule(name)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                bias = layer.bias.detach().double() + offset
                replace_parameter(layer, "bias", bias.to(layer.bias.dtype))
    cuts = [dead.cut for dead in dead_channels]
    narrower, gap = remove_channels(model, signature, cuts, kept_channels)
    if gap is not None:
        raise StepRefused("channels_read_elsewhere", gap=gap, layers=tuple(sorted(kept_channels)))
    return narrower


def _may_have_dead_channels(module: nn.Module, width: Width) -> bool:
    """Whether a width has rows or columns of zeros: a fast check, because tracing is slow."""
    producers = [_get_linear_weight(module, name) for name in width.producers]
    consumers = [
        _get_linear_weight(module, name) for name in _list_dense_layers(module, width.consumers)
    ]
    has_zero_row = any(not bool(weight.any(dim=1).all()) for weight in producers)
    return has_zero_row or any(not bool(weight.any(dim=0).all()) for weight in consumers)


def _find_dead_channels(
    model: Model, signature: Signature, consumers: WidthConsumers, sample: Sample | None
) -> DeadChannels | None:
    """Find the dead channels of one width; None if there are none.

    Producers whose outputs are combined element by element are *tied*: they lose the same channels.
    All producers of the width lose the same number of channels.
    """
    module, width = model.module, consumers.width
    consumer_names = dict.fromkeys(consumer for _, consumer in consumers.connections)
    dense_consumers = _list_dense_layers(module, consumer_names)
    low, high = _measure_input_ranges(model, signature, dense_consumers, sample)
    # By consumer, the value of each constant input, 0 for other inputs: (inputs,).
    value = {name: torch.where(low[name] == high[name], low[name], 0.0) for name in dense_consumers}
    removable: dict[tuple[str, ...], Tensor] = {}
    for tied in consumers.tied_producers:
        is_constant = torch.ones(width.value, dtype=torch.bool)
        is_unread = torch.ones(width.value, dtype=torch.bool)
        for producer in tied:
            if sample is None:
                is_constant &= ~_get_linear_weight(module, producer).any(dim=1)
            for name in dense_consumers:
                columns = consumers.connections.get((producer, name))  # (channels, inputs)
                if columns is None:
                    continue
                weight = _get_linear_weight(module, name)
                is_constant &= ~(columns & (low[name] != high[name])).any(dim=1)
                is_unread &= ~(columns & weight.any(dim=0)).any(dim=1)
                if module.get_submodule(name).bias is None:
                    # Without a bias, a constant other than 0 cannot be added to the output.
                    needs_bias = weight.any(dim=0) & (value[name] != 0)
                    is_constant &= ~(columns & needs_bias).any(dim=1)
        removable[tied] = is_constant | is_unread
    # All producers lose the same number, so the one with the fewest dead channels limits it. At
    # least one channel must stay, even if it is dead.
    removed_count = min(int(dead.sum()) for dead in removable.values())
    removed_count = min(removed_count, width.value - 1)
    if removed_count == 0:
        return None
    kept_channels = {}
    for tied, dead in removable.items():
        mask = torch.ones(width.value, dtype=torch.bool)
        mask[dead.nonzero().flatten()[:removed_count]] = False
        kept_channels.update(dict.fromkeys(tied, mask))
    offsets = {}
    for name in dense_consumers:
        removed_inputs = [
            columns[~kept_channels[producer]].any(dim=0)
            for (producer, consumer), columns in consumers.connections.items()
            if consumer == name
        ]
        removed = torch.stack(removed_inputs).any(dim=0)  # (inputs,)
        offsets[name] = (
            _get_linear_weight(module, name)[:, removed].double() @ value[name][removed].double()
        )
    cut = WidthCut(width, consumers, width.value - removed_count)
    return DeadChannels(cut, kept_channels, offsets)


def _measure_input_ranges(
    model: Model, signature: Signature, names: Sequence[str], sample: Sample | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the smallest and the largest value of each input of some dense layers.

    Args:
        model: the network; it is not changed.
        signature: describes its inputs.
        names: names of the layers.
        sample: calibration rows; if None, synthetic rows are used.

    Returns:
        By layer name, float ``(inputs,)`` each.
    """
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = args[0] if args else named["input"]
            flat = x.reshape(-1, x.shape[-1])
            if len(flat):
                smallest, largest = flat.amin(dim=0), flat.amax(dim=0)
                low[name] = torch.minimum(low[name], smallest) if name in low else smallest
                high[name] = torch.maximum(high[name], largest) if name in high else largest

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            part = model.module.get_submodule(name)
            hooks.callback(part.register_forward_pre_hook(record(name), with_kwargs=True).remove)
        for inputs in _iterate_input_batches(model, signature, sample):
            call_network(model.module, inputs, signature)
    return low, high


def _iterate_input_batches(
    model: Model, signature: Signature, sample: Sample | None
) -> Iterator[dict[str, Tensor]]:
    """Yield batches of the sample; without one, synthetic rows with dense inputs of two scales."""
    if sample is not None:
        split, rows = sample
        yield from (batch.inputs for batch in batches(split, signature, BATCH, rows))
        return
    for scale in SCALES:
        inputs = generate_inputs(signature, table_rows(model.module), EXAMPLE_ROWS)
        for part in dense_columns(signature):
            inputs = change_columns(inputs, part, partial(torch.mul, other=scale))
        yield inputs


def _list_dense_layers(module: nn.Module, names: Collection[str]) -> list[str]:
    """Return the names of the float dense layers among some modules."""
    return [name for name in names if isinstance(module.get_submodule(name), nn.Linear)]


def _get_linear_weight(module: nn.Module, name: str) -> Tensor:
    """Return the detached weight of a Linear, ``(out, in)``.

    Raises:
        StepRefused: the module is not a Linear.
    """
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise StepRefused("layer_not_linear", got=type(layer).__name__)
    return layer.weight.detach()

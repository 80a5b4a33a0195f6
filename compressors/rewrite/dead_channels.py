"""Detect dead channels, fold their constant output into the next layers, and remove them.

A channel is dead if its output is constant for every input, which a row of zero weights proves
(only the bias remains), or if no layer reads it (columns of zero weights). Optionally, a channel
that is constant on all calibration rows, such as a Relu that never activates, also counts as dead;
that is no proof.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import DenseInput, Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.batches import batches, example
from compressors.core.model import Model
from compressors.core.units import own_weight, table_rows
from compressors.errors.steps import StepRefused
from compressors.errors.widths import NotAWidth
from compressors.prune.structure.channel_consumers import Readers, layouts, readers_of, trace
from compressors.prune.structure.config_widths import Width, find_widths
from compressors.prune.structure.narrowing import SCALES, Cut, require_narrowable, without_channels

EXAMPLE_ROWS = 256
BATCH = 1024

Sample = tuple[Split, int]
"""Calibration rows, and the largest number of them to read."""


@dataclass(frozen=True)
class DeadChannels:
    """The dead channels of one width.

    ``kept`` maps each layer that outputs the channels to bool ``(channels,)``. ``offsets`` maps
    each consumer to float64 ``(outputs,)``: what the removed channels add to each of its outputs.
    """

    cut: Cut
    kept: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]

    def reasons(self, step: str) -> dict[str, Reason]:
        """How the step changes each dense layer, by layer name."""
        width = self.cut.width
        dead = Reason(
            "dead_channels",
            step=step,
            count=width.value - self.cut.count,
            channels=width.value,
            width=width.description(),
        )
        result = dict.fromkeys(width.makers, dead)
        for maker, reader in self.cut.readers.reads:
            if reader in self.offsets:
                result.setdefault(reader, Reason("dead_inputs", step=step, makers=(maker,)))
        return result


def find_dead_channels(
    model: Model, signature: Signature, free: Collection[str], sample: Sample | None
) -> tuple[DeadChannels, ...]:
    """Find the dead channels that can be removed.

    Args:
        model: not modified.
        signature: of its inputs.
        free: the dense layers that may change.
        sample: calibration rows; a channel that is constant on them counts as dead. If None, only
            channels that the weights prove dead count.
    """
    widths, _ = find_widths(model)
    result = []
    for width in widths.values():
        if max(width.makers.values()) > 1:  # in a group, such as a head, all channels must be dead
            continue
        layers = {*width.makers, *_dense(model.module, width.readers)}
        if not layers <= set(free) or not (sample or _may_have_dead_channels(model.module, width)):
            continue
        try:
            traces = trace(model.module, signature, table_rows(model.module), width)
            readers = readers_of(width, traces, next(layouts(width)))
            dead = _dead_channels(model, signature, readers, sample)
            if dead is not None:
                require_narrowable(model, signature, dead.cut)
                result.append(dead)
        except NotAWidth:
            continue  # its channels cannot be removed: the constants stay
    return tuple(result)


def remove_dead_channels(
    model: Model, signature: Signature, found: Sequence[DeadChannels]
) -> Model:
    """Remove the dead channels; ``model`` is a private copy and may be modified.

    Raises:
        CompressionError: the narrower network does not compute what the old one computes.
    """
    if not found:
        return model
    kept: dict[str, Tensor] = {}
    for dead in found:
        kept |= dead.kept
        for name, offset in dead.offsets.items():
            layer = model.module.get_submodule(name)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                moved = layer.bias.detach().double() + offset
                own_weight(layer, "bias", moved.to(layer.bias.dtype))
    narrow, gap = without_channels(model, signature, [dead.cut for dead in found], kept)
    if gap is not None:
        raise StepRefused("channels_read_elsewhere", gap=gap, layers=tuple(sorted(kept)))
    return narrow


def _may_have_dead_channels(module: nn.Module, width: Width) -> bool:
    """Whether a width has zero rows or columns; most have none, and tracing a width is slow."""
    makers = [_weight(module, name) for name in width.makers]
    readers = [_weight(module, name) for name in _dense(module, width.readers)]
    rows = any(not bool(weight.any(dim=1).all()) for weight in makers)
    return rows or any(not bool(weight.any(dim=0).all()) for weight in readers)


def _dead_channels(
    model: Model, signature: Signature, readers: Readers, sample: Sample | None
) -> DeadChannels | None:
    module, width = model.module, readers.width
    consumers = _dense(module, {reader: 1 for _, reader in readers.reads})
    low, high = _ranges(model, signature, consumers, sample)
    value = {name: torch.where(low[name] == high[name], low[name], 0.0) for name in consumers}
    removable: dict[tuple[str, ...], Tensor] = {}
    for group in readers.tied:
        constant = torch.ones(width.value, dtype=torch.bool)
        unread = torch.ones(width.value, dtype=torch.bool)
        for maker in group:
            if sample is None:
                constant &= ~_weight(module, maker).any(dim=1)
            for name in consumers:
                columns = readers.reads.get((maker, name))  # (channels, inputs)
                if columns is None:
                    continue
                weight = _weight(module, name)
                constant &= ~(columns & (low[name] != high[name])).any(dim=1)
                unread &= ~(columns & weight.any(dim=0)).any(dim=1)
                if module.get_submodule(name).bias is None:
                    lost = weight.any(dim=0) & (value[name] != 0)
                    constant &= ~(columns & lost).any(dim=1)
        removable[group] = constant | unread
    fewest = min(int(dead.sum()) for dead in removable.values())
    fewest = min(fewest, width.value - 1)  # at least one channel must stay, even if it is dead
    if fewest == 0:
        return None
    kept = {}
    for group, dead in removable.items():
        mask = torch.ones(width.value, dtype=torch.bool)
        mask[dead.nonzero().flatten()[:fewest]] = False
        kept.update(dict.fromkeys(group, mask))
    offsets = {}
    for name in consumers:
        read_inputs = [
            reads[~kept[maker]].any(dim=0)
            for (maker, reader), reads in readers.reads.items()
            if reader == name
        ]
        cut = torch.stack(read_inputs).any(dim=0)  # (inputs,)
        offsets[name] = _weight(module, name)[:, cut].double() @ value[name][cut].double()
    return DeadChannels(Cut(width, readers, width.value - fewest), kept, offsets)


def _ranges(
    model: Model, signature: Signature, names: Sequence[str], sample: Sample | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The smallest and the largest value of each input of the layers, float ``(inputs,)`` each."""
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = args[0] if args else named["input"]
            flat = x.reshape(-1, x.shape[-1])
            if len(flat):
                least, most = flat.amin(dim=0), flat.amax(dim=0)
                low[name] = torch.minimum(low[name], least) if name in low else least
                high[name] = torch.maximum(high[name], most) if name in high else most

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name in names:
            part = model.module.get_submodule(name)
            hooks.callback(part.register_forward_pre_hook(watch(name), with_kwargs=True).remove)
        for inputs in _inputs(model, signature, sample):
            model.module(**inputs)
    return low, high


def _inputs(
    model: Model, signature: Signature, sample: Sample | None
) -> Iterator[dict[str, Tensor]]:
    if sample is not None:
        split, rows = sample
        yield from (batch.inputs for batch in batches(split, signature, BATCH, rows))
        return
    for scale in SCALES:
        inputs = example(signature, table_rows(model.module), EXAMPLE_ROWS)
        dense = {item.name for item in signature.inputs if isinstance(item, DenseInput)}
        yield {name: x * scale if name in dense else x for name, x in inputs.items()}


def _dense(module: nn.Module, names: Collection[str]) -> list[str]:
    return [name for name in names if isinstance(module.get_submodule(name), nn.Linear)]


def _weight(module: nn.Module, name: str) -> Tensor:
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise StepRefused("layer_not_linear", got=type(layer).__name__)
    return layer.weight.detach()

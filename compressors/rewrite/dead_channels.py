"""Detect dead channels, fold their constant output into the next layers, and remove them.

A channel is dead if its output is the same for every input, or if all weights that consume it are
zero. A row of zero weights proves the former, because only the bias remains. Optionally, a channel
that is constant on all calibration rows, such as a Relu that is never active, also counts as dead.
That is not a proof, so removing it may change predictions.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import DenseInput, Signature, Split
from compressors.contracts.reasons import Reason
from compressors.core.batches import batches, generate_inputs
from compressors.core.model import Model
from compressors.core.units import own_weight, table_rows
from compressors.errors.steps import StepRefused
from compressors.errors.widths import NotAWidth
from compressors.prune.structure.channel_consumers import (
    Readers,
    channel_layouts,
    readers_of,
    trace,
)
from compressors.prune.structure.config_widths import Width, find_widths
from compressors.prune.structure.narrowing import (
    SCALES,
    WidthCut,
    require_narrowable,
    without_channels,
)

EXAMPLE_ROWS = 256
BATCH = 1024

Sample = tuple[Split, int]
"""Calibration rows, and the largest number of them to read."""


@dataclass(frozen=True)
class DeadChannels:
    """The dead channels of one width.

    Attributes:
        cut: the width to reduce.
        kept: by layer that outputs the channels, bool ``(channels,)``.
        offsets: by dense layer that consumes them, what the removed channels add to each of its
            outputs, float64 ``(outputs,)``.
    """

    cut: WidthCut
    kept: Mapping[str, Tensor]
    offsets: Mapping[str, Tensor]

    def reasons(self, step: str) -> dict[str, Reason]:
        """By dense layer, the reason that says how the step changes it."""
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
        model: the network; it is not changed.
        signature: its inputs.
        free: the dense layers that may change.
        sample: calibration rows; a channel that is constant on them counts as dead. If None, a
            channel is dead only if the weights prove it.
    """
    widths, _ = find_widths(model)
    result = []
    for width in widths.values():
        if max(width.makers.values()) > 1:  # groups of channels (heads) are not searched
            continue
        layers = {*width.makers, *_dense(model.module, width.readers)}
        if not layers <= set(free) or not (sample or _may_have_dead_channels(model.module, width)):
            continue
        try:
            traces = trace(model.module, signature, table_rows(model.module), width)
            readers = readers_of(width, traces, next(channel_layouts(width)))
            dead = _dead_channels(model, signature, readers, sample)
            if dead is not None:
                require_narrowable(model, signature, dead.cut)
                result.append(dead)
        except NotAWidth:
            continue  # the width cannot be reduced, so its dead channels stay
    return tuple(result)


def remove_dead_channels(
    model: Model, signature: Signature, dead_channels: Sequence[DeadChannels]
) -> Model:
    """Remove dead channels; ``model`` is a private copy and may be changed.

    Raises:
        StepRefused: the scores of the narrower network differ from those of the old one.
    """
    if not dead_channels:
        return model
    kept: dict[str, Tensor] = {}
    for dead in dead_channels:
        kept |= dead.kept
        for name, offset in dead.offsets.items():
            layer = model.module.get_submodule(name)
            if isinstance(layer, nn.Linear) and layer.bias is not None:
                bias = layer.bias.detach().double() + offset
                own_weight(layer, "bias", bias.to(layer.bias.dtype))
    cuts = [dead.cut for dead in dead_channels]
    narrower, gap = without_channels(model, signature, cuts, kept)
    if gap is not None:
        raise StepRefused("channels_read_elsewhere", gap=gap, layers=tuple(sorted(kept)))
    return narrower


def _may_have_dead_channels(module: nn.Module, width: Width) -> bool:
    """Whether a width has rows or columns of zeros: a fast check, because tracing is slow."""
    makers = [_weight(module, name) for name in width.makers]
    readers = [_weight(module, name) for name in _dense(module, width.readers)]
    rows = any(not bool(weight.any(dim=1).all()) for weight in makers)
    return rows or any(not bool(weight.any(dim=0).all()) for weight in readers)


def _dead_channels(
    model: Model, signature: Signature, readers: Readers, sample: Sample | None
) -> DeadChannels | None:
    """Find the dead channels of one width; None if there are none.

    Combined layers lose the same channels, and all layers of the width the same number of them.
    """
    module, width = model.module, readers.width
    consumers = _dense(module, {reader: 1 for _, reader in readers.reads})
    low, high = _ranges(model, signature, consumers, sample)
    # The value of each constant input, 0 for other inputs.
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
                    # Without a bias, a constant other than 0 cannot be added to the output.
                    needs_bias = weight.any(dim=0) & (value[name] != 0)
                    constant &= ~(columns & needs_bias).any(dim=1)
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
        removed_inputs = [
            reads[~kept[maker]].any(dim=0)
            for (maker, reader), reads in readers.reads.items()
            if reader == name
        ]
        removed = torch.stack(removed_inputs).any(dim=0)  # (inputs,)
        offsets[name] = _weight(module, name)[:, removed].double() @ value[name][removed].double()
    return DeadChannels(WidthCut(width, readers, width.value - fewest), kept, offsets)


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
    """Yield batches of calibration rows, or of synthetic rows of two scales without a sample."""
    if sample is not None:
        split, rows = sample
        yield from (batch.inputs for batch in batches(split, signature, BATCH, rows))
        return
    for scale in SCALES:
        inputs = generate_inputs(signature, table_rows(model.module), EXAMPLE_ROWS)
        dense = {item.name for item in signature.inputs if isinstance(item, DenseInput)}
        yield {name: x * scale if name in dense else x for name, x in inputs.items()}


def _dense(module: nn.Module, names: Collection[str]) -> list[str]:
    """The names of float dense layers among some modules."""
    return [name for name in names if isinstance(module.get_submodule(name), nn.Linear)]


def _weight(module: nn.Module, name: str) -> Tensor:
    """The detached weight of a Linear, ``(out, in)``.

    Raises:
        StepRefused: the module is not a Linear.
    """
    layer = module.get_submodule(name)
    if not isinstance(layer, nn.Linear):
        raise StepRefused("layer_not_linear", got=type(layer).__name__)
    return layer.weight.detach()

"""Find the consumers of each channel of a width by propagating NaN through the network.

Each row of a batch gets a NaN in one channel of a layer's output. NaN is removed from the output of
every other dense layer, so it arrives exactly at the inputs that consume the channel directly:
through activations, norms of single channels, concatenations, residual sums. Any other operation
that mixes channels (a layer norm, a softmax, a sum) spreads the NaN, and the width is rejected with
that reason. Dependency graphs built from autograd (Fang et al. 2023,
https://arxiv.org/abs/2301.12900) find consumers from the operators' names; this method runs the
network, so it also follows channels through concatenations.

A *maker* is a dense layer that outputs the channels, a *reader* is a layer or norm that consumes
them, and a *unit* is one channel or one group of channels that the width counts
(``config_widths.py``).

If a width counts groups of channels, such as heads, channels of one group may mix: the NaN of a
query reaches the whole output of its head. The network does not record which channels form a group,
so the usual orders are tried, and the scores of the network without a group confirm the right one.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.contracts.reasons import Reason
from compressors.core.batches import generate_inputs
from compressors.core.modules.formats import PackedLinear
from compressors.errors.widths import NotAWidth
from compressors.prune.structure.config_widths import Width

CHANNELS_PER_BATCH = 128  # each channel is one row of the network's input
Traces = dict[tuple[str, str], Tensor]
"""By maker and reader, bool ``(channels, inputs of the reader)``."""


@dataclass(frozen=True)
class Readers:
    """The consumers (readers) of the units of one width.

    Attributes:
        width: the width.
        reads: by maker and reader, which inputs of the reader consume which unit, bool
            ``(units, inputs of the reader)``.
        units: by maker, the unit of each of its channels, int64 ``(channels,)``.
        tied: groups of makers whose channels are combined (a residual sum, a gate, query and key of
            a head), so they must keep the same units.
    """

    width: Width
    reads: dict[tuple[str, str], Tensor]
    units: dict[str, Tensor]
    tied: tuple[tuple[str, ...], ...]


def trace(
    module: nn.Module, signature: Signature, rows_of_table: dict[str, int], width: Width
) -> Traces:
    """Find the inputs at which each channel of a width arrives.

    Args:
        module: the network in evaluation mode.
        signature: the inputs of the network.
        rows_of_table: number of rows of each table.
        width: the width.

    Raises:
        NotAWidth: an operation other than a dense layer mixes the channels, or a layer of fixed
            width reads them.
    """
    reads: Traces = {}
    for maker, size in width.makers.items():
        channels = width.value * size
        parts: dict[str, dict[int, Tensor]] = {}
        for begin in range(0, channels, CHANNELS_PER_BATCH):
            rows = min(CHANNELS_PER_BATCH, channels - begin)  # one row per channel
            inputs = generate_inputs(signature, rows_of_table, rows)
            with torch.no_grad(), _nan_trace(module, maker, channels, begin, rows) as reached:
                score = module(**inputs)
            if bool(score.isnan().any()):
                raise NotAWidth(Reason("channels_reach_score", maker=maker))
            for reader, columns in reached.items():
                parts.setdefault(reader, {})[begin] = columns
        for reader, batches in parts.items():
            columns = torch.cat(list(batches.values()))
            if len(columns) < channels:  # called for some rows and not for others
                raise NotAWidth(Reason("not_always_called", reader=reader))
            if not bool(columns.any()):
                continue
            if reader not in width.readers:
                raise NotAWidth(Reason("channels_mixed", reader=reader, maker=maker))
            reads[maker, reader] = columns
    return reads


def channel_layouts(width: Width) -> Iterator[dict[str, Tensor]]:
    """Yield the possible assignments of channels to units, by maker int64 ``(channels,)``.

    Either the channels of a unit are contiguous; or the layer has two or three parts, each with
    contiguous units, as a layer that computes queries, keys and values; or units alternate channel
    by channel.
    """
    largest = max(width.makers.values())
    for parts in dict.fromkeys((1, 2, 3, largest)):
        if any(size % parts == 0 for size in width.makers.values()):
            yield {
                maker: _units(width.value, size, parts if size % parts == 0 else 1)
                for maker, size in width.makers.items()
            }


def _units(value: int, size: int, parts: int) -> Tensor:
    """The unit of each of ``value * size`` channels, int64."""
    part = torch.arange(value).repeat_interleave(size // parts)  # (value * size / parts,)
    return part.repeat(parts)


def readers_of(width: Width, traces: Traces, units: dict[str, Tensor]) -> Readers:
    """Find the consumers of the units of a width for one assignment of channels to units.

    Raises:
        NotAWidth: an input depends on two units, or some inputs of a reader on none of them.
    """
    reads: dict[tuple[str, str], Tensor] = {}
    for (maker, reader), columns in traces.items():
        counts = torch.zeros(width.value, columns.shape[1]).index_add_(
            0, units[maker], columns.float()
        )
        reached = counts > 0  # (units, inputs)
        inputs_per_unit = reached.sum(dim=1)  # (units,)
        if bool((inputs_per_unit != inputs_per_unit[0]).any()) or bool(
            (reached.sum(dim=0) > 1).any()
        ):
            raise NotAWidth(Reason("mixed_before_reader", maker=maker, reader=reader))
        reads[maker, reader] = reached
    for reader, per_unit in width.readers.items():
        columns_of_makers = [columns for (_, name), columns in reads.items() if name == reader]
        reached = (
            torch.stack(columns_of_makers).any(dim=0) if columns_of_makers else torch.zeros(1, 1)
        )
        if int(reached.sum()) != per_unit * width.value or not columns_of_makers:
            raise NotAWidth(Reason("inputs_of_several", reader=reader))
    return Readers(width, reads, units, _tied(width, reads))


@contextmanager
def _nan_trace(
    module: nn.Module, maker: str, channels: int, begin: int, rows: int
) -> Iterator[dict[str, Tensor]]:
    """Put a NaN into channel ``begin + r`` of ``maker`` in row r; yield the inputs it reaches."""
    reached: dict[str, Tensor] = {}

    def read_hook(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = args[0] if args else named["input"]
            if len(x) != rows:
                if bool(x.isnan().any()):
                    raise NotAWidth(Reason("called_with_other_rows", layer=name))
                return
            columns = x.isnan().reshape(len(x), -1, x.shape[-1]).any(dim=1)
            reached[name] = reached[name] | columns if name in reached else columns

        return hook

    def mark_hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        if len(output) != rows or output.shape[-1] != channels:
            raise NotAWidth(Reason("returns_other_rows", maker=maker))
        marked = output.clone()
        row = torch.arange(rows)
        marked[row, ..., begin + row] = torch.nan
        return marked

    def clean_hook(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.nan_to_num(nan=0.0)

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | PackedLinear):
                hooks.callback(
                    part.register_forward_pre_hook(read_hook(name), with_kwargs=True).remove
                )
                output_hook = mark_hook if name == maker else clean_hook
                hooks.callback(part.register_forward_hook(output_hook).remove)
            elif isinstance(part, nn.BatchNorm1d) or (
                isinstance(part, nn.PReLU) and part.num_parameters > 1
            ):
                hooks.callback(
                    part.register_forward_pre_hook(read_hook(name), with_kwargs=True).remove
                )
        yield reached


def _tied(width: Width, reads: Mapping[tuple[str, str], Tensor]) -> tuple[tuple[str, ...], ...]:
    """Groups of makers whose channels arrive at the same inputs.

    Raises:
        NotAWidth: channels of two makers are combined, but not channel by channel.
    """
    groups = [{maker} for maker in width.makers]
    for (first, reader), columns in reads.items():
        for (second, other), others in reads.items():
            if first == second or reader != other or not bool((columns & others).any()):
                continue
            if not torch.equal(columns, others):
                raise NotAWidth(
                    Reason("channels_differ", first=first, second=second, reader=reader)
                )
            first_group = next(group for group in groups if first in group)
            second_group = next(group for group in groups if second in group)
            if first_group is not second_group:
                groups.remove(second_group)
                first_group |= second_group
    return tuple(tuple(sorted(group)) for group in groups)

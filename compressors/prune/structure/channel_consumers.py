"""Find the consumers of each channel of a width by propagating NaN through the network.

Each row of a batch gets a NaN in one channel of a layer's output. NaN is removed from the output of
every other dense layer, so it arrives exactly at the inputs that consume the channel directly:
through activations, norms of single channels, concatenations, residual sums. Any other operation
that mixes channels (a layer norm, a softmax, a sum) spreads the NaN to other channels. The width is
then rejected with that reason. Dependency graphs built from autograd (Fang et al. 2023,
https://arxiv.org/abs/2301.12900) find consumers from the operators' names; this method runs the
network, so it also follows channels through concatenations.

A *width* is a number in the network's configuration that sets the number of channels of one or more
layers (``config_widths.py``). A *producer* is a dense layer that outputs these channels, a
*consumer* is a layer or norm that takes them as inputs, and a *group* is one channel,
or several channels that the width counts as one, such as an attention head.

If a width counts groups of channels, such as heads, channels of one group may mix: the NaN of a
query reaches the whole output of its head. The network does not record which channels form a group,
so the usual layouts are tried (``channel_layouts``). A layout is confirmed if the narrower
network gives the scores of the full network in which the removed groups are zero
(``narrowing.py``).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.contracts.reasons import Reason
from compressors.core.modules.formats import PackedLinear
from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import network_scores
from compressors.errors.widths import NotAWidth
from compressors.prune.structure.config_widths import Width

CHANNELS_PER_BATCH = 128  # each channel is one row of the network's input
Traces = dict[tuple[str, str], Tensor]
"""By producer and consumer, bool ``(channels, inputs of the consumer)``: which inputs each channel
of the producer reaches."""


@dataclass(frozen=True)
class WidthConsumers:
    """The consumers of the groups of channels of one width.

    Attributes:
        width: the width.
        connections: by producer and consumer, which inputs of the consumer take which group of the
            producer: bool ``(groups, inputs of the consumer)``.
        groups: by producer, the group of each of its channels, int64 ``(channels,)``.
        tied_producers: sets of producers whose channels are combined (a residual sum, a gate,
            query and key of a head), so that they must keep the same groups.
    """

    width: Width
    connections: dict[tuple[str, str], Tensor]
    groups: dict[str, Tensor]
    tied_producers: tuple[tuple[str, ...], ...]


def trace(
    module: nn.Module, signature: Signature, rows_of_table: dict[str, int], width: Width
) -> Traces:
    """Find the inputs at which each channel of a width arrives.

    Args:
        module: the network in evaluation mode.
        signature: describes the inputs of the network.
        rows_of_table: number of rows of each table.
        width: the width whose channels are followed.

    Raises:
        NotAWidth: an operation other than a dense layer mixes the channels, a layer of fixed width
            reads them, they reach the score without a dense layer, or a layer is called only for
            some rows, or with another number of rows than the batch has.
    """
    connections: Traces = {}
    for producer, size in width.producers.items():
        channels = width.value * size
        # By consumer and first channel of a batch, which inputs each channel reaches.
        columns_by_begin: dict[str, dict[int, Tensor]] = {}
        for begin in range(0, channels, CHANNELS_PER_BATCH):
            rows = min(CHANNELS_PER_BATCH, channels - begin)  # one row per channel
            inputs = generate_inputs(signature, rows_of_table, rows)
            with torch.no_grad(), _nan_trace(module, producer, channels, begin, rows) as reached:
                score = network_scores(module, inputs, signature)
            if bool(score.isnan().any()):
                raise NotAWidth(Reason("channels_reach_score", producer=producer))
            for consumer, columns in reached.items():
                columns_by_begin.setdefault(consumer, {})[begin] = columns
        for consumer, columns_of_batches in columns_by_begin.items():
            columns = torch.cat(list(columns_of_batches.values()))
            if len(columns) < channels:  # the consumer was not called for every batch of rows
                raise NotAWidth(Reason("not_always_called", consumer=consumer))
            if not bool(columns.any()):
                continue
            if consumer not in width.consumers:
                raise NotAWidth(Reason("channels_mixed", consumer=consumer, producer=producer))
            connections[producer, consumer] = columns
    return connections


def channel_layouts(width: Width) -> Iterator[dict[str, Tensor]]:
    """Yield the possible assignments of channels to groups, by producer int64 ``(channels,)``.

    Either the channels of a group are contiguous; or the layer has two or three parts, each with
    contiguous groups, as a layer that computes queries, keys and values; or groups alternate
    channel by channel.
    """
    largest = max(width.producers.values())
    for parts in dict.fromkeys((1, 2, 3, largest)):
        if any(size % parts == 0 for size in width.producers.values()):
            yield {
                producer: _assign_groups(width.value, size, parts if size % parts == 0 else 1)
                for producer, size in width.producers.items()
            }


def _assign_groups(value: int, size: int, parts: int) -> Tensor:
    """Return the group of each channel, int64 ``(value * size,)``.

    Args:
        value: number of groups.
        size: channels per group.
        parts: number of equal parts of the layer; in each part the channels of a group are
            contiguous.
    """
    part = torch.arange(value).repeat_interleave(size // parts)  # (value * size / parts,)
    return part.repeat(parts)


def find_consumers(width: Width, traces: Traces, groups: dict[str, Tensor]) -> WidthConsumers:
    """Find the consumers of the groups of a width for one assignment of channels to groups.

    Raises:
        NotAWidth: an input depends on two groups, some inputs of a consumer depend on none of them,
            or the groups reach different numbers of a consumer's inputs.
    """
    connections: dict[tuple[str, str], Tensor] = {}
    for (producer, consumer), columns in traces.items():
        counts = torch.zeros(width.value, columns.shape[1]).index_add_(
            0, groups[producer], columns.float()
        )
        reached = counts > 0  # (groups, inputs)
        inputs_per_group = reached.sum(dim=1)  # (groups,)
        if bool((inputs_per_group != inputs_per_group[0]).any()) or bool(
            (reached.sum(dim=0) > 1).any()
        ):
            raise NotAWidth(Reason("mixed_before_consumer", producer=producer, consumer=consumer))
        connections[producer, consumer] = reached
    for consumer, per_group in width.consumers.items():
        columns_of_producers = [
            columns for (_, name), columns in connections.items() if name == consumer
        ]
        reached = (
            torch.stack(columns_of_producers).any(dim=0)
            if columns_of_producers
            else torch.zeros(1, 1)
        )
        if int(reached.sum()) != per_group * width.value or not columns_of_producers:
            raise NotAWidth(Reason("inputs_not_matched", consumer=consumer))
    return WidthConsumers(width, connections, groups, _find_tied_producers(width, connections))


@contextmanager
def _nan_trace(
    module: nn.Module, producer: str, channels: int, begin: int, rows: int
) -> Iterator[dict[str, Tensor]]:
    """While active, put a NaN into one channel of ``producer`` in each row of the batch.

    Args:
        module: the network.
        producer: name of the dense layer.
        channels: number of its channels.
        begin: the channel that becomes NaN in the first row; the next row has the next channel.
        rows: number of rows of the batch.

    Yields:
        By consumer, the inputs that the NaN of each row reaches: bool ``(rows, inputs)``, filled
        while the network runs.
    """
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
            raise NotAWidth(Reason("returns_other_rows", producer=producer))
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
                output_hook = mark_hook if name == producer else clean_hook
                hooks.callback(part.register_forward_hook(output_hook).remove)
            elif isinstance(part, nn.BatchNorm1d) or (
                isinstance(part, nn.PReLU) and part.num_parameters > 1
            ):
                hooks.callback(
                    part.register_forward_pre_hook(read_hook(name), with_kwargs=True).remove
                )
        yield reached


def _find_tied_producers(
    width: Width, connections: Mapping[tuple[str, str], Tensor]
) -> tuple[tuple[str, ...], ...]:
    """Return sets of producers whose channels arrive at the same inputs.

    Raises:
        NotAWidth: channels of two producers are combined, but not channel by channel.
    """
    tied = [{producer} for producer in width.producers]
    for (first, consumer), first_inputs in connections.items():
        for (second, other_consumer), second_inputs in connections.items():
            if first == second or consumer != other_consumer:
                continue
            if not bool((first_inputs & second_inputs).any()):
                continue
            if not torch.equal(first_inputs, second_inputs):
                raise NotAWidth(
                    Reason("channels_differ", first=first, second=second, consumer=consumer)
                )
            first_set = next(producers for producers in tied if first in producers)
            second_set = next(producers for producers in tied if second in producers)
            if first_set is not second_set:
                tied.remove(second_set)
                first_set |= second_set
    return tuple(tuple(sorted(producers)) for producers in tied)

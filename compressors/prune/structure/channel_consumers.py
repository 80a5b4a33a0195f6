"""Who reads each channel of a width, found by trying.

Each row of a batch gets a NaN in one channel of a layer's output; products cut the trace off (every
layer's own output is cleaned), so the columns where a NaN arrives are those that read that channel
directly: through activations, norms of single channels, concatenations, residual sums. Whatever
mixes channels otherwise (a layer norm, a softmax, a sum) spreads the NaN, and the width is refused
with that reason. Dependency graphs of autograd (Fang et al. 2023,
https://arxiv.org/abs/2301.12900) answer the same question from the operators' names; ours asks the
network itself, and misses nothing that a concatenation moves.

Where a width counts groups of channels, such as heads, a group may mix its own: the NaN of a query
reaches all of its head's output. Which channels belong together is not written anywhere, so the
usual orders are tried, and what the network scores without a group says which is right.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import Signature
from compressors.contracts.reasons import Reason
from compressors.core.batches import example
from compressors.core.modules.formats import PackedLinear
from compressors.errors.widths import NotAWidth
from compressors.prune.structure.config_widths import Width

TRACED = 128  # channels at a time: each is a row through the whole network
Traces = dict[tuple[str, str], Tensor]
"""By maker and reader, bool ``(channels, inputs of the reader)``."""


@dataclass(frozen=True)
class Readers:
    """Who reads the units of one width.

    ``reads`` holds, by maker and reader, bool ``(units, inputs of the reader)``. ``units`` says of
    each maker's channels which unit they are of, int64 ``(channels,)``. ``tied`` are the makers
    whose channels meet (a residual sum, a gate, query and key of a head): they keep the same ones.
    """

    width: Width
    reads: dict[tuple[str, str], Tensor]
    units: dict[str, Tensor]
    tied: tuple[tuple[str, ...], ...]


def trace(
    module: nn.Module, signature: Signature, rows_of_table: dict[str, int], width: Width
) -> Traces:
    """Where each channel of a width arrives.

    Raises:
        NotAWidth: something but dense layers mixes the channels, or a layer of unchanging width
            reads them.
    """
    reads: Traces = {}
    for maker, size in width.makers.items():
        channels = width.value * size
        parts: dict[str, dict[int, Tensor]] = {}
        for begin in range(0, channels, TRACED):
            rows = min(TRACED, channels - begin)  # a row a channel
            inputs = example(signature, rows_of_table, rows)
            with torch.no_grad(), _traced(module, maker, channels, begin, rows) as seen:
                score = module(**inputs)
            if bool(score.isnan().any()):
                raise NotAWidth(Reason("channels_reach_score", maker=maker))
            for reader, columns in seen.items():
                parts.setdefault(reader, {})[begin] = columns
        for reader, held in parts.items():
            columns = torch.cat(list(held.values()))
            if len(columns) < channels:  # called for some rows and not for others
                raise NotAWidth(Reason("not_always_called", reader=reader))
            if not bool(columns.any()):
                continue
            if reader not in width.readers:
                raise NotAWidth(Reason("channels_mixed", reader=reader, maker=maker))
            reads[maker, reader] = columns
    return reads


def layouts(width: Width) -> Iterator[dict[str, Tensor]]:
    """The orders in which channels may belong to units, by maker int64 ``(channels,)``.

    Each unit's channels side by side; two or three such parts one after another, as where one
    layer makes queries, keys and values; or the units in turn, channel by channel.
    """
    largest = max(width.makers.values())
    for parts in dict.fromkeys((1, 2, 3, largest)):
        if any(size % parts == 0 for size in width.makers.values()):
            yield {
                maker: _units(width.value, size, parts if size % parts == 0 else 1)
                for maker, size in width.makers.items()
            }


def _units(value: int, size: int, parts: int) -> Tensor:
    """Which unit each of ``value * size`` channels is of, int64."""
    one = torch.arange(value).repeat_interleave(size // parts)  # (value * size / parts,)
    return one.repeat(parts)


def readers_of(width: Width, traces: Traces, units: dict[str, Tensor]) -> Readers:
    """Who reads the units of a width, if channels belong to them like this.

    Raises:
        NotAWidth: an input would be read from two units, or not all of a reader's inputs are.
    """
    reads: dict[tuple[str, str], Tensor] = {}
    for (maker, reader), columns in traces.items():
        arrived = torch.zeros(width.value, columns.shape[1]).index_add_(
            0, units[maker], columns.float()
        )
        found = arrived > 0
        each = found.sum(dim=1)  # (units,)
        if bool((each != each[0]).any()) or bool((found.sum(dim=0) > 1).any()):
            raise NotAWidth(Reason("mixed_before_reader", maker=maker, reader=reader))
        reads[maker, reader] = found
    for reader, per_unit in width.readers.items():
        arriving = [columns for (_, name), columns in reads.items() if name == reader]
        together = torch.stack(arriving).any(dim=0) if arriving else torch.zeros(1, 1)
        if int(together.sum()) != per_unit * width.value or not arriving:
            raise NotAWidth(Reason("inputs_of_several", reader=reader))
    return Readers(width, reads, units, _tied(width, reads))


@contextmanager
def _traced(
    module: nn.Module, maker: str, channels: int, begin: int, rows: int
) -> Iterator[dict[str, Tensor]]:
    """Inside, row r carries a NaN in channel ``begin + r`` of ``maker``; yields who sees it."""
    seen: dict[str, Tensor] = {}

    def reading(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            x = args[0] if args else named["input"]
            if len(x) != rows:
                if bool(x.isnan().any()):
                    raise NotAWidth(Reason("called_with_other_rows", layer=name))
                return
            columns = x.isnan().reshape(len(x), -1, x.shape[-1]).any(dim=1)
            seen[name] = seen[name] | columns if name in seen else columns

        return hook

    def marking(_: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        if len(output) != rows or output.shape[-1] != channels:
            raise NotAWidth(Reason("returns_other_rows", maker=maker))
        marked = output.clone()
        each = torch.arange(rows)
        marked[each, ..., begin + each] = torch.nan
        return marked

    def cleaning(_: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
        return output.nan_to_num(nan=0.0)

    with ExitStack() as hooks:
        for name, part in module.named_modules():
            if isinstance(part, nn.Linear | PackedLinear):
                hooks.callback(
                    part.register_forward_pre_hook(reading(name), with_kwargs=True).remove
                )
                after = marking if name == maker else cleaning
                hooks.callback(part.register_forward_hook(after).remove)
            elif isinstance(part, nn.BatchNorm1d) or (
                isinstance(part, nn.PReLU) and part.num_parameters > 1
            ):
                hooks.callback(
                    part.register_forward_pre_hook(reading(name), with_kwargs=True).remove
                )
        yield seen


def _tied(width: Width, reads: Mapping[tuple[str, str], Tensor]) -> tuple[tuple[str, ...], ...]:
    """Makers whose channels arrive at the same inputs, one group each.

    Raises:
        NotAWidth: they meet, but not channel by channel.
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
            mine = next(group for group in groups if first in group)
            theirs = next(group for group in groups if second in group)
            if mine is not theirs:
                groups.remove(theirs)
                mine |= theirs
    return tuple(tuple(sorted(group)) for group in groups)

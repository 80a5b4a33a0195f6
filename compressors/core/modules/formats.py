"""Storage formats: the protocols a format implements, and the modules that use its tensors.

A format is one encoding of a table's rows or a dense layer's weights. Its file (below ``tables/``
or ``dense/``) registers one custom op, so that the same module runs in torch, trains its scales,
and is lowered to each serving target by one translation entry.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from compressors.contracts import ModuleRecord
from compressors.errors.compression import NotLowerable


class TensorSpec(NamedTuple):
    """Shape and type of one stored tensor.

    ``every`` is how many rows of a table share one entry of the first dimension: 1 for codes, more
    for scales of a group of rows, 0 for a tensor of the whole table, such as a codebook. ``first``
    is the value of every entry of the tensor's placeholder. If the network uses the entries as row
    numbers, it is a row that every table has.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    every: int = 1
    first: int = 0


class TableFormat(Protocol):
    """How the rows of a table are stored."""

    @property
    def name(self) -> str:
        """The format's tag in plans and bundles."""

    @property
    def learned(self) -> tuple[str, ...]:
        """The stored tensors that training may change; the op passes gradients to them."""

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Return the stored tensors of a table of ``rows x dim``, by name."""

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        """Return rows as float32, ``(*ids.shape, dim)``."""


class LinearFormat(Protocol):
    """How the weights of a dense layer are stored."""

    @property
    def name(self) -> str:
        """The format's tag in plans and bundles."""

    @property
    def learned(self) -> tuple[str, ...]:
        """The float32 tensors that training may change; their op passes gradients to them."""

    def layout(
        self, inputs: int, outputs: int, settings: Mapping[str, Any], *, bias: bool
    ) -> dict[str, TensorSpec]:
        """Return the stored tensors of a layer of these features, by name, weights first."""

    def apply(self, stored: Mapping[str, Tensor], x: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return the layer's output as float32, ``(*x.shape[:-1], outputs)``."""


def blocks(layout: Mapping[str, TensorSpec], rows: int, most: int) -> Iterator[tuple[int, int]]:
    """Yield ``begin`` and ``end`` of the row blocks in which a table is encoded.

    No entry of a stored tensor covers rows of two blocks: the result does not depend on ``most``.

    Args:
        layout: the stored tensors.
        rows: rows of the table.
        most: most rows of a block, unless one entry covers more.
    """
    together = math.lcm(*(spec.every for spec in layout.values() if spec.every))
    step = max(most // together, 1) * together
    yield from ((begin, min(begin + step, rows)) for begin in range(0, rows, step))


def entries(spec: TensorSpec, begin: int, end: int) -> slice:
    """Return the entries of a stored tensor that encode the rows ``begin`` to ``end``."""
    return slice(begin // spec.every, -(-end // spec.every))


class PackedTable(nn.Module):
    """Compressed replacement of an ``nn.Embedding``: ids ``(*,)`` to float32 ``(*, dim)``."""

    def __init__(
        self,
        storage: TableFormat,
        rows: int,
        dim: int,
        settings: Mapping[str, Any],
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.storage = storage
        self.rows = rows
        self.dim = dim
        self.settings = dict(settings)
        register_stored(self, storage.layout(rows, dim, settings), stored)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for the ids
        return self.storage.lookup(dict(self.named_buffers()), input, self.dim, self.settings)

    def record(self) -> ModuleRecord:
        """Return the record from which a bundle rebuilds this module."""
        return ModuleRecord(
            kind="table",
            format=self.storage.name,
            settings={"rows": self.rows, "dim": self.dim, **self.settings},
        )


class PackedLinear(nn.Module):
    """Compressed replacement of an ``nn.Linear``: float32 ``(*, in)`` to ``(*, out)``."""

    def __init__(
        self,
        storage: LinearFormat,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        settings: Mapping[str, Any] | None = None,
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.storage = storage
        self.in_features = in_features
        self.out_features = out_features
        self.has_bias = bias
        self.settings = dict(settings or {})
        layout = storage.layout(in_features, out_features, self.settings, bias=bias)
        register_stored(self, layout, stored)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return self.storage.apply(dict(self.named_buffers()), input, self.settings)

    def record(self) -> ModuleRecord:
        """Return the record from which a bundle rebuilds this module."""
        return ModuleRecord(
            kind="linear",
            format=self.storage.name,
            settings={
                "in_features": self.in_features,
                "out_features": self.out_features,
                "bias": self.has_bias,
                **self.settings,
            },
        )


class FoldedNorm(nn.Identity):
    """Identity in place of a norm whose parameters were folded into adjacent layers."""

    def record(self) -> ModuleRecord:
        """Return the record from which a bundle rebuilds this module."""
        return ModuleRecord(kind="norm", format="folded")


class Bag(nn.Module):
    """Replacement of an ``nn.EmbeddingBag``: looks rows up and reduces them over each bag.

    Equal to torch's module for ``sum``, ``mean`` and ``max``, padded or jagged input,
    ``padding_idx``, per-sample weights and empty bags (zeros), but implemented as a lookup and
    a masked reduction, since no exporter lowers the torch module to an efficient graph
    (NVIDIA/TensorRT#4210, pytorch/pytorch#138485). ``table`` is any module from ids to rows.

    ``longest`` is needed only to export jagged input: the graph pads each bag to that many ids.
    """

    def __init__(
        self,
        table: nn.Module,
        *,
        mode: str,
        padding_idx: int | None,
        include_last_offset: bool,
        longest: int | None = None,
    ) -> None:
        super().__init__()
        self.table = table
        self.mode = mode
        self.padding_idx = padding_idx
        self.include_last_offset = include_last_offset
        self.longest = longest

    def forward(
        self,
        input: Tensor,  # noqa: A002 - torch's name, callers may use it as a keyword
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        if offsets is None:
            ids, weights = input, per_sample_weights  # (bags, length)
            inside = torch.ones_like(ids, dtype=torch.bool)
        else:
            ids, inside, position = self._padded(input, offsets)  # (bags, longest)
            weights = None
            if per_sample_weights is not None:
                weights = padded(per_sample_weights, position)
        if self.padding_idx is not None:
            inside = inside & (ids != self.padding_idx)
        rows: Tensor = self.table(ids)  # (bags, longest, dim)
        if self.mode == "max":
            lowest = torch.finfo(rows.dtype).min
            top = rows.masked_fill(~inside.unsqueeze(-1), lowest).amax(dim=1)  # (bags, dim)
            return top.masked_fill(~inside.any(dim=1, keepdim=True), 0.0)
        share = inside.to(rows.dtype)
        if weights is not None:
            share = share * weights
        total = torch.matmul(share.unsqueeze(1), rows).squeeze(1)  # (bags, dim)
        if self.mode == "mean":
            total = total / inside.sum(dim=1, keepdim=True).clamp(min=1).to(rows.dtype)
        return total

    def _padded(self, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = values.shape[0]
        if self.include_last_offset:
            begin, end = offsets[:-1], offsets[1:]
        else:
            begin = offsets
            end = torch.cat([offsets[1:], offsets.new_full((1,), count)])
        if torch.compiler.is_exporting():
            if self.longest is None:
                raise NotLowerable("longest_list_unknown")
            longest = self.longest
        else:
            # At least one position, so that a batch of empty bags can be reduced.
            longest = max(1, int((end - begin).max())) if len(begin) else 1
        inside, position = pad_positions(begin, end, count, longest)
        return padded(values, position), inside, position

    def record(self) -> ModuleRecord | None:
        """Return the record of the bag and its table, or None if the table is not compressed."""
        record_of = getattr(self.table, "record", None)
        if record_of is None:
            return None
        inner: ModuleRecord = record_of()
        return ModuleRecord(
            kind="bag",
            format=inner.format,
            settings={
                **inner.settings,
                "mode": self.mode,
                "padding_idx": self.padding_idx,
                "include_last_offset": self.include_last_offset,
            },
        )


def pad_positions(begin: Tensor, end: Tensor, count: int, longest: int) -> tuple[Tensor, Tensor]:
    """Return positions of each bag's ids: ``inside`` bool, ``position`` int, ``(bags, longest)``.

    ``begin`` and ``end`` are ``(bags,)``, ``count`` is the number of all ids. Positions after a
    bag's end are ``count``, the index of the extra id that ``padded`` appends, so a batch of empty
    bags has an id to look up.
    """
    position = begin.unsqueeze(1) + torch.arange(longest, device=begin.device)
    inside = position < end.unsqueeze(1)
    return inside, torch.where(inside, position, count)


def padded(values: Tensor, position: Tensor) -> Tensor:
    """Gather values ``(all ids,)`` at ``position``; padding positions are zero."""
    return torch.cat([values, values.new_zeros(1)])[position]


def register_stored(
    module: nn.Module, layout: Mapping[str, TensorSpec], stored: Mapping[str, Tensor] | None
) -> None:
    """Register stored tensors as a module's buffers; if None, empty ones on the meta device."""
    for name, spec in layout.items():
        tensor = (
            torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            if stored is None
            else stored[name]
        )
        module.register_buffer(name, tensor)

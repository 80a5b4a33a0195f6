"""Storage formats: the protocols a format implements, and the modules that use its tensors.

A format is one encoding of a table's rows or a dense layer's weights. Its file (in
``compressors/quantize``) registers one torch custom op that decodes it. So the same module runs in
torch, its scales can be trained through the op's gradient, and each serving target needs one
translation of the op.

``settings`` are the arguments of a format's layout, such as the number of rows that share a scale.
They are stored in the record of the module.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compressors.contracts import ModuleRecord
from compressors.core.modules.table_weight import TableWeight
from compressors.errors.compression import NotLowerable


class TensorSpec(NamedTuple):
    """Shape and dtype of one stored tensor.

    Attributes:
        shape: the shape.
        dtype: the dtype.
        rows_per_entry: number of table rows per entry of the first dimension: 1 for codes, more for
            the scales of groups of rows, 0 for a tensor of the whole table, such as a codebook.
        first: the value of every entry of the placeholder that takes the tensor's place in a dry
            run. If the network uses the entries as row numbers, it must be a valid row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows_per_entry: int = 1
    first: int = 0


class TableFormat(Protocol):
    """How the rows of a table are stored."""

    @property
    def name(self) -> str:
        """The format's name in plans and bundles."""

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the stored tensors that training may change; the op gives their gradients."""

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Return the shape and dtype of each stored tensor of a ``rows x dim`` table, by name."""

    def lookup(
        self, stored: Mapping[str, Tensor], ids: Tensor, dim: int, settings: Mapping[str, Any]
    ) -> Tensor:
        """Return rows as float32, ``(*ids.shape, dim)``."""


@runtime_checkable
class ProductFormat(Protocol):
    """A table format that can also multiply by its codes, for networks that read the weight.

    Codes are the stored numbers, such as 4-bit integers, from which rows are decoded. The format's
    file registers a second custom op for that, with a gradient. A table whose weight is multiplied
    is stored in no other format, because each matmul would decode the whole table.
    """

    def can_multiply(self, settings: Mapping[str, Any]) -> bool:
        """Return whether it multiplies with these settings on every target."""

    def multiply(self, stored: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Multiply float32 ``(*, dim)`` by every row: float32 ``(*, rows)``."""


class LinearFormat(Protocol):
    """How the weights of a dense layer are stored."""

    @property
    def name(self) -> str:
        """The format's name in plans and bundles."""

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the float32 tensors that training may change; the op gives their gradients."""

    def layout(
        self, inputs: int, outputs: int, settings: Mapping[str, Any], *, bias: bool
    ) -> dict[str, TensorSpec]:
        """Return the shape and dtype of each stored tensor, by name, weights first."""

    def apply(self, stored: Mapping[str, Tensor], x: Tensor, settings: Mapping[str, Any]) -> Tensor:
        """Return the layer's output as float32, ``(*x.shape[:-1], outputs)``."""


def rows_per_group(layout: Mapping[str, TensorSpec]) -> int:
    """Return the number of neighbouring rows that can be encoded without other rows."""
    return math.lcm(*(spec.rows_per_entry for spec in layout.values() if spec.rows_per_entry))


def row_blocks(
    layout: Mapping[str, TensorSpec], rows: int, max_rows: int
) -> Iterator[tuple[int, int]]:
    """Yield ``begin`` and ``end`` of the row blocks in which a table is encoded.

    No entry of a stored tensor covers rows of two blocks, so the stored bytes do not depend on
    ``max_rows``.

    Args:
        layout: the stored tensors.
        rows: rows of the table.
        max_rows: largest number of rows of a block. It is exceeded if one entry covers more rows.
    """
    group = rows_per_group(layout)
    block_rows = max(max_rows // group, 1) * group
    yield from ((begin, min(begin + block_rows, rows)) for begin in range(0, rows, block_rows))


def layout_bytes(layout: Mapping[str, TensorSpec]) -> int:
    """Return the bytes of all stored tensors of a table or layer."""
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in layout.values())


def find_stored_entries(spec: TensorSpec, begin: int, end: int) -> slice:
    """Return the entries of a stored tensor that encode the rows ``begin`` to ``end - 1``."""
    return slice(begin // spec.rows_per_entry, -(-end // spec.rows_per_entry))


class PackedTable(nn.Module):
    """Compressed replacement of an ``nn.Embedding``: ids ``(*,)`` to float32 ``(*, dim)``.

    Its buffers are the stored tensors of its format, ``storage``. If the constructor gets no stored
    tensors, they are empty tensors on the meta device.
    """

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

    @property
    def weight(self) -> TableWeight:
        """The weight, for networks that read it instead of calling the table."""
        return TableWeight(self, self.rows, self.dim)

    def can_multiply(self) -> bool:
        """Return whether the format multiplies by its codes."""
        storage = self.storage
        return isinstance(storage, ProductFormat) and storage.can_multiply(self.settings)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply float32 ``(*, dim)`` by every row: float32 ``(*, rows)``."""
        assert isinstance(self.storage, ProductFormat)  # noqa: S101 - see ``can_multiply``
        return self.storage.multiply(dict(self.named_buffers()), x)

    def record(self) -> ModuleRecord:
        """Return the record from which a bundle rebuilds this module."""
        return ModuleRecord(
            kind="table",
            format=self.storage.name,
            settings={"rows": self.rows, "dim": self.dim, **self.settings},
        )


class PackedLinear(nn.Module):
    """Compressed replacement of an ``nn.Linear``: float32 ``(*, in)`` to ``(*, out)``.

    Its buffers are the stored tensors of its format, ``storage``. If the constructor gets no stored
    tensors, they are empty tensors on the meta device.
    """

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
    (NVIDIA/TensorRT#4210, pytorch/pytorch#138485). ``table`` is any module that maps ids to rows.

    In ``forward``, ``inside`` is False for padding and for ids equal to ``padding_idx``. The
    constructor's ``longest`` is needed only to export jagged input: the graph pads each bag to this
    length.
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

    @property
    def weight(self) -> Any:
        """The weight of the table."""
        return self.table.weight

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
            ids, inside, position = self._pad_bags(input, offsets)  # (bags, longest)
            weights = None
            if per_sample_weights is not None:
                weights = gather_padded(per_sample_weights, position)
        if self.padding_idx is not None:
            inside = inside & (ids != self.padding_idx)
        rows: Tensor = self.table(ids)  # (bags, longest, dim)
        if self.mode == "max":
            lowest = torch.finfo(rows.dtype).min
            largest = rows.masked_fill(~inside.unsqueeze(-1), lowest).amax(dim=1)  # (bags, dim)
            return largest.masked_fill(~inside.any(dim=1, keepdim=True), 0.0)
        factors = inside.to(rows.dtype)  # (bags, longest), zero for padding
        if weights is not None:
            factors = factors * weights
        total = torch.matmul(factors.unsqueeze(1), rows).squeeze(1)  # (bags, dim)
        if self.mode == "mean":
            total = total / inside.sum(dim=1, keepdim=True).clamp(min=1).to(rows.dtype)
        return total

    def _pad_bags(self, values: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return padded ids, the mask of real ids, and positions in ``values`` (bags, longest)."""
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
        return gather_padded(values, position), inside, position

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
    """Return the position of each bag's ids among all ids, padded to one length.

    Args:
        begin: position of each bag's first id, ``(bags,)``.
        end: position after each bag's last id, ``(bags,)``.
        count: number of ids of all bags.
        longest: length to which each bag is padded.

    Returns:
        ``inside``, bool ``(bags, longest)``, false for padding; and ``position``, int
        ``(bags, longest)``. Padding has the position ``count``, the index of the extra zero that
        ``gather_padded`` appends, so that a batch of empty bags has an id to look up.
    """
    position = begin.unsqueeze(1) + torch.arange(longest, device=begin.device)
    inside = position < end.unsqueeze(1)
    return inside, torch.where(inside, position, count)


def gather_padded(values: Tensor, position: Tensor) -> Tensor:
    """Gather values ``(all ids,)`` at ``position``; the position ``len(values)`` gives zero."""
    return torch.cat([values, values.new_zeros(1)])[position]


def register_stored(
    module: nn.Module, layout: Mapping[str, TensorSpec], stored: Mapping[str, Tensor] | None
) -> None:
    """Register stored tensors as buffers of a module; if None, empty ones on the meta device."""
    for name, spec in layout.items():
        tensor = (
            torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            if stored is None
            else stored[name]
        )
        # Not ``register_buffer``: it refuses the name ``weight``, which is a property of tables.
        module._buffers[name] = tensor

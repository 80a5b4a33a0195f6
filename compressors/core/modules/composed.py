"""Composed tables: an embedding table built from smaller tables.

The smaller tables are called parts: they have fewer rows or narrower rows, or several of them
contribute to one row. A composition is a method of building a table from parts. It has stored
tensors (such as a map from ids to rows of a part, or a projection) and parts, which are plain
float32 tables at first. Parts are ordinary units: a later step of the recipe can compress each one,
with a separate line in the plan. So a low-rank table with int4 parts needs no combined method.

``layout`` gives the shape and dtype of each stored tensor, and ``settings`` are the arguments that
it needs in addition to rows and width, such as the rank.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from compressors.contracts import ModuleRecord
from compressors.contracts.reasons import Reason
from compressors.core.modules.formats import TensorSpec, layout_bytes, register_stored
from compressors.core.modules.table_weight import TableWeight, can_multiply


class PartSpec(NamedTuple):
    """Rows and width of one part of a composed table."""

    rows: int
    dim: int


Parts = Mapping[str, nn.Module]
"""The parts of a composed table: each maps ids ``(*,)`` to float32 ``(*, dim of the part)``."""


class Composition(Protocol):
    """A method of building a table from smaller ones."""

    @property
    def name(self) -> str:
        """The composition's name in plans and bundles."""

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the stored float32 tensors that training may change, without those of parts."""

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Return the stored tensors by name, without those of the parts."""

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        """Return the shape of each part, by name."""

    def lookup_counts(
        self, stored: Mapping[str, Tensor], counts: Tensor, settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Return the lookup counts of each part's rows ``(part rows,)``, by part name.

        Only rows whose values are used are counted: an exported graph has no branches, and may also
        look up rows whose values it discards.

        Args:
            stored: the composition's stored tensors.
            counts: lookup counts of the whole table's rows, ``(rows,)``.
            settings: arguments of the composition's layout.
        """

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        parts: Parts,
        ids: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        """Return rows as float32, ``(*ids.shape, dim)``.

        Only operators that every serving target supports may be used.
        """


@runtime_checkable
class ProductComposition(Protocol):
    """A composition that can multiply vectors by all rows of its table without decoding it.

    Its parts must be able to do so, too: see ``ProductFormat`` in ``formats.py``.
    """

    def multiply(self, stored: Mapping[str, Tensor], parts: Parts, x: Tensor) -> Tensor:
        """Multiply float32 ``(*, dim)`` by every row: float32 ``(*, rows)``."""


class Design(NamedTuple):
    """The composition planned for one table, with its settings and a reason for the plan line."""

    composition: Composition
    settings: Mapping[str, Any]
    reason: Reason

    def bytes(self, rows: int, dim: int) -> int:
        """Return the bytes of the composed table, with its parts in float32."""
        layout = self.composition.layout(rows, dim, self.settings)
        parts = self.composition.parts(rows, dim, self.settings).values()
        return layout_bytes(layout) + sum(4 * part.rows * part.dim for part in parts)

    def table(
        self, rows: int, dim: int, stored: Mapping[str, Tensor], parts: Mapping[str, Tensor]
    ) -> "ComposedTable":
        """Build the table from its stored tensors and the weights of its parts."""
        return ComposedTable(self.composition, rows, dim, self.settings, stored, parts)


class ComposedTable(nn.Module):
    """Replacement of an ``nn.Embedding`` whose rows are computed from smaller tables."""

    def __init__(
        self,
        composition: Composition,
        rows: int,
        dim: int,
        settings: Mapping[str, Any],
        stored: Mapping[str, Tensor] | None = None,
        parts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Build the table from its tensors, or with empty tensors on the meta device if None.

        Args:
            composition: the method of composition.
            rows: rows of the whole table.
            dim: width of the whole table.
            settings: arguments of the composition's layout.
            stored: its stored tensors, without those of parts.
            parts: float32 weights ``(rows, dim)`` of the parts.
        """
        super().__init__()
        self.composition = composition
        self.rows = rows
        self.dim = dim
        self.settings = dict(settings)
        register_stored(self, composition.layout(rows, dim, settings), stored)
        self.part_names = tuple(composition.parts(rows, dim, settings))
        for name, spec in composition.parts(rows, dim, settings).items():
            self.add_module(name, plain_table(spec, None if parts is None else parts[name]))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name for the ids
        return self.composition.lookup(
            dict(self.named_buffers(recurse=False)),
            {name: self.get_submodule(name) for name in self.part_names},
            input,
            self.settings,
        )

    @property
    def weight(self) -> TableWeight:
        """The weight, for networks that read it instead of calling the table."""
        return TableWeight(self, self.rows, self.dim)

    def can_multiply(self) -> bool:
        """Return whether the composition and its parts multiply without decoding all rows."""
        parts = (self.get_submodule(name) for name in self.part_names)
        return isinstance(self.composition, ProductComposition) and all(map(can_multiply, parts))

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply float32 ``(*, dim)`` by every row: float32 ``(*, rows)``."""
        assert isinstance(self.composition, ProductComposition)  # noqa: S101 - ``can_multiply``
        stored = dict(self.named_buffers(recurse=False))
        parts = {name: self.get_submodule(name) for name in self.part_names}
        return self.composition.multiply(stored, parts, x)

    def record(self) -> ModuleRecord:
        """Return the record from which a bundle rebuilds this module, without its parts."""
        return ModuleRecord(
            kind="table",
            format=self.composition.name,
            settings={"rows": self.rows, "dim": self.dim, **self.settings},
        )


def sum_counts(counts: Tensor, index: Tensor, part_rows: int) -> Tensor:
    """Sum lookup counts by row of a part, ``(part_rows,)``.

    ``index``, int64 in the shape of ``counts``, is the row of the part to which each count is
    added.
    """
    return counts.new_zeros(part_rows).index_add_(0, index, counts)


def plain_table(spec: PartSpec, weight: Tensor | None) -> nn.Embedding:
    """Build an ``nn.Embedding`` with this weight; if None, an empty one on the meta device.

    Raises:
        ValueError: the weight has another shape than ``spec``.
    """
    if weight is None:
        return nn.Embedding(spec.rows, spec.dim, device="meta")
    if tuple(weight.shape) != spec:
        raise ValueError(f"a part of {spec.rows} x {spec.dim} was given {tuple(weight.shape)}")
    table = nn.Embedding(1, 1)  # its weight is replaced below: no large tensor is allocated
    table.num_embeddings, table.embedding_dim = spec
    table.weight = nn.Parameter(weight.detach().to(torch.float32), requires_grad=False)
    return table

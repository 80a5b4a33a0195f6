"""Tables made of smaller tables: fewer rows, narrower rows, or rows of several stores.

A composition holds tensors of its own (a map of rows, a projection) and parts, each a plain table
when it is made. Parts are units like any other: a later step of the recipe packs them, each with
a line of its own in the plan, so that "rank 4, then 3 bits" needs no method of its own.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from compressors.contracts import ModuleRecord
from compressors.contracts.reasons import Reason
from compressors.core.modules.formats import TensorSpec, register_stored


class PartSpec(NamedTuple):
    """Rows and width of a table inside a composed one."""

    rows: int
    dim: int


Parts = Mapping[str, nn.Module]
"""The tables inside a composed one: each takes ids ``(*,)`` and gives float32 ``(*, its dim)``."""


class Composition(Protocol):
    """One way to make a table of smaller ones."""

    @property
    def name(self) -> str:
        """The form's tag in plans and bundles."""

    @property
    def learned(self) -> tuple[str, ...]:
        """Its own float32 tensors that training may change."""

    def layout(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, TensorSpec]:
        """Its own stored tensors, without those of its parts."""

    def parts(self, rows: int, dim: int, settings: Mapping[str, Any]) -> dict[str, PartSpec]:
        """The tables inside, by name."""

    def lookup_counts(
        self, stored: Mapping[str, Tensor], counts: Tensor, settings: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """How often each part's rows answer, from how often rows are looked up, ``(rows,)``.

        A graph may look up more than it reads, since it has no branches: this counts what is read.
        """

    def lookup(
        self,
        stored: Mapping[str, Tensor],
        parts: Parts,
        ids: Tensor,
        settings: Mapping[str, Any],
    ) -> Tensor:
        """Rows as float32, ``(*ids.shape, dim)``, in operators that every target knows."""


class Design(NamedTuple):
    """How one table would be composed, and what that leaves of it."""

    composition: Composition
    settings: Mapping[str, Any]
    reason: Reason

    def bytes(self, rows: int, dim: int) -> int:
        """What it would take, its parts in float32."""
        own = self.composition.layout(rows, dim, self.settings).values()
        parts = self.composition.parts(rows, dim, self.settings).values()
        stored = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in own)
        return stored + sum(4 * part.rows * part.dim for part in parts)

    def table(
        self, rows: int, dim: int, stored: Mapping[str, Tensor], parts: Mapping[str, Tensor]
    ) -> "ComposedTable":
        """The table, from its own tensors and the weights of its parts."""
        return ComposedTable(self.composition, rows, dim, self.settings, stored, parts)


class ComposedTable(nn.Module):
    """What replaces an ``nn.Embedding`` where its rows are made of those of smaller tables."""

    def __init__(
        self,
        composition: Composition,
        rows: int,
        dim: int,
        settings: Mapping[str, Any],
        stored: Mapping[str, Tensor] | None = None,
        parts: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Make one from its tensors, or, without them, an empty one on the meta device.

        Args:
            composition: the form.
            rows: of the whole table.
            dim: of the whole table.
            settings: what the form needs to lay itself out.
            stored: its own tensors.
            parts: float32 weights ``(rows, dim)`` of the tables inside.
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

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name for the ids
        return self.composition.lookup(
            dict(self.named_buffers(recurse=False)),
            {name: self.get_submodule(name) for name in self.part_names},
            input,
            self.settings,
        )

    def record(self) -> ModuleRecord:
        """What a bundle must say so that this module can be built again; parts have their own."""
        return ModuleRecord(
            kind="table",
            format=self.composition.name,
            settings={"rows": self.rows, "dim": self.dim, **self.settings},
        )


def gathered(counts: Tensor, place: Tensor, places: int) -> Tensor:
    """Lookups of some rows, where ``place`` int64 says which of them each of ``counts`` reads."""
    return counts.new_zeros(places).index_add_(0, place, counts)


def plain_table(spec: PartSpec, weight: Tensor | None) -> nn.Embedding:
    """An ``nn.Embedding`` over a given weight, or an empty one on the meta device."""
    if weight is None:
        return nn.Embedding(spec.rows, spec.dim, device="meta")
    if tuple(weight.shape) != spec:
        raise ValueError(f"a part of {spec.rows} x {spec.dim} was given {tuple(weight.shape)}")
    table = nn.Embedding(1, 1)  # its weight is replaced at once: nothing large is made
    table.num_embeddings, table.embedding_dim = spec
    table.weight = nn.Parameter(weight.detach().to(torch.float32), requires_grad=False)
    return table

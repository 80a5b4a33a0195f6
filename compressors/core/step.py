"""The two step protocols: what a compression method implements, and which data it may see.

Tables may be larger than memory, so a table step sees row blocks of a memory-mapped weight; a
model step sees the whole module. ``compressors.core.runner`` runs both and checks their contract.
"""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from compressors.contracts import Bench, Change, Part
from compressors.core.model import Model
from compressors.core.modules.formats import TableFormat
from compressors.core.units import Choice


@runtime_checkable
class TableStep(Protocol):
    """A method for embedding tables, row block by row block."""

    @property
    def kind(self) -> str:
        """The method's tag."""

    @property
    def tables(self) -> tuple[str, ...]:
        """Name patterns of the tables it takes."""

    @property
    def min_rows(self) -> int:
        """Tables with fewer rows stay as they are."""

    @property
    def storage(self) -> TableFormat:
        """The format it writes."""

    def settings(self) -> dict[str, Any]:
        """What the format needs to know to lay a table out."""

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """What is learned from a table, float ``(rows, dim)``, before its blocks are encoded.

        Stored tensors of the whole table are among it, by the names the layout gives them.
        """

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors of one block of rows, float ``(rows, dim)``; none of the whole table."""


@runtime_checkable
class ModelStep(Protocol):
    """A method that needs the whole module."""

    @property
    def kind(self) -> str:
        """The method's tag."""

    @property
    def needs(self) -> tuple[Part, ...]:
        """The parts of the bench it cannot do without."""

    @property
    def changes(self) -> Change:
        """What becomes of a unit it takes.

        ``format``: it is stored in another format. ``values``: its format stays, and its weights
        change, it becomes narrower, or it is gone. ``parts``: a table is now made of smaller ones,
        which are units of their own. With the last two a unit may stay as it is, if nothing
        better is found; with ``format`` only if the model's notes say why. ``output``: no unit is
        taken, and a map stands behind the network.
        """

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:
        """Which units it takes, and why not the others. Units of no interest may be left out."""

    def apply(self, model: Model, bench: Bench) -> Model:
        """The compressed model; ``model`` has a module tree of its own over shared tensors.

        The architecture's configuration may be another one; records and ties are found by
        ``run``.
        """

    def dry_run(self, model: Model, bench: Bench) -> Model:
        """The same without data and without work: every shape of the result, whatever values."""


@runtime_checkable
class OptionalParts(Protocol):
    """A step that makes use of rows where there are some, and does without where there are none."""

    @property
    def wants(self) -> tuple[Part, ...]:
        """Such parts of the bench."""


def needs(step: TableStep | ModelStep) -> tuple[Part, ...]:
    """The parts of the bench a step cannot do without; a table step sees only its tables."""
    return step.needs if isinstance(step, ModelStep) else ()


def wants(step: TableStep | ModelStep) -> tuple[Part, ...]:
    """The parts of the bench a step makes use of where they are there."""
    return step.wants if isinstance(step, OptionalParts) else ()

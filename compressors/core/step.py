"""Step protocols: the interfaces that a compression method implements.

Tables may be larger than memory, so a table step receives row blocks of a memory-mapped weight; a
model step receives the whole module. ``compressors.core.runner`` runs both and checks their
contract.
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
    """A method that encodes embedding tables in blocks of rows."""

    @property
    def kind(self) -> str:
        """The method's tag."""

    @property
    def tables(self) -> tuple[str, ...]:
        """Name patterns of the tables to compress."""

    @property
    def min_rows(self) -> int:
        """Tables with fewer rows are not changed."""

    @property
    def storage(self) -> TableFormat:
        """The format it writes."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the format's layout."""

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Fit parameters to a table, float ``(rows, dim)``, before its blocks are encoded.

        They include the stored tensors of the whole table, under their names in the layout.
        """

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode a block, float ``(rows, dim)``: its stored tensors, none of the whole table."""


@runtime_checkable
class ModelStep(Protocol):
    """A method that works on the whole module."""

    @property
    def kind(self) -> str:
        """The method's tag."""

    @property
    def needs(self) -> tuple[Part, ...]:
        """The parts of the bench that it requires."""

    @property
    def changes(self) -> Change:
        """How the step changes a unit that it takes.

        ``format``: it is stored in another format. ``values``: its format is unchanged, and its
        weights change, it becomes narrower, or it is removed. ``parts``: the table is composed of
        smaller ones, which are separate units. With the last two a unit may be unchanged if no
        improvement is found; with ``format`` only if the model's notes say why. ``output``: no
        unit is taken; a map is applied to the network's output.
        """

    def choose(self, model: Model, bench: Bench) -> dict[str, Choice]:
        """Choose the units to change, with reasons. Units of another role may be left out."""

    def apply(self, model: Model, bench: Bench) -> Model:
        """Compress the model; its module tree is a private copy over shared tensors.

        The step may change the architecture's configuration; ``run`` determines records and ties.
        """

    def dry_run(self, model: Model, bench: Bench) -> Model:
        """Predict every shape of the result without data or work; values do not matter."""


@runtime_checkable
class OptionalParts(Protocol):
    """A step that uses parts of the bench if they are present, and runs without them."""

    @property
    def wants(self) -> tuple[Part, ...]:
        """The optional parts of the bench."""


def needs(step: TableStep | ModelStep) -> tuple[Part, ...]:
    """Return the parts of the bench that a step requires; a table step requires none."""
    return step.needs if isinstance(step, ModelStep) else ()


def wants(step: TableStep | ModelStep) -> tuple[Part, ...]:
    """Return the parts of the bench that a step uses if they are present."""
    return step.wants if isinstance(step, OptionalParts) else ()

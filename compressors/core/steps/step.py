"""The protocols ``Method``, ``Step`` and ``TableStep``, and the settings base class.

A *unit* is a table or dense layer. A *method* is the settings of one compression algorithm, a line
of a recipe. Every method implements one of two protocols:

- ``Step``: it plans (decides for every unit whether it changes it), then applies the plan to the
  whole network.
- ``TableStep``: it only encodes tables, in blocks of rows, because tables may be larger than
  memory. ``compressors.core.steps.table_step`` plans and applies it.

``compressors.core.runner`` runs every step and checks its contract.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from compressors.contracts import Bench, Frozen, Part
from compressors.core.model import Model
from compressors.core.modules.formats import TableFormat
from compressors.core.steps.decisions import AppliedStep, StepPlan

Effect = Literal["format", "values", "parts", "output"]
"""How a step changes a selected unit.

- ``format``: the unit is stored in another format.
- ``values``: the unit's format stays; its weights change, it becomes narrower, or it is removed.
- ``parts``: the unit is replaced by a composition of smaller units.
- ``output``: no unit is selected; a function that recalibrates the network's output is added.

With ``values`` and ``parts``, a selected unit stays unchanged if the step finds no improvement.
"""


class StepSettings(Frozen):
    """Settings of a method. Class attributes and properties declare what the method does.

    Attributes:
        effect: how the method changes a selected unit; ``Effect`` describes the four values.
        keeps_zeros: whether weights that it sets to zero stay zero: later steps that train do not
            change them.
        recovers_quality: whether it trains to recover the quality that the previous step lost; the
            quality budget then evaluates both steps together.
        requires_budget: whether a preset includes it only if its loss of quality can be measured on
            validation rows.
        trains_towers: whether it can train a model with two towers.
        kind: the method's name in recipes, plans and reports.
    """

    effect: ClassVar[Effect] = "format"
    keeps_zeros: ClassVar[bool] = False
    recovers_quality: ClassVar[bool] = False
    requires_budget: ClassVar[bool] = False
    trains_towers: ClassVar[bool] = False

    kind: str

    @property
    def trains(self) -> bool:
        """Whether the method trains; a failed training is not repeated on fewer units."""
        return False

    @property
    def reads_original(self) -> bool:
        """Whether the method reads the network before the recipe (``Model.original``)."""
        return False

    @property
    def needs(self) -> tuple[Part, ...]:
        """The parts of the bench, such as ``train``, that the method requires; by default none."""
        return ()

    @property
    def wants(self) -> tuple[Part, ...]:
        """The parts of the bench that the method uses if they are present; by default none."""
        return ()

    def dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        """Predict the result without data; by default the unchanged model (no shape changes)."""
        return model

    def smallest_dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        """Predict the smallest result; by default the same as ``dry_run``."""
        return self.dry_run(model, plan)


class Method(Protocol):
    """What every method declares; see ``StepSettings``. It is also a ``Step`` or ``TableStep``."""

    @property
    def kind(self) -> str:
        """The method's name in recipes, plans and reports."""

    @property
    def effect(self) -> Effect:
        """How the step changes a selected unit."""

    @property
    def trains(self) -> bool:
        """Whether it trains."""

    @property
    def needs(self) -> tuple[Part, ...]:
        """The parts of the bench that it requires."""

    @property
    def wants(self) -> tuple[Part, ...]:
        """The parts of the bench that it uses if they are present."""


@runtime_checkable
class Step(Method, Protocol):
    """A method that works on the whole module."""

    def plan(self, model: Model, bench: Bench) -> StepPlan[Any]:
        """Decide which units the step changes, with reasons.

        The model may consist of placeholders (tensors without values), and the bench may have no
        files: a dry run plans too.
        """

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Any]) -> AppliedStep:
        """Compress the model as planned.

        The model has a private copy of the module tree, whose tensors are shared with the caller's
        model: the step replaces modules and parameters, and writes into no tensor. It may change
        the architecture's configuration. ``run`` then describes the compressed modules and finds
        tensors with several names.
        """

    def dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        """Predict the shape of every tensor of the result, without data; values do not matter.

        If the sizes depend on data, the prediction is the largest possible result.
        """

    def smallest_dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        """Predict as ``dry_run``; if the sizes depend on data, the smallest possible result."""


@runtime_checkable
class TableStep(Method, Protocol):
    """A method that encodes embedding tables in blocks of rows."""

    @property
    def tables(self) -> tuple[str, ...]:
        """Name patterns of the tables to compress."""

    @property
    def min_rows(self) -> int:
        """Tables with fewer rows are not changed."""

    @property
    def storage(self) -> TableFormat:
        """The format that it writes."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the format's layout."""

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Fit parameters to a table, float ``(rows, dim)``, before its blocks are encoded.

        Returns:
            The parameters for ``encode``, by name. They include the stored tensors of the whole
            table, under their names in the layout.
        """

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode a block of rows, float ``(rows, dim)``.

        Returns:
            The stored tensors of these rows, without tensors of the whole table.
        """

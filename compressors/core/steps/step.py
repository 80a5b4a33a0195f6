"""The protocol of a step, and the settings and abilities that all methods declare.

A step first plans: it decides for every unit whether it changes it. It then applies that plan.
Tables may be larger than memory, so a method that only encodes tables implements ``TableStep``: it
receives row blocks, and ``compressors.core.steps.table_step`` plans and applies it.
``compressors.core.runner`` runs every step and checks its contract.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from compressors.contracts import Bench, Frozen, Part
from compressors.core.model import Model
from compressors.core.modules.formats import TableFormat
from compressors.core.steps.decisions import Applied, StepPlan

Effect = Literal["format", "values", "parts", "output"]
"""How a step changes a unit that it takes.

``format``: it is stored in another format. ``values``: its format is unchanged, and its weights
change, it becomes narrower, or it is removed. ``parts``: it is composed of smaller units. With the
last two a unit may be unchanged if no improvement is found. ``output``: no unit is taken; a map is
applied to the network's output.
"""


class StepSettings(Frozen):
    """Settings of a method. Its class attributes declare what the method does.

    Attributes:
        effect: how it changes a unit that it takes.
        keeps_zeros: whether weights that it sets to zero stay zero in later training.
        recovers_quality: whether it trains what the previous step has cut or rounded, so that the
            quality budget judges both together.
        requires_budget: whether a preset applies it only if validation rows can show its loss.
    """

    effect: ClassVar[Effect] = "format"
    keeps_zeros: ClassVar[bool] = False
    recovers_quality: ClassVar[bool] = False
    requires_budget: ClassVar[bool] = False

    kind: str

    @property
    def trains(self) -> bool:
        """Whether it trains, so that a failed run is too slow to be repeated on fewer units."""
        return False

    @property
    def reads_original(self) -> bool:
        """Whether it reads layers of the network before the recipe (``Model.original``)."""
        return False

    @property
    def needs(self) -> tuple[Part, ...]:
        """The parts of the bench that the method requires; by default none."""
        return ()

    @property
    def wants(self) -> tuple[Part, ...]:
        """The parts of the bench that it uses if they are present; by default none."""
        return ()

    def dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        """Predict the result; by default the model as it is, because no shape changes."""
        return model

    def smallest_dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        """Predict the smallest result; by default the only one that ``dry_run`` predicts."""
        return self.dry_run(model, plan)


class Method(Protocol):
    """What every method declares; see ``StepSettings``. It is also a ``Step`` or ``TableStep``."""

    @property
    def kind(self) -> str:
        """The method's tag."""

    @property
    def effect(self) -> Effect:
        """How the step changes a unit that it takes."""

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

        The model may consist of placeholders, and the bench may have no files: a dry run plans too.
        """

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Any]) -> Applied:
        """Compress the model as planned; its module tree is a private copy over shared tensors.

        The step may change the architecture's configuration; ``run`` determines records and ties.
        """

    def dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        """Predict every shape of the result without data or work; values do not matter.

        Where the result depends on data, it is the largest one.
        """

    def smallest_dry_run(self, model: Model, plan: StepPlan[Any]) -> Model:
        """Predict the smallest result."""


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
        """The format it writes."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the format's layout."""

    def fit(self, rows: Tensor) -> dict[str, Tensor]:
        """Fit parameters to a table, float ``(rows, dim)``, before its blocks are encoded.

        They include the stored tensors of the whole table, under their names in the layout.
        """

    def encode(self, block: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode a block, float ``(rows, dim)``: its stored tensors, none of the whole table."""

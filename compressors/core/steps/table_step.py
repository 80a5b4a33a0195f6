"""Plan and apply the methods that encode tables: the code shared by all of them."""

from collections.abc import Mapping

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.placeholders import dry_run_packed
from compressors.core.state.tensor_files import find_file
from compressors.core.steps.decisions import (
    AppliedStep,
    Decision,
    StepPlan,
    choose_tables,
    selected_units,
)
from compressors.core.steps.step import Effect, Method, Step, TableStep
from compressors.core.steps.table_encoder import encode_table
from compressors.core.units import Unit, pack_table, swap
from compressors.quantize.better_format import best_format, table_bytes

Formats = Mapping[str, TableStep]
"""By table name, the step that encodes it: the recipe's, or one with a better format.

A better format is more precise and takes no more bytes (``compressors/quantize/better_format.py``).
"""


class EncodeTables:
    """Adapts a ``TableStep`` to a ``Step`` that encodes every table that becomes smaller.

    Args:
        encoder: the method and its settings.
    """

    def __init__(self, encoder: TableStep) -> None:
        self._encoder = encoder

    @property
    def kind(self) -> str:
        """The method's name in recipes, plans and reports."""
        return self._encoder.kind

    @property
    def effect(self) -> Effect:
        """How the step changes a selected table."""
        return self._encoder.effect

    @property
    def trains(self) -> bool:
        """Whether the method trains."""
        return self._encoder.trains

    @property
    def needs(self) -> tuple[Part, ...]:
        """The parts of the bench that the method requires."""
        return self._encoder.needs

    @property
    def wants(self) -> tuple[Part, ...]:
        """The parts of the bench that the method uses if they are present."""
        return self._encoder.wants

    def plan(self, model: Model, bench: Bench) -> StepPlan[Formats]:
        """Select the tables whose best format is smaller than the present one."""
        units, encoder = Unit.of(model.module), self._encoder
        decisions = choose_tables(
            units, encoder.tables, encoder.min_rows, encoder.kind, with_heads=True
        )
        formats: dict[str, TableStep] = {}
        for unit in selected_units(units, decisions):
            rows, dim = unit.weight.shape
            stored_by, reasons = best_format(encoder, unit.weight)
            size = table_bytes(stored_by, rows, dim)
            if size < unit.bytes:
                decisions[unit.name] = Decision("taken", reasons)
                formats[unit.name] = stored_by
            else:
                why = Reason("not_smaller", step=stored_by.kind, bytes=size, present=unit.bytes)
                decisions[unit.name] = Decision("skipped", (why,))
        return StepPlan(decisions, formats)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Formats]) -> AppliedStep:
        """Encode the selected tables, one after another."""
        for unit in plan.units(model.module):
            file = find_file(unit.weight, model.files)
            packed = encode_table(plan.payload[unit.name], unit.weight, file)
            swap(model.module, unit.name, pack_table(unit.module, packed))
        return AppliedStep(model)

    def dry_run(self, model: Model, plan: StepPlan[Formats]) -> Model:
        """Replace the selected tables by placeholders in the formats that ``apply`` would use."""
        for unit in plan.units(model.module):
            stored_by = plan.payload[unit.name]
            model = dry_run_packed(
                model, [unit], table=stored_by.storage, settings=stored_by.settings()
            )
        return model

    def smallest_dry_run(self, model: Model, plan: StepPlan[Formats]) -> Model:
        """Return the result of ``dry_run``: a format's layout determines the bytes exactly."""
        return self.dry_run(model, plan)


def to_step(method: Method) -> Step:
    """Return a ``Step`` unchanged, or a ``TableStep`` adapted by ``EncodeTables``.

    Raises:
        TypeError: the method implements neither protocol.
    """
    if isinstance(method, TableStep):
        return EncodeTables(method)
    if isinstance(method, Step):
        return method
    raise TypeError(f"{method.kind!r} is neither a Step nor a TableStep")

"""What a step would make of a model, without doing it: every format, shape and byte."""

from collections.abc import Mapping

from compressors.better_format import best_format
from compressors.contracts import Bench
from compressors.model import Model
from compressors.plan import plan_of, remarked
from compressors.skipping import skippable
from compressors.stand_ins import packed_outline
from compressors.step import ModelStep, TableStep, choices_of, output_line, without_units
from compressors.units import Choice, Unit, folded_norms, stored_bytes


def outline(step: TableStep | ModelStep, source: Model, bench: Bench) -> Model:
    """The outcome of ``compressors.step.run`` over stand-ins, with the plan it would have.

    The plan is exact but for what only the values tell: a training that finds nothing better is
    predicted to have found something, and a layer that a format cannot hold to be taken.

    Args:
        step: the method and its settings.
        source: the model, or an earlier outline; left as it is.
        bench: its schema and the rows of its splits count; none of its files is read.

    Raises:
        NothingToCompress: the step takes no unit of this model.
        CompressionError: the step cannot be carried out on this model.
    """
    model = source.private()
    skipped = skippable(step, source, bench)
    choices = choices_of(step, model, bench, skipped)
    before = Unit.of(source.module)
    if isinstance(step, ModelStep):
        model = without_units(step, skipped).outline(model, bench)
    else:
        model = _packed(step, model, choices)
    after = Unit.of(model.module)
    sizes = stored_bytes(source.module), stored_bytes(model.module)
    line, folded = output_line(step, source, model), folded_norms(model.module)
    plan = plan_of(step.kind, source, choices, before, after, sizes, line, folded)
    output = isinstance(step, ModelStep) and step.changes == "output"
    plan = remarked(plan, step.kind, skipped, {} if output else choices, {})
    return Model(model.module, source.architecture, model.network, plan)


def _packed(step: TableStep, model: Model, choices: Mapping[str, Choice]) -> Model:
    """Every chosen table over placeholders, in the format that ``run`` would store it in."""
    for unit in Unit.of(model.module):
        if unit.name in choices and choices[unit.name].take:
            stored_by, _ = best_format(step, unit.weight)
            model = packed_outline(
                model,
                {unit.name: choices[unit.name]},
                table=stored_by.storage,
                settings=stored_by.settings(),
            )
    return model

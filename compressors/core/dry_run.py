"""Dry run: predict the format, shape and bytes of every unit after a step, without running it."""

from collections.abc import Mapping

from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.placeholders import dry_run_packed
from compressors.core.plan_lines import build_plan, with_remarks
from compressors.core.runner import ModelStep, TableStep, output_line, plan_choices, without_units
from compressors.core.skipping import skippable
from compressors.core.units import Choice, Unit, folded_norms, stored_bytes
from compressors.quantize.better_format import best_format


def dry_run(step: TableStep | ModelStep, source: Model, bench: Bench) -> Model:
    """Predict the result of ``run``: a model of placeholders with the plan it would have.

    The plan is exact except where it depends on tensor values. It assumes that training finds an
    improvement, and that a chosen layer can be stored in its format.

    Args:
        step: the method and its settings.
        source: the model, or the result of an earlier dry run; not modified.
        bench: only its signature and the row counts of its splits are used; no file is read.

    Raises:
        NothingToCompress: the step can compress no unit of this model.
        CompressionError: the step cannot be carried out on this model.
    """
    model = source.private()
    skipped = skippable(step, source, bench)
    choices = plan_choices(step, model, bench, skipped)
    before = Unit.of(source.module)
    if isinstance(step, ModelStep):
        model = without_units(step, skipped).dry_run(model, bench)
    else:
        model = _packed(step, model, choices)
    after = Unit.of(model.module)
    sizes = stored_bytes(source.module), stored_bytes(model.module)
    line, folded = output_line(step, source, model), folded_norms(model.module)
    plan = build_plan(step.kind, source, choices, before, after, sizes, line, folded)
    output = isinstance(step, ModelStep) and step.changes == "output"
    plan = with_remarks(plan, step.kind, skipped, {} if output else choices, {})
    return Model(model.module, source.architecture, model.network, plan)


def _packed(step: TableStep, model: Model, choices: Mapping[str, Choice]) -> Model:
    """Replace every chosen table by placeholders in the format that ``run`` would store."""
    for unit in Unit.of(model.module):
        if unit.name in choices and choices[unit.name].take:
            stored_by, _ = best_format(step, unit.weight)
            model = dry_run_packed(
                model,
                {unit.name: choices[unit.name]},
                table=stored_by.storage,
                settings=stored_by.settings(),
            )
    return model

"""Dry run: predict the format, shape and bytes of every unit after a step, without running it."""

from compressors.contracts import Bench
from compressors.core.model import Model
from compressors.core.plan_lines import add_remarks, build_plan, output_lines
from compressors.core.runner import add_notes, plan_step
from compressors.core.skipping import find_skippable_units
from compressors.core.steps.step import Method
from compressors.core.units import Unit, folded_norms, stored_bytes


def dry_run(method: Method, source: Model, bench: Bench, *, smallest: bool = False) -> Model:
    """Predict the result of ``run``: a model of placeholder tensors, with its plan.

    A placeholder has the shape and dtype of a tensor and almost no memory (``placeholders.py``).

    The plan is exact except where it depends on tensor values. It assumes that training improves
    the network, and that every selected layer can be stored in its format.

    Args:
        method: the method and its settings.
        source: the model, or the result of an earlier dry run; not modified.
        bench: only its signature and the row counts of its splits are used; no file is read.
        smallest: for a step that makes some decisions only while it runs, predict the smallest
            possible result instead of the largest one.

    Raises:
        NothingToCompress: the step can compress no unit of this model.
        CompressionError: the step cannot be applied to this model.
    """
    model = source.private()  # a copy of the module tree, so that ``source`` is not modified
    planned = plan_step(method, model, bench)
    skipped, notes = find_skippable_units(planned, method, source, bench)
    if skipped:
        model = source.private()
        planned = plan_step(method, model, bench, skipped)
    step, plan, _ = planned
    plan = add_notes(plan, notes)
    model = step.smallest_dry_run(model, plan) if smallest else step.dry_run(model, plan)
    before, after = Unit.of(source.module), Unit.of(model.module)
    sizes = stored_bytes(source.module), stored_bytes(model.module)
    # The line of the function that recalibrates the network's output, if a step added one.
    outputs = output_lines(step.kind, source, model.module, plan.decisions)
    folded = folded_norms(model.module)
    new_plan = build_plan(
        step.kind, source, plan.decisions, before, after, sizes, outputs=outputs, folded=folded
    )
    new_plan = add_remarks(new_plan, step.kind, skipped, plan.decisions, outcome_reasons={})
    return Model(model.module, source.architecture, model.network, new_plan)

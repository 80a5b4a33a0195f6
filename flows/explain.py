"""Explain an order without running it: its steps, targets, bytes and memory.

Formats, widths and bytes are predicted by a dry run of the steps (``compressors.core.dry_run``).
Bytes are exact unless they depend on the quality budget or the data; then ``bytes_between`` has
their bounds. Peak memory is an estimate from sizes (``tasks.orchestration.memory_estimate``).
"""

from collections.abc import Mapping

from compressors.contracts import TARGETS, Artifact, Frozen, Plan, Signature
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.units import stored_bytes
from compressors.distill.training.trainable import trainable_tensors
from flows.dry_run import dry_run_recipe, weight_byte_bounds
from flows.order import Order
from flows.resolve import find_completed_result, resolve_teachers
from flows.step_selection import (
    has_measurable_budget,
    is_reported,
    require_budget_rows,
    require_teachers_are_used,
)
from flows.terms import Requirement, Terms
from infra.errors import Refused
from tasks.build import require_builder
from tasks.bundles.bundle_ref import BundleRef, find_bundle, require_measurable
from tasks.bundles.loading import load_bundle
from tasks.orchestration.documents import AS_TRAINED
from tasks.orchestration.memory_estimate import Memory, peak_memory


class ExplainedStep(Frozen):
    """One step of the recipe: the bytes after it, or why it would be skipped.

    Attributes:
        step: kind of the step, or ``AS_TRAINED`` for the untouched model.
        bytes: bytes of the weights after the step; unchanged by a skipped step.
        left_out: why the step would be skipped; None if it would be applied.
    """

    step: str
    bytes: int
    left_out: Reason | None = None


class ExplainedTarget(Frozen):
    """One target, and why it would be skipped if it is optional and cannot be built here.

    Attributes:
        target: name of the target.
        wanted: whether the order requires the target, or it is optional.
        missing: why it cannot be built on this machine; None if it can.
    """

    target: str
    wanted: Requirement
    missing: str | None = None


class Explanation(Frozen):
    """The explanation of an order for the current machine and stores.

    Attributes:
        model: the bundle, ``name@version``.
        task: its kind of task.
        rows: rows of each split of its data.
        limits: the limits of the order, as text.
        budget: largest loss of the metric on validation rows; None if the order has no budget or
            the loss cannot be measured.
        bytes_between: fewest and most bytes of weights that the order can result in.
        teachers: names of the teachers that the order adds to the untouched model.
        earlier: the registered version that the same order produced before; None if it never ran.
        steps: the untouched model and each step, with the bytes after it.
        plan: formats and bytes of all tables and layers.
        targets: the ordered targets.
        memory: estimated peak memory of the flow's process.
    """

    model: str
    task: str
    rows: dict[str, int]
    limits: tuple[str, ...]
    budget: float | None
    bytes_between: tuple[int, int] | None = None
    teachers: tuple[str, ...]
    earlier: str | None
    steps: tuple[ExplainedStep, ...]
    plan: Plan
    targets: tuple[ExplainedTarget, ...]
    memory: Memory


def explain(terms: Terms) -> Explanation:
    """Explain an order.

    The bundle is fetched, verified and loaded as memory-mapped tensors; nothing is compressed,
    built, measured or stored.

    Raises:
        Refused: there is no such bundle, it is unsafe, or a required target cannot be built here.
        CompressionError: the order cannot be run: a limit is on a metric that is not measured, a
            step of preset ``custom`` can compress no unit, or every step would be skipped.
    """
    order = terms if isinstance(terms, Order) else Order.model_validate(terms.model_dump())
    bundle = find_bundle(order.model)
    require_measurable(bundle, order.limits)
    require_teachers_are_used(order)
    teachers = resolve_teachers(order, bundle)
    earlier = find_completed_result(order)
    loaded = load_bundle(bundle.artifact)
    signature = loaded.manifest.signature
    teacher_artifacts = tuple(teacher.artifact for teacher in teachers)
    explained = _explain_steps(order, bundle, signature, loaded.model, teacher_artifacts)
    model, steps, trained_bytes = explained
    original_bytes = stored_bytes(loaded.model.module)
    plan = model.plan if model.plan is not None else Plan()
    return Explanation(
        model=f"{bundle.name}@{bundle.version}",
        task=bundle.task,
        rows=bundle.rows,
        limits=tuple(map(str, bundle.limits(order.limits))),
        budget=order.quality_budget() if has_measurable_budget(order, bundle) else None,
        bytes_between=weight_byte_bounds(order, bundle, signature, loaded.model, teacher_artifacts),
        teachers=tuple(teacher.name for teacher in teachers),
        earlier=None if earlier is None else earlier.version,
        steps=(ExplainedStep(step=AS_TRAINED, bytes=original_bytes), *steps),
        plan=plan if earlier is None else _copy_warnings(plan, earlier.report.plan),
        targets=tuple(
            _explain_target(target, requirement)
            for target, requirement in order.targets.requirements().items()
        ),
        memory=peak_memory(
            bytes_before=original_bytes,
            bytes_after=plan.bytes_after,
            data_bytes=max(split.artifact.bytes for split in loaded.manifest.data.values()),
            builds=any(TARGETS[kind].is_built for kind in order.targets.requirements()),
            trained_bytes=trained_bytes,
        ),
    )


def _copy_warnings(plan: Plan, finished: Plan) -> Plan:
    """Copy the warnings of a finished run of the order; a dry run has no data to detect them."""
    warnings = {line.module: line.warnings for line in finished.lines if line.warnings}
    return Plan(
        lines=tuple(
            line.model_copy(update={"warnings": warnings.get(line.module, line.warnings)})
            for line in plan.lines
        )
    )


def _explain_steps(
    order: Order,
    bundle: BundleRef,
    signature: Signature,
    model: Model,
    teachers: tuple[Artifact, ...],
) -> tuple[Model, list[ExplainedStep], int]:
    """Dry-run the recipe as if the first option of every choice were within the budget.

    A choice is a part of a recipe with several options, in order of preference
    (``flows/presets.py``).

    Returns:
        The model after the last step, the steps that a report mentions, and the largest number of
        bytes that one step trains.
    """
    require_budget_rows(order, bundle)
    stages, skip_reasons = dry_run_recipe(order, bundle, signature, model, teachers)
    results = iter(stages[1:])
    steps = []
    for index, step in enumerate(order.recipe()):
        if index not in skip_reasons:
            _, model = next(results)
        reason = skip_reasons.get(index)
        if is_reported(reason):
            size = stored_bytes(model.module)
            steps.append(ExplainedStep(step=step.kind, bytes=size, left_out=reason))
    return model, steps, _find_max_trained_bytes(order, stages, skip_reasons)


def _find_max_trained_bytes(
    order: Order, stages: tuple[tuple[str, Model], ...], skip_reasons: Mapping[int, Reason]
) -> int:
    """Return the largest number of bytes of tensors that one step of the order trains."""
    max_bytes = 0
    (_, model), *results = stages  # the untouched model, then the result of each applied step
    next_stages = iter(results)
    for index, step in enumerate(order.recipe()):
        if index in skip_reasons:
            continue
        training = getattr(step, "training", None)
        if training is not None:
            # ``training.tables``: whether the step trains tables in addition to dense layers.
            names = set(trainable_tensors(model.module, tables=training.tables))
            tensors = (*model.module.named_parameters(), *model.module.named_buffers())
            trained_bytes = sum(tensor.nbytes for name, tensor in tensors if name in names)
            max_bytes = max(max_bytes, trained_bytes)
        _, model = next(next_stages)
    return max_bytes


def _explain_target(target: str, requirement: Requirement) -> ExplainedTarget:
    """Check whether a target can be built on this machine.

    Raises:
        Refused: it cannot be built, and the order requires it.
    """
    try:
        require_builder(target)
    except Refused as fault:
        if requirement == "required":
            raise
        return ExplainedTarget(target=target, wanted=requirement, missing=str(fault))
    return ExplainedTarget(target=target, wanted=requirement)

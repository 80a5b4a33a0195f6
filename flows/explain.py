"""Explain an order without running it: its steps, targets, bytes and memory.

The steps themselves compute formats, widths and bytes (``compressors.core.dry_run``), so
they are exact; peak memory is an estimate from sizes (``tasks.orchestration.memory_estimate``).
"""

from collections.abc import Mapping

from compressors.contracts import TARGETS, Artifact, Frozen, Plan, Signature
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.units import stored_bytes
from compressors.distill.training.trainable import trainable
from flows.choosing import can_be_judged, is_reported, require_budget_rows, require_taught
from flows.dry_run import bounds, dry_run_recipe
from flows.order import Order
from flows.resolve import carried_out_result, teachers_of
from flows.terms import Terms, Wanted
from infra.errors import Refused
from tasks.build import require_builder
from tasks.bundles.bundle_ref import BundleRef, find, require_measurable
from tasks.bundles.loading import load_bundle
from tasks.orchestration.documents import AS_TRAINED
from tasks.orchestration.memory_estimate import Memory, peak_memory


class ExplainedStep(Frozen):
    """One step of the recipe: the bytes after it, or why it would be skipped."""

    step: str
    bytes: int
    left_out: Reason | None = None


class ExplainedTarget(Frozen):
    """One target, and why it would be skipped if it is optional and cannot be built here."""

    target: str
    wanted: Wanted
    missing: str | None = None


class Explanation(Frozen):
    """The explanation of an order for the current machine and stores."""

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
        CompressionError: the order cannot be run: a limit on a number that is not measured, a
            custom step with nothing to do, or no step that fits.
    """
    order = terms if isinstance(terms, Order) else Order.model_validate(terms.model_dump())
    subject = find(order.model)
    require_measurable(subject, order.limits)
    require_taught(order)
    teachers = teachers_of(order, subject)
    before = carried_out_result(order)
    loaded = load_bundle(subject.artifact)
    signature = loaded.manifest.signature
    teacher_artifacts = tuple(teacher.artifact for teacher in teachers)
    model, steps, trained = _steps(order, subject, signature, loaded.model, teacher_artifacts)
    least, most = bounds(order, subject, signature, loaded.model, teacher_artifacts)
    original = stored_bytes(loaded.model.module)
    plan = model.plan if model.plan is not None else Plan()
    return Explanation(
        model=f"{subject.name}@{subject.version}",
        task=subject.task,
        rows=subject.rows,
        limits=tuple(map(str, order.limits)),
        budget=order.quality_budget() if can_be_judged(order, subject) else None,
        bytes_between=(least, most),
        teachers=tuple(teacher.name for teacher in teachers),
        earlier=None if before is None else before.version,
        steps=(ExplainedStep(step=AS_TRAINED, bytes=original), *steps),
        plan=plan if before is None else _with_warnings(plan, before.report.plan),
        targets=tuple(_target(kind, wanted) for kind, wanted in order.targets.wanted().items()),
        memory=peak_memory(
            bytes_before=original,
            bytes_after=sum(line.bytes_after for line in plan.lines),
            data_bytes=max(held.artifact.bytes for held in loaded.manifest.data.values()),
            builds=any(TARGETS[kind].is_built for kind in order.targets.wanted()),
            trained_bytes=trained,
        ),
    )


def _with_warnings(plan: Plan, carried_out: Plan) -> Plan:
    """Add the warnings that a finished run of the order has from its calibration rows."""
    warnings = {line.module: line.warnings for line in carried_out.lines if line.warnings}
    return Plan(
        lines=tuple(
            line.model_copy(update={"warnings": warnings.get(line.module, line.warnings)})
            for line in plan.lines
        )
    )


def _steps(
    order: Order,
    subject: BundleRef,
    signature: Signature,
    model: Model,
    teachers: tuple[Artifact, ...],
) -> tuple[Model, list[ExplainedStep], int]:
    """Dry-run the recipe as if every first option were within the budget.

    Returns:
        The result, the state after each step, and the most bytes that one step trains.
    """
    require_budget_rows(order, subject)
    stages, left_out = dry_run_recipe(order, subject, signature, model, teachers)
    results = iter(stages[1:])
    foreseen = []
    for place, step in enumerate(order.recipe()):
        if place not in left_out:
            _, model = next(results)
        why = left_out.get(place)
        if is_reported(why):
            size = stored_bytes(model.module)
            foreseen.append(ExplainedStep(step=step.kind, bytes=size, left_out=why))
    return model, foreseen, _trained(order, stages, left_out)


def _trained(
    order: Order, stages: tuple[tuple[str, Model], ...], left_out: Mapping[int, Reason]
) -> int:
    """Return the most bytes of tensors that one step of the order trains."""
    most = 0
    (_, model), *results = stages
    after = iter(results)
    for place, step in enumerate(order.recipe()):
        if place in left_out:
            continue
        training = getattr(step, "training", None)
        if training is not None:
            names = set(trainable(model.module, tables=training.tables))
            tensors = (*model.module.named_parameters(), *model.module.named_buffers())
            most = max(most, sum(held.nbytes for name, held in tensors if name in names))
        _, model = next(after)
    return most


def _target(kind: str, wanted: Wanted) -> ExplainedTarget:
    try:
        require_builder(kind)
    except Refused as fault:
        if wanted == "required":
            raise
        return ExplainedTarget(target=kind, wanted=wanted, missing=str(fault))
    return ExplainedTarget(target=kind, wanted=wanted)

"""What an order would run, and what it would come to, without running it.

Formats, widths and bytes are worked out by the steps themselves (``compressors.outline``), so
they are exact; peak memory is an estimate from sizes (``tasks.memory``).
"""

from compressors.contracts import Artifact, Bench, Frozen, Part, Plan, Schema, Split, TargetKind
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.errors import NothingToCompress
from compressors.model import Model
from compressors.outline import outline
from compressors.steps import AnyStep
from compressors.units import Unit, stored_bytes
from flows.order import Order
from flows.recipe import looked_at, need_budget_rows, need_taught, split_name, through
from flows.resolve import already, teachers_of
from flows.terms import Terms, Wanted
from infra.errors import Refused
from tasks.build import need_builder
from tasks.documents import AS_TRAINED, Idle
from tasks.loading import load_bundle
from tasks.memory import Memory, peak_memory
from tasks.subject import Subject, find, need_measurable

Trains = FineTune | Distill


class Foreseen(Frozen):
    """One step of the recipe: what is left after it, or why it would be left out."""

    step: str
    bytes: int
    idle: str | None = None


class ForeseenTarget(Frozen):
    """One target, and why it would be left out, if it is optional and cannot be built here."""

    target: TargetKind
    wanted: Wanted
    missing: str | None = None


class Explanation(Frozen):
    """What an order means on this machine today."""

    model: str
    task: str
    rows: dict[str, int]
    limits: tuple[str, ...]
    budget: float | None
    teachers: tuple[str, ...]
    earlier: str | None
    steps: tuple[Foreseen, ...]
    plan: Plan
    targets: tuple[ForeseenTarget, ...]
    memory: Memory


def explain(terms: Terms) -> Explanation:
    """Work out what an order would do.

    The bundle is fetched, verified and loaded as tensors of a mapped file; nothing is compressed,
    built, measured or stored.

    Raises:
        Refused: there is no such bundle, it is unsafe, or a required target cannot be built here.
        CompressionError: the order could not be carried out: a limit on a number that is not
            measured, a step of one's own with nothing to do, or no step that fits.
    """
    order = terms if isinstance(terms, Order) else Order.model_validate(terms.model_dump())
    subject = find(order.model)
    need_measurable(subject, order.limits)
    need_taught(order)
    teachers = teachers_of(order, subject)
    before = already(order)
    loaded = load_bundle(subject.artifact)
    schema = loaded.manifest.signature
    heard = tuple(teacher.artifact for teacher in teachers)
    model, steps = _steps(order, subject, schema, loaded.model, heard)
    original = stored_bytes(loaded.model.module)
    plan = model.plan if model.plan is not None else Plan()
    return Explanation(
        model=f"{subject.name}@{subject.version}",
        task=subject.task,
        rows=subject.rows,
        limits=tuple(map(str, order.limits)),
        budget=order.budget,
        teachers=tuple(teacher.name for teacher in teachers),
        earlier=None if before is None else before.version,
        steps=(Foreseen(step=AS_TRAINED, bytes=original), *steps),
        plan=plan if before is None else _with_warnings(plan, before.report.plan),
        targets=tuple(_target(kind, wanted) for kind, wanted in order.targets.wanted().items()),
        memory=peak_memory(
            bytes_before=original,
            bytes_after=sum(line.bytes_after for line in plan.lines),
            data_bytes=max(held.artifact.bytes for held in loaded.manifest.data.values()),
            builds=any(kind != "onnxruntime" for kind in order.targets.wanted()),
            trained_bytes=_trained(order, loaded.model),
        ),
    )


def _with_warnings(plan: Plan, carried_out: Plan) -> Plan:
    """Add what a finished run of the order found out on its calibration rows."""
    warnings = {line.module: line.warning for line in carried_out.lines if line.warning is not None}
    return Plan(
        lines=tuple(
            line.model_copy(update={"warning": warnings.get(line.module, line.warning)})
            for line in plan.lines
        )
    )


def _steps(
    order: Order,
    subject: Subject,
    schema: Schema,
    model: Model,
    teachers: tuple[Artifact, ...],
) -> tuple[Model, list[Foreseen]]:
    """Outline the recipe on the very way that a run takes."""

    def attempt(step: AnyStep, source: Model) -> Model | Idle:
        held = _rows(looked_at(step, subject), subject)
        bench = Bench(signature=schema, teachers=teachers, **held)
        try:
            return outline(step, source, bench)
        except NothingToCompress as fault:
            return Idle(reason=str(fault))

    need_budget_rows(order, subject)
    stages, idle = through(order, subject, model, attempt)  # as if the budget held for all
    made = iter(stages[1:])
    found = []
    for place, step in enumerate(order.recipe()):
        if place not in idle:
            _, model = next(made)
        held = stored_bytes(model.module)
        found.append(Foreseen(step=step.kind, bytes=held, idle=idle.get(place)))
    return model, found


def _rows(parts: tuple[Part, ...], subject: Subject) -> dict[str, Split]:
    """The rows a step would see, counted but not prepared: an outline reads none."""
    return {
        part: Split(path="", sha256="0" * 64, rows=subject.rows[split_name(part, subject)])
        for part in parts
    }


def _trained(order: Order, model: Model) -> int:
    """Bytes of the tables that a step of the order trains."""
    if not any(step.training.tables for step in order.recipe() if isinstance(step, Trains)):
        return 0
    return sum(unit.bytes for unit in Unit.of(model.module) if unit.role == "table")


def _target(kind: TargetKind, wanted: Wanted) -> ForeseenTarget:
    try:
        need_builder(kind)
    except Refused as fault:
        if wanted == "required":
            raise
        return ForeseenTarget(target=kind, wanted=wanted, missing=str(fault))
    return ForeseenTarget(target=kind, wanted=wanted)

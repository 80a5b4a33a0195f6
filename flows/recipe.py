"""Apply a recipe: the steps in order, within the budget, and the effect of each step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from compressors.contracts import Artifact, Estimate, Part
from compressors.contracts.reasons import Reason
from compressors.core.registries import AnyStep
from flows.choosing import (
    SOFT_LABELS,
    allowed_steps,
    can_be_judged,
    is_reported,
    is_taught,
    parts_of_step,
    require_budget_rows,
    split_name,
)
from flows.dry_run import least_bytes
from flows.order import Order
from flows.presets import BEFORE
from flows.run import Run
from infra.bundle.bundle_folder import read
from infra.settings import load_settings
from tasks.compress import compress as compress_step
from tasks.evaluation.budget import quality_loss
from tasks.orchestration.documents import AS_TRAINED, NotApplicable, PreparedRows, Ranking, Scored
from tasks.orchestration.outages import wait_out
from tasks.orchestration.workspace import local
from tasks.rank import rank
from tasks.score import average, score
from tasks.stages import measure_stages


@dataclass(frozen=True)
class Compressed:
    """The result of a recipe: every stage from the untouched model on, and the skipped steps.

    Attributes:
        order: the applied order; that of an earlier preset if it results in fewer bytes.
        stages: the result of each step.
        left_out_steps: reasons of skipped steps, by the step's place in the recipe.
        remarks: remarks for the report: the budget and its used part, a fallback.
    """

    order: Order
    stages: tuple[tuple[str, Artifact], ...]
    left_out_steps: dict[int, Reason]
    remarks: tuple[Reason, ...] = ()

    @property
    def bundle(self) -> Artifact:
        """The bundle of the last stage."""
        return self.stages[-1][1]

    def recipe(self) -> tuple[AnyStep, ...]:
        """Return the steps that were tried, without options that were not needed."""
        return tuple(step for _, step in self._tried())

    def left_out(self) -> dict[str, Reason]:
        """Return the reasons of skipped steps, by their names in reports."""
        tried = self._tried()
        kinds = [step.kind for _, step in tried]
        return {
            step.kind
            + (
                f" (step {number} of the recipe)" if kinds.count(step.kind) > 1 else ""
            ): self.left_out_steps[place]
            for number, (place, step) in enumerate(tried, 1)
            if place in self.left_out_steps
        }

    def _tried(self) -> list[tuple[int, AnyStep]]:
        return [
            (place, step)
            for place, step in enumerate(self.order.recipe())
            if is_reported(self.left_out_steps.get(place))
        ]


def carry_out(run: Run, excluded: Mapping[str, str] = MappingProxyType({})) -> Compressed:
    """Apply the steps of an order to a pulled bundle.

    A preset's result never has more bytes than that of the previous preset: if it would, the
    earlier preset is applied and its result is used.

    Args:
        run: the order; its progress receives the name of each step.
        excluded: units that no step of a preset may change, with the reasons.

    Raises:
        CompressionError: as ``allowed_steps``; or the order has a budget that cannot be measured.
    """
    order = run.order
    require_budget_rows(order, run.model)
    own = _carried_out(run, excluded)
    before = BEFORE.get(order.preset)
    if before is None:
        return own
    earlier = replace(run, order=order.model_copy(update={"preset": before}))
    size = weight_bytes(own.bundle)
    least = partial(least_bytes, earlier.order, run.model, run.model.artifact)
    if before != "small" and wait_out(least) >= size:
        return own  # known from the dry run, without applying it
    other = carry_out(earlier, excluded)
    other_size = weight_bytes(other.bundle)
    if other_size >= size:
        return own
    remark = Reason(
        "earlier_preset_smaller",
        preset=order.preset,
        bytes=size,
        earlier=other.order.preset,
        earlier_bytes=other_size,
    )
    return replace(other, remarks=(remark, *other.remarks))


def _carried_out(run: Run, excluded: Mapping[str, str]) -> Compressed:
    learned: set[str] = set()  # stages that have learned from the teachers, or follow such a stage

    def attempt(step: AnyStep, source: Artifact) -> Artifact | NotApplicable:
        run.progress.stage(step.kind)
        taught = is_taught(step) or source.sha256 in learned
        teachers = run.teachers if taught else ()
        result = _apply_step(replace(run, teachers=teachers), step, source, excluded)
        if taught and not isinstance(result, NotApplicable):
            learned.add(result.sha256)
        return result

    judged = can_be_judged(run.order, run.model)
    spent = partial(over_budget, run) if judged else None
    stages, left_out = allowed_steps(run.order, run.model, run.model.artifact, attempt, spent)
    budget = run.order.quality_budget()
    if not judged or budget is None:
        return Compressed(run.order, stages, left_out)
    remark = budget_remark(run, budget, stages[-1][1])
    return Compressed(run.order, stages, left_out, (remark,))


def weight_bytes(bundle: Artifact) -> int:
    """Return the bytes of all weights of a compressed bundle, as its plan counts them."""
    plan = wait_out(lambda: read(local(bundle))).plan
    return sum(line.bytes_after for line in plan.lines) if plan is not None else 0


def measure_recipe_stages(
    run: Run, compressed: Compressed, test: PreparedRows, ranking: Ranking | None
) -> Artifact:
    """Measure the quality of every stage on the test rows, for the report.

    These numbers do not affect any choice.
    """

    def predictions(bundle: Artifact) -> Artifact:
        if ranking is None:
            return run.call(score, bundle=bundle, split=test.artifact, rows=test.rows)
        return run.call(rank, bundle=bundle, test=test, ranking=ranking)

    scored = tuple(
        Scored(step=step, bundle=bundle, score=predictions(bundle))
        for step, bundle in compressed.stages
    )
    return run.call(
        measure_stages,
        scored=scored,
        metric=run.model.metric,
        test=test.artifact,
        test_rows=test.rows,
        seed=run.order.seed,
    )


def budget_loss(run: Run, stage: Artifact) -> Estimate:
    """Measure the metric a stage has lost against the untouched model, on validation rows."""
    validation = run.prepared("validation")

    def scored(name: str, bundle: Artifact) -> Scored:
        predictions = run.call(
            score, bundle=bundle, split=validation.artifact, rows=validation.rows
        )
        return Scored(step=name, bundle=bundle, score=predictions)

    return run.call(
        quality_loss,
        original=scored(AS_TRAINED, run.model.artifact),
        now=scored("now", stage),
        metric=run.model.metric,
        validation=validation.artifact,
        rows=validation.rows,
        seed=run.order.seed,
    )


def over_budget(run: Run, stage: Artifact) -> Reason | None:
    """Return why a stage is over the order's budget; None if it is within."""
    budget = run.order.quality_budget()
    loss = budget_loss(run, stage).point
    if budget is None or loss <= budget:
        return None
    return Reason("over_budget", loss=loss, metric=run.model.metric, budget=budget)


def budget_remark(run: Run, budget: float, result: Artifact) -> Reason:
    """Format the budget, and the part of it that the result has used."""
    metric = run.model.metric
    loss = budget_loss(run, result).point
    origin = Reason("budget_ordered")
    if run.order.budget is None:
        origin = Reason("budget_of_preset", preset=run.order.preset)
    if loss < 0:
        return Reason("quality_gained", budget=budget, metric=metric, origin=origin, gain=-loss)
    if loss > budget:
        return Reason("quality_over_budget", budget=budget, metric=metric, origin=origin, loss=loss)
    return Reason("quality_lost", budget=budget, metric=metric, origin=origin, loss=loss)


def _apply_step(
    run: Run, step: AnyStep, source: Artifact, excluded: Mapping[str, str]
) -> Artifact | NotApplicable:
    return run.call(
        compress_step,
        source=source,
        step=step,
        splits=_splits(run, step),
        original=run.model.artifact,
        teachers=tuple(teacher.artifact for teacher in run.teachers),
        seed=run.order.seed,
        preset=run.order.preset != "custom",
        excluded=dict(excluded),
        # Training on another device results in other bits; all other work is bit-identical.
        device=load_settings().device if "validation" in step.needs else "cpu",
        code=run.code,
    )


def _splits(run: Run, step: AnyStep) -> dict[Part, Artifact]:
    """Return only the splits that a step may read, so that no other is part of its cache key."""
    splits: dict[Part, Artifact] = {}
    for part in parts_of_step(step, run.model):
        rows = run.prepared(split_name(part, run.model))
        splits[part] = _soft_labels(run, rows) if part in SOFT_LABELS else rows.artifact
    return splits


def _soft_labels(run: Run, rows: PreparedRows) -> Artifact:
    """Average the predictions of the untouched model with those of the teachers."""
    own = run.call(score, bundle=run.model.artifact, split=rows.artifact, rows=rows.rows)
    if not run.teachers:
        return own
    others = (
        run.call_for(teacher, score, bundle=teacher.artifact, split=rows.artifact, rows=rows.rows)
        for teacher in run.teachers
    )
    return run.call(average, scores=(own, *others), output=run.teachers[0].output)

"""Apply the steps of a recipe within the quality budget, and measure the result of each step.

``wait_out`` calls a function, and repeats the call while a service does not respond.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

from compressors.contracts import SOFT_LABELS, Artifact, Estimate, Part
from compressors.contracts.reasons import Reason
from compressors.core.registries import AnyStep
from flows.dry_run import min_weight_bytes
from flows.order import Order
from flows.presets import PREVIOUS_PRESET
from flows.run import Run
from flows.step_selection import (
    has_measurable_budget,
    is_reported,
    learns_from_teachers,
    parts_of_step,
    require_budget_rows,
    select_steps,
    split_name,
)
from infra.bundle.bundle_folder import SplitName, read
from infra.settings import load_settings
from tasks.bundles.teachers import Teacher
from tasks.compress import compress as compress_step
from tasks.evaluation.budget import measure_quality_loss
from tasks.orchestration.documents import (
    AS_TRAINED,
    NotApplicable,
    PreparedRows,
    Ranking,
    ScoredStage,
)
from tasks.orchestration.outages import wait_out
from tasks.orchestration.workspace import local
from tasks.prepare import prepare_for_teacher
from tasks.retrieval.rank import rank
from tasks.score import average, read_scores, score
from tasks.stages import measure_stages


@dataclass(frozen=True)
class Compressed:
    """The result of a recipe.

    Attributes:
        order: the applied order. Its preset is the previous one if that results in fewer bytes.
        stages: name and bundle of each stage: the untouched model, then each applied step.
        skip_reasons: reasons of skipped steps, by the step's index in the recipe.
        remarks: remarks for the report, such as the budget and how much of it was used.
    """

    order: Order
    stages: tuple[tuple[str, Artifact], ...]
    skip_reasons: dict[int, Reason]
    remarks: tuple[Reason, ...] = ()

    @property
    def bundle(self) -> Artifact:
        """The bundle of the last stage."""
        return self.stages[-1][1]

    def recipe(self) -> tuple[AnyStep, ...]:
        """Return the steps that a report lists.

        These are all except those skipped for a reason in ``flows.step_selection.UNREPORTED``.
        """
        return tuple(step for _, step in self._list_reported_steps())

    def skip_reasons_by_step(self) -> dict[str, Reason]:
        """Return the reasons of skipped steps, by the steps' names in reports."""
        steps = self._list_reported_steps()
        kinds = [step.kind for _, step in steps]
        reasons = {}
        for number, (index, step) in enumerate(steps, 1):
            if index in self.skip_reasons:
                suffix = f" (step {number} of the recipe)" if kinds.count(step.kind) > 1 else ""
                reasons[f"{step.kind}{suffix}"] = self.skip_reasons[index]
        return reasons

    def _list_reported_steps(self) -> list[tuple[int, AnyStep]]:
        """Return index and step of each step that a report lists."""
        return [
            (index, step)
            for index, step in enumerate(self.order.recipe())
            if is_reported(self.skip_reasons.get(index))
        ]


def apply_recipe(run: Run, excluded: Mapping[str, str] = MappingProxyType({})) -> Compressed:
    """Apply the steps of an order to its bundle.

    If the result of a preset could have more bytes than that of the previous preset, that preset is
    applied too, and the smaller result is returned.

    Args:
        run: the run context of the order.
        excluded: units that no step of a preset may change, each with its reason.

    Raises:
        CompressionError: no step fits, a step of preset ``custom`` cannot be applied, or the order
            has a budget that cannot be measured.
    """
    order = run.order
    require_budget_rows(order, run.model)
    result = _apply_steps(run, excluded)
    previous_preset = PREVIOUS_PRESET.get(order.preset)
    if previous_preset is None:
        return result
    previous_run = replace(run, order=order.model_copy(update={"preset": previous_preset}))
    size = count_weight_bytes(result.bundle)
    lower_bound = partial(min_weight_bytes, previous_run.order, run.model)
    # The previous preset is not applied if it cannot result in fewer bytes. This is not checked for
    # "small": its lower bound assumes that as many rows as possible are pruned, which is rare.
    if previous_preset != "small" and wait_out(lower_bound) >= size:
        return result
    previous_result = apply_recipe(previous_run, excluded)
    previous_size = count_weight_bytes(previous_result.bundle)
    if previous_size >= size:
        return result
    remark = Reason(
        "earlier_preset_smaller",
        preset=order.preset,
        bytes=size,
        earlier=previous_result.order.preset,
        earlier_bytes=previous_size,
    )
    return replace(previous_result, remarks=(remark, *previous_result.remarks))


def _apply_steps(run: Run, excluded: Mapping[str, str]) -> Compressed:
    """Apply the steps of an order, without a comparison with the previous preset."""
    from_teachers: set[str] = set()  # hashes of bundles that depend on the teachers

    def apply_step(step: AnyStep, source: Artifact) -> Artifact | NotApplicable:
        run.progress.start_phase(step.kind)
        depends_on_teachers = learns_from_teachers(step) or source.sha256 in from_teachers
        teachers = run.teachers if depends_on_teachers else ()
        result = _apply_step(replace(run, teachers=teachers), step, source, excluded)
        if depends_on_teachers and not isinstance(result, NotApplicable):
            from_teachers.add(result.sha256)
        return result

    has_budget = has_measurable_budget(run.order, run.model)
    check = partial(find_budget_violation, run) if has_budget else None
    stages, reasons = select_steps(run.order, run.model, run.model.artifact, apply_step, check)
    budget = run.order.quality_budget()
    if not has_budget or budget is None:
        return Compressed(run.order, stages, reasons)
    remark = build_budget_remark(run, budget, stages[-1][1])
    return Compressed(run.order, stages, reasons, (remark,))


def count_weight_bytes(bundle: Artifact) -> int:
    """Return the bytes of all weights of a compressed bundle, according to its plan."""
    plan = wait_out(lambda: read(local(bundle))).plan
    return plan.bytes_after if plan is not None else 0


def measure_recipe_stages(
    run: Run, compressed: Compressed, test: PreparedRows, ranking: Ranking | None
) -> Artifact:
    """Measure the quality of every stage on the test rows.

    The numbers are only reported; they do not affect which steps are applied.
    """
    scored = tuple(
        ScoredStage(step=step, bundle=bundle, score=_score_rows(run, bundle, test, ranking))
        for step, bundle in compressed.stages
    )
    return run.call(
        measure_stages,
        scored=scored,
        metrics=run.model.metrics,
        test=test.artifact,
        test_rows=test.rows,
        seed=run.order.seed,
    )


def _score_rows(
    run: Run, bundle: Artifact, rows: PreparedRows, ranking: Ranking | None
) -> Artifact:
    """Return a model's scores of some rows; with a ranking, the metrics of each query."""
    if ranking is None:
        return run.call(score, bundle=bundle, split=rows.artifact, rows=rows.rows)
    return run.call(rank, bundle=bundle, test=rows, ranking=ranking)


def measure_budget_loss(run: Run, stage: Artifact) -> tuple[str, Estimate]:
    """Measure how much of its metric a stage loses against the untouched model.

    The loss is measured on validation rows.

    Returns:
        The metric and its loss; with several outputs, those of the output that loses most.
    """
    validation = run.prepare_split("validation")

    ranking = run.prepare_ranking("validation")

    def score_stage(name: str, bundle: Artifact) -> ScoredStage:
        predictions = _score_rows(run, bundle, validation, ranking)
        return ScoredStage(step=name, bundle=bundle, score=predictions)

    original = score_stage(AS_TRAINED, run.model.artifact)
    now = score_stage("now", stage)  # the model as compressed so far
    losses = {
        metric: run.call(
            measure_quality_loss,
            original=original,
            now=now,
            metric=metric,
            validation=validation.artifact,
            rows=validation.rows,
            seed=run.order.seed,
        )
        for metric in run.model.metrics
    }
    return max(losses.items(), key=lambda item: item[1].point)


def find_budget_violation(run: Run, stage: Artifact) -> Reason | None:
    """Return why a stage is over the order's budget; None if it is within."""
    budget = run.order.quality_budget()
    metric, loss = measure_budget_loss(run, stage)
    if budget is None or loss.point <= budget:
        return None
    return Reason("over_budget", loss=loss.point, metric=metric, budget=budget)


def build_budget_remark(run: Run, budget: float, result: Artifact) -> Reason:
    """Return the remark that states the budget and the loss or gain of the result."""
    metric, estimate = measure_budget_loss(run, result)
    loss = estimate.point
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
    """Run the task that applies one step to a stored bundle."""
    return run.call(
        compress_step,
        source=source,
        step=step,
        splits=_select_splits_of_step(run, step),
        original=run.model.artifact,
        teachers=tuple(teacher.artifact for teacher in run.teachers),
        seed=run.order.seed,
        preset=run.order.preset != "custom",  # a step of a preset is skipped if it does not fit
        excluded=dict(excluded),
        # Only training depends on the device, and every step that trains needs validation rows. All
        # other results are bit-identical on any device, so their cache keys do not contain it.
        device=load_settings().device if "validation" in step.needs else "cpu",
        context_digest=run.context_digest,  # part of the cache key
    )


def _select_splits_of_step(run: Run, step: AnyStep) -> dict[Part, Artifact]:
    """Return the splits that a step may read; others must not become part of its cache key."""
    splits: dict[Part, Artifact] = {}
    for part in parts_of_step(step, run.model):
        name = split_name(part, run.model)
        rows = run.prepare_split(name)
        is_teaching = part in SOFT_LABELS
        splits[part] = _average_soft_labels(run, rows, name) if is_teaching else rows.artifact
    return splits


def _average_soft_labels(run: Run, rows: PreparedRows, split: SplitName) -> Artifact:
    """Return the average of the predictions of the untouched model and of the teachers."""
    original = run.call(score, bundle=run.model.artifact, split=rows.artifact, rows=rows.rows)
    if not run.teachers:
        return original
    forms = tuple(output.form for output in run.model.outputs)  # logit, probability or score
    return run.call(
        average,
        scores=(original, *(_score_by_teacher(run, item, rows, split) for item in run.teachers)),
        forms=forms,
        forms_of_teachers=(forms, *(teacher.forms for teacher in run.teachers)),
    )


def _score_by_teacher(run: Run, teacher: Teacher, rows: PreparedRows, split: SplitName) -> Artifact:
    """Return the predictions of an additional teacher for the rows of a split of the student.

    The teacher is a bundle, or columns of the student's data that contain its predictions.
    """
    if teacher.columns:
        return run.call(
            read_scores,
            bundle=run.model.artifact,
            split=split,
            columns=teacher.columns,
            forms=teacher.forms,
        )
    inputs = _prepare_teacher_inputs(run, teacher, rows, split)
    return run.call_for(teacher, score, bundle=teacher.artifact, split=inputs, rows=rows.rows)


def _prepare_teacher_inputs(
    run: Run, teacher: Teacher, rows: PreparedRows, split: SplitName
) -> Artifact:
    """Return a teacher's inputs for the rows of a split: the student's, if both have the same."""
    if not teacher.needs_separate_inputs:
        return rows.artifact
    return run.call_for(
        teacher,
        prepare_for_teacher,
        bundle=run.model.artifact,
        split=split,
        teacher=teacher.artifact,
    )


def check_teachers(run: Run) -> None:
    """Read the data of all teachers, so that an order fails at its beginning if a part is missing.

    Raises:
        DataRefused: a column is missing, or a value cannot be used.
    """
    parts = {part for step in run.order.recipe() for part in parts_of_step(step, run.model)}
    splits = {split_name(part, run.model) for part in parts if part in SOFT_LABELS}
    for split in sorted(splits & set(run.model.rows)):
        for teacher in run.teachers:
            if teacher.columns:
                _score_by_teacher(run, teacher, run.prepare_split(split), split)
            elif teacher.needs_separate_inputs:
                _prepare_teacher_inputs(run, teacher, run.prepare_split(split), split)

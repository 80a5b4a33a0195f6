"""Carry out a recipe: the steps in order, within the budget, and what each of them was worth."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from compressors.contracts import Artifact, Estimate, Part, digest
from compressors.contracts.reasons import Reason
from compressors.core.registries import AnyStep
from compressors.core.runner import needs
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
from infra.bundle.bundle_folder import SplitName, read
from infra.settings import load_settings
from tasks.bundles.bundle_ref import BundleRef
from tasks.bundles.teachers import Teacher
from tasks.compress import compress as compress_step
from tasks.evaluation.budget import quality_loss
from tasks.orchestration.documents import AS_TRAINED, NotApplicable, PreparedRows, Ranking, Scored
from tasks.orchestration.outages import wait_out
from tasks.orchestration.policy import kept, remembered
from tasks.orchestration.progress import Progress
from tasks.orchestration.workspace import local, store
from tasks.prepare import prepare
from tasks.rank import rank
from tasks.score import average, score
from tasks.stages import measure_stages


@dataclass(frozen=True)
class Compressed:
    """The result of a recipe: every stage from the untouched model on, and the steps left out.

    Attributes:
        order: the order that was carried out; of an earlier preset where that gave fewer bytes.
        stages: what each step resulted in.
        left_out_steps: why steps were left out, by the step's place in the recipe.
        remarks: for the report: the budget and what was lost of it, a fallback.
    """

    order: Order
    stages: tuple[tuple[str, Artifact], ...]
    left_out_steps: dict[int, Reason]
    remarks: tuple[Reason, ...] = ()

    @property
    def bundle(self) -> Artifact:
        """The last stage."""
        return self.stages[-1][1]

    def recipe(self) -> tuple[AnyStep, ...]:
        """The steps that were tried: without options that were not needed."""
        return tuple(step for _, step in self._tried())

    def left_out(self) -> dict[str, Reason]:
        """Why steps were left out, by the names that reports give them."""
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


def carry_out(
    order: Order,
    subject: BundleRef,
    bundle: Artifact,
    teachers: tuple[Teacher, ...],
    code: str,
    progress: Progress,
    excluded: Mapping[str, str] = MappingProxyType({}),
) -> Compressed:
    """Apply the steps of an order to a pulled bundle.

    A preset's result never has more bytes than that of the preset before it: where it would, the
    earlier preset is carried out, and its result is the result.

    Args:
        order: whose steps.
        subject: the bundle they are for.
        bundle: the pulled bundle.
        teachers: whose predictions steps learn from, next to the original's.
        code: digest of the architecture's code and the attempt; part of cache keys.
        progress: receives each step's name.
        excluded: units that no step of a preset may change, with the reasons.

    Raises:
        CompressionError: as ``allowed_steps``; or the order has a budget that cannot be measured.
    """
    require_budget_rows(order, subject)
    own = _carried_out(order, subject, bundle, teachers, code, progress, excluded)
    before = BEFORE.get(order.preset)
    if before is None:
        return own
    earlier = order.model_copy(update={"preset": before})
    size = weight_bytes(own.bundle)
    if before != "small" and wait_out(lambda: least_bytes(earlier, subject, bundle)) >= size:
        return own  # the dry run says so, without carrying it out
    other = carry_out(earlier, subject, bundle, teachers, code, progress, excluded)
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


def _carried_out(
    order: Order,
    subject: BundleRef,
    bundle: Artifact,
    teachers: tuple[Teacher, ...],
    code: str,
    progress: Progress,
    excluded: Mapping[str, str],
) -> Compressed:
    learned: set[str] = set()  # stages that have learned from the teachers, or come from one

    def attempt(step: AnyStep, source: Artifact) -> Artifact | NotApplicable:
        progress.stage(step.kind)
        taught = is_taught(step) or source.sha256 in learned
        used = teachers if taught else ()
        result = _made(order, step, source, subject, bundle, used, code, excluded)
        if taught and not isinstance(result, NotApplicable):
            learned.add(result.sha256)
        return result

    def spent(now: Artifact) -> Reason | None:
        return over_budget(order, subject, bundle, now, code)

    judged = can_be_judged(order, subject)
    stages, left_out = allowed_steps(order, subject, bundle, attempt, spent if judged else None)
    budget = order.quality_budget()
    if not judged or budget is None:
        return Compressed(order, stages, left_out)
    remark = budget_remark(order, budget, subject, bundle, stages[-1][1], code)
    return Compressed(order, stages, left_out, (remark,))


def weight_bytes(bundle: Artifact) -> int:
    """Bytes of all weights of a compressed bundle, as its plan counts them."""
    plan = wait_out(lambda: read(local(bundle))).plan
    return sum(line.bytes_after for line in plan.lines) if plan is not None else 0


def measure_recipe_stages(
    compressed: Compressed,
    subject: BundleRef,
    test: Artifact,
    ranking: Ranking | None,
    seed: int,
    code: str,
) -> Artifact:
    """Every stage's quality on the test rows, for the report; nothing is chosen by it."""
    rows = subject.rows["test"]

    def predictions(bundle: Artifact) -> Artifact:
        if ranking is None:
            return kept(score, bundle=bundle, split=test, rows=rows, code=code)
        asked = PreparedRows(artifact=test, rows=rows)
        return kept(rank, bundle=bundle, test=asked, ranking=ranking, code=code)

    scored = tuple(
        Scored(step=step, bundle=bundle, score=predictions(bundle))
        for step, bundle in compressed.stages
    )
    return kept(
        measure_stages,
        scored=scored,
        metric=subject.metric,
        test=test,
        test_rows=rows,
        seed=seed,
        code=code,
    )


def ranking_of(subject: BundleRef, bundle: Artifact, code: str) -> Ranking | None:
    """What a retrieval model is ranked on beside the test rows; None for other tasks."""
    if subject.task != "retrieval":
        return None

    def rows_of(split: SplitName) -> PreparedRows:
        prepared = kept(prepare, bundle=bundle, split=split, code=code)
        return PreparedRows(artifact=prepared, rows=subject.rows[split])

    earlier: tuple[SplitName, ...] = ("train", "calibration", "validation")
    seen = tuple(rows_of(split) for split in earlier if split in subject.rows)
    return Ranking(items=rows_of("items"), seen=seen)


def budget_loss(
    order: Order, subject: BundleRef, bundle: Artifact, now: Artifact, code: str
) -> Estimate:
    """What a stage has lost of the metric against the untouched model, on validation rows."""
    rows = subject.rows["validation"]
    split = kept(prepare, bundle=bundle, split="validation", code=code)
    original, candidate = (
        Scored(
            step=word, bundle=it, score=kept(score, bundle=it, split=split, rows=rows, code=code)
        )
        for word, it in ((AS_TRAINED, bundle), ("now", now))
    )
    loss: Estimate = remembered(
        quality_loss,
        original=original,
        now=candidate,
        metric=subject.metric,
        validation=split,
        rows=rows,
        seed=order.seed,
        code=code,
    )
    return loss


def over_budget(
    order: Order, subject: BundleRef, bundle: Artifact, now: Artifact, code: str
) -> Reason | None:
    """Why a stage is over the order's budget; None if it is within."""
    budget = order.quality_budget()
    loss = budget_loss(order, subject, bundle, now, code).point
    if budget is None or loss <= budget:
        return None
    return Reason("over_budget", loss=loss, metric=subject.metric, budget=budget)


def budget_remark(
    order: Order,
    budget: float,
    subject: BundleRef,
    bundle: Artifact,
    result: Artifact,
    code: str,
) -> Reason:
    """The budget, and what the result has lost of it."""
    loss = budget_loss(order, subject, bundle, result, code).point
    origin = Reason("budget_ordered")
    if order.budget is None:
        origin = Reason("budget_of_preset", preset=order.preset)
    if loss < 0:
        return Reason(
            "quality_gained", budget=budget, metric=subject.metric, origin=origin, gain=-loss
        )
    if loss > budget:
        return Reason(
            "quality_over_budget", budget=budget, metric=subject.metric, origin=origin, loss=loss
        )
    return Reason("quality_lost", budget=budget, metric=subject.metric, origin=origin, loss=loss)


def _made(
    order: Order,
    step: AnyStep,
    source: Artifact,
    subject: BundleRef,
    bundle: Artifact,
    teachers: tuple[Teacher, ...],
    code: str,
    excluded: Mapping[str, str],
) -> Artifact | NotApplicable:
    """The result of one step, if it is an artifact one that is still stored."""
    made: Artifact | NotApplicable = remembered(
        compress_step,
        lambda result: isinstance(result, NotApplicable) or store().manifest(result),
        source=source,
        step=step,
        splits=_splits(step, subject, bundle, teachers, code),
        original=bundle,
        teachers=tuple(teacher.artifact for teacher in teachers),
        seed=order.seed,
        preset=order.preset != "custom",
        excluded=dict(excluded),
        # Training elsewhere ends with other bits; all else is the same wherever it is done.
        device=load_settings().device if "validation" in needs(step) else "cpu",
        code=code,
    )
    return made


def _splits(
    step: AnyStep, subject: BundleRef, bundle: Artifact, teachers: tuple[Teacher, ...], code: str
) -> dict[Part, Artifact]:
    """What a step may look at, and no more, so that nothing else is part of its cache key."""
    splits: dict[Part, Artifact] = {}
    for part in parts_of_step(step, subject):
        split = split_name(part, subject)
        prepared = kept(prepare, bundle=bundle, split=split, code=code)
        splits[part] = prepared
        if part in SOFT_LABELS:
            rows = subject.rows[split]
            splits[part] = kept(score, bundle=bundle, split=prepared, rows=rows, code=code)
            if teachers:
                others = (
                    kept(
                        score,
                        bundle=teacher.artifact,
                        split=prepared,
                        rows=rows,
                        code=digest([code, teacher.architecture]),
                    )
                    for teacher in teachers
                )
                scores, output = (splits[part], *others), teachers[0].output
                splits[part] = kept(average, scores=scores, output=output, code=code)
    return splits

"""Select the steps of a recipe that fit the model, its data and the budget.

Used by the flow, which applies steps, and by the dry run, which only predicts their result.
"""

from collections.abc import Callable
from typing import TypeVar

from compressors.contracts import Part, task_kind
from compressors.contracts.reasons import Reason
from compressors.core.registries import AnyStep
from compressors.errors.orders import OrderRefused
from flows.order import Order
from flows.presets import Group
from infra.bundle.bundle_folder import SplitName
from tasks.bundles.bundle_ref import BundleRef
from tasks.orchestration.documents import AS_TRAINED, NotApplicable

T = TypeVar("T")

UNREPORTED = ("nothing_left", "option_not_needed")
"""Codes of the reasons why steps are left out that no report needs to mention."""


def is_reported(left_out: Reason | None) -> bool:
    """Return whether a report lists a step: it is applied, or skipped for a notable reason."""
    return left_out is None or left_out.code not in UNREPORTED


def require_budget_rows(order: Order, subject: BundleRef) -> None:
    """Raise if the order sets a budget and has no rows to measure it.

    Raises:
        CompressionError: there are no validation rows, or the task has no score per row.
    """
    if order.budget is None:
        return
    if not task_kind(subject.task).scores_rows:
        raise OrderRefused("budget_for_retrieval")
    if "validation" not in subject.rows:
        raise OrderRefused("budget_needs_validation", splits=tuple(subject.rows))


def can_be_judged(order: Order, subject: BundleRef) -> bool:
    """Return whether there is a budget, and rows to measure it."""
    rows = "validation" in subject.rows and task_kind(subject.task).scores_rows
    return order.quality_budget() is not None and rows


def allowed_steps(
    order: Order,
    subject: BundleRef,
    begin: T,
    attempt: Callable[[AnyStep, T], T | NotApplicable],
    spent: Callable[[T], Reason | None] | None = None,
) -> tuple[tuple[tuple[str, T], ...], dict[int, Reason]]:
    """Apply or dry-run the choices of an order's steps, and select those that fit.

    A preset applies to any model, so a group of its steps that does not fit this model is skipped
    as a whole, with the reason; in a custom recipe that is an error. A group that costs more
    quality than the remaining budget is also skipped, and the next option of its choice is tried.
    Later choices that begin with the same method on the same units are skipped too: they would cut
    deeper and cost more.

    Args:
        order: the order with the steps.
        subject: the order's bundle.
        begin: the input of the first step.
        attempt: returns the result of a step, given the result of the previous step.
        spent: returns why the result of a group is over the budget; None if it is within.

    Returns:
        Every stage from ``begin`` on, and the reasons of skipped steps, by their place in the
        recipe.

    Raises:
        CompressionError: a step of preset ``custom`` has nothing to do or lacks data, and no
            earlier step was over the budget, which could be the cause; or no step fits at all.
    """
    stages = [(AS_TRAINED, begin)]
    left_out: dict[int, Reason] = {}
    over: dict[str, Reason] = {}
    number = 0
    for choice in order.choices():
        taken: Group | None = None
        refused: dict[str, Reason] = {}
        for group in choice.options:
            places, number = range(number, number + len(group)), number + len(group)
            if taken is not None:
                left_out.update(dict.fromkeys(places, Reason("option_not_needed")))
                continue
            if method_and_units(group[0]) in over:
                left_out.update(dict.fromkeys(places, over[method_and_units(group[0])]))
                continue
            exempt = choice.base and group is choice.options[-1] and order.budget is None
            why = next(filter(None, (lacking(step, subject, order) for step in group)), None)
            done: list[tuple[str, T]] = []
            for step in group if why is None else ():
                result = attempt(step, (stages + done)[-1][1])
                if isinstance(result, NotApplicable):
                    (why,) = result.reasons
                    break
                done.append((step.kind, result))
            if why is not None and order.preset == "custom" and not over:
                raise OrderRefused("step_not_applicable", reason=why)
            if why is None and spent is not None and not exempt:
                why = spent(done[-1][1])
                if why is not None:
                    refused[method_and_units(group[0])] = why
            if why is None:
                taken = group
                stages += done
            else:
                reported = Reason("nothing_left") if choice.rest else why
                left_out.update(dict.fromkeys(places, reported))
        if taken is None:
            over |= refused
    if len(stages) == 1:
        raise OrderRefused(
            "no_step_fits", preset=order.preset, reasons=tuple(dict.fromkeys(left_out.values()))
        )
    return tuple(stages), left_out


def method_and_units(step: AnyStep) -> str:
    """Return a step's method and the tables or layers it applies to."""
    return step.model_dump_json(include={"kind", "tables", "layers"})


def lacking(step: AnyStep, subject: BundleRef, order: Order | None = None) -> Reason | None:
    """Return the data that a step needs and the bundle lacks, before anything runs.

    A preset applies a step that requires a budget only if validation rows can measure the loss.
    """
    if (
        step.requires_budget
        and order is not None
        and order.preset != "custom"
        and not can_be_judged(order, subject)
    ):
        if not task_kind(subject.task).scores_rows:
            return Reason("pruning_without_budget", task=subject.task)
        return Reason("pruning_not_judged", splits=tuple(subject.rows))
    if not task_kind(subject.task).scores_rows and "validation" in step.needs:
        return Reason("no_loss", step=step.kind, task=subject.task)
    wanted = dict.fromkeys(split_name(part, subject) for part in step.needs)
    missing = [split for split in wanted if split not in subject.rows]
    if not missing:
        return None
    return Reason(
        "data_missing", step=step.kind, missing=tuple(missing), splits=tuple(subject.rows)
    )


def parts_of_step(step: AnyStep, subject: BundleRef) -> tuple[Part, ...]:
    """Return the parts of the bench a step needs, and the available ones of those it can use."""
    there = (part for part in step.wants if split_name(part, subject) in subject.rows)
    return (*step.needs, *there)


SOFT_LABELS: tuple[Part, ...] = ("soft_labels", "traffic_soft_labels")


def is_taught(step: AnyStep) -> bool:
    """Return whether a step learns from the predictions of teachers."""
    return any(part in SOFT_LABELS for part in (*step.needs, *step.wants))


def require_taught(order: Order) -> None:
    """Raise if the order names teachers but no step uses them.

    Raises:
        CompressionError: lists the steps.
    """
    if order.teachers and not any(map(is_taught, order.recipe())):
        raise OrderRefused(
            "teachers_unused",
            teachers=len(order.teachers),
            steps=tuple(step.kind for step in order.recipe()),
        )


def split_name(part: Part, subject: BundleRef) -> SplitName:
    """Return the split from which a part of the bench is built."""
    match part:
        case "soft_labels":
            return "train"
        case "traffic_soft_labels":
            return "traffic"
        case "calibration":
            return subject.calibration()
    return part

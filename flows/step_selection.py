"""Select the steps of a recipe that fit the model, its data and the quality budget.

The flow applies the steps; the dry run only predicts their result. Both use ``select_steps``, so
that they agree. A recipe is a list of choices, a choice has options in order of preference, and an
option is a group of steps that are applied together (``flows/presets.py``).
"""

from collections.abc import Callable
from typing import TypeVar

from compressors.contracts import SOFT_LABELS, Part, required_parts
from compressors.contracts.reasons import Reason
from compressors.core.registries import AnyStep
from compressors.errors.orders import OrderRefused
from flows.order import Order
from flows.presets import Group
from infra.bundle.bundle_folder import SplitName
from tasks.bundles.bundle_ref import BundleRef
from tasks.orchestration.documents import AS_TRAINED, NotApplicable

T = TypeVar("T")
"""The result of a step: a stored bundle (``Artifact``) or, in a dry run, a ``Model``."""

UNREPORTED = ("nothing_left", "option_not_needed")
"""Codes of the reasons for skipped steps that reports omit.

``nothing_left``: the step is only for units that no earlier step changed, and there are none.
``option_not_needed``: an earlier option of the same choice was applied.
"""


def is_reported(skip_reason: Reason | None) -> bool:
    """Return whether reports list a step: it is applied, or skipped for a reason they mention."""
    return skip_reason is None or skip_reason.code not in UNREPORTED


def require_budget_rows(order: Order, bundle: BundleRef) -> None:
    """Raise if the order sets a budget and the bundle has no rows to measure the loss.

    Raises:
        CompressionError: there are no validation rows.
    """
    if order.budget is not None and "validation" not in bundle.rows:
        raise OrderRefused("budget_needs_validation", splits=tuple(bundle.rows))


def has_measurable_budget(order: Order, bundle: BundleRef) -> bool:
    """Return whether the order or its preset has a budget, and the bundle has validation rows."""
    return order.quality_budget() is not None and "validation" in bundle.rows


def select_steps(
    order: Order,
    bundle: BundleRef,
    original: T,
    apply_step: Callable[[AnyStep, T], T | NotApplicable],
    budget_violation: Callable[[T], Reason | None] | None = None,
) -> tuple[tuple[tuple[str, T], ...], dict[int, Reason]]:
    """Apply or dry-run the steps of an order, and keep those that fit model, data and budget.

    Each choice of the recipe keeps the first of its options that fits. A preset must work for any
    model, so an option that cannot be applied to this model is skipped; in a custom recipe that is
    an error. An option whose result is over the budget is skipped, too. If every option of a choice
    is skipped, later options that begin with a method that was over the budget on the same units
    are skipped, since they would remove even more.

    Args:
        order: the order with the steps.
        bundle: the order's bundle.
        original: the input of the first step: a stored bundle, or a model in a dry run.
        apply_step: returns the result of a step, given the result of the previous step.
        budget_violation: returns why a result is over the budget, or None if it is within. Without
            this argument, no option is compared with the budget.

    Returns:
        Name and result of each stage (``AS_TRAINED`` with ``original``, then each kept step), and
        the reasons of skipped steps by their index in the recipe.

    Raises:
        CompressionError: no step fits; or, for preset ``custom``, a step cannot be applied or lacks
            data. The latter is not raised after a step over the budget, which may be its cause.
    """
    stages = [(AS_TRAINED, original)]
    skip_reasons: dict[int, Reason] = {}
    over_budget: dict[str, Reason] = {}  # by method_and_units of the first step of an option
    next_index = 0
    for choice in order.choices():
        selected: Group | None = None
        over_budget_options: dict[str, Reason] = {}
        for group in choice.options:
            indices = range(next_index, next_index + len(group))
            next_index += len(group)
            if selected is not None:
                skip_reasons.update(dict.fromkeys(indices, Reason("option_not_needed")))
                continue
            method = method_and_units(group[0])
            if method in over_budget:
                skip_reasons.update(dict.fromkeys(indices, over_budget[method]))
                continue
            is_exempt = (
                choice.last_option_is_exempt
                and group is choice.options[-1]
                and order.budget is None
            )
            missing = (missing_data_reason(step, bundle, order) for step in group)
            reason = next(filter(None, missing), None)
            group_stages: list[tuple[str, T]] = []
            for step in group if reason is None else ():
                result = apply_step(step, (stages + group_stages)[-1][1])
                if isinstance(result, NotApplicable):
                    (reason,) = result.reasons
                    break
                group_stages.append((step.kind, result))
            if reason is not None and order.preset == "custom" and not over_budget:
                raise OrderRefused("step_not_applicable", reason=reason)
            if reason is None and budget_violation is not None and not is_exempt:
                reason = budget_violation(group_stages[-1][1])
                if reason is not None:
                    over_budget_options[method] = reason
            if reason is None:
                selected = group
                stages += group_stages
            else:
                # Steps for remaining units fail if there are none, unless they are over the budget.
                has_none_left = choice.only_remaining_units and method not in over_budget_options
                reported = Reason("nothing_left") if has_none_left else reason
                skip_reasons.update(dict.fromkeys(indices, reported))
        if selected is None:
            over_budget |= over_budget_options
    if len(stages) == 1:
        reasons = tuple(dict.fromkeys(skip_reasons.values()))
        raise OrderRefused("no_step_fits", preset=order.preset, reasons=reasons)
    return tuple(stages), skip_reasons


def method_and_units(step: AnyStep) -> str:
    """Return a key for a step's method and the tables or layers it applies to, as JSON."""
    return step.model_dump_json(include={"kind", "tables", "layers"})


def missing_data_reason(
    step: AnyStep, bundle: BundleRef, order: Order | None = None
) -> Reason | None:
    """Return why the bundle lacks data that a step needs; None if it lacks none.

    With an order, this includes steps of a preset that need a measurable budget: they prune rows.
    """
    if (
        step.requires_budget
        and order is not None
        and order.preset != "custom"
        and not has_measurable_budget(order, bundle)
    ):
        return Reason("pruning_not_judged", splits=tuple(bundle.rows))
    # A retrieval model has no score per row; only steps that train towers can compute its loss.
    if not bundle.scores_rows and "validation" in step.needs and not step.trains_towers:
        return Reason("no_loss", step=step.kind, task=bundle.task)
    parts = required_parts(step.needs, scores_rows=bundle.scores_rows)
    needed = dict.fromkeys(split_name(part, bundle) for part in parts)
    missing = [split for split in needed if split not in bundle.rows]
    if not missing:
        return None
    return Reason("data_missing", step=step.kind, missing=tuple(missing), splits=tuple(bundle.rows))


def parts_of_step(step: AnyStep, bundle: BundleRef) -> tuple[Part, ...]:
    """Return the parts of the bench a step needs, and those it can use if they are available."""
    available = (part for part in step.wants if split_name(part, bundle) in bundle.rows)
    return (*required_parts(step.needs, scores_rows=bundle.scores_rows), *available)


def learns_from_teachers(step: AnyStep) -> bool:
    """Return whether a step learns from the predictions of teachers."""
    return any(part in SOFT_LABELS for part in (*step.needs, *step.wants))


def require_teachers_are_used(order: Order) -> None:
    """Raise if the order names teachers but no step uses them.

    Raises:
        CompressionError: lists the steps of the order.
    """
    if order.teachers and not any(map(learns_from_teachers, order.recipe())):
        raise OrderRefused(
            "teachers_unused",
            teachers=len(order.teachers),
            steps=tuple(step.kind for step in order.recipe()),
        )


def split_name(part: Part, bundle: BundleRef) -> SplitName:
    """Return the split of the bundle's data that a part of the bench is made from."""
    match part:
        case "soft_labels":
            return "train"
        case "traffic_soft_labels":
            return "traffic"
        case "calibration":
            return bundle.calibration()
    return part

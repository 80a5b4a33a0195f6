"""Add the rules between fields of an order to the JSON schema that Prefect checks.

Prefect validates the parameters of a run against the flow's JSON schema when the run is created:
from the form, the API and ``prefect deployment run``. Pydantic writes types and ranges of single
fields into that schema. This file adds the rules that concern several fields, so that Prefect
refuses an invalid order before it is queued. ``Order`` checks the same rules again.

The rules are in the ``then`` of an ``if`` that is always true, because the form does not render
that part. JSON schema cannot compare two numbers with each other. Batch sizes and ``label_rate``
are therefore compared with fixed thresholds; a wrong pair of numbers between two neighboring
thresholds is refused only when the run starts.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from compressors.contracts import TARGETS, default_target
from compressors.contracts.limits import LARGEST_GAIN
from compressors.contracts.metrics import FAMILIES, Metric
from compressors.contracts.metrics.families import name_pattern
from compressors.core.registries import METHODS
from flows.presets import PRESETS

Schema = dict[str, Any]

LONGEST_RECIPE = 24
"""Number of positions in a recipe for which the schema requires that 'recalibrate' is last."""

BATCH_THRESHOLDS = tuple(
    sorted(
        {*range(2, 18), 20, 24, 32, 33, 48, 64, 65, 96, 128, 129}
        | {2**power + increment for power in range(8, 18) for increment in (0, 1)}
        | {digit * 10**power for power in (2, 3, 4) for digit in (1, 2, 5)}
    )
)
"""Sizes in rows with which the schema compares each pair of batch sizes.

They are small numbers, powers of two and the numbers after them, and round decimal numbers.
"""

RATE_THRESHOLDS = tuple(number / 20 for number in range(1, 21))
"""Shares of positive labels with which the schema compares both ends of ``label_rate``."""


def add_rules(schema: Schema) -> None:
    """Add the rules to the JSON schema of ``Order``, in place."""
    schema["if"] = {}
    schema["then"] = {"allOf": list(_list_rules())}


def _list_rules() -> Iterator[Schema]:
    yield _build_field_rule("limits", {"items": {"allOf": list(_generate_limit_rules())}})
    yield _build_field_rule("targets", {"allOf": list(_generate_target_rules())})
    yield _build_field_rule("rules", {"allOf": list(_generate_data_rules())})
    is_custom = {"properties": {"preset": {"const": "custom"}}, "required": ["preset"]}
    yield {
        "if": is_custom,
        "then": {"properties": {"steps": {"minItems": 1}}, "required": ["steps"]},
        "else": {"properties": {"steps": {"maxItems": 0}}},
    }
    yield _build_field_rule("steps", {"allOf": list(_generate_recipe_rules())})
    yield _build_field_rule(
        "steps", {"items": {"required": ["kind"], "allOf": list(_generate_step_rules())}}
    )
    yield from _generate_teacher_rules()


def _generate_limit_rules() -> Iterator[Schema]:
    """Yield rules for each metric and reference: which bound is allowed, and its range.

    Metrics whose names differ only in a number, such as ``ndcg@10`` and ``ndcg@20``, are a family
    and have the same rules. ``against`` names the reference of a limit: the baseline, the champion,
    or none (``absolute``). ``metric.compared`` is how the metric is compared with a reference: by
    its difference, by its ratio, or never.
    """
    for family in FAMILIES.values():
        metric = family.any_member()
        is_metric = _build_condition("metric", {"pattern": name_pattern(family)})
        relative = {"against": {"enum": ["baseline", "champion"]}}
        if metric.compared == "never":
            absolute = {"against": {"const": "absolute"}}  # also if the order omits it
            yield _build_implication(is_metric, {"properties": absolute})
            yield _build_implication(
                is_metric, _require_bound(metric, _find_absolute_range(metric))
            )
            continue
        by_reference = {
            "if": {"properties": relative},  # baseline if the order omits it
            "then": _require_bound(metric, _find_relative_range(metric)),
            "else": _require_bound(metric, _find_absolute_range(metric)),
        }
        yield _build_implication(is_metric, by_reference)


def _require_bound(metric: Metric, bound_range: Schema) -> Schema:
    """Require the bound that limits a bad result (minimum or maximum), and forbid the other."""
    required, forbidden = "at_least", "at_most"
    if not metric.higher_is_better:
        required, forbidden = forbidden, required
    bounds = {required: {"type": "number", **bound_range}, forbidden: {"type": "null"}}
    return {"properties": bounds, "required": [required]}


def _find_absolute_range(metric: Metric) -> Schema:
    """Return the range of an absolute bound, as ``compressors/contracts/limits.py`` checks it.

    ``metric.low`` is the smallest plausible bound, ``metric.high`` the largest possible value.
    """
    # Metrics that are never compared with a reference measure how much scores change. For them the
    # best possible value (no change at all) is a valid bound; for other metrics it is not.
    is_change = metric.compared == "never"
    if metric.higher_is_better:
        maximum = "maximum" if is_change else "exclusiveMaximum"
        return {"minimum": metric.low, "exclusiveMinimum": 0, maximum: metric.high}
    lower: Schema = {"minimum": max(metric.low, 0)}
    if not is_change:
        lower["exclusiveMinimum"] = 0
    return {**lower, "exclusiveMaximum": metric.high}


def _find_relative_range(metric: Metric) -> Schema:
    """Return the range of a bound relative to the baseline or the champion.

    ``metric.loosest_bound`` is the largest loss or ratio that a limit may allow.
    """
    if metric.compared == "ratio":
        return {"exclusiveMinimum": 0, "maximum": metric.loosest_bound}
    # The bound is on the change of the metric: from the largest loss to the largest gain.
    low, high = -metric.loosest_bound, LARGEST_GAIN
    if not metric.higher_is_better:
        low, high = -high, -low
    return {"exclusiveMinimum": low, "exclusiveMaximum": high}


def _generate_target_rules() -> Iterator[Schema]:
    """Yield rules for targets: at least one is not off, and batch sizes grow."""
    default_field = default_target().field
    others = [item.field for item in TARGETS.values() if item.field != default_field]
    is_target = {"enum": ["required", "optional"]}
    yield {
        # Required if the order omits it.
        "if": {"properties": {default_field: is_target}},
        "else": {"anyOf": [_build_condition(other, is_target) for other in others]},
    }
    # Numbers of rows for which engines are built, in ascending order, with their defaults.
    sizes = (("smallest_batch", 1), ("best_batch", 64), ("largest_batch", 1024))
    for (smaller, _), (larger, default) in pairwise(sizes):
        for threshold in BATCH_THRESHOLDS:
            at_least = {"minimum": threshold}
            is_large_enough = _build_condition(larger, at_least, by_default=default >= threshold)
            yield _build_implication(_build_condition(smaller, at_least), is_large_enough)
    # The defaults above: if the order omits best_batch, 64 must be between the two other sizes; if
    # best_batch is greater than 1024, the order must set largest_batch.
    for name, bound in (("smallest_batch", {"maximum": 64}), ("largest_batch", {"minimum": 64})):
        yield {"if": {"required": ["best_batch"]}, "else": _build_field_rule(name, bound)}
    yield _build_implication(
        _build_condition("best_batch", {"exclusiveMinimum": 1024}), {"required": ["largest_batch"]}
    )


def _generate_data_rules() -> Iterator[Schema]:
    """Yield rules for the thresholds of data checks: row counts, and the range of label rates."""
    yield _build_field_rule("min_rows", {"minimum": 1, "additionalProperties": {"minimum": 1}})
    yield _build_field_rule(
        "label_rate", {"items": {}, "prefixItems": [{"minimum": 0, "maximum": 1}] * 2}
    )
    for threshold in RATE_THRESHOLDS:
        at_least = {"minimum": threshold}
        low, both = {"prefixItems": [at_least]}, {"prefixItems": [at_least, at_least]}
        yield _build_field_rule("label_rate", _build_implication({"type": "array", **low}, both))


def _generate_recipe_rules() -> Iterator[Schema]:
    """Yield rules for the list of steps: 'recalibrate' occurs at most once, as the last step."""
    is_recalibrate = {"properties": {"kind": {"const": "recalibrate"}}, "required": ["kind"]}
    yield {"contains": is_recalibrate, "minContains": 0, "maxContains": 1}
    for index in range(LONGEST_RECIPE):
        earlier_steps: list[Schema] = [{}] * index
        is_at_index = {"minItems": index + 1, "prefixItems": [*earlier_steps, is_recalibrate]}
        yield _build_implication(is_at_index, {"maxItems": index + 1})


def _generate_step_rules() -> Iterator[Schema]:
    """Yield rules between the settings of one step, which the step's class checks too.

    The settings are described in the classes of the steps, such as ``Distill``. ``soft_share`` is
    the weight of the teacher's predictions in training, the labels get the rest. The rows
    ``traffic`` are logged requests, which have no labels. ``auxiliary`` is the layer of a head that
    learns the teacher's predictions. Without ``dense``, only tables are trained.
    """

    def for_kind(kind: str, when: Schema, then: Schema) -> Schema:
        return _build_implication(
            {"allOf": [_build_condition("kind", {"const": kind}), when]}, then
        )

    above_0 = {"exclusiveMinimum": 0}
    # Rows with few lookups can be pruned only if their score is the number of lookups.
    yield for_kind(
        "prune_rows",
        _build_condition("min_lookups", above_0),
        _build_field_rule("importance", {"const": "lookups"}),
    )
    yield for_kind(
        "channels",
        _build_condition("soft_share", above_0),
        _build_condition("training", {"type": "object"}),
    )
    trains_tables = _build_condition("tables", {"const": True})
    yield for_kind(
        "qat", {}, _build_field_rule("training", _build_field_rule("tables", {"const": False}))
    )
    yield for_kind(
        "distill",
        _build_condition("rows", {"const": "traffic"}),
        {**_build_field_rule("soft_share", {"const": 1}), "required": ["soft_share"]},
    )
    has_auxiliary = _build_condition("auxiliary", {"type": "string"})
    yield for_kind(
        "distill", has_auxiliary, _build_field_rule("soft_share", {"exclusiveMaximum": 1})
    )
    yield for_kind("distill", has_auxiliary, _build_field_rule("rows", {"enum": ["train", "both"]}))
    is_margin = _build_condition("loss", {"const": "margin"})
    yield for_kind("distill", is_margin, _build_field_rule("temperature", {"const": 1}))
    no_dense = _build_condition("dense", {"const": False})
    yield for_kind("distill", no_dense, _build_condition("training", trains_tables))
    yield for_kind("distill", no_dense, _build_field_rule("student", {"type": "null"}))


def _generate_teacher_rules() -> Iterator[Schema]:
    """Yield a rule: an order with teachers has a step that learns from their predictions."""

    def has_teacher_loss(step: Any) -> bool:
        return "soft_share" in step.model_fields

    kinds = [kind for kind, method in METHODS.items() if has_teacher_loss(method)]
    presets = [
        name
        for name, choices in PRESETS.items()
        if any(
            has_teacher_loss(type(step))
            for choice in choices
            for group in choice.options
            for step in group
        )
    ]
    has_distilling_step = {"contains": _build_condition("kind", {"enum": kinds})}
    yield _build_implication(
        _build_condition("teachers", {"minItems": 1}),
        {
            "if": _build_condition("preset", {"const": "custom"}),
            "then": _build_condition("steps", has_distilling_step),
            "else": _build_condition("preset", {"enum": presets}),
        },
    )


def _build_field_rule(name: str, rule: Schema) -> Schema:
    """Return a rule for a field; it does not apply if the field is absent."""
    return {"properties": {name: rule}}


def _build_condition(name: str, rule: Schema, *, by_default: bool = False) -> Schema:
    """Return a condition: a field satisfies a rule.

    Args:
        name: the field.
        rule: the rule.
        by_default: whether an absent field, which has its default, satisfies the rule.
    """
    return (
        _build_field_rule(name, rule)
        if by_default
        else {**_build_field_rule(name, rule), "required": [name]}
    )


def _build_implication(condition: Schema, then: Schema) -> Schema:
    """Return a rule that applies only to values that satisfy a condition."""
    return {"if": condition, "then": then}

"""The rules of an order that Prefect checks when it is submitted, as JSON schema.

Prefect validates the parameters of a run against the flow's JSON schema when the run is created:
from the form, the API and ``prefect deployment run``. Pydantic writes types and ranges of single
fields into that schema. This file adds the rules between fields, so that an order that ``Order``
refuses is refused before it is queued.

Rules are under ``then`` (of an ``if`` that is always true), which the form does not render. JSON
schema cannot compare two numbers: batch sizes and ``label_rate`` are compared at thresholds, so a
pair between two neighbouring thresholds is refused when the run starts, and not before.
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
"""Positions of a recipe for which the schema says that 'recalibrate' comes last."""

BATCH_THRESHOLDS = tuple(
    sorted(
        {*range(2, 18), 20, 24, 32, 33, 48, 64, 65, 96, 128, 129}
        | {2**power + more for power in range(8, 18) for more in (0, 1)}
        | {step * 10**power for power in (2, 3, 4) for step in (1, 2, 5)}
    )
)
RATE_THRESHOLDS = tuple(number / 20 for number in range(1, 21))


def add_rules(schema: Schema) -> None:
    """Add the rules to the JSON schema of ``Order``."""
    schema["if"] = {}
    schema["then"] = {"allOf": list(_rules())}


def _rules() -> Iterator[Schema]:
    yield _field("limits", {"items": {"allOf": list(_limit_rules())}})
    yield _field("targets", {"allOf": list(_target_rules())})
    yield _field("rules", {"allOf": list(_data_rules())})
    is_custom = {"properties": {"preset": {"const": "custom"}}, "required": ["preset"]}
    yield {
        "if": is_custom,
        "then": {"properties": {"steps": {"minItems": 1}}, "required": ["steps"]},
        "else": {"properties": {"steps": {"maxItems": 0}}},
    }
    yield _field("steps", {"allOf": list(_recipe_rules())})
    yield _field("steps", {"items": {"required": ["kind"], "allOf": list(_step_rules())}})
    yield from _teacher_rules()


def _limit_rules() -> Iterator[Schema]:
    """Return the rule for each metric and reference: the side and the range of the bound."""
    for family in FAMILIES.values():
        declared = family.any_member()
        of_metric = _holds("metric", {"pattern": name_pattern(family)})
        relative = {"against": {"enum": ["baseline", "champion"]}}
        if declared.compared == "never":
            absolute = {"against": {"const": "absolute"}}  # also if the order omits it
            yield _implies(of_metric, {"properties": absolute})
            yield _implies(of_metric, _bounded(declared, _absolute_range(declared)))
            continue
        by_reference = {
            "if": {"properties": relative},  # baseline if the order omits it
            "then": _bounded(declared, _relative_range(declared)),
            "else": _bounded(declared, _absolute_range(declared)),
        }
        yield _implies(of_metric, by_reference)


def _bounded(declared: Metric, numbers: Schema) -> Schema:
    """Require a bound on the side that limits a bad result, and none on the other side."""
    sides = ("at_least", "at_most")
    side, other = sides if declared.higher_is_better else sides[::-1]
    bounds = {side: {"type": "number", **numbers}, other: {"type": "null"}}
    return {"properties": bounds, "required": [side]}


def _absolute_range(declared: Metric) -> Schema:
    """Return the range of a bound, as for one limit in ``compressors/contracts/limits.py``."""
    is_change = declared.compared == "never"  # then the best value is possible: no score changes
    if declared.higher_is_better:
        most = "maximum" if is_change else "exclusiveMaximum"
        return {"minimum": declared.low, "exclusiveMinimum": 0, most: declared.high}
    least: Schema = {"minimum": max(declared.low, 0)}
    return (
        least | ({} if is_change else {"exclusiveMinimum": 0}) | {"exclusiveMaximum": declared.high}
    )


def _relative_range(declared: Metric) -> Schema:
    if declared.compared == "ratio":
        return {"exclusiveMinimum": 0, "maximum": declared.largest}
    least, most = -declared.largest, LARGEST_GAIN
    if not declared.higher_is_better:
        least, most = -most, -least
    return {"exclusiveMinimum": least, "exclusiveMaximum": most}


def _target_rules() -> Iterator[Schema]:
    first = default_target()
    others = [item.field for item in TARGETS.values() if item is not first]
    is_target = {"enum": ["required", "optional"]}
    yield {
        "if": {"properties": {first.field: is_target}},  # a target if the order omits it
        "else": {"anyOf": [_holds(other, is_target) for other in others]},
    }
    sizes = (("smallest_batch", 1), ("best_batch", 64), ("largest_batch", 1024))
    for (less, _), (more, default) in pairwise(sizes):
        for threshold in BATCH_THRESHOLDS:
            at_least = {"minimum": threshold}
            enough = _holds(more, at_least, by_default=default >= threshold)
            yield _implies(_holds(less, at_least), enough)
    # Without the size in the middle its default is between the others.
    for name, bound in (("smallest_batch", {"maximum": 64}), ("largest_batch", {"minimum": 64})):
        yield {"if": {"required": ["best_batch"]}, "else": _field(name, bound)}
    yield _implies(
        _holds("best_batch", {"exclusiveMinimum": 1024}), {"required": ["largest_batch"]}
    )


def _data_rules() -> Iterator[Schema]:
    yield _field("min_rows", {"minimum": 1, "additionalProperties": {"minimum": 1}})
    yield _field("label_rate", {"items": {}, "prefixItems": [{"minimum": 0, "maximum": 1}] * 2})
    for threshold in RATE_THRESHOLDS:
        at_least = {"minimum": threshold}
        low, both = {"prefixItems": [at_least]}, {"prefixItems": [at_least, at_least]}
        yield _field("label_rate", _implies({"type": "array", **low}, both))


def _recipe_rules() -> Iterator[Schema]:
    is_last = {"properties": {"kind": {"const": "recalibrate"}}, "required": ["kind"]}
    yield {"contains": is_last, "minContains": 0, "maxContains": 1}
    for place in range(LONGEST_RECIPE):
        before: list[Schema] = [{}] * place
        found = {"minItems": place + 1, "prefixItems": [*before, is_last]}
        yield _implies(found, {"maxItems": place + 1})


def _step_rules() -> Iterator[Schema]:
    """Return the rules between the settings of one step, as in the step's class."""

    def of(kind: str, when: Schema, then: Schema) -> Schema:
        return _implies({"allOf": [_holds("kind", {"const": kind}), when]}, then)

    above_0 = {"exclusiveMinimum": 0}
    yield of(
        "prune_rows", _holds("min_lookups", above_0), _field("importance", {"const": "traffic"})
    )
    yield of("channels", _holds("soft_share", above_0), _holds("training", {"type": "object"}))
    trains_tables = _holds("tables", {"const": True})
    yield of("qat", {}, _field("training", _field("tables", {"const": False})))
    yield of(
        "distill",
        _holds("rows", {"const": "traffic"}),
        {**_field("soft_share", {"const": 1}), "required": ["soft_share"]},
    )
    has_auxiliary = _holds("auxiliary", {"type": "string"})
    yield of("distill", has_auxiliary, _field("soft_share", {"exclusiveMaximum": 1}))
    yield of("distill", has_auxiliary, _field("rows", {"enum": ["train", "both"]}))
    of_margin = _holds("loss", {"const": "margin"})
    yield of("distill", of_margin, _field("temperature", {"const": 1}))
    no_dense = _holds("dense", {"const": False})
    yield of("distill", no_dense, _holds("training", trains_tables))
    yield of("distill", no_dense, _field("student", {"type": "null"}))


def _teacher_rules() -> Iterator[Schema]:
    """Require a step that learns from teachers, as ``require_taught`` does at run time."""

    def can_be_taught(step: Any) -> bool:
        return "soft_share" in step.model_fields

    kinds = [kind for kind, method in METHODS.items() if can_be_taught(method)]
    presets = [
        name
        for name, choices in PRESETS.items()
        if any(
            can_be_taught(type(step))
            for choice in choices
            for group in choice.options
            for step in group
        )
    ]
    learns = {"contains": _holds("kind", {"enum": kinds})}
    yield _implies(
        _holds("teachers", {"minItems": 1}),
        {
            "if": _holds("preset", {"const": "custom"}),
            "then": _holds("steps", learns),
            "else": _holds("preset", {"enum": presets}),
        },
    )


def _field(name: str, rule: Schema) -> Schema:
    """Return a rule for a field that applies if the order has the field."""
    return {"properties": {name: rule}}


def _holds(name: str, rule: Schema, *, by_default: bool = False) -> Schema:
    """Return a condition: the field, or its default if absent, satisfies a rule."""
    return _field(name, rule) if by_default else {**_field(name, rule), "required": [name]}


def _implies(condition: Schema, then: Schema) -> Schema:
    return {"if": condition, "then": then}

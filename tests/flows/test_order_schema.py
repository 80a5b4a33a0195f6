"""The JSON schema that Prefect checks on submission and the class ``Order`` refuse the same orders.

The tests use the validator that Prefect's server uses when a run is created. There are two kinds of
exceptions. Only the schema refuses teachers that no step uses. Only the class refuses some orders,
because a JSON schema cannot compare two fields: the schema compares batch sizes and label rates
with fixed thresholds (``BATCH_THRESHOLDS``, ``RATE_THRESHOLDS``), and checks the position of
'recalibrate' only in the first 24 steps.

``rules`` are limits for the data: the least number of rows of a split, and the range of the share
of positive labels (``label_rate``). ``soft_share`` is the weight of the teachers' predictions in
the loss; labels have the rest. A score change is a metric of the difference between compressed and
baseline scores, so its limit has no reference. A preset is a list of choices; each has options, and
each option is a group of steps (``flows/presets.py``).

In names of cases, "traffic" are training rows without labels, and "nulls of the form" are the null
values that the form submits for optional fields without a value. With "auxiliary", an auxiliary
head learns the teacher's predictions, and the network's output only the labels.
"""

import json
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import (
    _VALIDATOR,
    is_valid_schema,
    preprocess_schema,
    validate,
)
from prefect.utilities.schema_tools.validation import ValidationError as SchemaError
from pydantic import ValidationError

from compressors.contracts.limits import LARGEST_GAIN
from compressors.contracts.metrics import default_metrics
from compressors.contracts.metrics import metric as metric_named
from compressors.core.registries import METHODS
from flows.compress import compress
from flows.order import Order
from flows.order_schema import BATCH_THRESHOLDS, RATE_THRESHOLDS
from flows.presets import PRESETS

LIMIT: dict[str, Any] = {"metric": "auc", "against": "baseline", "at_least": -0.002}
ORDER: dict[str, Any] = {"model": "clicks@1", "limits": [LIMIT]}
KINDS: dict[str, Any] = {
    member.model_fields["kind"].default: member for member in tuple(METHODS.values())
}
MAX_SCHEMA_BYTES = 150_000
"""A browser loads the schema with the form. 60 kB of it describe single fields; the remainder are
rules that several fields have to fulfil together, such as increasing batch sizes."""


@cache
def validator() -> Any:
    """Return Prefect's validator of the flow's parameters."""
    schema = parameter_schema(compress).model_dump()
    is_valid_schema(schema)
    assert len(json.dumps(schema)) < MAX_SCHEMA_BYTES
    return _VALIDATOR(preprocess_schema(schema))


def passes_schema(order: dict[str, Any]) -> bool:
    """Return whether Prefect's server accepts an order on submission."""
    return next(validator().iter_errors({"order": order}), None) is None


def passes_class(order: dict[str, Any]) -> bool:
    """Return whether ``Order`` accepts an order, as at the start of the flow."""
    try:
        Order.model_validate_json(json.dumps(order))
    except ValidationError:
        return False
    return True


def custom_order(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return an order with a custom recipe."""
    return {**ORDER, "preset": "custom", "steps": list(steps), **more}


def order_with_limits(*limits: dict[str, Any]) -> dict[str, Any]:
    """Return an order with other limits."""
    return {**ORDER, "limits": list(limits)}


VALID: dict[str, dict[str, Any]] = {
    "required fields only": ORDER,
    "last preset": {**ORDER, "preset": "smallest", "budget": 0.001},
    "explicit defaults": Order.model_validate(ORDER).model_dump(mode="json"),
    "nulls of the form": {**ORDER, "budget": None, "rules": {"label_rate": None}},
    "steps": custom_order({"kind": "fold"}, {"kind": "rowwise_int8", "tables": ["user", "item*"]}),
    "recalibrate last": custom_order({"kind": "rowwise_int8"}, {"kind": "recalibrate"}),
    "recalibrate alone": custom_order({"kind": "recalibrate"}),
    "same step twice": custom_order({"kind": "rowwise_int8"}, {"kind": "rowwise_int8"}),
    "other target": {**ORDER, "targets": {"onnxruntime": "off", "tensorrt_rtx": "optional"}},
    "third target": {**ORDER, "targets": {"onnxruntime": "off", "tensorrt": "required"}},
    "batches": {**ORDER, "targets": {"smallest_batch": 3, "best_batch": 3, "largest_batch": 3}},
    "teachers": {**ORDER, "preset": "small", "teachers": ["a@1", "registry:b@2"]},
    "step that learns from teachers": custom_order({"kind": "distill"}, teachers=["a@1"]),
    "rows by split": {**ORDER, "rules": {"min_rows": {"test": 5}, "label_rate": [0.2, 0.2]}},
    "several limits": order_with_limits(LIMIT, LIMIT, {"metric": "bytes", "at_most": 0.5}),
    "score change": order_with_limits({"metric": "score_correlation", "at_least": 1.0}),
    "distill tables only": custom_order(
        {"kind": "distill", "dense": False, "training": {"tables": True}}
    ),
    "traffic with soft labels only": custom_order(
        {"kind": "distill", "rows": "traffic", "soft_share": 1}
    ),
}
INVALID: dict[str, dict[str, Any]] = {
    "no model": {"limits": [LIMIT]},
    "empty model": {**ORDER, "model": ""},
    "no limits": {"model": "clicks@1"},
    "empty limits": order_with_limits(),
    "unknown field": {**ORDER, "promot": True},
    "unknown preset": {**ORDER, "preset": "tiny"},
    "unknown target": {**ORDER, "targets": {"openvino": "required"}},
    "unknown field of a limit": order_with_limits({**LIMIT, "margin": 1}),
    "unknown field of a step": custom_order({"kind": "fold", "x": 1}),
    "negative budget": {**ORDER, "budget": -0.1},
    "negative seed": {**ORDER, "seed": -1},
    "custom without steps": {**ORDER, "preset": "custom"},
    "custom with no steps": custom_order(),
    "steps without custom": {**ORDER, "steps": [{"kind": "fold"}]},
    "steps with another preset": {**ORDER, "preset": "small", "steps": [{"kind": "fold"}]},
    "unknown step": custom_order({"kind": "fold_all"}),
    "step without kind": custom_order({"min_rows": 7}),
    "recalibrate first": custom_order({"kind": "recalibrate"}, {"kind": "fold"}),
    "recalibrate twice": custom_order({"kind": "recalibrate"}, {"kind": "recalibrate"}),
    "no target": {**ORDER, "targets": {"onnxruntime": "off"}},
    "all targets off": {
        **ORDER,
        "targets": {"onnxruntime": "off", "tensorrt": "off", "tensorrt_rtx": "off"},
    },
    "smallest above the default": {**ORDER, "targets": {"smallest_batch": 65}},
    "largest below the default": {**ORDER, "targets": {"largest_batch": 63}},
    "best above the default": {**ORDER, "targets": {"best_batch": 1025}},
    "best below smallest": {**ORDER, "targets": {"smallest_batch": 8, "best_batch": 4}},
    "largest below best": {**ORDER, "targets": {"best_batch": 512, "largest_batch": 256}},
    "largest below smallest": {**ORDER, "targets": {"smallest_batch": 40, "largest_batch": 9}},
    "no rows": {**ORDER, "rules": {"min_rows": 0}},
    "no rows of a split": {**ORDER, "rules": {"min_rows": {"test": 0}}},
    "rate above 1": {**ORDER, "rules": {"label_rate": [0.1, 1.5]}},
    "rate below 0": {**ORDER, "rules": {"label_rate": [-0.1, 0.5]}},
    "rates reversed": {**ORDER, "rules": {"label_rate": [0.9, 0.1]}},
    "unknown metric": order_with_limits({"metric": "accuracy", "at_least": 0.1}),
    "unknown reference": order_with_limits({**LIMIT, "against": "teacher"}),
    "no bound": order_with_limits({"metric": "auc"}),
    "two bounds": order_with_limits({"metric": "auc", "at_least": -0.1, "at_most": 0.1}),
    "upper bound, higher is better": order_with_limits({"metric": "auc", "at_most": -0.1}),
    "lower bound of a size": order_with_limits({"metric": "bytes", "at_least": 0.5}),
    "bound that allows chance level": order_with_limits({"metric": "auc", "at_least": -0.5}),
    "impossible gain": order_with_limits({"metric": "auc", "at_least": 0.2}),
    "auc in percent": order_with_limits({"metric": "auc", "against": "absolute", "at_least": 75}),
    "auc below chance level": order_with_limits(
        {"metric": "auc", "against": "absolute", "at_least": 0.4}
    ),
    "ratio of zero": order_with_limits({"metric": "bytes", "at_most": 0}),
    "ratio as percent": order_with_limits({"metric": "bytes", "at_most": 50}),
    "score change against the baseline": order_with_limits(
        {"metric": "changed_top1", "against": "baseline", "at_most": 0}
    ),
    "second limit": order_with_limits(LIMIT, {"metric": "auc", "at_least": -3}),
    "qat with tables": custom_order({"kind": "qat", "training": {"tables": True}}),
    "channels with teachers, without training": custom_order(
        {"kind": "channels", "soft_share": 0.5}
    ),
    "min_lookups with importance norm": custom_order(
        {"kind": "prune_rows", "min_lookups": 2, "importance": "norm"}
    ),
    "traffic with a loss on labels": custom_order({"kind": "distill", "rows": "traffic"}),
    "auxiliary without labels": custom_order(
        {"kind": "distill", "auxiliary": "a", "soft_share": 1}
    ),
    "temperature with the margin loss": custom_order(
        {"kind": "distill", "loss": "margin", "temperature": 2}
    ),
    "distill without trained tensors": custom_order({"kind": "distill", "dense": False}),
    "student without dense": custom_order(
        {"kind": "distill", "dense": False, "training": {"tables": True}, "student": {"hidden": 4}}
    ),
}


@pytest.mark.parametrize("order", VALID.values(), ids=VALID)
def test_valid_order_passes_class_and_schema(order: dict[str, Any]) -> None:
    assert passes_class(order)
    assert passes_schema(order)


@pytest.mark.parametrize("order", INVALID.values(), ids=INVALID)
def test_invalid_order_fails_class_and_schema(order: dict[str, Any]) -> None:
    assert not passes_class(order)
    assert not passes_schema(order)


def test_schema_refuses_teachers_without_a_step_that_learns_from_them() -> None:
    """``Order`` accepts these orders; the flow refuses them at its start."""
    for order in ({**ORDER, "teachers": ["a"]}, custom_order({"kind": "fold"}, teachers=["a"])):
        assert passes_class(order)
        assert not passes_schema(order)


def test_schema_accepts_every_preset_and_its_steps_as_a_custom_recipe() -> None:
    for preset, choices in PRESETS.items():
        assert passes_schema({**ORDER, "preset": preset})
        for choice in choices:
            for group in choice.options:
                steps = [step.model_dump(mode="json") for step in group]
                assert passes_schema(custom_order(*steps)), (preset, steps)


@pytest.mark.parametrize("kind", KINDS)
def test_class_and_schema_agree_on_every_step_with_its_defaults(kind: str) -> None:
    order = custom_order({"kind": kind})
    assert passes_schema(order) == passes_class(order)


REFERENCES: list[dict[str, Any]] = [
    {},
    *({"against": name} for name in ("absolute", "baseline", "champion")),
]


# All default metrics, and some with another depth, cut-off or batch size.
METRICS = sorted({*default_metrics(), "ndcg@5", "recall@100", "mrr@10", "map@100", "p99_ms@256"})


def bounds_near_limits(metric: str) -> list[float]:
    """Return numbers at, below and above those with which the bound of a limit is compared.

    They are 0, the largest plausible improvement, and of the metric: ``low`` and ``high``, the
    smallest and largest plausible value, and ``loosest_bound``, the largest plausible loss or
    ratio.
    """
    declared = metric_named(metric)
    numbers = (0.0, LARGEST_GAIN, declared.low, declared.high, declared.loosest_bound)
    bounds = {value + more for value in numbers for more in (-1e-3, 0.0, 1e-3)}
    return sorted({sign * bound for bound in bounds for sign in (-1.0, 1.0)})


@given(st.data())
def test_class_and_schema_agree_on_random_limits_near_their_bounds(data: st.DataObject) -> None:
    metric = data.draw(st.sampled_from(METRICS))
    reference = data.draw(st.sampled_from(REFERENCES))
    bound_field = data.draw(st.sampled_from(["at_least", "at_most"]))
    bound = data.draw(st.sampled_from(bounds_near_limits(metric)))
    order = order_with_limits({"metric": metric, **reference, bound_field: bound})
    assert passes_schema(order) == passes_class(order)


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
def test_class_and_schema_agree_on_every_limit_near_its_bounds(metric: str) -> None:
    for reference, bound_field in product(REFERENCES, ("at_least", "at_most")):
        for bound in bounds_near_limits(metric):
            order = order_with_limits({"metric": metric, **reference, bound_field: bound})
            assert passes_schema(order) == passes_class(order), order


SIZES = st.sampled_from([*BATCH_THRESHOLDS, 1, 7, 100, 1_000, 4_096])
TARGETS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("onnxruntime", "tensorrt_rtx", "tensorrt"),
            st.sampled_from(["required", "optional", "off"]),
        ),
        **dict.fromkeys(("smallest_batch", "best_batch", "largest_batch"), SIZES),
    },
)
STEPS = st.lists(st.sampled_from([{"kind": kind} for kind in KINDS]), max_size=6)


@given(
    targets=TARGETS,
    steps=STEPS,
    preset=st.sampled_from(["safe", "small", "custom"]),
    rates=st.lists(st.sampled_from([0.0, *RATE_THRESHOLDS, 1.05]), min_size=1, max_size=3),
)
def test_class_and_schema_agree_on_random_targets_steps_and_rates(
    targets: dict[str, Any], steps: list[dict[str, Any]], preset: str, rates: list[float]
) -> None:
    for order in (
        {**ORDER, "targets": targets},
        {**ORDER, "preset": preset, "steps": steps},
        {**ORDER, "rules": {"label_rate": rates}},
    ):
        assert passes_schema(order) == passes_class(order), order


@given(sizes=st.tuples(*[st.integers(1, 200_000)] * 3))
def test_schema_accepts_all_valid_batch_sizes(sizes: tuple[int, int, int]) -> None:
    """The schema compares sizes at thresholds only, and may accept some invalid sizes."""
    names = ("smallest_batch", "best_batch", "largest_batch")
    order = {**ORDER, "targets": dict(zip(names, sorted(sizes), strict=True))}
    assert passes_class(order)
    assert passes_schema(order)


def test_schema_error_names_the_field_and_the_reason() -> None:
    with pytest.raises(SchemaError, match=r"order\.limits\[0\]\.at_least.*-3 is less than"):
        validate(
            {"order": INVALID["second limit"] | {"limits": [{"metric": "auc", "at_least": -3}]}},
            parameter_schema(compress).model_dump(),
            raise_on_error=True,
        )

"""Errors of a faulty order name the place of the fault and the valid names."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from flows.order import Order
from flows.order_faults import sentences

LIMIT = {"metric": "auc", "at_least": -0.01}
GOOD = {"model": "clicks", "limits": [LIMIT], "preset": "custom", "steps": [{"kind": "fold"}]}


def sentences_of(**changed: Any) -> list[str]:
    with pytest.raises(ValidationError) as fault:
        Order.model_validate_json(json.dumps({**GOOD, **changed}))
    return sentences(fault.value, Order)


def test_a_misspelled_setting_is_reported_with_the_settings_of_its_step() -> None:
    (said,) = sentences_of(steps=[{"kind": "fold"}, {"kind": "channels", "kep": 0.5}])
    assert said.startswith("steps.1.channels.kep: there is no such setting, did you mean 'keep'?")
    assert "keep, " in said
    assert "calibrator" not in said  # a setting of another step


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"limit": []}, ["limit: there is no such setting, did you mean 'limits'?", "budget"]),
        (
            {"steps": [{"kind": "distill", "training": {"epoch": 3}}]},
            ["steps.0.distill.training.epoch:", "did you mean 'epochs'?", "warmup"],
        ),
        ({"targets": {"onnx": "required"}}, ["targets.onnx:", "onnxruntime"]),
        ({"limits": [{**LIMIT, "at_last": 1}]}, ["limits.0.at_last:", "at_least"]),
    ],
)
def test_a_misspelled_setting_is_reported_at_any_depth(
    changed: dict[str, Any], words: list[str]
) -> None:
    (said,) = sentences_of(**changed)
    assert all(word in said for word in words), said


def test_a_misspelled_step_is_reported_with_the_nearest_name_and_all_names() -> None:
    (said,) = sentences_of(steps=[{"kind": "static-int8"}])
    assert said.startswith("steps.0: there is no kind 'static-int8', did you mean 'static_int8'?")
    assert "rowwise_int4" in said


def test_what_is_missing_empty_or_contradictory_is_said_plainly() -> None:
    assert sentences_of(limits=[]) == ["limits: needs at least 1; found none"]
    assert sentences_of(steps=[]) == ["Order: preset 'custom' needs steps"]
    with pytest.raises(ValidationError) as fault:
        Order.model_validate({"model": "clicks"})
    assert sentences(fault.value, Order) == ["limits: is missing"]


def test_a_faulty_limit_is_not_also_reported_as_missing() -> None:
    (said,) = sentences_of(limits=[{**LIMIT, "metric": "AUC"}])
    assert said.startswith("limits.0.metric: ")


def test_without_a_model_to_read_names_from_nothing_is_guessed() -> None:
    with pytest.raises(ValidationError) as fault:
        Order.model_validate({**GOOD, "limit": []})
    assert sentences(fault.value) == ["limit: there is no such setting"]


def test_a_thousand_faults_are_reported_as_the_first_20_and_the_number_of_others() -> None:
    said = sentences_of(teachers=list(range(1000)))
    assert len(said) == 21
    assert said[0].startswith("teachers.0:")
    assert said[-1] == "and 980 more faults"


def test_a_sentence_about_a_long_value_is_bounded() -> None:
    (said,) = sentences_of(steps=[{"kind": "x" * 100_000}])
    assert len(said) < 2_100

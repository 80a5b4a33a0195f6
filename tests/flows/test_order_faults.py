"""Sentences about the validation errors of an order: each has the field and the valid names."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from flows.order import Order
from flows.order_faults import format_errors
from infra.printable import MAX_SENTENCE_CHARACTERS

LIMIT = {"metric": "auc", "at_least": -0.01}
GOOD = {"model": "clicks", "limits": [LIMIT], "preset": "custom", "steps": [{"kind": "fold"}]}


def sentences_for(**fields: Any) -> list[str]:
    """Return the sentences about a valid order with some invalid fields."""
    with pytest.raises(ValidationError) as fault:
        Order.model_validate_json(json.dumps({**GOOD, **fields}))
    return format_errors(fault.value, Order)


def test_misspelled_setting_is_reported_with_the_settings_of_its_step() -> None:
    (sentence,) = sentences_for(steps=[{"kind": "fold"}, {"kind": "channels", "kep": 0.5}])
    assert sentence.startswith(
        "steps.1.channels.kep: there is no such setting, did you mean 'keep'?"
    )
    assert "keep, " in sentence
    assert "calibrator" not in sentence  # a setting of another step


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"limit": []}, ["limit: there is no such setting, did you mean 'limits'?", "budget"]),
        (
            {"steps": [{"kind": "distill", "training": {"epoch": 3}}]},
            ["steps.0.distill.training.epoch:", "did you mean 'epochs'?", "warmup"],
        ),
        (
            {"targets": {"onnxruntim": "required"}},
            ["targets.onnxruntim: unknown target 'onnxruntim'", "did you mean 'onnxruntime'?"],
        ),
        ({"limits": [{**LIMIT, "at_last": 1}]}, ["limits.0.at_last:", "at_least"]),
    ],
)
def test_misspelled_setting_is_reported_at_any_depth(
    fields: dict[str, Any], words: list[str]
) -> None:
    (sentence,) = sentences_for(**fields)
    assert all(word in sentence for word in words), sentence


def test_misspelled_step_is_reported_with_the_nearest_name_and_all_names() -> None:
    (sentence,) = sentences_for(steps=[{"kind": "static-int8"}])
    assert sentence.startswith(
        "steps.0: there is no kind 'static-int8', did you mean 'static_int8'?"
    )
    assert "rowwise_int4" in sentence


def test_step_without_a_similar_name_is_reported_with_all_names_in_a_second_sentence() -> None:
    (sentence,) = sentences_for(steps=[{"kind": "zzz"}])
    first, second = sentence.split(". ")
    assert first == "steps.0: there is no kind 'zzz'"
    assert second.startswith("Valid names: ")
    assert second.endswith(".")


def test_missing_empty_and_contradictory_fields_have_short_sentences() -> None:
    assert sentences_for(limits=[]) == ["limits: expected at least 1, got none"]
    assert sentences_for(steps=[]) == ["Order: preset 'custom' needs steps"]
    with pytest.raises(ValidationError) as fault:
        Order.model_validate({"model": "clicks"})
    assert format_errors(fault.value, Order) == ["limits: is missing"]


def test_invalid_limit_is_not_also_reported_as_missing() -> None:
    (sentence,) = sentences_for(limits=[{**LIMIT, "metric": "AUC"}])
    assert sentence.startswith("limits.0.metric: ")


def test_sentence_without_a_model_class_suggests_no_names() -> None:
    with pytest.raises(ValidationError) as fault:
        Order.model_validate({**GOOD, "limit": []})
    assert format_errors(fault.value) == ["limit: there is no such setting"]


def test_1000_errors_are_reported_as_20_sentences_and_the_number_of_other_errors() -> None:
    lines = sentences_for(teachers=list(range(1000)))
    assert len(lines) == 21
    assert lines[0].startswith("teachers.0:")
    assert lines[-1] == "and 980 more errors"


def test_sentence_about_a_long_value_has_a_bounded_length() -> None:
    (sentence,) = sentences_for(steps=[{"kind": "x" * 100_000}])
    assert len(sentence) <= MAX_SENTENCE_CHARACTERS

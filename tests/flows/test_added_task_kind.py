"""A kind of task is added by one declaration with its functions, and goes through a whole order."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from added_order import AddedOrder
from added_task_kind import registered_task_kind, write_upvotes
from error_codes import raises_value_error

from compressors.contracts import Output, Signature


@pytest.fixture
def upvotes() -> Iterator[None]:
    with registered_task_kind():
        yield


@pytest.mark.xdist_group("added")
def test_a_registered_kind_is_packed_trained_measured_and_judged(added_order: AddedOrder) -> None:
    assert added_order.packing_warnings == ()
    measurement = added_order.report.measurement
    assert measurement is not None
    assert measurement.numbers.score_unit == "probability"
    assert {item.outcome for item in added_order.report.targets[0].verdict.judgements} >= {
        "accepted"
    }
    assert added_order.losses
    assert max(added_order.losses) < 0.5  # of squares; cross entropy begins near 0.6


def test_without_registration_the_task_is_unknown(tmp_path: Path) -> None:
    document = json.loads((write_upvotes(tmp_path / "draft") / "model.json").read_text())
    with raises_value_error("task_unknown", task="upvotes"):
        Signature.model_validate(document["signature"])


def test_a_kind_of_other_outputs_is_refused(upvotes: None, tmp_path: Path) -> None:
    document = json.loads((write_upvotes(tmp_path / "draft") / "model.json").read_text())
    with raises_value_error("output_form", task="upvotes", got="score"):
        Output.model_validate(document["signature"]["outputs"][0] | {"form": "score"})

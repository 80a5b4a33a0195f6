"""One declaration with its functions adds a task kind that every phase of an order can use.

The task kind is in ``added_task_kind.py``; the order is in ``added_order.py``. The form of an
output says what its numbers are: ``logit``, ``probability`` or ``score``.
"""

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
def test_registered_task_kind_is_packed_trained_measured_and_judged(
    added_order: AddedOrder,
) -> None:
    assert added_order.packing_warnings == ()
    measurement = added_order.report.measurement
    assert measurement is not None
    assert measurement.numbers.score_unit == "probability"
    assert {item.outcome for item in added_order.report.targets[0].verdict.judgements} >= {
        "accepted"
    }
    assert added_order.losses
    assert max(added_order.losses) < 0.5  # squared errors; a cross entropy would start near 0.6


def test_unregistered_task_kind_is_refused_as_unknown(tmp_path: Path) -> None:
    document = json.loads((write_upvotes(tmp_path / "draft") / "model.json").read_text())
    with raises_value_error("task_unknown", task="upvotes"):
        Signature.model_validate(document["signature"])


def test_output_with_a_form_that_the_task_kind_excludes_is_refused(
    upvotes: None, tmp_path: Path
) -> None:
    document = json.loads((write_upvotes(tmp_path / "draft") / "model.json").read_text())
    with raises_value_error("output_form", task="upvotes", got="score"):
        Output.model_validate(document["signature"]["outputs"][0] | {"form": "score"})

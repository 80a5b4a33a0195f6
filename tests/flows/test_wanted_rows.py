"""A step that can do without rows is given them where there are some."""

import pytest

from compressors.contracts import Artifact
from compressors.contracts.reasons import Reason
from compressors.prune.dense.magnitude import Magnitude
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.static_int8 import StaticInt8
from flows.step_selection import missing_data_reason, parts_of_step
from tasks.bundles.bundle_ref import BundleRef


def subject(**rows: int) -> BundleRef:
    return BundleRef(
        artifact=Artifact(uri="file:///nowhere", sha256="0" * 64, bytes=1),
        name="clicks",
        version="1",
        metric="auc",
        rows={"test": 100, **rows},
        longest={},
        architecture="models:Ranker",
        task="ctr",
        grouped=False,
    )


@pytest.mark.parametrize(
    ("rows", "seen"),
    [
        ({}, ()),
        ({"validation": 10}, ()),
        ({"train": 10}, ("calibration",)),  # made from the training rows
        ({"train": 10, "calibration": 10}, ("calibration",)),
    ],
)
def test_float16_uses_calibration_rows_if_available_and_never_requires_them(rows, seen):
    held = subject(**rows)
    assert parts_of_step(Float16(), held) == seen
    assert missing_data_reason(Float16(), held) is None


def test_what_a_step_needs_comes_first_and_others_want_nothing():
    held = subject(train=10)
    assert parts_of_step(StaticInt8(), held) == ("calibration",)
    assert parts_of_step(Magnitude(), held) == ()
    assert missing_data_reason(StaticInt8(), subject()) == Reason(
        "data_missing", step="static_int8", missing=("train",), splits=("test",)
    )

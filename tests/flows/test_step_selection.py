"""Which parts of the bench a step reads, and the reason if the bundle lacks a required split.

The parts of the bench are prepared splits and predictions of teachers. Calibration rows are made
from the training split if the bundle has no calibration split.
"""

import pytest

from compressors.contracts import Artifact, Output
from compressors.contracts.reasons import Reason
from compressors.prune.dense.magnitude import Magnitude
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.static_int8 import StaticInt8
from flows.step_selection import missing_data_reason, parts_of_step
from tasks.bundles.bundle_ref import BundleRef


def bundle_with(**rows: int) -> BundleRef:
    """Return a bundle with 100 test rows and other splits."""
    return BundleRef(
        artifact=Artifact(uri="file:///nowhere", sha256="0" * 64, bytes=1),
        name="clicks",
        version="1",
        outputs=(Output(name="click", kind="ctr", form="logit", label="click", metric="auc"),),
        rows={"test": 100, **rows},
        longest={},  # longest list of each jagged input, of which there is none
        architecture="b" * 64,  # digest of the source of the model's class
        grouped=False,  # rows have no group, such as a session
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({}, ()),
        ({"validation": 10}, ()),
        ({"train": 10}, ("calibration",)),  # made from the training rows
        ({"train": 10, "calibration": 10}, ("calibration",)),
    ],
)
def test_float16_uses_calibration_rows_if_available_and_never_requires_them(rows, expected):
    bundle = bundle_with(**rows)
    assert parts_of_step(Float16(), bundle) == expected
    assert missing_data_reason(Float16(), bundle) is None


def test_static_int8_requires_calibration_rows_and_magnitude_requires_none():
    bundle = bundle_with(train=10)
    assert parts_of_step(StaticInt8(), bundle) == ("calibration",)
    assert parts_of_step(Magnitude(), bundle) == ()
    assert missing_data_reason(StaticInt8(), bundle_with()) == Reason(
        "data_missing", step="static_int8", missing=("train",), splits=("test",)
    )

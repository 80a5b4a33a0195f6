"""A metric is added by one declaration with its estimator, and goes through a whole order."""

from collections.abc import Iterator

import pytest
from added_metric import BRIER, registered_metric
from added_order import AddedOrder
from error_codes import raises_value_error

from compressors.contracts import Limit
from compressors.contracts.metrics import register
from compressors.contracts.metrics.metric import one
from tasks.report.tables import markdown


@pytest.fixture
def brier() -> Iterator[None]:
    with registered_metric():
        yield


@pytest.mark.xdist_group("added")
def test_a_registered_metric_is_measured_judged_and_reported(
    added_order: AddedOrder, brier: None
) -> None:
    report = added_order.report
    accepted, rejected = report.targets[0].verdict.judgements[:2]
    assert (accepted.outcome, rejected.outcome) == ("accepted", "rejected")
    assert report.measurement is not None
    number = report.measurement.numbers.of("brier", "absolute")
    assert number is not None
    assert 0 < number.low < number.point < number.high < 0.25  # 0.25: one half for every row
    assert accepted.reason.startswith("Brier score vs baseline is ")
    assert "| Brier score |" in markdown(report)


def test_a_name_is_registered_once(brier: None) -> None:
    with pytest.raises(ValueError, match="brier"):
        register(one(BRIER))


def test_without_registration_the_name_is_unknown() -> None:
    with raises_value_error("metric_unknown", metric="brier"):
        Limit.parse("brier vs baseline <= 0.01")

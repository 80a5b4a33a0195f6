"""One declaration with an estimator adds a metric that every phase of an order can use.

The metric is the Brier score of ``added_metric.py``; the order is that of ``added_order.py``.
"""

from collections.abc import Iterator

import pytest
from added_metric import BRIER, registered_metric
from added_order import AddedOrder
from error_codes import raises_value_error

from compressors.contracts import Limit
from compressors.contracts.metrics import register
from compressors.contracts.metrics.metric import single_metric
from tasks.report.tables import markdown


@pytest.fixture
def brier() -> Iterator[None]:
    with registered_metric():
        yield


@pytest.mark.xdist_group("added")
def test_registered_metric_is_measured_judged_and_reported(
    added_order: AddedOrder, brier: None
) -> None:
    report = added_order.report
    # A judgement is the outcome for one limit. The first two limits of the order name the metric.
    accepted, rejected = report.targets[0].verdict.judgements[:2]
    assert (accepted.outcome, rejected.outcome) == ("accepted", "rejected")
    assert report.measurement is not None
    estimate = report.measurement.numbers.of("brier", "absolute")
    assert estimate is not None
    # A model that predicts 0.5 for every row has a Brier score of 0.25.
    assert 0 < estimate.low < estimate.point < estimate.high < 0.25
    assert accepted.reason.startswith("Brier score vs baseline is ")
    assert "| Brier score |" in markdown(report)


def test_registering_a_metric_name_twice_raises_value_error(brier: None) -> None:
    with pytest.raises(ValueError, match="brier"):
        register(single_metric(BRIER))


def test_limit_on_an_unregistered_metric_raises_metric_unknown() -> None:
    with raises_value_error("metric_unknown", metric="brier"):
        Limit.parse("brier vs baseline <= 0.01")

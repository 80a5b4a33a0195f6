"""A metric is added by one declaration with its estimator, and goes through a whole order."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from drafts import write_draft
from error_codes import raises_value_error
from orders import carry_out, surroundings

from compressors.contracts import Limit, Metric
from compressors.contracts.metrics import FAMILIES, register
from compressors.contracts.metrics.families import find_metric
from compressors.contracts.metrics.metric import one
from compressors.metrics.cluster_intervals import GroupedPair, Groups, grouped_pair, mean_of_rows
from compressors.metrics.estimators.protocols import ScoredRows, require_groups
from compressors.metrics.intervals import PairedRows, RowStatistics, mean_statistic
from compressors.metrics.point_estimates import number_groups
from flows.order import Order
from tasks.bundles.packing import pack
from tasks.report.tables import markdown


def squared_errors(label, probability) -> np.ndarray:
    return (np.asarray(probability, np.float64) - np.asarray(label, np.float64)) ** 2


@dataclass(frozen=True)
class Brier:
    """Mean squared error of probabilities (Brier 1950)."""

    metric: Metric

    def point(self, rows: ScoredRows) -> float:
        return float(squared_errors(rows.label, rows.score).mean())

    def of_rows(self, pair: PairedRows) -> RowStatistics:
        before, after = (squared_errors(pair.label, score) for score in pair.scores)
        return RowStatistics(before.size, mean_statistic(before), mean_statistic(after))

    def of_groups(self, pair: PairedRows) -> GroupedPair:
        group = require_groups(self.metric, pair.group)
        groups = Groups(*number_groups(group, np.size(pair.label)))
        before, after = (
            mean_of_rows(squared_errors(pair.label, score), groups) for score in pair.scores
        )
        return grouped_pair(before, after, self.metric.high, groups.rows.size, "")


BRIER = Metric(
    name="brier",
    kind="quality",
    label="Brier score",
    labels=("clicks",),
    evaluations=("rows",),
    higher_is_better=False,
    compared="difference",
    largest=0.2,
    low=0.0,
    high=1.0,
    estimators={"rows": Brier},
)


@pytest.fixture
def brier() -> Iterator[None]:
    register(one(BRIER))
    yield
    del FAMILIES["brier"]
    find_metric.cache_clear()


def test_a_registered_metric_is_measured_judged_and_reported(
    brier: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings(monkeypatch, tmp_path / "recpress")
    pack(write_draft(tmp_path / "draft"))
    limits = (
        Limit.parse("brier vs baseline <= 0.01"),
        Limit.parse("brier vs baseline <= -0.15"),  # a gain that no compression reaches
    )
    report = carry_out(Order(model="clicks@1", preset="safe", limits=limits)).finished.report
    accepted, rejected = report.targets[0].verdict.judgements
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

"""Metrics: one object for each, with its name, label, direction, unit, range and estimator.

This folder declares metrics; the estimators are in ``compressors/metrics``.

metric.py         the classes ``Metric`` and ``MetricFamily``
families.py       the registry: a metric by its name, and the metrics measured for a task kind
quality.py        quality of a model on labeled rows
score_changes.py  differences between the scores of the candidate and of the baseline
serving.py        bytes and latency of the served artifact
"""

from compressors.contracts.metrics.families import FAMILIES as FAMILIES
from compressors.contracts.metrics.families import MetricName as MetricName
from compressors.contracts.metrics.families import default_batch_sizes as default_batch_sizes
from compressors.contracts.metrics.families import default_metrics as default_metrics
from compressors.contracts.metrics.families import measured_metrics as measured_metrics
from compressors.contracts.metrics.families import metric as metric
from compressors.contracts.metrics.families import metric_problem as metric_problem
from compressors.contracts.metrics.families import quality_metrics as quality_metrics
from compressors.contracts.metrics.families import register as register
from compressors.contracts.metrics.metric import Metric as Metric
from compressors.contracts.metrics.metric import MetricFamily as MetricFamily

"""Metrics: which tasks measure them, which direction is better, which values are possible.

Types only. This table is the only place that lists the metrics of a task; signatures, orders and
measurements use it. To add a metric, add its name to ``Measure`` and a line to ``MEASURES``.
"""

from typing import Literal, get_args

from pydantic import Field

from compressors.contracts.inputs import Frozen
from compressors.contracts.reasons import Reason

Task = Literal["ctr", "ranking", "retrieval"]
Metric = Literal["auc", "gauc", "ndcg@10", "recall@20", "ndcg@20"]
Measure = Literal[
    "auc",
    "gauc",
    "ndcg@10",
    "recall@20",
    "ndcg@20",
    "logloss",
    "normalized_entropy",
    "score_correlation",
    "mean_score_change",
    "max_score_change",
    "changed_top1",
    "top20_overlap",
    "bytes",
    "p50_ms@1",
    "p99_ms@1",
    "p50_ms@64",
    "p99_ms@64",
    "p50_ms@1024",
    "p99_ms@1024",
]
SCORE_CHANGE: tuple[Measure, ...] = (
    "score_correlation",
    "mean_score_change",
    "max_score_change",
    "changed_top1",
    "top20_overlap",
)
"""Metrics that compare the candidate's scores with the baseline's, their only reference."""

ScoreUnit = Literal["probability", "spread"]
"""Unit of a change of scores: probability, or standard deviations of the baseline's scores."""

EVERY_TASK: tuple[Task, ...] = get_args(Task)


class MetricProperties(Frozen):
    """Properties of one metric that are known before anything is measured.

    Attributes:
        tasks: tasks for which it is measured.
        higher_is_better: whether higher values are better.
        compared: how two models are compared: candidate minus other, or candidate over other.
            ``never`` for a change of scores, which compares with the baseline by itself.
        largest: in a comparison the largest loss, or the largest ratio, that an order can intend; a
            larger one would accept a useless model.
        low: the smallest number that a limit on the metric itself can intend. For a share it is
            the value of random scores, which every useful model exceeds.
        high: the largest possible number.
        unit: unit of the metric itself.
        selects: whether a signature may name it as the metric to judge a model by.
        needs_group: whether the data needs a group column.
        batch: rows of the timed request.
    """

    name: Measure
    tasks: tuple[Task, ...]
    higher_is_better: bool
    compared: Literal["difference", "ratio", "never"]
    largest: float = Field(gt=0)
    low: float
    high: float
    unit: str = ""
    selects: bool = False
    needs_group: bool = False
    batch: int | None = None


def _share(
    name: Metric, task: Task, *, largest: float, low: float = 0.0, needs_group: bool = True
) -> MetricProperties:
    """A quality between 0 and 1, higher is better."""
    return MetricProperties(
        name=name,
        tasks=(task,),
        higher_is_better=True,
        compared="difference",
        largest=largest,
        low=low,
        high=1.0,
        selects=True,
        needs_group=needs_group,
    )


def _loss(name: Measure, *, largest: float, high: float) -> MetricProperties:
    """A loss of predicted probabilities; 0 is perfect."""
    return MetricProperties(
        name=name,
        tasks=("ctr",),
        higher_is_better=False,
        compared="difference",
        largest=largest,
        low=0.0,
        high=high,
    )


def _score_change(
    name: Measure,
    *,
    high: float = 1.0,
    higher_is_better: bool = False,
    needs_group: bool = False,
    tasks: tuple[Task, ...] = EVERY_TASK,
) -> MetricProperties:
    """A difference of scores from the baseline's."""
    return MetricProperties(
        name=name,
        tasks=tasks,
        higher_is_better=higher_is_better,
        compared="never",
        largest=high,
        low=0.0,
        high=high,
        needs_group=needs_group,
    )


def _latency(name: Measure) -> MetricProperties:
    """A quantile of the time of one request, in milliseconds."""
    return MetricProperties(
        name=name,
        tasks=EVERY_TASK,
        higher_is_better=False,
        compared="ratio",
        largest=10.0,
        low=0.001,  # a call of a runtime takes several microseconds
        high=3_600_000.0,
        unit=" ms",
        batch=int(name.rpartition("@")[2]),
    )


MEASURES: dict[str, MetricProperties] = {
    facts.name: facts
    for facts in (
        _share("auc", "ctr", largest=0.5, low=0.5, needs_group=False),
        # The probability floor of ``metrics.py`` bounds the loss of a row by 15.95 nats.
        _loss("logloss", largest=0.2, high=15.95),
        _loss("normalized_entropy", largest=0.5, high=1000.0),
        _share("gauc", "ctr", largest=0.5, low=0.5),
        _share("ndcg@10", "ranking", largest=1.0),
        _share("recall@20", "retrieval", largest=1.0),
        _share("ndcg@20", "retrieval", largest=1.0),
        _score_change("score_correlation", higher_is_better=True),
        # In standard deviations, the unit of scores without a scale, a change may exceed 1.
        _score_change("mean_score_change", high=100.0),
        _score_change("max_score_change", high=100.0),
        _score_change("changed_top1", needs_group=True),
        _score_change("top20_overlap", higher_is_better=True, tasks=("retrieval",)),
        MetricProperties(
            name="bytes",
            tasks=EVERY_TASK,
            higher_is_better=False,
            compared="ratio",
            largest=2.0,
            low=1024.0,  # an empty graph takes more
            high=1e18,
            unit=" bytes",
        ),
        *(
            _latency(name)
            for name in get_args(Measure)
            if "_ms@" in name  # every latency is measured alike
        ),
    )
}

LATENCY_BATCHES = tuple(
    sorted({facts.batch for facts in MEASURES.values() if facts.batch is not None})
)


def quality_metrics(task: str, *, grouped: bool) -> tuple[str, ...]:
    """Return the quality metrics measured for a task.

    Args:
        task: task of the signature.
        grouped: whether the signature names a group column.
    """
    return tuple(
        name
        for name, facts in MEASURES.items()
        if facts.compared == "difference"
        and task in facts.tasks
        and (grouped or not facts.needs_group)
    )


def measured_metrics(task: str, *, grouped: bool, test_rows: int) -> tuple[str, ...]:
    """Return all metrics measured for a model.

    These are quality, score changes, bytes, and latency of batches no larger than the test rows.
    """
    quality = quality_metrics(task, grouped=grouped)
    rest = (
        name
        for name, facts in MEASURES.items()
        if facts.compared != "difference"
        and task in facts.tasks
        and (grouped or not facts.needs_group)
        and (facts.batch or 0) <= test_rows
    )
    return (*quality, *rest)


def selecting_metrics(task: str, *, grouped: bool) -> tuple[str, ...]:
    """Return the metrics that a signature of this task may name."""
    return tuple(n for n in quality_metrics(task, grouped=grouped) if MEASURES[n].selects)


def metric_problem(task: str, metric: str, *, grouped: bool) -> Reason | None:
    """Return why a signature's metric cannot be used, or None."""
    possible = selecting_metrics(task, grouped=grouped)
    if metric in possible:
        return None
    with_group = selecting_metrics(task, grouped=True)
    if not grouped and metric in with_group:
        return Reason("metric_without_group", metric=metric)
    if not possible and not grouped:
        return Reason("metric_of_groups_alone", metric=metric, task=task, grouped=with_group)
    more = tuple(name for name in with_group if name not in possible)
    if more:
        return Reason(
            "metric_of_other_task_or_group",
            task=task,
            metrics=possible,
            grouped=more,
            metric=metric,
        )
    return Reason("metric_of_other_task", task=task, metrics=possible, metric=metric)

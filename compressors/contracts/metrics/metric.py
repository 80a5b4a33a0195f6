"""What a metric declares, and families of metrics that differ only in a number in their names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from compressors.contracts.named_object import named_object
from compressors.contracts.task_kind import Evaluation, Labels, TaskKind

MetricKind = Literal["quality", "score_change", "bytes", "latency"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Properties of one metric that are known before anything is measured.

    Attributes:
        name: name in limits, signatures and reports, such as ``ndcg@10``.
        kind: what is measured: quality of a model, a change of its scores, bytes or latency.
        label: name in sentences.
        heading: name in tables, if shorter than ``label``.
        evaluations: by how a model is evaluated, where it can be measured; see ``TaskKind``.
        labels: the labels with which it can be measured.
        higher_is_better: whether higher values are better.
        compared: how two models are compared: candidate minus other, or candidate over other.
            ``never`` for a change of scores, which compares with the baseline by itself.
        largest: in a comparison the largest loss, or the largest ratio, that an order can intend; a
            larger one would accept a useless model.
        low: the smallest number that a limit on the metric itself can intend. For a share it is
            the value of random scores, which every useful model exceeds.
        high: the largest possible number.
        unit: unit of the metric itself, with a space before it.
        decimals: digits after the point of the metric itself in sentences.
        is_share: whether reports show the number in percent.
        in_score_units: whether the number is in the unit of the model's scores.
        has_interval: whether other rows are covered by an interval.
        selects: whether a signature may name it as the metric to judge a model by.
        needs_group: whether the data needs a group column.
        depth: number of ranks that count.
        batch: rows of the timed request.
        quantile: quantile of the times of many requests.
        estimators: by how a model is evaluated, ``rows`` (one score for each row) or ``queries``
            (a ranking of the catalogue for each query): the class of the estimator, or its
            ``module:name``, which is imported when it is first used. Empty unless ``kind`` is
            ``quality``.
    """

    name: str
    kind: MetricKind
    label: str
    higher_is_better: bool
    compared: Literal["difference", "ratio", "never"]
    largest: float
    low: float
    high: float
    evaluations: tuple[Evaluation, ...] = ("rows", "queries")
    labels: tuple[Labels, ...] = ("clicks", "grades")
    heading: str = ""
    unit: str = ""
    decimals: int = 4
    is_share: bool = False
    in_score_units: bool = False
    has_interval: bool = True
    selects: bool = False
    needs_group: bool = False
    depth: int | None = None
    batch: int | None = None
    quantile: float | None = None
    estimators: Mapping[Evaluation, Any] = field(default_factory=dict)

    def estimator(self, evaluation: Evaluation) -> Any:
        """Return the estimator for ``rows`` or ``queries``; None if the metric has none.

        Its protocol is in ``compressors/metrics/estimators/protocols.py``.
        """
        found = named_object(self.estimators.get(evaluation))
        return None if found is None else found(self)


@dataclass(frozen=True, kw_only=True)
class MetricFamily:
    """Metrics whose names differ in the number after the ``@``; or one metric without a number.

    Attributes:
        name: the name, up to and including the ``@`` if there is one.
        number: what the number is, such as ``k`` or ``batch``; empty for one metric.
        member: returns the metric with a number; without arguments if the family is one metric.
        usual: the numbers that are measured for every model, in addition to those of its
            ``TaskKind``.
        most: the largest number.
    """

    name: str
    member: Callable[..., Metric]
    number: str = ""
    usual: tuple[int, ...] = ()
    most: int = 10_000

    @property
    def spelling(self) -> str:
        """The names of the family for people: ``auc``, ``ndcg@k``."""
        return f"{self.name}{self.number}"

    def of_task(self, kind: TaskKind) -> tuple[Metric, ...]:
        """Return the metrics of the family that every order measures for a kind of task."""
        if not self.number:
            return (self.member(),)
        named = (name.partition("@") for name in kind.usual)
        own = [int(number) for head, at, number in named if head + at == self.name]
        return tuple(self.member(number) for number in (*self.usual, *own))

    def any_member(self) -> Metric:
        """Return a metric of the family, for what all of them have in common."""
        return self.member(1) if self.number else self.member()


def one(metric: Metric) -> MetricFamily:
    """Return the family of one metric without a number in its name."""
    return MetricFamily(name=metric.name, member=lambda: metric)

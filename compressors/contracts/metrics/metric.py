"""The class ``Metric``, and families of metrics that differ only in a number in their names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
        heading: name in tables of reports, if it differs from ``label``; else empty.
        evaluations: the ways of evaluating a model (``TaskKind.evaluation``) that can measure it.
        labels: the kinds of labels with which it can be measured.
        higher_is_better: whether higher values are better.
        compared: how two models are compared: by the ``difference`` candidate minus other, or the
            ``ratio`` candidate / other. ``never`` for a change of scores, which is itself a
            comparison with the baseline.
        loosest_bound: largest loss or ratio that a limit on a comparison can plausibly allow; a
            larger one would accept a useless model.
        low: smallest plausible limit on the metric itself. For a quality metric in [0, 1] it is the
            value of random scores (0.5 for AUC), or 0 if that depends on the data.
        high: largest possible value or, if the metric has no upper bound, a value that only useless
            results exceed.
        unit: unit of the value in sentences, with a space before it.
        decimals: digits after the decimal point of the value in sentences.
        is_share: whether reports show the value in percent.
        in_score_units: whether the value is in the unit of the model's scores
            (``TaskKind.score_unit``).
        has_interval: whether the value has a confidence interval.
        selects: whether a signature may name it as the metric by which the model is judged.
        needs_group: whether the data needs a group column.
        depth: number of top ranks that are evaluated; None if there is no such number.
        batch: number of rows of a timed request; None if it is not a latency.
        quantile: quantile of the latencies of many requests; None if it is not a latency.
        output: the output of the model that is measured, as in ``auc[click]``; None if the model
            has one output, or if the metric describes the whole model (bytes and latency).
        estimators: the class of the estimator, or its ``module:name``, which is imported at first
            use, for each way of evaluating a model: ``rows`` (one score for each row) or
            ``queries`` (a ranking of the catalogue for each query). Empty unless ``kind`` is
            ``quality``.
    """

    name: str
    kind: MetricKind
    label: str
    higher_is_better: bool
    compared: Literal["difference", "ratio", "never"]
    loosest_bound: float
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
    output: str | None = None
    estimators: Mapping[Evaluation, Any] = field(default_factory=dict)

    @property
    def is_of_output(self) -> bool:
        """Whether each output of a model has its own value; the others describe the whole model."""
        return self.kind in ("quality", "score_change")

    def of_output(self, output: str) -> "Metric":
        """Return this metric for one of several outputs; its name is then like ``auc[click]``."""
        return replace(
            self,
            name=metric_name_of_output(self.name, output),
            label=f"{self.label} of {output}",
            heading=self.heading and f"{self.heading} of {output}",
            output=output,
        )

    def estimator(self, evaluation: Evaluation) -> Any:
        """Return the estimator for a way of evaluating models; None if the metric has none.

        Its protocol is in ``compressors/metrics/estimators/protocols.py``.
        """
        estimator_class = named_object(self.estimators.get(evaluation))
        return None if estimator_class is None else estimator_class(self)


def metric_name_of_output(metric: str, output: str) -> str:
    """Return the name of a metric of one of several outputs, such as ``auc[click]``."""
    return f"{metric}[{output}]"


@dataclass(frozen=True, kw_only=True)
class MetricFamily:
    """Metrics whose names differ in the number after the ``@``; or one metric without a number.

    Attributes:
        name: the name, up to and including the ``@`` if there is one.
        number: the meaning of the number, such as ``k`` or ``batch``; empty if there is none.
        member: function that returns the metric with a number; it has no argument if there is no
            number.
        default_numbers: the numbers that are measured for every model, in addition to those in
            ``TaskKind.default_metrics``.
        max_number: the largest allowed number.
    """

    name: str
    member: Callable[..., Metric]
    number: str = ""
    default_numbers: tuple[int, ...] = ()
    max_number: int = 10_000

    @property
    def spelling(self) -> str:
        """The family's name as messages show it, such as ``auc`` or ``ndcg@k``."""
        return f"{self.name}{self.number}"

    def list_metrics_of_task(self, kind: TaskKind) -> tuple[Metric, ...]:
        """Return the metrics of the family that every order measures for a task kind."""
        if not self.number:
            return (self.member(),)
        default_names = (name.partition("@") for name in kind.default_metrics)
        numbers_of_kind = [
            int(number)
            for prefix, separator, number in default_names
            if prefix + separator == self.name
        ]
        return tuple(self.member(number) for number in (*self.default_numbers, *numbers_of_kind))

    def any_member(self) -> Metric:
        """Return one metric of the family, for the properties that all of its metrics share."""
        return self.member(1) if self.number else self.member()


def single_metric(metric: Metric) -> MetricFamily:
    """Return the family of one metric without a number in its name."""
    return MetricFamily(name=metric.name, member=lambda: metric)

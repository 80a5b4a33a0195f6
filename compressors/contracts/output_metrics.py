"""Names of metrics and limits for models with one output or several.

``outputs`` are the outputs of a signature, and ``grouped`` is whether it names a group column. A
model with one output has the metric ``auc``, a model with several ``auc[click]`` and ``auc[like]``.
"""

from collections.abc import Iterable, Iterator

from compressors.contracts.limits import Limit
from compressors.contracts.metrics import default_batch_sizes, metric, quality_metrics
from compressors.contracts.metrics.families import can_be_measured, default_metrics_of_task
from compressors.contracts.metrics.metric import Metric, metric_name_of_output
from compressors.contracts.metrics.serving import MEDIAN
from compressors.contracts.signature import Output

Outputs = tuple[Output, ...]


def quality_metrics_of_outputs(
    outputs: Outputs, *, grouped: bool, additional: Iterable[str] = ()
) -> tuple[str, ...]:
    """Return the quality metrics measured for a model.

    Args:
        outputs: the model's outputs.
        grouped: whether the signature names a group column.
        additional: names of metrics to measure in addition to the default metrics, such as those
            in the limits that ``limits_of_outputs`` returns; only quality metrics are used.
    """
    additional_declared = [metric(name) for name in additional]
    names: list[str] = []
    for output in outputs:
        of_output = [item for item in additional_declared if item.output in (None, output.name)]
        measured = quality_metrics(
            output.kind,
            grouped=grouped,
            additional=(output.metric, *(_strip_output(item) for item in of_output)),
        )
        names += [_name_for_output(name, output, outputs) for name in measured]
    return tuple(names)


def additional_metrics(outputs: Outputs, names: Iterable[str]) -> tuple[str, ...]:
    """Return the metrics among ``names`` that are not measured for every model of these tasks."""
    default_names = {
        _name_for_output(item.name, output, outputs) if item.is_of_output else item.name
        for output in outputs
        for item in default_metrics_of_task(output.kind)
    }
    return tuple(sorted(set(names) - default_names))


def metrics_measured_for_limits(outputs: Outputs, limits: Iterable[Limit]) -> tuple[str, ...]:
    """Return the metrics of limits that might not be measured if no limit named them.

    These are the metrics of limits that are no default metrics (``additional_metrics``), and high
    quantiles of latency, such as ``p99_ms@64``. A high quantile is a default metric, but needs many
    requests, so for a slow model it is measured only if a limit names it
    (``tasks/evaluation/latency.py``).
    """
    declared = [limit.declared for limit in limits]
    quantiles = {item.name for item in declared if item.quantile not in (None, MEDIAN)}
    additional = additional_metrics(outputs, (item.name for item in declared))
    return tuple(sorted({*additional, *quantiles}))


def default_batch_sizes_of_outputs(outputs: Outputs) -> tuple[int, ...]:
    """Return the batch sizes at which the latency of every model of these tasks is measured."""
    return tuple(sorted({size for output in outputs for size in default_batch_sizes(output.kind)}))


def limits_of_outputs(
    limits: Iterable[Limit], outputs: Outputs, *, grouped: bool
) -> tuple[Limit, ...]:
    """Return limits whose metrics have the names under which they are measured.

    A limit on a metric without an output, such as ``auc``, applies to each of several outputs for
    which the metric can be measured. For one output, ``auc[click]`` is ``auc``. A limit on a metric
    that cannot be measured, or on an unknown output, is unchanged.
    """
    return tuple(item for limit in limits for item in _resolve_limit(limit, outputs, grouped))


def _resolve_limit(limit: Limit, outputs: Outputs, grouped: bool) -> Iterator[Limit]:
    declared = limit.declared
    if len(outputs) == 1:
        is_known = declared.output == outputs[0].name
        yield _replace_metric(limit, _strip_output(declared)) if is_known else limit
        return
    measurable = [
        output for output in outputs if can_be_measured(declared, output.kind, grouped=grouped)
    ]
    if not declared.is_of_output or declared.output is not None or not measurable:
        yield limit
        return
    for output in measurable:
        yield _replace_metric(limit, metric_name_of_output(limit.metric, output.name))


def _replace_metric(limit: Limit, name: str) -> Limit:
    return limit.model_copy(update={"metric": name})


def _strip_output(item: Metric) -> str:
    """Return the name of a metric without the output in brackets."""
    return item.name.partition("[")[0]


def _name_for_output(name: str, output: Output, outputs: Outputs) -> str:
    """Return a metric's name, with the output in brackets if the model has several outputs."""
    return name if len(outputs) == 1 else metric_name_of_output(name, output.name)

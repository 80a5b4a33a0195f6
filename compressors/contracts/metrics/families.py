"""The registry of metrics: a metric by its name, and the metrics measured for a task kind.

A family contains metrics that differ in the number in their names, such as ``ndcg@10`` and
``ndcg@20``; a metric without a number is a family of one. An order is a request to compress a
model, with limits on metrics. *Default* metrics are those that every order of a task kind measures;
others are measured if a limit names them. *Selecting* metrics (``Metric.selects``) are those that a
signature may name as the metric by which the model is judged. The parameter ``task`` is the name of
a task kind, and ``grouped`` is whether the signature names a group column. For a model with several
outputs, the metric of one output has its name in brackets, such as ``auc[click]``.

To add a metric, write its declaration and its estimator. Then add its family to ``FAMILIES`` of
``quality.py``, ``score_changes.py`` or ``serving.py``, or call ``register``.
"""

import re
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator, GetJsonSchemaHandler
from pydantic_core import CoreSchema

from compressors.contracts.metrics import quality, score_changes, serving
from compressors.contracts.metrics.metric import Metric, MetricFamily
from compressors.contracts.reasons import Reason
from compressors.contracts.task_kind import TASK_KINDS, task_kind
from compressors.contracts.value_errors import value_error

FAMILIES: dict[str, MetricFamily] = {}
"""Every family by its name."""


def register(family: MetricFamily) -> None:
    """Add a family of metrics.

    Raises:
        ValueError: a family has this name already.
    """
    if family.name in FAMILIES:
        raise ValueError(f"metric {family.spelling} is already registered")
    FAMILIES[family.name] = family
    find_metric.cache_clear()


OUTPUT_NAME = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
"""Regular expression of the name of an output."""


@cache
def find_metric(name: str) -> Metric | None:
    """Return the metric with this name; None if no family contains it."""
    of_output = re.fullmatch(rf"([^\[\]]+)\[({OUTPUT_NAME})\]", name)
    if of_output is not None:
        member = find_metric(of_output[1])
        return member.of_output(of_output[2]) if member and member.is_of_output else None
    prefix, separator, number = name.partition("@")
    family = FAMILIES.get(prefix + separator)
    if family is None:
        return None
    if not family.number:
        return family.member()
    if not re.fullmatch(r"[1-9][0-9]{0,8}", number) or int(number) > family.max_number:
        return None
    return family.member(int(number))


def metric(name: str) -> Metric:
    """Return the metric with this name.

    Raises:
        KeyError: no family contains it.
    """
    result = find_metric(name)
    if result is None:
        raise KeyError(name)
    return result


for _family in (*quality.FAMILIES, *score_changes.FAMILIES, *serving.FAMILIES):
    register(_family)


# --- metrics of a task -------------------------------------------------------------------------


def _list_default_metrics(task: str, *, grouped: bool) -> tuple[Metric, ...]:
    """Return the metrics that every order of a task kind measures, as far as its data allows."""
    return tuple(
        member
        for family in FAMILIES.values()
        for member in family.list_metrics_of_task(task_kind(task))
        if can_be_measured(member, task, grouped=grouped)
    )


def default_metrics() -> dict[str, Metric]:
    """Return, by name, the default metrics of all task kinds, also those that need groups."""
    return {
        item.name: item for task in TASK_KINDS for item in _list_default_metrics(task, grouped=True)
    }


def quality_metrics(task: str, *, grouped: bool, additional: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the quality metrics measured for a model.

    Args:
        task: name of the task kind.
        grouped: whether the signature names a group column.
        additional: names of metrics to measure in addition to the default metrics; only quality
            metrics are used.
    """
    default_names = [item.name for item in _list_default_metrics(task, grouped=grouped)]
    names = dict.fromkeys([*default_names, *additional])  # each name once, in this order
    return tuple(name for name in names if metric(name).kind == "quality")


def default_metrics_of_task(task: str) -> tuple[Metric, ...]:
    """Return the metrics that are measured for every model of a task kind whose data has groups."""
    return _list_default_metrics(task, grouped=True)


def can_be_measured(
    item: Metric, task: str, *, grouped: bool, test_rows: int | None = None
) -> bool:
    """Return whether a metric can be measured for a model.

    Args:
        item: the metric.
        task: name of the task kind.
        grouped: whether the signature names a group column.
        test_rows: number of test rows, which a latency's batch size may not exceed; None for no
            limit.
    """
    kind = task_kind(task)
    return (
        kind.evaluation in item.evaluations
        and kind.labels in item.labels
        and (grouped or not item.needs_group)
        and (test_rows is None or (item.batch or 0) <= test_rows)
    )


def measured_metrics(task: str, *, grouped: bool, test_rows: int) -> tuple[str, ...]:
    """Return the names, as messages show them, of all metrics that can be measured for a model.

    These are quality, score changes, bytes, and latency with batch sizes up to ``test_rows``. A
    family is one name, such as ``ndcg@k``.
    """
    return tuple(
        family.spelling
        for family in FAMILIES.values()
        if can_be_measured(family.any_member(), task, grouped=grouped, test_rows=test_rows)
    )


def default_batch_sizes(task: str) -> tuple[int, ...]:
    """Return the batch sizes at which latency is measured for every model of a task kind."""
    batches = {
        item.batch for item in _list_default_metrics(task, grouped=True) if item.batch is not None
    }
    return tuple(sorted(batches))


def selecting_metrics(task: str, *, grouped: bool) -> tuple[str, ...]:
    """Return the names, as messages show them, of metrics that a signature of a task may name."""
    members = {family.spelling: family.any_member() for family in FAMILIES.values()}
    return tuple(
        spelling
        for spelling, member in members.items()
        if member.selects and can_be_measured(member, task, grouped=grouped)
    )


def metric_problem(task: str, name: str, *, grouped: bool) -> Reason | None:
    """Return why a signature with this task kind cannot name a metric, or None."""
    item = find_metric(name)
    if item is not None and item.selects and can_be_measured(item, task, grouped=grouped):
        return None
    if item is not None and item.selects and can_be_measured(item, task, grouped=True):
        return Reason("metric_without_group", metric=name)
    possible = selecting_metrics(task, grouped=grouped)
    with_group = selecting_metrics(task, grouped=True)
    if not possible and not grouped:
        return Reason("metric_of_groups_alone", metric=name, task=task, grouped=with_group)
    additional = tuple(spelling for spelling in with_group if spelling not in possible)
    if additional:
        return Reason(
            "metric_of_other_task_or_group",
            task=task,
            metrics=possible,
            grouped=additional,
            metric=name,
        )
    return Reason("metric_of_other_task", task=task, metrics=possible, metric=name)


# --- names in documents ------------------------------------------------------------------------


def _require_known(name: str) -> str:
    """Return the name of a registered metric unchanged; raise for another name."""
    if find_metric(name) is None:
        known = tuple(family.spelling for family in FAMILIES.values())
        raise value_error("metric_unknown", metric=name, known=known)
    return name


class _NameSchema:
    """The JSON schema of a metric's name: a metric measured for every model, or one of a family."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        others = "|".join(name_pattern(item) for item in FAMILIES.values())
        return {
            "anyOf": [
                {
                    "title": "Measured by default",
                    "type": "string",
                    "enum": list(default_metrics()),
                },
                {
                    "title": "At another depth or batch, or of one output: auc[NAME]",
                    "type": "string",
                    "pattern": others,
                },
            ]
        }


def name_pattern(family: MetricFamily) -> str:
    """Return a regular expression that matches the names of a family, for JSON schemas."""
    number = "[1-9][0-9]*" if family.number else ""
    output = rf"(\[{OUTPUT_NAME}\])?" if family.any_member().is_of_output else ""
    return f"^{re.escape(family.name)}{number}{output}$"


MetricName = Annotated[str, AfterValidator(_require_known), _NameSchema()]
"""The name of a registered metric."""

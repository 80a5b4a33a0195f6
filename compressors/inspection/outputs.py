"""Derive the outputs of a signature from what a trained network returned."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from compressors.contracts import Output, metric_problem
from compressors.contracts.task_kind import OutputForm
from compressors.errors.inspection import InspectionFailed
from compressors.inspection.sample import Sample


@dataclass(frozen=True)
class NamedScores:
    """The outputs of a network: a tensor ``(rows,)`` for each, and their names if it has names."""

    scores: tuple[Tensor, ...]
    names: tuple[str, ...] | None


def named_scores(returned: object, rows: int, architecture: str) -> NamedScores:
    """Split what a network returned into outputs.

    Args:
        returned: one tensor, ``(rows,)``, ``(rows, 1)`` or ``(rows, outputs)``; or a tuple, list or
            mapping of tensors ``(rows,)`` or ``(rows, 1)``. Other entries of a mapping are ignored.
        rows: number of rows.
        architecture: name of the network's class, for the error.

    Raises:
        InspectionFailed: it is something else.
    """
    if isinstance(returned, Tensor) and returned.dim() == 2 and len(returned) == rows:
        return NamedScores(returned.unbind(dim=1), None)
    if isinstance(returned, Tensor):
        returned = (returned,)
    if isinstance(returned, Mapping):
        scores = {name: value for name, value in returned.items() if _is_score(value, rows)}
        names, values = tuple(map(str, scores)), list(scores.values())
    else:
        names, values = None, list(returned) if isinstance(returned, tuple | list) else []
    if not values or not all(_is_score(value, rows) for value in values):
        raise InspectionFailed(
            "outputs_unknown", architecture=architecture, got=_describe_shape(returned)
        )
    return NamedScores(tuple(value.reshape(-1) for value in values), names)


def _is_score(value: object, rows: int) -> bool:
    """Return whether a value is a tensor with one number per row."""
    return isinstance(value, Tensor) and value.shape in ((rows,), (rows, 1))


def _describe_shape(returned: object) -> str:
    """Describe a value by its type, and tensors by their shape."""
    if isinstance(returned, Tensor):
        return f"a tensor {tuple(returned.shape)}"
    if isinstance(returned, tuple | list):
        return f"{type(returned).__name__} of {', '.join(map(_describe_shape, returned))}"
    if isinstance(returned, Mapping):
        items = [f"{key}: {_describe_shape(value)}" for key, value in returned.items()]
        return f"a mapping with {', '.join(items)}"
    return type(returned).__name__


def derive_outputs(
    outputs: NamedScores,
    labels: Mapping[str, str],
    sample: Sample,
    metric: str | None,
    architecture: str,
) -> tuple[Output, ...]:
    """Derive the outputs of a signature.

    If labels are 0 and 1, they are clicks, and the output has the kind ``ctr``. If there are other
    labels, or the metric is one of lists such as ``ndcg@10``, the kind is ``ranking``. Scores of
    kind ``ctr`` that all lie in [0, 1] are probabilities, other ones logits.

    Args:
        outputs: the outputs of the network.
        labels: column with the labels by output; for outputs without names, in their order.
        sample: the sampled columns, also of the labels.
        metric: the metric that decides quality; None for ``auc``, or ``ndcg@10`` of a ranking.
        architecture: name of the network's class, for errors.

    Raises:
        InspectionFailed: the labels do not fit the outputs.
    """
    by_name = _map_outputs_to_labels(outputs, labels, architecture)
    indices = {name: index for index, name in enumerate(outputs.names or by_name)}
    return tuple(
        _describe_output(name, label, sample, outputs.scores[indices[name]], metric)
        for name, label in by_name.items()
    )


def _map_outputs_to_labels(
    outputs: NamedScores, labels: Mapping[str, str], architecture: str
) -> dict[str, str]:
    """Return the column with the labels of each output."""
    if outputs.names is None:
        if len(labels) != len(outputs.scores):
            raise InspectionFailed(
                "labels_count",
                architecture=architecture,
                expected=len(outputs.scores),
                got=len(labels),
            )
        return dict(labels)
    if set(labels) - set(outputs.names) and len(labels) == 1 == len(outputs.names):
        return {outputs.names[0]: next(iter(labels.values()))}
    if unknown := tuple(name for name in labels if name not in outputs.names):
        raise InspectionFailed(
            "labels_unnamed", architecture=architecture, names=outputs.names, got=unknown
        )
    return {name: labels[name] for name in outputs.names if name in labels}


def _is_of_lists(metric: str | None) -> bool:
    """Return whether a metric is measured for rankings and not for clicks."""
    return (
        metric is not None
        and metric_problem("ctr", metric, grouped=True) is not None
        and metric_problem("ranking", metric, grouped=True) is None
    )


def _describe_output(
    name: str, label: str, sample: Sample, scores: Tensor, metric: str | None
) -> Output:
    """Return one output of the signature."""
    column = sample[label]
    values = {column.low, column.high} if column.is_integer else set(np.unique(column.values))
    is_click = values <= {0, 1} and not _is_of_lists(metric)
    form: OutputForm = "score"
    if is_click:
        form = "probability" if bool(((scores >= 0) & (scores <= 1)).all()) else "logit"
    return Output(
        name=name,
        kind="ctr" if is_click else "ranking",
        form=form,
        label=label,
        metric=metric or ("auc" if is_click else "ndcg@10"),
    )

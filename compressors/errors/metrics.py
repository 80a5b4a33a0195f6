"""Errors of computing metrics and judging limits.

``sentences`` map a code to its message, in the syntax of ``str.format``.

``times`` is the name of measured durations, such as "candidate latency", and ``number`` the name of
a measured value. ``expected`` and ``got`` of ``graphs_differ`` are names of graphs. ``problem``
says why the metric that the bundle's signature names cannot be measured. A draft is a bundle's
files before they are packed. ``changed_top1`` is the share of groups in which another row has the
highest score.
"""

from typing import ClassVar

from compressors.errors.compression import CompressionError

_WITHOUT_CHAMPION = "Leave limits against the champion out of this order."


class MetricRefused(CompressionError):
    """A metric or a measurement cannot be computed from these rows, scores or settings.

    ``units`` are what an interval resamples, such as rows or queries. ``side`` is ``query`` or
    ``item``: the tower of a retrieval model whose vectors are wrong.
    """

    sentences: ClassVar = {
        "probabilities_outside": (
            "Log loss needs probabilities in [0, 1]; {count} of {rows} are outside, the "
            "first is {first:g}. Apply the sigmoid to logits first."
        ),
        "labels_not_binary": (
            "This metric needs labels 0 and 1; {count} of {rows} are neither, the first is "
            "{first:g}. Convert ratings to clicks first."
        ),
        "grades_outside": (
            "Metrics of lists need labels in [0, 30] (a gain of ndcg is 2**label - 1); got "
            "{lowest:g} to {highest:g}. Convert ratings to relevance grades first."
        ),
        "depth_below_one": "Expected a depth k of at least 1, got {depth}.",
        "one_class_only": "{metric} needs positive and negative rows; got {positive} positive of "
        "{rows}. Use a larger or another test set.",
        "groups_of_one_class": "gauc needs a group with both a positive and a negative row; no "
        "group has both. Choose another group column, or the metric 'auc'.",
        "relevant_items_missing": "Metrics of lists need a group with a relevant item (label above "
        "0); no group has one. Check the label and group columns.",
        "metric_needs_groups": (
            "{metric} needs a group column, but this data has none. Name one in the "
            "bundle's signature, or use the metric 'auc'."
        ),
        "interval_metric_unknown": "An interval needs a metric with an estimator for this kind of "
        "evaluation; {metric!r} has none.",
        "column_shape": "A metric needs {column} as one number per row, shape (rows,); got shape "
        "{shape!r}.",
        "column_not_numeric": "A metric needs {column} as numbers; got {dtype}.",
        "column_not_finite": "A metric needs finite numbers; {count} of {rows} values of {column} "
        "are NaN or infinite. The model or its data is broken, so no limit can accept it.",
        "lengths_differ": "A metric needs columns of the same rows; got lengths {lengths}.",
        "group_shape": "Expected a group column of shape (rows,), got {shape!r}.",
        "group_not_finite": "A group column must not have NaN or infinity; fill or drop them.",
        "values_unpaired": "Expected one value of both models for each query, got shapes "
        "{baseline!r} and {candidate!r}.",
        "values_not_finite": "Expected finite values for all queries, got NaN or infinity.",
        "scores_unpaired": "Expected a score of both models for each row, got shapes {baseline!r} "
        "and {candidate!r}.",
        "scores_not_finite": "Expected finite scores, got NaN or infinity.",
        "units_few": "An interval needs at least {least} {units}; got {got}. Use a larger test "
        "set.",
        "bootstrap_samples_few": "A 95 % interval needs at least {least} bootstrap samples; got "
        "{got}.",
        "quantile_outside": "Expected a latency quantile inside (0, 1), got {quantile!r}.",
        "durations_unusable": "{times} needs one positive, finite duration in ms per round, shape "
        "(rounds,); got shape {shape!r} with {count} other values.",
        "rounds_few": "{times} at quantile {quantile:g} needs at least {least} rounds for a 95 % "
        "interval; got {got}. Measure more rounds, or limit the median.",
        "items_not_in_catalogue": "Some test items are not in the catalogue, so no ranking can "
        "contain them.",
        "new_items_missing": (
            "Every evaluated row has an item that its query already had in earlier splits, "
            "so there is nothing to rank. Check the group column, which names the query, "
            "and the splits."
        ),
        "vectors_shape": "A ranking needs {expected} {side} vectors of one length; got shape "
        "{shape!r}.",
        "vectors_not_finite": (
            "{count} of {rows} {side} vectors have NaN or infinity, the first is number "
            "{first}. Either an id or a list is outside of what its input declares, or a "
            "value overflowed."
        ),
        "retrieval_needs_groups": (
            "A retrieval model's rows need a group column with the user or query of each "
            "interaction."
        ),
        "graphs_differ": (
            "A model of task {task!r} is served as {expected}, but a model to compare it "
            f"with is served as {{got}}. {_WITHOUT_CHAMPION}"
        ),
        "outputs_differ": (
            "The model has the outputs {expected}, but a model to compare it with has {got}. "
            f"{_WITHOUT_CHAMPION}"
        ),
        "inputs_differ": (
            "The {model} has the inputs {got}, but the candidate has {expected}: they "
            f"cannot be compared on the same rows. {_WITHOUT_CHAMPION}"
        ),
        "tokenizers_differ": (
            "The {model} has another tokenizer for column {column!r} than the candidate: it "
            f"cannot be scored on the candidate's token ids. {_WITHOUT_CHAMPION}"
        ),
        "item_inputs_differ": (
            "The item tower of {name} has the inputs {got}, but the item tower of the order's "
            f"bundle has {{expected}}: it cannot encode this catalogue. {_WITHOUT_CHAMPION}"
        ),
        "graph_scores_not_finite": (
            "The {model} graph returns no finite score for {count} test rows, the first is "
            "row {row}. Either an id or a list is outside of what its input declares, or a "
            "value overflowed."
        ),
        "bundle_scores_not_finite": (
            "{name} {version} has no finite score for {count} rows. Either an id is "
            "outside of its table, or a value overflowed."
        ),
    }


class LimitRefused(CompressionError):
    """Limits cannot be judged: one is incomplete, or its metric is not measured."""

    sentences: ClassVar = {
        "limits_missing": (
            "Expected at least one limit, got none: without limits every model would be "
            "accepted. Add one, for example auc vs baseline >= -0.001."
        ),
        "bound_missing": "A limit on {metric!r} needs at_least or at_most.",
        "number_missing": (
            "Limit '{limit}' needs a metric that was not measured; measured: {measured}. "
            "Remove the limit, or add the data that the metric needs (gauc, changed_top1 and "
            "metrics at a depth k need a group column, changed_top1 also groups of at least "
            "two rows)."
        ),
        "number_broken": (
            "Expected finite numbers for {number}, with low <= high, got {point} [{low}, "
            "{high}]. Check the scores from which they were computed."
        ),
        "sizes_below_one": "Expected sizes of at least 1 byte, got candidate {candidate}, baseline "
        "{baseline}, champion {champion}.",
        "measured_but_not_built": "{target} was measured but is marked as not built; one of the "
        "two is wrong.",
        "bundle_metric_unusable": "Bundle {name}@{version}: {problem} in the draft's model.json, "
        "raise its version and run 'recpress bundle pack' again.",
        "limit_output_unknown": "Limit '{limit}' names output {output!r}, which this bundle does "
        "not have. Use one of {outputs}.",
        "limit_not_measured": "Limit '{limit}' is on a metric that is not measured for this bundle "
        "(task {task}, {rows} test rows, a group column). Use one of {metrics}.",
        "limit_not_measured_without_groups": "Limit '{limit}' is on a metric that is not measured "
        "for this bundle (task {task}, {rows} test rows, no group column). Use one of {metrics}.",
    }

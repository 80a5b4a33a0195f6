"""Metrics, measurements and limits that cannot be computed, with their codes and sentences."""

from typing import ClassVar

from compressors.errors.compression import CompressionError

_WITHOUT_CHAMPION = "Leave limits against the champion out of this order."


class MetricRefused(CompressionError):
    """A metric or a measurement cannot be computed from these rows, scores or settings."""

    sentences: ClassVar = {
        "probabilities_outside": "Log loss needs probabilities in [0, 1]; {count} of {rows} are "
        "outside, the first is {first:g}. Apply the sigmoid to logits before.",
        "labels_not_binary": "This metric needs labels 0 and 1; {count} of {rows} are neither, the "
        "first is {first:g}. Turn ratings into clicks before.",
        "grades_outside": "ndcg needs labels in [0, 30] (a gain is 2**label - 1); got {lowest:g} "
        "to {highest:g}. Map ratings to grades of relevance before.",
        "depth_below_one": "Expected a depth k of at least 1, got {depth}.",
        "one_class_only": "{metric} needs positive and negative rows; got {positive} positive of "
        "{rows}. Use a larger or another test set.",
        "groups_of_one_class": "gauc needs a group with both a positive and a negative row; no "
        "group has both. Choose another group column, or the metric 'auc'.",
        "relevant_items_missing": "ndcg needs a group with a relevant item (label above 0); no "
        "group has one. Check the label and group columns.",
        "metric_needs_groups": "{metric} needs a group column and this data has none. Name one in "
        "the bundle's signature, or use the metric 'auc'.",
        "interval_metric_unknown": "An interval needs a metric with an estimator for this kind of "
        "evaluation; {metric!r} has none.",
        "column_shape": "A metric needs {column} as one number per row, shape (rows,); got shape "
        "{shape!r}.",
        "column_not_numeric": "A metric needs {column} as numbers; got {dtype}.",
        "column_not_finite": "A metric needs finite numbers; {count} of {rows} values of {column} "
        "are NaN or infinite. The model or its data is broken; no gate can accept it.",
        "lengths_differ": "A metric needs columns of the same rows; got lengths {lengths}.",
        "group_shape": "A group column has shape (rows,); got {shape!r}.",
        "group_not_finite": "A group column must not have NaN or infinity; fill or drop them.",
        "values_unpaired": "Means are compared on the same queries; got values of shapes "
        "{baseline!r} and {candidate!r}.",
        "values_not_finite": "A query's value is NaN or infinite, which is no measurement.",
        "scores_unpaired": "Expected a score of both models for each row, got shapes {baseline!r} "
        "and {candidate!r}.",
        "scores_not_finite": "Expected finite scores, got NaN or infinity.",
        "units_few": "An interval needs at least {least} {units}; got {got}. Use a larger test "
        "set.",
        "bootstrap_samples_few": "A 95 % interval needs at least {least} bootstrap samples; got "
        "{got}.",
        "quantile_outside": "Expected a latency quantile inside (0, 1), got {quantile!r}.",
        "durations_unusable": "{times} needs one positive, finite duration in ms per round, shape "
        "(rounds,); got shape {shape!r} with {count} others.",
        "rounds_few": "{times} at quantile {quantile:g} needs at least {least} rounds for a 95 % "
        "interval; got {got}. Measure more rounds, or limit the median.",
        "items_not_in_catalogue": "Some test items are not in the catalogue, so no ranking can "
        "contain them.",
        "new_items_missing": "No test row has an item that the same query did not have before, so "
        "there is nothing to find. Check the group column, which names the query, and the splits.",
        "vectors_shape": "A ranking needs {expected} {side} vectors of one length; got shape "
        "{shape!r}.",
        "vectors_not_finite": "{count} of {rows} {side} vectors have NaN or infinity, the first is "
        "number {first}: an id or a list outside what its inputs declare, or an overflow.",
        "retrieval_needs_groups": "A retrieval model's rows need a group column, which says whose "
        "interaction each row is.",
        "graphs_differ": "A model of task {task!r} is served as {expected}; one that it should be "
        f"compared with is served as {{got}}. {_WITHOUT_CHAMPION}",
        "inputs_differ": "The {model} has the inputs {got}, the candidate {expected}: they cannot "
        f"be compared on the same rows. {_WITHOUT_CHAMPION}",
        "graph_scores_not_finite": "The {model} graph gives no finite score for {count} test rows, "
        "the first is row {row}: an id or a list outside what its inputs declare, or an overflow.",
        "bundle_scores_not_finite": "{name} {version} gives no finite score for {count} rows: an "
        "id outside its table, or an overflow.",
    }


class LimitRefused(CompressionError):
    """Limits cannot be judged: a limit is incomplete, or what it needs is not measured."""

    sentences: ClassVar = {
        "limits_missing": "No limits: a gate without any would accept anything. Give at least one, "
        "for example auc vs baseline >= -0.001.",
        "bound_missing": "Limit on {metric!r} needs at_least or at_most.",
        "number_missing": "Limit '{limit}' needs a number that was not measured; measured: "
        "{measured}. Drop the limit, or give the data what the metric needs (gauc, ndcg and "
        "changed_top1 need a group column, changed_top1 also groups of two rows or more).",
        "number_broken": "{number} is {point} [{low}, {high}], which is no measurement, so it "
        "cannot be judged. Check the scores it was computed from.",
        "sizes_below_one": "Sizes must be at least 1 byte; got candidate {candidate}, baseline "
        "{baseline}, champion {champion}.",
        "measured_but_not_built": "{target} was measured but is marked as not built; one of the "
        "two is wrong.",
        "bundle_metric_unusable": "Bundle {name}@{version}: {problem} in the draft's model.json, "
        "raise its version and run 'recpress bundle pack' again.",
        "limit_not_measured": "Limit '{limit}' is on a metric that is not measured for this bundle "
        "(task {task}, {rows} test rows, a group column). Use one of {metrics}.",
        "limit_not_measured_without_groups": "Limit '{limit}' is on a metric that is not measured "
        "for this bundle (task {task}, {rows} test rows, no group column). Use one of {metrics}.",
    }

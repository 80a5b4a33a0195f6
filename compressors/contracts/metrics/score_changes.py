"""Metrics of score changes, which compare the scores of the candidate and of the baseline.

The candidate is the compressed model, the baseline the uncompressed one.
"""

from compressors.contracts.metrics.metric import Metric, single_metric
from compressors.contracts.task_kind import Evaluation


def _create_metric(
    name: str,
    label: str,
    *,
    heading: str = "",
    high: float = 1.0,
    higher_is_better: bool = False,
    needs_group: bool = False,
    is_share: bool = False,
    has_interval: bool = True,
    evaluations: tuple[Evaluation, ...] = ("rows", "queries"),
) -> Metric:
    """Create a metric in [0, ``high``] that compares two models' scores of the same rows.

    ``high`` is 1 for correlations and shares. For changes of scores it is 100: probabilities change
    by at most 1, and a change by 100 standard deviations only occurs in a useless model. ``Metric``
    describes the other arguments.
    """
    return Metric(
        name=name,
        kind="score_change",
        label=label,
        heading=heading,
        evaluations=evaluations,
        higher_is_better=higher_is_better,
        compared="never",
        loosest_bound=high,  # not used: limits on the metric are never comparisons
        low=0.0,
        high=high,
        is_share=is_share,
        # Only changes of scores are in the unit of the scores; correlations and shares have none.
        in_score_units=high > 1,
        has_interval=has_interval,
        needs_group=needs_group,
    )


# Pearson correlation of both models' scores.
CORRELATION = _create_metric("score_correlation", "score correlation", higher_is_better=True)
MEAN = _create_metric("mean_score_change", "mean score change", high=100.0)
# The maximum has no interval, because rows that were not measured can change more.
LARGEST = _create_metric("max_score_change", "largest score change", high=100.0, has_interval=False)
# The share of groups in which another row has the highest score (of queries: another item).
TOP1 = _create_metric(
    "changed_top1",
    "share of changed top-1",
    heading="changed top-1",
    is_share=True,
    needs_group=True,
)
# The share of a query's 20 items with the highest scores that the baseline also ranks there.
TOP20 = _create_metric(
    "top20_overlap",
    "overlap of the top 20",
    heading="top-20 overlap",
    higher_is_better=True,
    is_share=True,
    evaluations=("queries",),
)

FAMILIES = tuple(single_metric(change) for change in (CORRELATION, MEAN, LARGEST, TOP1, TOP20))

"""Quality metrics: how well a model's scores rank or predict labeled rows.

``metric.py`` describes the properties. A limit that allows a loss (baseline minus candidate, or the
reverse if lower is better) of ``loosest_bound`` or more would accept a useless model.
"""

from compressors.contracts.metrics.metric import Metric, MetricFamily, single_metric
from compressors.contracts.task_kind import Evaluation, Labels

ESTIMATORS = "compressors.metrics.estimators"
"""Package of the estimators, which are named as text so that contracts need no numpy."""


def _create_bounded_metric(
    name: str,
    label: str,
    labels: Labels,
    *,
    loosest_bound: float,
    estimators: dict[Evaluation, str],
    low: float = 0.0,
    needs_group: bool = True,
    depth: int | None = None,
) -> Metric:
    """Create a quality metric in [0, 1] for which higher is better.

    A signature may name it as the metric by which the model is judged (``selects``).

    Args:
        name: name in limits and signatures.
        label: name in sentences.
        labels: the kind of labels with which it can be measured.
        loosest_bound: a limit that allows this loss or more would accept a useless model.
        estimators: ``module:name`` of the estimator, for each way of evaluating a model.
        low: value of random scores; 0 if that depends on the data.
        needs_group: whether the data needs a group column.
        depth: number of top ranks that are evaluated; None if there is no such number.
    """
    return Metric(
        name=name,
        kind="quality",
        label=label,
        evaluations=tuple(estimators),
        labels=(labels,),
        higher_is_better=True,
        compared="difference",
        loosest_bound=loosest_bound,
        low=low,
        high=1.0,
        selects=True,
        needs_group=needs_group,
        depth=depth,
        estimators=estimators,
    )


def _create_loss_metric(
    name: str, label: str, *, loosest_bound: float, high: float, estimator: str
) -> Metric:
    """Create a metric that is a loss of predicted probabilities; its best value is 0.

    Args:
        name: name in limits.
        label: name in sentences.
        loosest_bound: a limit that allows an increase of this size or more would accept a useless
            model.
        high: largest possible or, without such a bound, largest meaningful value.
        estimator: name of the estimator's class in ``metrics/estimators/log_loss.py``.
    """
    return Metric(
        name=name,
        kind="quality",
        label=label,
        evaluations=("rows",),
        labels=("clicks",),
        higher_is_better=False,
        compared="difference",
        loosest_bound=loosest_bound,
        low=0.0,
        high=high,
        estimators={"rows": f"{ESTIMATORS}.log_loss:{estimator}"},
    )


def _create_metric_at_depth(name: str, label: str, k: int, *, rows: str, queries: str) -> Metric:
    """Create a metric of the first ``k`` ranks of lists of rows or of rankings of the catalogue.

    Args:
        name: name in limits and signatures, before the ``@``.
        label: name in sentences, before the ``@``.
        k: number of ranks that are evaluated.
        rows: ``file:class`` of the estimator of lists of rows.
        queries: ``file:class`` of the estimator of each query's ranking of the catalogue.
    """
    return _create_bounded_metric(
        f"{name}@{k}",
        f"{label}@{k}",
        "grades",
        loosest_bound=1.0,  # the whole range of the metric
        depth=k,
        estimators={"rows": f"{ESTIMATORS}.{rows}", "queries": f"{ESTIMATORS}.{queries}"},
    )


def ndcg(k: int) -> Metric:
    """Create NDCG at rank ``k``."""
    return _create_metric_at_depth(
        "ndcg", "NDCG", k, rows="ndcg:NdcgOfRows", queries="ndcg:NdcgOfQueries"
    )


def recall(k: int) -> Metric:
    """Create recall: the share of the relevant items that are in the first ``k`` ranks."""
    return _create_metric_at_depth(
        "recall", "Recall", k, rows="top_k:RecallOfRows", queries="recall:RecallOfQueries"
    )


def mrr(k: int) -> Metric:
    """Create MRR: 1 / rank of the first relevant item, or 0 if that rank is above ``k``."""
    return _create_metric_at_depth(
        "mrr", "MRR", k, rows="top_k:ReciprocalRank", queries="top_k:ReciprocalRank"
    )


def mean_average_precision(k: int) -> Metric:
    """Create MAP at rank ``k``, divided by the number of all relevant items as in trec_eval."""
    return _create_metric_at_depth(
        "map", "MAP", k, rows="top_k:AveragePrecision", queries="top_k:AveragePrecision"
    )


def hit(k: int) -> Metric:
    """Create the share of lists with a relevant item in the first ``k`` ranks."""
    return _create_metric_at_depth("hit", "Hit", k, rows="top_k:Hit", queries="top_k:Hit")


def precision(k: int) -> Metric:
    """Create precision: the share of the first ``k`` ranks with a relevant item."""
    return _create_metric_at_depth(
        "precision", "Precision", k, rows="top_k:Precision", queries="top_k:Precision"
    )


CHANCE_AUC = 0.5
"""AUC of random scores. Even a perfect model is useless after a loss of 0.5."""

FAMILIES = (
    single_metric(
        _create_bounded_metric(
            "auc",
            "AUC",
            "clicks",
            loosest_bound=0.5,
            low=CHANCE_AUC,
            needs_group=False,
            estimators={"rows": f"{ESTIMATORS}.auc:Auc"},
        )
    ),
    # ``metrics/point_estimates.py`` clips probabilities to at least 1.19e-7, so the loss of a row
    # is at most 15.943 nats.
    single_metric(
        _create_loss_metric(
            "logloss", "log loss", loosest_bound=0.2, high=15.95, estimator="LogLoss"
        )
    ),
    single_metric(
        _create_loss_metric(
            "normalized_entropy",
            "normalized entropy",
            loosest_bound=0.5,
            # The ratio to the loss of predicting the base rate (1.0) has no fixed upper bound: it
            # depends on that rate. No useful model is near 1000 times that loss.
            high=1000.0,
            estimator="NormalizedEntropy",
        )
    ),
    single_metric(
        _create_bounded_metric(
            "gauc",
            "GAUC",
            "clicks",
            loosest_bound=0.5,
            low=CHANCE_AUC,
            estimators={"rows": f"{ESTIMATORS}.auc:GroupAuc"},
        )
    ),
    MetricFamily(name="recall@", number="k", member=recall),
    MetricFamily(name="ndcg@", number="k", member=ndcg),
    MetricFamily(name="mrr@", number="k", member=mrr),
    MetricFamily(name="map@", number="k", member=mean_average_precision),
    MetricFamily(name="hit@", number="k", member=hit),
    MetricFamily(name="precision@", number="k", member=precision),
)

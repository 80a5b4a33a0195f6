"""Quality metrics: how well a model's scores rank or predict labeled rows."""

from compressors.contracts.metrics.metric import Metric, MetricFamily, single_metric
from compressors.contracts.task_kind import Evaluation, Labels

ESTIMATORS = "compressors.metrics.estimators"
"""Package of the estimators, which are named as text so that contracts need no numpy."""


def _bounded_quality(
    name: str,
    label: str,
    labels: Labels,
    *,
    largest: float,
    estimators: dict[Evaluation, str],
    low: float = 0.0,
    needs_group: bool = True,
    depth: int | None = None,
) -> Metric:
    """Create a quality metric in [0, 1] for which higher is better."""
    return Metric(
        name=name,
        kind="quality",
        label=label,
        evaluations=tuple(estimators),
        labels=(labels,),
        higher_is_better=True,
        compared="difference",
        largest=largest,
        low=low,
        high=1.0,
        selects=True,
        needs_group=needs_group,
        depth=depth,
        estimators=estimators,
    )


def _loss(name: str, label: str, *, largest: float, high: float, estimator: str) -> Metric:
    """Create a metric that is a loss of predicted probabilities; its best value is 0."""
    return Metric(
        name=name,
        kind="quality",
        label=label,
        evaluations=("rows",),
        labels=("clicks",),
        higher_is_better=False,
        compared="difference",
        largest=largest,
        low=0.0,
        high=high,
        estimators={"rows": f"{ESTIMATORS}.log_loss:{estimator}"},
    )


def ndcg(k: int) -> Metric:
    """Create NDCG at rank ``k``, of groups of rows or of each query's ranking of the catalogue."""
    return _bounded_quality(
        f"ndcg@{k}",
        f"NDCG@{k}",
        "grades",
        largest=1.0,
        depth=k,
        estimators={
            "rows": f"{ESTIMATORS}.ndcg:NdcgOfRows",
            "queries": f"{ESTIMATORS}.ndcg:NdcgOfQueries",
        },
    )


def recall(k: int) -> Metric:
    """Create recall: the share of a query's relevant items in the top ``k`` of the catalogue."""
    return _bounded_quality(
        f"recall@{k}",
        f"Recall@{k}",
        "grades",
        largest=1.0,
        depth=k,
        estimators={"queries": f"{ESTIMATORS}.recall:Recall"},
    )


FAMILIES = (
    single_metric(
        _bounded_quality(
            "auc",
            "AUC",
            "clicks",
            largest=0.5,
            low=0.5,
            needs_group=False,
            estimators={"rows": f"{ESTIMATORS}.auc:Auc"},
        )
    ),
    # ``point_estimates.py`` clips probabilities, so the loss of a row is at most 15.95 nats.
    single_metric(_loss("logloss", "log loss", largest=0.2, high=15.95, estimator="LogLoss")),
    single_metric(
        _loss(
            "normalized_entropy",
            "normalized entropy",
            largest=0.5,
            high=1000.0,
            estimator="NormalizedEntropy",
        )
    ),
    single_metric(
        _bounded_quality(
            "gauc",
            "GAUC",
            "clicks",
            largest=0.5,
            low=0.5,
            estimators={"rows": f"{ESTIMATORS}.auc:GroupAuc"},
        )
    ),
    MetricFamily(name="recall@", number="k", member=recall),
    MetricFamily(name="ndcg@", number="k", member=ndcg),
)

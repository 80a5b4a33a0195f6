"""Metrics of quality: how well a model's scores order or predict labeled rows."""

from compressors.contracts.metrics.metric import Metric, MetricFamily, one
from compressors.contracts.task_kind import Evaluation, Labels

ESTIMATORS = "compressors.metrics.estimators"


def _share(
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
    """A quality between 0 and 1, higher is better."""
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
    """A loss of predicted probabilities; 0 is perfect."""
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
    """NDCG of the first ``k`` ranks, of each list of rows or of the catalogue for each query."""
    return _share(
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
    """Share of a query's relevant items among the first ``k`` of the catalogue."""
    return _share(
        f"recall@{k}",
        f"Recall@{k}",
        "grades",
        largest=1.0,
        depth=k,
        estimators={"queries": f"{ESTIMATORS}.recall:Recall"},
    )


FAMILIES = (
    one(
        _share(
            "auc",
            "AUC",
            "clicks",
            largest=0.5,
            low=0.5,
            needs_group=False,
            estimators={"rows": f"{ESTIMATORS}.auc:Auc"},
        )
    ),
    # The probability floor of ``point_estimates.py`` bounds the loss of a row by 15.95 nats.
    one(_loss("logloss", "log loss", largest=0.2, high=15.95, estimator="LogLoss")),
    one(
        _loss(
            "normalized_entropy",
            "normalized entropy",
            largest=0.5,
            high=1000.0,
            estimator="NormalizedEntropy",
        )
    ),
    one(
        _share(
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

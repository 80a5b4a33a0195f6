"""Metrics of serving: bytes and latency. They are compared by ratio, and lower is better."""

from functools import partial

from compressors.contracts.metrics.metric import Metric, MetricFamily, single_metric

BATCHES = (1, 64, 1024)
"""Batch sizes at which every order measures latency."""

LARGEST_BATCH = 65_536
MEDIAN = 0.5
QUANTILES = {"p50": MEDIAN, "p99": 0.99}

BYTES = Metric(
    name="bytes",
    kind="bytes",
    label="size",
    higher_is_better=False,
    compared="ratio",
    largest=2.0,
    low=1024.0,  # even an empty graph is larger
    high=1e18,
    unit=" bytes",
    decimals=0,
    has_interval=False,
)


def latency(quantile: str, batch: int) -> Metric:
    """Create the metric for a quantile of the latency of requests of ``batch`` rows, in ms."""
    return Metric(
        name=f"{quantile}_ms@{batch}",
        kind="latency",
        label=f"{quantile} latency at batch {batch}",
        heading=f"{quantile} ms, batch {batch}",
        higher_is_better=False,
        compared="ratio",
        largest=10.0,
        low=0.001,  # any call of a runtime takes longer
        high=3_600_000.0,
        unit=" ms",
        decimals=3,
        batch=batch,
        quantile=QUANTILES[quantile],
    )


FAMILIES = (
    single_metric(BYTES),
    *(
        MetricFamily(
            name=f"{quantile}_ms@",
            number="batch",
            member=partial(latency, quantile),
            usual=BATCHES,
            most=LARGEST_BATCH,
        )
        for quantile in QUANTILES
    ),
)

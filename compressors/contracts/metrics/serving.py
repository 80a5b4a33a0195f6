"""Metrics of serving: bytes and latency. They are compared by ratio, and lower is better."""

from functools import partial

from compressors.contracts.metrics.metric import Metric, MetricFamily, single_metric

BATCHES = (1, 64, 1024)
"""Batch sizes at which every order measures latency."""

LARGEST_BATCH = 65_536
"""Largest batch size for which a limit on latency can be given."""
MEDIAN = 0.5
MEDIAN_NAME = "p50"
QUANTILES = {MEDIAN_NAME: MEDIAN, "p99": 0.99}
"""The measured quantiles of latency, by their names in metrics."""

BYTES = Metric(
    name="bytes",
    kind="bytes",
    label="size",
    higher_is_better=False,
    compared="ratio",
    loosest_bound=2.0,  # a limit that allows more than twice the other model's bytes is a mistake
    # A limit outside of ``low`` to ``high`` is refused as a mistake.
    low=1024.0,  # even an empty graph is larger
    high=1e18,  # an exabyte, more than any model
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
        loosest_bound=10.0,  # a limit that allows over ten times the other model's is a mistake
        low=0.001,  # any call of a runtime takes longer
        high=3_600_000.0,  # one hour
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
            default_numbers=BATCHES,
            max_number=LARGEST_BATCH,
        )
        for quantile in QUANTILES
    ),
)

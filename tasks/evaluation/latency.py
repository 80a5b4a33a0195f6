"""Measure the latency of several models at one batch size, within a limit of time. No Prefect.

All models are called in turn, so that a machine that slows down affects all of them.
"""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressors.contracts import metric
from compressors.contracts.metrics.serving import MEDIAN_NAME, QUANTILES, latency
from compressors.contracts.targets.runtime import Session
from compressors.metrics import intervals
from compressors.metrics.measured import Number, latency_numbers
from infra.timing import measure_interleaved_ms

log = logging.getLogger(__name__)

TIMING_BUDGET_MS = 15_000.0
"""Milliseconds to spend on one batch size, of all models together.

It is exceeded if the interval of a quantile needs more rounds; a round is one call of each model.
"""
MAX_TIMING_MS = 60_000.0
"""Most milliseconds for one batch size. A quantile whose interval needs more is not measured.

The median and the quantiles with a limit are measured in any case.
"""
MAX_ROUNDS = 1000
"""Most calls of each model at one batch size, unless a quantile's interval needs more."""
WARMUP_CALLS = 20
"""Calls of each model before the measurement; at most the number of measured calls."""
SLOW_ROUND_MS = 1000.0
"""If the first round takes longer, its time is the estimate of how long a round takes."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Latencies:
    """Latencies at one batch size.

    Attributes:
        candidate: the candidate's latencies, and their ratios to those of the other models.
        baseline: the baseline's latencies.
        not_timed: latencies that were not measured, by metric, with the seconds that they would
            have taken.
    """

    candidate: tuple[Number, ...]
    baseline: tuple[Number, ...]
    not_timed: dict[str, float] = field(default_factory=dict)


def measure_latency(
    sessions: Mapping[str, Session],
    inputs: Mapping[str, Array],
    size: int,
    limited: Collection[str],
    seed: int,
) -> Latencies:
    """Time all models at one batch size.

    Args:
        sessions: the graph or engine of ``baseline``, ``candidate``, and ``champion`` if any.
        inputs: a batch of ``size`` rows.
        size: rows of the batch.
        limited: names of the metrics with a limit.
        seed: seed of the bootstrap.
    """
    models = list(sessions.values())
    round_ms = _estimate_round_ms(models, inputs)
    needed = {  # rounds by metric
        latency(name, size).name: intervals.rounds_needed(quantile)
        for name, quantile in QUANTILES.items()
    }
    always = {latency(MEDIAN_NAME, size).name, *limited}
    not_timed = {
        name: rounds * round_ms / 1000
        for name, rounds in needed.items()
        if rounds * round_ms > MAX_TIMING_MS and name not in always
    }
    for name, seconds in not_timed.items():
        log.warning("%s is not measured: it would take %.0f s", metric(name).label, seconds)
    min_rounds = max(rounds for name, rounds in needed.items() if name not in not_timed)
    rounds = max(min_rounds, min(MAX_ROUNDS, math.ceil(TIMING_BUDGET_MS / round_ms)))
    warmup = min(WARMUP_CALLS, rounds)
    times = dict(zip(sessions, measure_interleaved_ms(models, inputs, rounds, warmup), strict=True))
    candidate: list[Number] = []
    baseline: list[Number] = []
    for name, quantile in QUANTILES.items():
        metric_name = latency(name, size).name
        if metric_name in not_timed:
            continue
        ratio = intervals.latency_ratio(times["baseline"], times["candidate"], quantile, seed=seed)
        champion_ratio = None
        if "champion" in times:
            champion_ratio = intervals.latency_ratio(
                times["champion"], times["candidate"], quantile, seed=seed
            )
        estimate = intervals.latency(times["candidate"], quantile, seed=seed)
        candidate += latency_numbers(metric_name, estimate, ratio, champion_ratio)
        estimate = intervals.latency(times["baseline"], quantile, seed=seed)
        # "absolute": the model's number, not a comparison with another model.
        baseline.append(Number(metric=metric_name, against="absolute", estimate=estimate))
    return Latencies(tuple(candidate), tuple(baseline), not_timed)


def _estimate_round_ms(models: list[Session], inputs: Mapping[str, Array]) -> float:
    """Estimate the milliseconds of a round, which is one call of each model.

    It is the sum of the models' medians of five calls; of one call if that is slow.
    """
    times_of_one_call = measure_interleaved_ms(models, inputs, rounds=1, warmup=1)
    first = sum(float(times[0]) for times in times_of_one_call)
    if first > SLOW_ROUND_MS:
        return first
    times_of_models = measure_interleaved_ms(models, inputs, rounds=5, warmup=5)
    return sum(float(np.median(times)) for times in times_of_models)

"""How often does a 95 % interval contain the true value when rows belong to users?

Simulates test sets whose users have 1 to 200 rows (log-uniform: most users have few rows, a few
users have most of the rows). Users differ in their click rate, in how well the baseline model fits
them, and in how much the compressed model changes their scores.

For each number of users, prints the share of test sets in which the interval of
``intervals.estimate_pair`` contains the true value, for the metric of the baseline ("value") and
for the difference between both models. For comparison, also prints it for the row bootstrap, which
ignores users.

    python -m benchmarks.interval_coverage --runs 4000
"""

import argparse
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compressors.metrics import point_estimates
from compressors.metrics.intervals import estimate_pair

METRICS = ("auc", "logloss", "normalized_entropy")
USERS = (30, 100, 500)
MAX_ROWS = 200  # of a user
POPULATION_BATCHES, POPULATION_BATCH_ROWS = 4, 1_000_000  # for the true values

Floats = NDArray[np.float64]


class TestSet(NamedTuple):
    """One simulated test set, with one entry per row.

    Attributes:
        label: whether the row is a click.
        baseline: the click probability that the baseline predicts.
        candidate: the click probability that the compressed model predicts.
        user: index of the user.
    """

    label: NDArray[np.bool_]
    baseline: Floats
    candidate: Floats
    user: NDArray[np.intp]


class Coverage(NamedTuple):
    """Share of test sets, in [0, 1], whose interval contains the true value."""

    baseline: float
    difference: float


def simulate(rng: np.random.Generator, sizes: NDArray[np.intp]) -> TestSet:
    """Draw a test set with ``sizes[u]`` rows for user ``u``.

    Clicks depend on an effect of the user and on a feature of the row. The baseline's logit
    contains both, with an error for each user and each row. The compressed model adds a shift for
    each user and a rounding error for each row.
    """
    users = sizes.size
    user = np.repeat(np.arange(users), sizes)
    user_effect, user_error, user_shift = rng.normal(size=(3, users))
    feature, row_error, rounding = rng.normal(size=(3, user.size))
    probability = _sigmoid(-1 + 0.8 * user_effect[user] + feature)
    label = rng.random(user.size) < probability
    baseline = -1 + 0.8 * feature + (0.4 * user_effect + 0.4 * user_error)[user] + 0.3 * row_error
    candidate = baseline + 0.25 * user_shift[user] + 0.25 * rounding
    return TestSet(label, _sigmoid(baseline), _sigmoid(candidate), user)


def draw_heavy_tailed_sizes(rng: np.random.Generator, users: int) -> NDArray[np.intp]:
    """Draw the number of rows of each user: 1 to 200, with probability proportional to 1 / rows."""
    rows = np.arange(1, MAX_ROWS + 1)
    return rng.choice(rows, size=users, p=(1 / rows) / (1 / rows).sum())


@cache
def estimate_true_values() -> dict[str, tuple[float, float]]:
    """Estimate the true values from 4 million users with one row each.

    In a large population, almost all pairs of rows are of different users, so one row per user is
    enough. The standard errors (below 0.0003) are much smaller than every interval.

    Returns:
        By metric, its value for the baseline, and the difference between both models.
    """
    rng = np.random.default_rng(0)
    one_row_per_user = np.ones(POPULATION_BATCH_ROWS, dtype=np.intp)
    measure = {
        "auc": point_estimates.auc,
        "logloss": point_estimates.logloss,
        "normalized_entropy": point_estimates.normalized_entropy,
    }
    values: dict[str, list[tuple[float, float]]] = {metric: [] for metric in METRICS}
    for _ in range(POPULATION_BATCHES):
        rows = simulate(rng, one_row_per_user)
        for metric in METRICS:
            before = measure[metric](rows.label, rows.baseline)
            after = measure[metric](rows.label, rows.candidate)
            values[metric].append((before, after - before))
    means = {metric: np.mean(pairs, axis=0) for metric, pairs in values.items()}
    return {metric: (float(mean[0]), float(mean[1])) for metric, mean in means.items()}


def measure_coverage(
    users: int, runs: int, metrics: Iterable[str] = METRICS, *, grouped: bool = True
) -> dict[str, Coverage]:
    """Return by metric the share of simulated test sets whose interval contains the true value.

    Args:
        users: number of users of each test set.
        runs: number of test sets.
        metrics: names of metrics.
        grouped: whether intervals are computed from users, by a jackknife that leaves out one group
            of rows after the other; otherwise a bootstrap resamples rows.
    """
    metrics = tuple(metrics)
    hits = {metric: np.zeros(2) for metric in metrics}
    for run in range(runs):
        rng = np.random.default_rng([users, run])
        rows = simulate(rng, draw_heavy_tailed_sizes(rng, users))
        group = rows.user if grouped else None
        for metric in metrics:
            intervals = estimate_pair(
                metric, rows.label, rows.baseline, rows.candidate, group, samples=300
            )  # ``samples``: number of bootstrap samples, if rows are resampled
            for column, (estimate, value) in enumerate(
                zip(
                    (intervals.baseline, intervals.difference),
                    estimate_true_values()[metric],
                    strict=True,
                )
            ):
                hits[metric][column] += estimate.low <= value <= estimate.high
    return {metric: Coverage(*(count / runs).tolist()) for metric, count in hits.items()}


def _sigmoid(logit: Floats) -> Floats:
    value: Floats = 1 / (1 + np.exp(-logit))
    return value


def main() -> None:
    """Print coverage for every metric and number of users."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=4000, help="simulated test sets")
    parser.add_argument(
        "--row-runs", type=int, default=300, help="simulated test sets for the row bootstrap"
    )
    runs, row_runs = parser.parse_args().runs, parser.parse_args().row_runs
    print("| users | metric | value | difference | row bootstrap: value | difference |")
    print("|---|---|---|---|---|---|")
    for users in USERS:
        by_user = measure_coverage(users, runs)
        by_row = measure_coverage(users, row_runs, grouped=False)
        for metric in METRICS:
            cells = (*by_user[metric], *by_row[metric])
            print(f"| {users} | {metric} | " + " | ".join(f"{c:.1%}" for c in cells) + " |")


if __name__ == "__main__":
    main()

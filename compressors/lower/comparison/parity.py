"""Parity check: compare the scores of a lowered graph with those of the module.

Both score the same rows. Differences are compared with limits that are relative to the spread
(standard deviation) of the module's scores. Each target defines its limits, because graphs of
different targets differ from the module in different ways:

* A graph without int8 arithmetic differs only by float rounding.
* With int8 activations, a value close to a rounding boundary may be rounded to either neighbour. A
  few scores then differ by the effect of one quantization step. In ONNX Runtime's graph the values
  before that rounding equal the module's values, so 90 % of the scores must be equal up to float
  rounding.
* TensorRT's graph rounds looked-up table rows to float16, which moves many values across a rounding
  boundary by a small amount.
* A layer that TensorRT multiplies in bfloat16 rounds its inputs and outputs to bfloat16 (8
  significant bits), which the module does not: 0.2 to 0.5 % of the spread in small networks.
* A wrong lowering changes all scores by 3 to 5 % of their spread: for example, an input scale that
  is 15 % off, a table that is 3 % too large, or a zero point that is a tenth of a quantization step
  off.

A network can be so sensitive to rounding that two correct programs differ by more: one with tens of
int8 layers, for example (``rounding_errors.py``). If a difference exceeds its limit, the caller can
therefore have measured how far rounding errors change the module's scores. The limits then become
``ROUNDING_FACTOR`` times these changes. Such limits may be larger than the effect of a wrong
operator, so the caller must compare every operator too (``tasks/evaluation/parity.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressors.contracts import Plan
from compressors.errors.compression import ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.lower.findings import Parity
from compressors.lower.targets.registry import lowering_target

FloatArray = NDArray[np.float32]
RoundingChanges = Callable[[], FloatArray]
"""Measures the changes of the module's scores by rounding errors, ``(repetitions, *scores)``."""
ROUNDING_FACTOR = 2.0
"""Multiple of the changes by rounding errors that a graph may differ from its module."""


def check_parity(
    expected: FloatArray,
    actual: FloatArray,
    plan: Plan | None,
    target: str,
    rounding_changes: RoundingChanges | None = None,
) -> Parity:
    """Compare scores ``(rows,)`` or vectors ``(rows, dim)`` of the module and of the graph.

    Args:
        expected: the module's scores or vectors.
        actual: the graph's scores or vectors for the same rows.
        plan: the compression plan, whose formats decide the limits; None if uncompressed.
        target: name of the serving target.
        rounding_changes: measures how far rounding errors change the module's scores of these rows.
            Called if a difference exceeds its limit; None keeps the limits.

    Returns:
        The differences and their limits.

    Raises:
        ParityLost: the shapes differ, NaN (the score of a row with an id out of range) is in
            different places, or a difference exceeds its limit.
    """
    if expected.shape != actual.shape:
        shapes = expected.shape, actual.shape
        raise ParityLost(ParityFailure(code="parity_shape", target=target, shapes=shapes))
    is_nan = np.isnan(expected)
    if not np.array_equal(is_nan, np.isnan(actual)):
        raise ParityLost(
            add_worst_row(
                ParityFailure(code="parity_nan", target=target),
                is_nan != np.isnan(actual),
                expected,
                actual,
            )
        )
    differences = absolute_differences(expected, actual)
    finite = expected[np.isfinite(expected)]  # one infinite score would make every limit infinite
    spread = float(finite.std(dtype=np.float64)) if finite.size else 0.0
    rms, largest, quantile_90 = _summarize(differences[~is_nan])
    rms_share, largest_share, quantile_90_share = lowering_target(target).tolerance(plan)
    # The constants allow float32 rounding if the spread is almost 0 because all scores are equal.
    parity = Parity(
        rows=int(expected.size),
        largest=largest,
        root_mean_square=rms,
        quantile_90=quantile_90,
        spread=spread,
        rms_limit=1e-6 + rms_share * spread,
        largest_limit=1e-5 + largest_share * spread,
        quantile_90_limit=1e-6 + quantile_90_share * spread,
    )
    if parity.exceeds_limit and rounding_changes is not None:
        parity = _allow_rounding(parity, rounding_changes())
    if parity.exceeds_limit:
        failure = ParityFailure(
            code="parity_limit",
            target=target,
            measured={
                "root mean square": parity.root_mean_square,
                "in nine of ten rows": parity.quantile_90,
                "at most": parity.largest,
            },
            limits={
                "root mean square": parity.rms_limit,
                "in nine of ten rows": parity.quantile_90_limit,
                "at most": parity.largest_limit,
            },
            spread=spread,
            by_rounding=parity.by_rounding,
        )
        raise ParityLost(add_worst_row(failure, differences, expected, actual))
    return parity


def _summarize(differences: NDArray[np.float64]) -> tuple[float, float, float]:
    """Return root mean square, largest and 0.9 quantile of absolute differences without NaN."""
    if not differences.size:
        return 0.0, 0.0, 0.0
    rms = float(np.sqrt((differences**2).mean()))
    return rms, float(differences.max()), float(np.quantile(differences, 0.9))


def _allow_rounding(parity: Parity, changes: FloatArray) -> Parity:
    """Return a parity whose limits allow the changes that rounding errors make to the scores."""
    rms, largest, quantile_90 = _summarize(np.abs(changes[np.isfinite(changes)], dtype=np.float64))
    return parity.model_copy(
        update={
            "rms_limit": max(parity.rms_limit, ROUNDING_FACTOR * rms),
            "largest_limit": max(parity.largest_limit, ROUNDING_FACTOR * largest),
            "quantile_90_limit": max(parity.quantile_90_limit, ROUNDING_FACTOR * quantile_90),
            "by_rounding": rms,
        }
    )


def check_outputs(
    expected: FloatArray,
    actual: FloatArray,
    outputs: Sequence[str],
    plan: Plan | None,
    target: str,
    rounding_changes: RoundingChanges | None = None,
) -> tuple[Parity, ...]:
    """Compare each output of the module with that of the graph; return one result per output.

    Args:
        expected: the module's scores or vectors. Several outputs are columns, ``(rows, outputs)``,
            each with limits that are relative to its own spread.
        actual: the graph's, in the same shape.
        outputs: the names of the graph's outputs.
        plan: the compression plan, whose formats decide the limits; None if uncompressed.
        target: name of the serving target.
        rounding_changes: as for ``check_parity``, of all outputs.

    Raises:
        ParityLost: ``check_parity`` raises it for an output, which the failure names if there are
            several.
    """
    if len(outputs) == 1 or expected.shape != actual.shape:
        return (check_parity(expected, actual, plan, target, rounding_changes),)
    measure = None if rounding_changes is None else cache(rounding_changes)
    parities = []
    for column, name in enumerate(outputs):
        changes = None if measure is None else (lambda at=column: measure()[:, :, at])
        try:
            parity = check_parity(expected[:, column], actual[:, column], plan, target, changes)
        except ParityLost as fault:
            raise ParityLost(replace(fault.failure, output=name)) from None
        parities.append(parity.model_copy(update={"output": name}))
    return tuple(parities)


def worst_parity(parities: Sequence[Parity]) -> Parity:
    """Return the parity whose root mean square is closest to its limit, or furthest above it."""
    return max(parities, key=lambda parity: parity.root_mean_square / parity.rms_limit)


def allowed_share(plan: Plan | None, target: str) -> float:
    """Return how much a tensor inside a graph may differ, relative to its largest absolute value.

    Targets define no limits for inner tensors. The largest of the limits for scores is used, which
    is a fraction of the scores' standard deviation.
    """
    return max(lowering_target(target).tolerance(plan))


def absolute_differences(expected: FloatArray, actual: FloatArray) -> NDArray[np.float64]:
    """Return absolute differences: 0 if both are NaN or the same infinity, inf if one is NaN."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(expected.astype(np.float64) - actual)
    gap[(expected == actual) | (np.isnan(expected) & np.isnan(actual))] = 0.0
    gap[np.isnan(gap)] = np.inf
    return gap


def add_worst_row(
    failure: ParityFailure, gap: NDArray[Any], expected: FloatArray, actual: FloatArray
) -> ParityFailure:
    """Return a failure with the row and the two scores for which ``gap`` is largest."""
    position = np.unravel_index(int(np.argmax(gap)), gap.shape)
    return replace(
        failure,
        row=int(position[0]),
        component=int(position[1]) if len(position) > 1 else None,
        expected=float(expected[position]),
        found=float(actual[position]),
        rows=int(expected.shape[0]),
    )

"""Parity check: compare the scores of a lowered graph with those of the module.

Scores are compared on the same rows, relative to their spread (standard deviation).

* A graph without int8 arithmetic differs only by float rounding.
* With int8 inputs, a value close to the boundary between two levels may be rounded to either, so a
  few scores differ by about one level. ONNX Runtime's graph computes the same float32 values up to
  such boundaries, so nine of ten scores must be equal up to rounding there.
* TensorRT's graph rounds looked-up weights to float16 once, which moves many values across a
  boundary by a small amount.
* A layer that TensorRT multiplies in bfloat16 rounds its inputs and outputs to 8 bits, which the
  module does not: 0.2 to 0.5 % of the spread in small networks.
* A wrong lowering moves all scores: an input scale 15 % off, a table 3 % too large or a zero point
  a tenth of a level off move them by 3 to 5 % of their spread.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressors.contracts import Plan
from compressors.errors.compression import ParityLost
from compressors.errors.parity_failure import ParityFailure
from compressors.lower.findings import Parity
from compressors.lower.targets.registry import lowering_target

FloatArray = NDArray[np.float32]


def compare(expected: FloatArray, found: FloatArray, plan: Plan | None, target: str) -> Parity:
    """Compare scores ``(rows,)`` or vectors ``(rows, dim)`` of the module and of the graph.

    Raises:
        ParityLost: NaN (a refused row) in different places, or a difference over the limit.
    """
    if expected.shape != found.shape:
        shapes = expected.shape, found.shape
        raise ParityLost(ParityFailure(code="parity_shape", target=target, shapes=shapes))
    refused = np.isnan(expected)
    if not np.array_equal(refused, np.isnan(found)):
        raise ParityLost(
            _at(
                ParityFailure(code="parity_nan", target=target),
                refused != np.isnan(found),
                expected,
                found,
            )
        )
    differences = gap_of(expected, found)
    gap = differences[~refused]
    finite = expected[np.isfinite(expected)]  # one infinite score would make every limit infinite
    spread = float(finite.std(dtype=np.float64)) if finite.size else 0.0
    rms_share, largest_share, most_share = lowering_target(target).tolerance(plan)
    parity = Parity(
        rows=int(expected.size),
        largest=float(gap.max(initial=0.0)),
        root_mean_square=float(np.sqrt((gap**2).mean())) if gap.size else 0.0,
        quantile_90=float(np.quantile(gap, 0.9)) if gap.size else 0.0,
        spread=spread,
        rms_limit=1e-6 + rms_share * spread,
        largest_limit=1e-5 + largest_share * spread,
        quantile_90_limit=1e-6 + most_share * spread,
    )
    if (
        parity.root_mean_square > parity.rms_limit
        or parity.largest > parity.largest_limit
        or parity.quantile_90 > parity.quantile_90_limit
    ):
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
        )
        raise ParityLost(_at(failure, differences, expected, found))
    return parity


def allowed_share(plan: Plan | None, target: str) -> float:
    """Largest allowed difference of a tensor inside a graph, relative to its largest value."""
    return max(lowering_target(target).tolerance(plan))


def gap_of(expected: FloatArray, found: FloatArray) -> NDArray[np.float64]:
    """Absolute differences: 0 if both are NaN or the same infinity, inf if one is NaN."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(expected.astype(np.float64) - found)
    gap[(expected == found) | (np.isnan(expected) & np.isnan(found))] = 0.0
    gap[np.isnan(gap)] = np.inf
    return gap


def _at(
    failure: ParityFailure, gap: NDArray[Any], expected: FloatArray, found: FloatArray
) -> ParityFailure:
    """Add the row and the scores where ``gap`` is largest to a failure."""
    place = np.unravel_index(int(np.argmax(gap)), gap.shape)
    return replace(
        failure,
        row=int(place[0]),
        component=int(place[1]) if len(place) > 1 else None,
        expected=float(expected[place]),
        found=float(found[place]),
        rows=int(expected.shape[0]),
    )

"""Does a lowered graph compute what the module computes?

Scores are compared on the same rows. A graph without int8 arithmetic differs by float rounding
only. With int8 inputs a value on the edge between two levels may fall to either side, in any of
the layers, so single scores may differ by a level's worth while a wrong lowering (a transposed
weight, a forgotten scale) moves scores by their whole spread. Hence a limit relative to that
spread, on the root mean square and on the largest difference.
"""

import numpy as np
from numpy.typing import NDArray

from compressors.contracts import Frozen, Plan, TargetKind
from compressors.errors import ParityLost

FloatArray = NDArray[np.float32]


class Parity(Frozen):
    """How far two sets of scores are apart, and how far they may be."""

    rows: int
    largest: float
    root_mean_square: float
    spread: float
    rms_limit: float
    largest_limit: float


def compare(
    expected: FloatArray, found: FloatArray, plan: Plan | None, target: TargetKind
) -> Parity:
    """Compare scores ``(rows,)`` of the module and of the graph.

    Raises:
        ParityLost: NaN (a refused row) in different places, or a difference over the limit.
    """
    if expected.shape != found.shape:
        raise ParityLost(f"The module gives {expected.shape} scores, the graph {found.shape}.")
    refused = np.isnan(expected)
    if not np.array_equal(refused, np.isnan(found)):
        rows = np.flatnonzero(refused != np.isnan(found))[:5].tolist()
        raise ParityLost(f"Module and {target} graph refuse different rows, such as {rows}.")
    gap = np.abs(expected[~refused] - found[~refused]).astype(np.float64)
    spread = float(expected[~refused].std()) if gap.size else 0.0
    rms_share, largest_share = _shares(plan, target)
    parity = Parity(
        rows=int(expected.size),
        largest=float(gap.max(initial=0.0)),
        root_mean_square=float(np.sqrt((gap**2).mean())) if gap.size else 0.0,
        spread=spread,
        rms_limit=1e-6 + rms_share * spread,
        largest_limit=1e-5 + largest_share * spread,
    )
    if parity.root_mean_square > parity.rms_limit or parity.largest > parity.largest_limit:
        raise ParityLost(
            f"The {target} graph is off by {parity.root_mean_square:.2g} (root mean square; limit "
            f"{parity.rms_limit:.2g}) and at most {parity.largest:.2g} (limit "
            f"{parity.largest_limit:.2g}) where scores spread by {spread:.2g}."
        )
    return parity


def _shares(plan: Plan | None, target: TargetKind) -> tuple[float, float]:
    formats = {line.format for line in plan.lines} if plan else set()
    if "static_int8" in formats:
        return 0.05, 0.5
    if target != "onnxruntime" and formats & {"float16", "rowwise_int8", "rowwise_int4"}:
        return 0.005, 0.05  # one float16 rounding of looked-up weights, or a float16 Gemm
    return 1e-4, 1e-3

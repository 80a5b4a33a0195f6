"""A problem of the uncompressed model, and a test whether a mean is clearly above zero."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressors.contracts.reasons import Reason

CLEAR_STANDARD_ERRORS = 4.0
"""A mean is clearly above 0 if it exceeds this number of standard errors.

By chance, this happens for about 1 in 30,000 means.
"""

MIN_VALUES = 100
"""Smallest number of values, one per row or group, for which a mean is tested."""

Array = NDArray[Any]


@dataclass(frozen=True)
class BaselineProblem:
    """A problem of a model or its labels.

    Attributes:
        reason: the problem: the expected and the actual value, and what to do.
        prevents_packing: whether ``recpress bundle pack`` refuses a bundle with this problem;
            otherwise it only warns.
        prevents_measurement: whether every flow run with this bundle fails when it measures the
            model.
    """

    reason: Reason
    prevents_packing: bool = False
    prevents_measurement: bool = False


def clearly_above(values: Array) -> bool:
    """Whether the mean of values ``(n,)`` is above 0 by more than ``CLEAR_STANDARD_ERRORS``.

    The result is False if there are fewer than ``MIN_VALUES`` values.
    """
    if values.size < MIN_VALUES:
        return False
    error = values.std(ddof=1) / np.sqrt(values.size)
    return bool(values.mean() > CLEAR_STANDARD_ERRORS * error and values.mean() > 0)

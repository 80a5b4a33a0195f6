"""A problem of the uncompressed model, and the test whether a difference is more than noise."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressors.contracts.reasons import Reason

CLEAR = 4.0
"""Standard errors of a clear difference: by chance about 1 in 30,000 means is above."""

FEWEST = 100
"""Smallest number of rows or groups for which a mean is tested."""

Array = NDArray[Any]


@dataclass(frozen=True)
class BaselineProblem:
    """A problem of a model or its labels.

    Attributes:
        reason: the expected and the actual value, and what to do.
        refused: whether pack refuses a bundle with this problem; else it is a warning.
        fatal: whether every run fails because of it, when the model is measured.
    """

    reason: Reason
    refused: bool = False
    fatal: bool = False


def clearly_above(values: Array) -> bool:
    """Whether the mean of values ``(n,)`` is above 0 by more than ``CLEAR`` standard errors.

    False if there are fewer than ``FEWEST`` values.
    """
    if values.size < FEWEST:
        return False
    error = values.std(ddof=1) / np.sqrt(values.size)
    return bool(values.mean() > CLEAR * error and values.mean() > 0)

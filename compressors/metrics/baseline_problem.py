"""A problem of the uncompressed model, and the test whether a difference is more than noise."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressors.contracts.reasons import Reason

CLEAR = 4.0  # standard errors: by chance about 1 in 30,000
FEWEST = 100
"""Fewest rows or groups from which a mean is tested."""

Array = NDArray[Any]


@dataclass(frozen=True)
class BaselineProblem:
    """A problem of a model or its labels.

    Attributes:
        reason: the expected and the actual value, and what to do.
        refused: whether pack refuses a bundle with this problem; else it is a warning.
        fatal: whether measuring fails because of it, so that no run can succeed.
    """

    reason: Reason
    refused: bool = False
    fatal: bool = False


def clearly_above(values: Array) -> bool:
    """Whether a mean is above 0 by more than ``CLEAR`` standard errors."""
    if values.size < FEWEST:
        return False
    error = values.std(ddof=1) / np.sqrt(values.size)
    return bool(values.mean() > CLEAR * error and values.mean() > 0)

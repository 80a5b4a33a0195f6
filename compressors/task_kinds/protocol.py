"""The functions of a kind of task."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray
from torch import Tensor

from compressors.core.batches import Batch
from compressors.metrics.baseline_problem import BaselineProblem


class TaughtRows(NamedTuple):
    """Outputs of a student and of its teacher, float ``(rows,)``, for the rows of ``batch``."""

    student: Tensor
    teacher: Tensor
    batch: Batch


class ScoredSample(NamedTuple):
    """A sample of rows with the uncompressed model's scores: all ``(rows,)``."""

    label: NDArray[Any]
    score: NDArray[Any]
    group: NDArray[Any] | None


class TaskFunctions(Protocol):
    """Losses and checks of models with one score for each row. It is created with an output."""

    def hard_loss(self, score: Tensor, batch: Batch) -> Tensor:
        """Compute the loss against the labels, a scalar.

        Args:
            score: the network's output, float ``(rows,)``.
            batch: labels, and groups if the kind has lists.
        """

    def soft_loss(self, rows: TaughtRows, temperature: float) -> Tensor:
        """Compute the loss against a teacher, a scalar.

        Args:
            rows: both outputs in the form that the declared output has.
            temperature: divides both outputs; the loss is multiplied by its square.
        """

    def score_problems(self, sample: ScoredSample) -> Iterator[BaselineProblem]:
        """Yield problems of the uncompressed model's scores."""

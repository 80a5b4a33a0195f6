"""The functions that the class of a task kind must have, and types of their arguments."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray
from torch import Tensor

from compressors.core.batches import Batch
from compressors.metrics.baseline_problem import BaselineProblem


class DistillationRows(NamedTuple):
    """Outputs of a student and of its teacher, float ``(rows,)``, for the rows of ``batch``."""

    student: Tensor
    teacher: Tensor
    batch: Batch


class ScoredSample(NamedTuple):
    """Labels, scores of the uncompressed model, and groups if any, ``(rows,)`` each."""

    label: NDArray[Any]
    score: NDArray[Any]
    group: NDArray[Any] | None


class TaskFunctions(Protocol):
    """Losses and score checks of a task kind with one score per row.

    An object is created with the signature's output as its only argument.
    """

    def hard_loss(self, score: Tensor, batch: Batch) -> Tensor:
        """Compute the loss against the labels, a scalar.

        Args:
            score: the network's output, float ``(rows,)``.
            batch: the rows' labels, and their groups if the loss is computed by list.
        """

    def soft_loss(self, rows: DistillationRows, temperature: float) -> Tensor:
        """Compute the loss against a teacher, a scalar.

        Args:
            rows: outputs of student and teacher, in the form that the signature names.
            temperature: divides both outputs; the loss is multiplied by its square.
        """

    def find_score_problems(self, sample: ScoredSample) -> Iterator[BaselineProblem]:
        """Yield the problems of the uncompressed model's scores, such as an AUC below 0.5."""

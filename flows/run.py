"""``Run``: the values that all phases of one order need, and methods that call tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from prefect import Task

from compressors.contracts import Artifact, Limit, digest
from flows.order import Order
from infra.bundle.bundle_folder import SplitName
from tasks.bundles.bundle_ref import BundleRef
from tasks.bundles.teachers import Teacher
from tasks.orchestration import task_calls
from tasks.orchestration.documents import PreparedRows, Ranking
from tasks.orchestration.progress import Progress
from tasks.orchestration.task_calls import require_stored
from tasks.prepare import prepare

R = TypeVar("R")


@dataclass(frozen=True)
class Run:
    """An order that is running, and the bundles that it refers to.

    Attributes:
        order: the order.
        model: the order's bundle.
        teachers: models whose predictions steps learn from, in addition to the uncompressed model.
        champions: graph or engine of the current champion, by target; empty if no limit compares
            with the champion.
        progress: shows the name of the current phase (one of the functions of ``flows/phases.py``)
            in Prefect's UI.
    """

    order: Order
    model: BundleRef
    teachers: tuple[Teacher, ...]
    champions: Mapping[str, Artifact]
    progress: Progress

    @cached_property
    def context_digest(self) -> str:
        """Digest that is a part of every cache key: what no argument of a task contains.

        It covers the source code of the model's class, of which ``model.architecture`` is the
        digest, and ``order.attempt``, a number that users increase to run an order again.
        """
        return digest([self.model.architecture, self.order.attempt])

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """The order's limits; a limit that names no output becomes one limit for each output."""
        return self.model.limits(self.order.limits)

    def call(
        self,
        task: Task[..., R],
        /,
        check: Callable[[R], object] = require_stored,
        **arguments: Any,
    ) -> R:
        """Run a task, or return its cached result.

        Args:
            task: the task.
            check: raises if a cached result is no longer valid; then the task runs again.
            arguments: the arguments of the task.
        """
        return task_calls.call(task, self.context_digest, check, **arguments)

    def call_for(self, teacher: Teacher, task: Task[..., R], /, **arguments: Any) -> R:
        """Run a task on a teacher, or return its cached result.

        Like ``call``, but the cache key also contains the digest of the source code of the
        teacher's class.
        """
        context_digest = digest([self.context_digest, teacher.architecture])
        return task_calls.call(task, context_digest, **arguments)

    def prepare_split(self, split: SplitName) -> PreparedRows:
        """Convert one split of the model's data to tensors.

        Returns:
            The artifact of the tensors, and the number of rows.
        """
        artifact = self.call(prepare, bundle=self.model.artifact, split=split)
        return PreparedRows(artifact=artifact, rows=self.model.rows[split])

    def prepare_ranking(self, split: SplitName = "test") -> Ranking | None:
        """Return what a retrieval evaluation needs in addition to the rows it evaluates.

        That is the catalogue of items, and the earlier splits with the items that users have seen.
        None if the model has a score per row.

        Args:
            split: the split whose rows are evaluated, ``test`` or ``validation``.
        """
        if self.model.scores_rows:
            return None
        earlier_splits: tuple[SplitName, ...] = ("train", "calibration")
        if split == "test":
            earlier_splits = (*earlier_splits, "validation")
        seen = tuple(
            self.prepare_split(earlier) for earlier in earlier_splits if earlier in self.model.rows
        )
        return Ranking(items=self.prepare_split("items"), seen=seen)

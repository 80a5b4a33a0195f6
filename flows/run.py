"""``Run``: the values that all stages of one order need, and methods that call tasks."""

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
from tasks.orchestration import policy
from tasks.orchestration.documents import PreparedRows, Ranking
from tasks.orchestration.policy import require_stored
from tasks.orchestration.progress import Progress
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
        progress: receives the name of each stage.
    """

    order: Order
    model: BundleRef
    teachers: tuple[Teacher, ...]
    champions: Mapping[str, Artifact]
    progress: Progress

    @cached_property
    def code(self) -> str:
        """Digest of the model's code and the order's attempt, a part of every cache key."""
        return digest([self.model.architecture, self.order.attempt])

    @cached_property
    def limits(self) -> tuple[Limit, ...]:
        """The order's limits; those on each of several outputs are separate limits."""
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
        return policy.call(task, self.code, check, **arguments)

    def call_for(self, teacher: Teacher, task: Task[..., R], /, **arguments: Any) -> R:
        """Run a task on a teacher, or return its cached result.

        Like ``call``, but the cache key also contains the digest of the teacher's code.
        """
        code = digest([self.code, teacher.architecture])
        return policy.call(task, code, **arguments)

    def prepare_split(self, split: SplitName) -> PreparedRows:
        """Convert one split of the model's data to tensors, and return their artifact."""
        artifact = self.call(prepare, bundle=self.model.artifact, split=split)
        return PreparedRows(artifact=artifact, rows=self.model.rows[split])

    def prepare_ranking(self, split: SplitName = "test") -> Ranking | None:
        """Return the catalogue of items, and the splits whose items users have seen before.

        A retrieval evaluation needs both. None for tasks that have a score per row.

        Args:
            split: the split whose rows are evaluated, ``test`` or ``validation``.
        """
        if self.model.scores_rows:
            return None
        earlier_splits: tuple[SplitName, ...] = ("train", "calibration")
        if split == "test":
            earlier_splits = (*earlier_splits, "validation")
        seen = tuple(
            self.prepare_split(split) for split in earlier_splits if split in self.model.rows
        )
        return Ranking(items=self.prepare_split("items"), seen=seen)

"""The run context of one order: values that all stages need, and methods that call tasks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from prefect import Task

from compressors.contracts import Artifact, digest, task_kind
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
    """An order in progress, with the objects that it refers to.

    Attributes:
        order: the order.
        model: the bundle it names.
        teachers: models whose predictions steps learn from, in addition to the model's.
        champions: what production runs, by target; empty if the order does not compare with it.
        progress: receives the name of each stage.
    """

    order: Order
    model: BundleRef
    teachers: tuple[Teacher, ...]
    champions: Mapping[str, Artifact]
    progress: Progress

    @cached_property
    def code(self) -> str:
        """Digest of the architecture's code and the attempt, part of each result's cache key."""
        return digest([self.model.architecture, self.order.attempt])

    def call(
        self,
        task: Task[..., R],
        /,
        check: Callable[[R], object] = require_stored,
        **arguments: Any,
    ) -> R:
        """Run a task or return its recorded result, as ``policy.call``."""
        return policy.call(task, self.code, check, **arguments)

    def call_for(self, teacher: Teacher, task: Task[..., R], /, **arguments: Any) -> R:
        """Run a task on a teacher, whose architecture is also part of the cache key."""
        code = digest([self.code, teacher.architecture])
        return policy.call(task, code, **arguments)

    def prepared(self, split: SplitName) -> PreparedRows:
        """Return the rows of one split of the model's data, as tensors."""
        rows = self.call(prepare, bundle=self.model.artifact, split=split)
        return PreparedRows(artifact=rows, rows=self.model.rows[split])

    def ranking(self) -> Ranking | None:
        """Return the catalogue and the seen items of a retrieval model; None for other tasks."""
        if task_kind(self.model.task).scores_rows:
            return None
        earlier: tuple[SplitName, ...] = ("train", "calibration", "validation")
        seen = tuple(self.prepared(split) for split in earlier if split in self.model.rows)
        return Ranking(items=self.prepared("items"), seen=seen)

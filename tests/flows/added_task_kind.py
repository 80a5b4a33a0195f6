"""A task kind that only tests define: predicts upvotes of posts, trained with squared errors.

``write_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from drafts import write_draft
from torch import Tensor

from compressors.contracts import Output
from compressors.contracts.task_kind import TASK_KINDS, TaskKind, register
from compressors.core.batches import Batch
from compressors.metrics.baseline_problem import BaselineProblem
from compressors.task_kinds.protocol import DistillationRows, ScoredSample

LOSSES: list[float] = []
"""Each value of the loss against labels, so that a test can check which loss training used."""


@dataclass(frozen=True)
class Upvotes:
    """The functions of the task kind. Its losses are squared errors of probabilities.

    ``hard_loss`` compares a student with the labels, ``soft_loss`` with the scores of a teacher.
    """

    output: Output

    def hard_loss(self, score: Tensor, batch: Batch) -> Tensor:
        loss = (torch.sigmoid(score) - batch.label.to(torch.float32)).square().mean()
        LOSSES.append(float(loss.detach()))
        return loss

    def soft_loss(self, rows: DistillationRows, temperature: float) -> Tensor:
        outputs = (rows.student, rows.teacher)
        student, teacher = (torch.sigmoid(output / temperature) for output in outputs)
        return (student - teacher).square().mean()

    def find_score_problems(self, sample: ScoredSample) -> Iterator[BaselineProblem]:
        """Check the shapes, and report no problem of the uncompressed model's scores."""
        assert sample.label.shape == sample.score.shape
        yield from ()


KIND = TaskKind(
    name="upvotes",
    forms=("logit",),  # the model returns logits
    labels="clicks",  # labels are 0 or 1, here the upvotes
    needs_label=True,
    evaluation="rows",  # one score per row
    default_metrics=(),  # nothing such as ndcg@10 is measured unless a limit names it
    functions=Upvotes,
)


def write_upvotes(folder: Path) -> Path:
    """Write a bundle with the task kind to a folder, not packed yet, and return the folder."""
    draft = write_draft(folder, name="posts")
    document = json.loads((draft / "model.json").read_text())
    document["signature"]["outputs"][0]["kind"] = "upvotes"
    (draft / "model.json").write_text(json.dumps(document))
    return draft


@contextmanager
def registered_task_kind() -> Iterator[None]:
    """Register the task kind within the context."""
    register(KIND)
    try:
        yield
    finally:
        del TASK_KINDS[KIND.name]

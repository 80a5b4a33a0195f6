"""A kind of task is added by one declaration with its functions, and goes through a whole order."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from drafts import write_draft
from error_codes import raises_value_error
from orders import carry_out, surroundings
from torch import Tensor

from compressors.contracts import Limit, Output, Signature
from compressors.contracts.task_kind import TASK_KINDS, TaskKind, register
from compressors.core.batches import Batch
from compressors.distill.fine_tune import FineTune
from compressors.distill.training.settings import Training
from compressors.metrics.baseline_problem import BaselineProblem
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from compressors.task_kinds.protocol import ScoredSample, TaughtRows
from flows.order import Order
from tasks.bundles.packing import pack

LOSSES: list[float] = []


@dataclass(frozen=True)
class Upvotes:
    """Squared errors of probabilities."""

    output: Output

    def hard_loss(self, score: Tensor, batch: Batch) -> Tensor:
        loss = (torch.sigmoid(score) - batch.label.to(torch.float32)).square().mean()
        LOSSES.append(float(loss.detach()))
        return loss

    def soft_loss(self, rows: TaughtRows, temperature: float) -> Tensor:
        student, teacher = (torch.sigmoid(output / temperature) for output in rows[:2])
        return (student - teacher).square().mean()

    def score_problems(self, sample: ScoredSample) -> Iterator[BaselineProblem]:
        assert sample.label.shape == sample.score.shape
        yield from ()


KIND = TaskKind(
    name="upvotes",
    forms=("logit",),
    labels="clicks",
    needs_label=True,
    evaluation="rows",
    usual=(),
    functions=Upvotes,
)


@pytest.fixture
def upvotes() -> Iterator[None]:
    register(KIND)
    yield
    del TASK_KINDS["upvotes"]


def write_upvotes(folder: Path) -> Path:
    draft = write_draft(folder, name="posts")
    document = json.loads((draft / "model.json").read_text())
    document["signature"]["outputs"][0]["kind"] = "upvotes"
    (draft / "model.json").write_text(json.dumps(document))
    return draft


def test_a_registered_kind_is_packed_trained_measured_and_judged(
    upvotes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surroundings(monkeypatch, tmp_path / "recpress")
    assert pack(write_upvotes(tmp_path / "draft")).warnings == ()
    LOSSES.clear()
    order = Order(
        model="posts",
        preset="custom",
        steps=(RowwiseInt8(), FineTune(training=Training(epochs=1, learning_rate=1e-4))),
        limits=(Limit.parse("auc vs baseline >= -0.02"),),
    )
    report = carry_out(order).finished.report
    assert report.outcome == "accepted", report.targets[0].verdict.reason
    assert report.measurement is not None
    assert report.measurement.numbers.score_unit == "probability"
    assert LOSSES
    assert max(LOSSES) < 0.5  # of squares; cross entropy begins near 0.6


def test_without_registration_the_task_is_unknown(tmp_path: Path) -> None:
    document = json.loads((write_upvotes(tmp_path / "draft") / "model.json").read_text())
    with raises_value_error("task_unknown", task="upvotes"):
        Signature.model_validate(document["signature"])


def test_a_kind_of_other_outputs_is_refused(upvotes: None, tmp_path: Path) -> None:
    document = json.loads((write_upvotes(tmp_path / "draft") / "model.json").read_text())
    with raises_value_error("output_form", task="upvotes", got="score"):
        Output.model_validate(document["signature"]["outputs"][0] | {"form": "score"})

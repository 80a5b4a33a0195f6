"""``distill``: training on a teacher's scores, smaller students, and invalid students.

The networks are those of ``models.py``. The layer ``hidden`` of ``RANKER`` has 40 inputs and
``width`` outputs, 16 by default. In its bench, labels and soft labels are the opposite of the
network's predictions. ``NORMED.signature`` has the inputs ``user`` and ``price`` (two numbers).
"""

from dataclasses import replace

import models
import pytest
import torch
from error_codes import raises_code
from models import BENCH_ROWS, NORMED, RANKER, SHORT_TRAINING, Reference
from reason_codes import codes_of, require_reason
from torch import Tensor, nn

from compressors.contracts import Split
from compressors.contracts.reasons import Reason
from compressors.contracts.task_kind import TASK_KINDS
from compressors.core.batches import batches
from compressors.core.dry_run import dry_run
from compressors.core.runner import run
from compressors.core.state.module_state import map_tensors
from compressors.distill.distill import Distill
from compressors.distill.fine_tune import FineTune
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import DistillationRefused, RowsMissing
from compressors.metrics import point_estimates
from compressors.prune.dense.channels import Channels
from compressors.quantize.dense.static_int8 import StaticInt8


def test_a_distilled_student_correlates_with_its_teacher(tmp_path):
    """The teacher's scores are the negated scores of the network before training."""
    bench = RANKER.bench(tmp_path / "data")
    source = RANKER.model()
    step = Distill(soft_share=1.0, training=SHORT_TRAINING)
    result = run(step, source, bench, tmp_path / "out")
    (batch,) = batches(bench.validation, RANKER.signature, BENCH_ROWS)
    with torch.no_grad():
        teacher = -source.module(**batch.inputs).reshape(-1)
        student = result.module(**batch.inputs).reshape(-1)
    scores = torch.stack([teacher, student])
    assert float(torch.corrcoef(scores)[0, 1]) > 0.5  # -1 before training


def test_soft_share_is_the_weight_of_the_teacher_against_labels(tmp_path):
    """Labels contradict the teacher, so the student's scores show which of them it learned from."""
    bench = RANKER.bench(tmp_path / "data")
    split_with_opposite_labels = models.write_split(
        RANKER.signature,
        RANKER.rows_of_tables(),
        tmp_path / "l",
        seed=8,
        score_function=lambda x: -RANKER.label_scores(x),
    )
    bench = bench.model_copy(update={"train": split_with_opposite_labels})
    (batch,) = batches(bench.validation, RANKER.signature, BENCH_ROWS)
    aucs = {}
    for share in (0.05, 1.0):
        step = Distill(soft_share=share, training=SHORT_TRAINING)
        result = run(step, RANKER.model(), bench, tmp_path / str(share))
        with torch.no_grad():
            scores = result.module(**batch.inputs).reshape(-1)
        aucs[share] = point_estimates.auc(batch.label.numpy(), scores.numpy())
    # The teacher agrees with the validation labels; the training labels are their opposite.
    assert aucs[1.0] > 0.6
    assert aucs[0.05] < 0.4


def test_student_config_builds_a_smaller_network(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    step = Distill(student={"width": 8}, training=SHORT_TRAINING)
    result = run(step, RANKER.model(), bench, tmp_path / "out")
    assert result.network.architecture.config == {"width": 8}
    assert result.module.hidden.out_features == 8
    assert torch.equal(result.module.item.weight, RANKER.model().module.item.weight)
    reasons = result.plan.of("hidden").reasons
    assert codes_of(reasons)[:3] == ["trained_on_rows", "smaller_in_student", "trained_to_epoch"]
    require_reason(reasons, "trained_on_rows", step="distill", rows=BENCH_ROWS)
    require_reason(reasons, "smaller_in_student", before="16x40", after="8x40")
    trained = require_reason(reasons, "trained_to_epoch", metric="auc")
    assert 1 <= trained.fields["epoch"] <= SHORT_TRAINING.epochs
    assert 0 < trained.fields["before"] < trained.fields["after"] < 1
    assert result.plan.of("item").reasons == (Reason("tables_not_trained", step="distill"),)


def test_a_student_with_unknown_arguments_or_packed_layers_raises_distillation_refused(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    with raises_code(DistillationRefused, "argument_unknown", architecture="models:Ranker"):
        run(Distill(student={"widht": 8}), RANKER.model(), bench, tmp_path / "a")
    # Packed layers have int8 codes in place of float weights.
    packed = run(StaticInt8(), RANKER.model(), bench, tmp_path / "packed")
    with raises_code(DistillationRefused, "layer_packed", layer="cross"):
        run(Distill(student={"width": 8}), packed, bench, tmp_path / "b")


class VariableDepthNet(nn.Module):
    """A perceptron whose layer widths are an argument; it also accepts unknown arguments."""

    def __init__(
        self, dim: int = 4, hidden: tuple[int, ...] = (8, 8), users: int = 15, **_: int
    ) -> None:
        super().__init__()
        self.user = nn.Embedding(users, dim)
        widths = [dim + 2, *hidden]
        self.layers = nn.ModuleList(map(nn.Linear, widths, widths[1:]))
        self.out = nn.Linear(widths[-1], 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        for layer in self.layers:
            x = torch.relu(layer(x))
        score: Tensor = torch.sigmoid(self.out(x))
        return score


@pytest.mark.parametrize(
    ("student", "code", "fields"),
    [
        ({"dim": 2}, "table_untrained", {"table": "user"}),
        ({"users": 9}, "table_shortened", {"table": "user", "got": 9, "expected": 15}),
        ({"hidden": [8, 8, 8]}, "layer_added", {"unit": "layers.2"}),
        (
            {"hiden": [8]},
            "argument_unknown",
            {"argument": "hiden", "arguments": ("_", "dim", "hidden", "users")},
        ),
    ],
)
def test_students_with_untrained_tables_or_added_layers_raise_distillation_refused(
    student, code, fields, tmp_path
):
    reference = Reference(VariableDepthNet, NORMED.signature)
    bench = reference.bench(tmp_path / "data")
    with raises_code(DistillationRefused, code, **fields):
        dry_run(Distill(student=student), reference.model(), bench)


def test_layers_that_a_student_lacks_are_dropped_in_the_plan(tmp_path):
    reference = Reference(VariableDepthNet, NORMED.signature)
    bench = reference.bench(tmp_path / "data")
    step = Distill(student={"hidden": [8]}, training=SHORT_TRAINING)
    result = run(step, reference.model(), bench, tmp_path / "out")
    line = result.plan.of("layers.1")
    assert (line.format, line.bytes_after) == ("dropped", 0)
    assert codes_of(line.reasons) == ["trained_on_rows", "not_in_student"]
    assert sum(item.bytes_after for item in result.plan.lines) == sum(
        t.numel() * t.element_size() for t in map_tensors(tmp_path / "out").values()
    )


def test_a_student_with_fewer_columns_in_a_table_trains_the_table(tmp_path):
    reference = Reference(VariableDepthNet, NORMED.signature)
    bench = reference.bench(tmp_path / "data")
    training = SHORT_TRAINING.model_copy(update={"tables": True})
    step = Distill(student={"dim": 2}, training=training)
    result = run(step, reference.model(), bench, tmp_path / "out")
    assert result.module.user.weight.shape == (15, 2)
    reasons = result.plan.of("user").reasons
    assert codes_of(reasons)[:3] == ["trained_on_rows", "smaller_in_student", "trained_to_epoch"]
    require_reason(reasons, "smaller_in_student", before="15x4", after="15x2")


def test_missing_soft_labels_or_another_number_of_them_raise_an_error(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    other = NORMED.bench(tmp_path / "other")
    folder = tmp_path / "cut"
    folder.mkdir()
    models.save_file({"score": torch.zeros(5)}, folder / "data.safetensors")
    too_few_labels = bench.model_copy(
        update={"soft_labels": Split(path=str(folder), sha256="2" * 64, rows=5)}
    )
    with raises_code(RowsMissing, "soft_labels_differ", got=5, expected=BENCH_ROWS):
        run(Distill(), RANKER.model(), too_few_labels, tmp_path / "out")
    without_labels = other.model_copy(update={"soft_labels": None})
    with raises_code(NothingToCompress, "rows_missing", missing=("soft_labels",)):
        run(Distill(), NORMED.model(), without_labels, tmp_path / "out")


def test_training_for_a_task_kind_without_losses_raises_training_unavailable(tmp_path, monkeypatch):
    bench = RANKER.bench(tmp_path / "data")
    kind = bench.signature.single_output.task_kind
    monkeypatch.setitem(TASK_KINDS, kind.name, replace(kind, functions=None))
    with raises_code(NothingToCompress, "training_unavailable", task=kind.name):
        FineTune().plan(RANKER.model(), bench)


def test_a_pruned_network_can_be_distilled(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    pruned = run(Channels(), RANKER.model(), bench, tmp_path / "cut")
    result = run(Distill(training=SHORT_TRAINING), pruned, bench, tmp_path / "out")
    assert result.network.architecture == pruned.network.architecture
    assert result.plan.of("hidden").steps == ("channels", "distill")

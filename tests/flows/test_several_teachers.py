"""Orders that distill from several teachers, on training rows and on rows without labels.

An order is a request to compress a model: its steps, limits and teachers. A stage is the original
or the result of a step. The split ``traffic`` of a bundle has rows without labels, such as logged
requests. A draft is the folder of a bundle before it is packed, and a home the folder with
everything that recpress stores.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from command_line import run_main_apart
from drafts import write_draft
from error_codes import raises_code
from orders import FlowResult, run_without_prefect, use_home
from reason_codes import codes_of, require_reason
from safetensors.torch import load_file

from compressors.contracts import Limit, Plan
from compressors.distill.distill import Distill
from compressors.distill.training.settings import Training
from compressors.errors.orders import OrderRefused
from compressors.errors.steps import StepRefused
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.explain import explain
from flows.order import Order
from infra.bundle.bundle_folder import read
from tasks.bundles.bundle_ref import resolve
from tasks.bundles.packing import pack
from tasks.orchestration.workspace import local

LOOSE_LIMIT = Limit.parse("auc vs baseline >= -0.2")
ONE_EPOCH = Training(epochs=1, batch=256)
ROWS = {"train": 1_000, "validation": 500, "traffic": 700, "test": 500}
# The student is trained on rows of "both" splits, train and traffic. A hint is an auxiliary loss
# that compares the output of layer "first" in the student with its output in the original.
STEPS = (
    Distill(rows="both", hints=("first",), student={"hidden": 32}, training=ONE_EPOCH),
    RowwiseInt8(),
)


def write_draft_with_traffic(folder: Path, name: str, seed: int) -> Path:
    """Write a draft whose split ``traffic`` has no label column."""
    draft = write_draft(folder, name=name, seed=seed, rows=ROWS)
    traffic = pq.read_table(draft / "traffic.parquet").drop_columns(["label"])
    pq.write_table(traffic, draft / "traffic.parquet")
    return draft


ORDER = Order(
    model="clicks@1",
    preset="custom",
    steps=STEPS,
    limits=(LOOSE_LIMIT,),
    teachers=("second@1", "third@1"),
)


@pytest.fixture(scope="module")
def distilled_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FlowResult]:
    """Pack the model, two teachers and a ranking model; run ``ORDER``; return folder and result."""
    home = tmp_path_factory.mktemp("teachers")
    with pytest.MonkeyPatch.context() as patch:
        use_home(patch, home / "recpress")
        for seed, name in enumerate(("clicks", "second", "third")):
            pack(write_draft_with_traffic(home / name, name, seed))
        pack(write_draft(home / "lists", name="lists", task="ranking", rows=ROWS))
        return home, run_without_prefect(ORDER)


@pytest.fixture(autouse=True)
def _use_home(distilled_run: tuple[Path, FlowResult], monkeypatch: pytest.MonkeyPatch) -> None:
    use_home(monkeypatch, distilled_run[0] / "recpress")


def test_plan_states_the_teachers_and_training_rows_that_explain_predicted(
    distilled_run: tuple[Path, FlowResult],
) -> None:
    plan = distilled_run[1].finished.report.plan
    line = plan.of("cross")
    assert line is not None
    assert codes_of(line.reasons)[:2] == ["trained_on_both", "several_teachers"]
    require_reason(line.reasons, "trained_on_both", step="distill", rows=1000, traffic=700)
    # The teachers are the model itself and the two that the order names.
    require_reason(line.reasons, "several_teachers", teachers=3)
    assert line.reasons[2].code in ("trained_to_epoch", "training_unchanged")
    predicted = explain(ORDER).plan.lines
    # The plan adds reasons about the training to those that were predicted.
    for expected, actual in zip(predicted, plan.lines, strict=True):
        assert actual.reasons[: len(expected.reasons)] == expected.reasons
        assert actual.model_copy(update={"reasons": expected.reasons}) == expected


def test_each_teacher_scores_each_split_once_and_predictions_are_averaged_once(
    distilled_run: tuple[Path, FlowResult],
) -> None:
    # Three models on two splits; the original and the results of two steps on the test rows.
    assert distilled_run[1].states_of("score") == ["Completed"] * (3 * 2 + 3)
    assert distilled_run[1].states_of("average") == ["Completed"] * 2
    with_other_limits = run_without_prefect(
        ORDER.model_copy(update={"limits": (Limit.parse("auc >= 0.1"),)})
    )
    states = with_other_limits.states_of("score") + with_other_limits.states_of("average")
    assert set(states) == {"Cached"}


def test_bundles_have_the_teachers_among_their_parents(
    distilled_run: tuple[Path, FlowResult],
) -> None:
    report = distilled_run[1].finished.report
    stages = [stage.bundle for stage in report.stages]
    teachers = [resolve(name) for name in ORDER.teachers]
    last = read(local(report.compressed))
    # Parents are all earlier stages and the teachers.
    assert last.parents == (stages[0], stages[1], *teachers)
    assert read(local(stages[1])).parents == (stages[0], *teachers)
    order = report.reproduction.order
    assert order["teachers"] == [teacher.uri for teacher in teachers]


def test_soft_labels_are_the_mean_logits_of_the_teachers(
    distilled_run: tuple[Path, FlowResult],
) -> None:
    from tasks.prepare import prepare
    from tasks.score import average, score

    bundles = [resolve(name) for name in ("clicks", *ORDER.teachers)]
    rows = prepare.fn(bundles[0], "traffic")
    scores = tuple(score.fn(bundle, rows, ROWS["traffic"]) for bundle in bundles)
    logits = [load_file(local(item) / "data.safetensors")["score"] for item in scores]
    mean = load_file(local(average.fn(scores, ("logit",), (("logit",),) * 3)) / "data.safetensors")[
        "score"
    ]
    torch.testing.assert_close(mean, torch.stack(logits).mean(dim=0))
    assert float((logits[0] - logits[1]).abs().mean()) > 0.1  # the teachers differ


def test_order_with_other_teachers_is_not_the_completed_order(
    distilled_run: tuple[Path, FlowResult],
) -> None:
    from flows.resolve import find_completed_result

    result = find_completed_result(ORDER)
    assert result is not None
    assert result.version == distilled_run[1].finished.version
    assert find_completed_result(ORDER.model_copy(update={"teachers": ("second@1",)})) is None


@pytest.mark.parametrize(
    ("teachers", "steps", "code", "fields"),
    [
        (
            ("lists@1",),
            STEPS,
            "teacher_outputs_differ",
            {"difference": "its task is 'ranking', not 'ctr'"},
        ),
        (("second@1", "second"), STEPS, "teacher_repeated", {"name": "second@1"}),
        (("clicks@1",), STEPS, "teacher_repeated", {"name": "clicks@1"}),
        (
            ("registry:clicks",),
            STEPS,
            "teacher_reference_malformed",
            {"reference": "registry:clicks"},
        ),
        (("second@1",), (RowwiseInt8(),), "teachers_unused", {"steps": ("rowwise_int8",)}),
    ],
)
def test_unusable_teachers_are_refused(
    teachers: tuple[str, ...],
    steps: tuple[Distill | RowwiseInt8, ...],
    code: str,
    fields: dict[str, Any],
) -> None:
    order = ORDER.model_copy(update={"teachers": teachers, "steps": steps})
    with raises_code(OrderRefused, code, **fields):
        explain(order)


def test_training_on_a_missing_gpu_raises_device_missing(
    distilled_run: tuple[Path, FlowResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached result of the step on the CPU must not be used instead."""
    monkeypatch.setenv("RECPRESS_DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with raises_code(StepRefused, "device_missing", device="cuda"):
        run_without_prefect(ORDER.model_copy(update={"limits": (Limit.parse("auc >= 0.2"),)}))


def test_registered_version_can_be_a_teacher(distilled_run: tuple[Path, FlowResult]) -> None:
    version = distilled_run[1].finished.version
    order = ORDER.model_copy(update={"teachers": (f"registry:clicks@{version}",)})
    line = explain(order).plan.of("cross")
    assert line is not None
    require_reason(line.reasons, "several_teachers", teachers=2)


def test_explain_command_accepts_teachers_and_exits_with_code_2_if_they_do_not_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "order.json").write_text(ORDER.model_dump_json())
    order = ("--order", str(tmp_path / "order.json"))
    code, out, err = run_main_apart(monkeypatch, capsys, "explain", *order, "--json")
    assert code == 0, err
    plan = Plan.model_validate(json.loads(out)["plan"])
    line = plan.of("cross")
    assert line is not None
    require_reason(line.reasons, "several_teachers", teachers=3)
    arguments = (
        "clicks@1",
        "--preset",
        "small",
        "--limit",
        str(LOOSE_LIMIT),
        "--teacher",
        "lists@1",
    )
    code, _, err = run_main_apart(monkeypatch, capsys, "explain", *arguments)
    assert code == 2
    assert "has other outputs" in err

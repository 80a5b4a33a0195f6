"""Teachers that are columns of predictions in the data, or bundles that read other inputs.

The student is ``ClickNet`` (``tests/drafts.py``); labels are drawn from its own probabilities. One
teacher is a gradient boosting model of scikit-learn, whose probabilities are a column of the data.
The other is a network that reads a column that the student does not. The form of an output or
column says what its numbers are: ``logit``, ``probability``, or ``score``, a number that cannot be
converted to the other two. A reference ``column:NAME[,NAME...][=FORM]`` has one column per output
of the student; without a form it is that of the output. A draft is the folder of a bundle before it
is packed.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from drafts import write_draft
from error_codes import TextMatching, raises_code
from orders import run_without_prefect
from safetensors.torch import load_file, save_file
from sklearn.ensemble import HistGradientBoostingClassifier
from torch import nn

from compressors.contracts import Limit
from compressors.distill.distill import Distill
from compressors.distill.soft_labels import convert_scores
from compressors.distill.training.settings import Training
from compressors.errors.orders import OrderRefused
from flows.order import Order
from flows.resolve import order_digest, resolve_teachers
from infra.errors import DataRefused
from tasks.bundles.bundle_ref import find_bundle, resolve
from tasks.bundles.packing import pack
from tasks.orchestration.workspace import local
from tasks.prepare import prepare, prepare_for_teacher
from tasks.score import average, read_scores, score

ROWS = {"train": 1_000, "calibration": 200, "validation": 400, "test": 400}
STEP = Distill(training=Training(epochs=1, batch=256))
LIMIT = Limit.parse("auc vs baseline >= -0.3")


class OtherNet(nn.Module):
    """A teacher that reads only the column ``price`` and returns a probability."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, price: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.layer(price)).squeeze(1)


@pytest.fixture
def student(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pack the student, whose data has the columns ``boosted`` and ``price``; return its draft."""
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "draft_network,test_other_teachers")
    draft = write_draft(work_folder / "student", rows=ROWS)
    tables = {split: pq.read_table(draft / f"{split}.parquet") for split in ROWS}
    features = {
        split: np.column_stack([table[name].to_numpy() for name in ("user", "item")])
        for split, table in tables.items()
    }
    boosting = HistGradientBoostingClassifier(max_iter=20, random_state=0)
    boosting.fit(features["train"], tables["train"]["label"].to_numpy())
    for split, table in tables.items():
        boosted = boosting.predict_proba(features[split])[:, 1]
        price = np.linspace(-2, 2, len(table), dtype=np.float32)
        table = table.append_column("boosted", pa.array(boosted))
        pq.write_table(table.append_column("price", pa.array(price)), draft / f"{split}.parquet")
    pack(draft)
    return draft


@pytest.fixture
def teacher(student: Path, work_folder: Path) -> nn.Module:
    """Pack ``OtherNet`` with the data files of the student; return the network."""
    torch.manual_seed(0)
    network, folder = OtherNet(), work_folder / "teacher"
    folder.mkdir()
    save_file(network.state_dict(), folder / "model.safetensors")
    click = {"name": "click", "kind": "ctr", "form": "probability", "label": "label"}
    document = {
        "schema_version": 2,
        "name": "other",
        "version": "1",
        "signature": {
            "inputs": [{"kind": "dense", "name": "price", "shape": [1]}],
            "outputs": [click | {"metric": "auc"}],
        },
        "network": {"architecture": {"path": "test_other_teachers:OtherNet", "config": {}}},
        "data": {split: str(student / f"{split}.parquet") for split in ROWS},
    }
    (folder / "model.json").write_text(json.dumps(document))
    pack(folder)
    return network


def scores_in(artifact) -> torch.Tensor:
    """Return the stored predictions of a teacher."""
    return load_file(local(artifact) / "data.safetensors")["score"]


def order(*teachers: str) -> Order:
    """Return an order that distills the student from its original and from these teachers."""
    return Order(model="clicks", preset="custom", steps=(STEP,), limits=(LIMIT,), teachers=teachers)


def test_order_learns_from_a_column_of_probabilities(student: Path) -> None:
    result = run_without_prefect(order("column:boosted=probability"))
    # Read at the start, and again from the cache for the step.
    assert result.states_of("read the scores") == ["Completed", "Cached"]
    finished = result.finished
    assert finished.report.outcome == "accepted", finished.report.targets[0].verdict.reason
    assert finished.report.reproduction.order["teachers"] == ["column:boosted=probability"]
    line = finished.report.plan.of("cross")
    assert line is not None
    # Two teachers: the untouched model and the column.
    assert any("2" in str(why) for why in line.reasons if why.code == "several_teachers")
    # The soft labels are the mean of the untouched model's logits and those of the column.
    bundle = resolve("clicks")
    rows = prepare.fn(bundle, "train")
    original = score.fn(bundle, rows, ROWS["train"])
    column = read_scores.fn(bundle, "train", ("boosted",), ("probability",))
    # The form of the mean, then the forms of both sources.
    mean = average.fn((original, column), ("logit",), (("logit",), ("probability",)))
    boosted = torch.tensor(pq.read_table(student / "train.parquet")["boosted"].to_numpy())
    expected = (scores_in(original) + torch.logit(boosted).float()) / 2
    torch.testing.assert_close(scores_in(mean), expected)


@pytest.mark.slow
def test_order_learns_from_a_model_that_reads_other_columns(teacher: nn.Module) -> None:
    result = run_without_prefect(order("other@1"))
    assert result.states_of("prepare train for a teacher") == ["Completed", "Cached"]
    assert result.finished.report.outcome == "accepted"
    rows = prepare_for_teacher.fn(resolve("clicks"), "train", resolve("other@1"))
    predictions = scores_in(score.fn(resolve("other@1"), rows, ROWS["train"]))
    price = torch.linspace(-2, 2, ROWS["train"])[:, None]
    with torch.no_grad():
        torch.testing.assert_close(predictions, teacher(price))


def test_digest_of_an_order_depends_on_column_and_form(student: Path) -> None:
    bundle = find_bundle("clicks")
    digests = {
        order_digest(item, bundle, {}, resolve_teachers(item, bundle))
        for item in (
            order(),
            order("column:boosted=probability"),
            order("column:boosted=logit"),
            order("column:price"),
        )
    }
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("reference", "code"),
    [
        ("column:", "teacher_column_malformed"),
        ("column:boosted=odds", "teacher_column_malformed"),
        ("column:boosted,,price", "teacher_column_malformed"),
        ("column:boosted,price", "teacher_columns_count"),
        ("column:boosted=score", "teacher_form_differs"),
    ],
)
def test_unusable_column_is_refused_before_the_run(
    student: Path, reference: str, code: str
) -> None:
    with raises_code(OrderRefused, code, reference=reference):
        resolve_teachers(order(reference), find_bundle("clicks"))


def test_column_that_is_missing_or_has_no_probabilities_is_refused_at_the_start(
    student: Path,
) -> None:
    with pytest.raises(DataRefused, match="other"):
        run_without_prefect(order("column:other"))
    with raises_code(DataRefused, "column_no_probability", column="price", row=0):
        run_without_prefect(order("column:price=probability"))


def test_teacher_whose_columns_the_student_lacks_is_refused_by_name(
    teacher: nn.Module, student: Path
) -> None:
    for split in ROWS:
        path = student / f"{split}.parquet"
        pq.write_table(pq.read_table(path).drop_columns(["price"]), path)
    document = json.loads((student / "model.json").read_text()) | {"version": "2"}
    (student / "model.json").write_text(json.dumps(document))
    pack(student)
    with raises_code(
        DataRefused, "teacher_data_unusable", teacher="other@1", problem=TextMatching("price")
    ):
        run_without_prefect(order("other@1"))


def test_conversion_of_forms_is_the_logit_or_its_inverse() -> None:
    probability = torch.tensor([0.25, 0.5, 1.0])
    logit = convert_scores(probability, ("probability",), ("logit",))
    torch.testing.assert_close(logit[:2], torch.tensor([0.25, 0.5]).logit())
    assert bool(logit.isfinite().all())  # 1, whose logit is infinite, is clamped below 1
    back = convert_scores(logit, ("logit",), ("probability",))
    torch.testing.assert_close(back, probability, atol=1e-5, rtol=0)  # for the clamped 1
    both = torch.stack([logit, probability], dim=1)
    assert convert_scores(both, ("logit", "probability"), ("logit", "probability")) is both
    converted = convert_scores(both, ("logit", "probability"), ("logit", "logit"))
    torch.testing.assert_close(converted[:, 1], logit)

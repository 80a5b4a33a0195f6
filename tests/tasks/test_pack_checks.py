"""Checks of ``pack`` on a model that loads: its construction, metric, labels and scores.

Notes are remarks on how the model's class was constructed, and are stored in the manifest. Warnings
are problems of labels and scores that do not prevent packing. ``examine`` checks a packed bundle. A
draft is the folder of a bundle before it is packed.
"""

import html
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drafts import write_draft
from error_codes import HasReason, TextMatching, raises_code
from reason_codes import codes_of
from safetensors.torch import load_file, save_file

from compressors.contracts import Artifact, Limit, Output
from compressors.contracts.metrics import default_metrics
from compressors.contracts.metrics.families import can_be_measured
from compressors.errors.compression import ModelRefused
from compressors.errors.metrics import LimitRefused
from infra.bundle import bundle_folder as bundle_format
from infra.bundle.bundle_folder import MANIFEST, parse_manifest
from infra.bundle.json_reader import parse
from infra.data.expectations import Validation
from infra.errors import BundleRefused, DataRefused
from tasks.bundles.bundle_ref import BundleRef, find_bundle, require_measurable
from tasks.bundles.loading import load_bundle
from tasks.bundles.packing import examine, pack, show
from tasks.orchestration.workspace import local, store
from tasks.validate import validate

# ClickNet of tests/draft_network.py with code at the end of its constructor and another returned
# score.
CHANGED_NETWORK = """
import copy
import torch
from torch import nn
import draft_network

class ChangedClickNet(draft_network.ClickNet):
    def __init__(self, **config):
        super().__init__(**config)
{init}

    def forward(self, **inputs):
        score = super().forward(**inputs)
        return {score}
"""


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder for drafts; recpress stores everything in its subfolder ``recpress``."""
    monkeypatch.setenv("RECPRESS_HOME", str(tmp_path / "recpress"))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", "draft_network")
    return tmp_path


def write_changed_draft(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, *, init: str = "pass", score: str = "score"
) -> Path:
    """Write a draft whose class is ``ClickNet`` with changes.

    Args:
        workdir: parent folder of the draft.
        monkeypatch: the fixture.
        init: statements at the end of the constructor.
        score: expression that ``forward`` returns; ``score`` is the original score.
    """
    name = f"changed_{workdir.name}_{abs(hash((init, score)))}".replace("-", "_")
    lines = "\n".join(f"        {line}" for line in init.splitlines())
    (workdir / f"{name}.py").write_text(CHANGED_NETWORK.format(init=lines, score=score))
    monkeypatch.syspath_prepend(str(workdir))
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", name)
    return write_draft(workdir / "draft", network=f"{name}:ChangedClickNet")


def change_output(draft: Path, **fields: object) -> None:
    """Change fields of the draft's output."""
    path = draft / "model.json"
    document = json.loads(path.read_text())
    document["signature"]["outputs"][0] |= fields
    path.write_text(json.dumps(document))


def replace_labels(draft: Path, split: str, labels: list[int]) -> None:
    """Replace the labels of all rows of a split."""
    path = draft / f"{split}.parquet"
    table = pq.read_table(path)
    column = table.column_names.index("label")
    pq.write_table(table.set_column(column, "label", pa.array(labels)), path)


def labels_of(draft: Path, split: str) -> list[int]:
    labels: list[int] = pq.read_table(draft / f"{split}.parquet")["label"].to_pylist()
    return labels


def pack_without_checks(draft: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pack a draft like an earlier version of recpress, which had none of these checks.

    Returns:
        The URI of the bundle's artifact.
    """
    with monkeypatch.context() as patch:
        # ``require_sound`` raises for problems of labels and scores, or returns them as warnings.
        patch.setattr("tasks.bundles.packing.require_sound", lambda *_, **__: ())
        # Rules of later versions do not apply to documents that recpress has stored.
        patch.setattr(
            "infra.bundle.bundle_folder.parse", lambda *a, **k: parse(*a, **(k | {"stored": True}))
        )
        return pack(draft).artifact.uri


# --- how the class is built ------------------------------------------------------------------


@pytest.mark.parametrize(
    "init",
    [
        'self.to("cpu")',
        'self.to(torch.device("cpu"))',
        "self.half()\nself.float()",
        "self.first = copy.deepcopy(self.first)",
        # Random initial weights, which the stored weights replace.
        "self.first.weight.data.copy_(torch.randn_like(self.first.weight))",
        # Parameters in a list, for example for a regularization term with the factor 0.1.
        "self.weights = [(list(self.user.parameters()), 0.1)]",
    ],
)
def test_class_that_moves_or_copies_its_weights_is_packed_without_a_note(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, init: str
) -> None:
    packed = pack(write_changed_draft(workdir, monkeypatch, init=init))
    assert packed.notes == packed.warnings == ()
    assert "notes" not in json.loads((local(packed.artifact) / MANIFEST).read_text())


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ('self.to("cuda:0")', ["cuda:0", "on the CPU"]),
        ("self.cuda()", ["cuda", "on the CPU"]),
        # A condition on the initial weights, whose values must therefore exist.
        ("self.big = float(self.user.weight.max()) > 0", ["all its weights in memory", "self.big"]),
    ],
)
def test_class_that_needs_a_gpu_or_all_weights_in_memory_is_packed_with_a_note(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, init: str, words: list[str]
) -> None:
    packed = pack(write_changed_draft(workdir, monkeypatch, init=init))
    assert show("clicks").notes == packed.notes == examine("clicks").manifest.notes
    (note,) = packed.notes
    assert all(word in note for word in words)
    model = load_bundle(packed.artifact).model.module
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


def test_random_attribute_that_changes_scores_is_refused_by_name(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two loads of the bundle have different scores.
    init, score = "self.noise = torch.randn(1)", "score + self.noise"
    with raises_code(ModelRefused, "loads_differ", names=("noise",)):
        pack(write_changed_draft(workdir, monkeypatch, init=init, score=score))


def test_random_attribute_that_changes_no_score_is_accepted(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = "import time\nself.noise = torch.randn(1)\nself.begun = time.time()"
    pack(write_changed_draft(workdir, monkeypatch, init=init))


def test_network_that_fails_on_one_row_is_refused(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = "torch.stack([score, 0 * score], dim=1).squeeze()[:, 0]"
    with raises_code(ModelRefused, "single_row_fails", problem=TextMatching("too many indices")):
        pack(write_changed_draft(workdir, monkeypatch, score=score))


def test_dropout_in_evaluation_mode_is_refused(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = "nn.functional.dropout(score, 0.5)"
    with raises_code(ModelRefused, "calls_differ"):
        pack(write_changed_draft(workdir, monkeypatch, score=score))


def test_class_that_raises_in_its_constructor_is_refused_with_its_message(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = 'raise ValueError("an odd number of fields")'
    with raises_code(ModelRefused, "construction_failed") as refused:
        pack(write_changed_draft(workdir, monkeypatch, init=init))
    assert "an odd number of fields" in refused.value.fields["problem"]
    # The arguments fit the constructor, so the message must not say that they are wrong.
    assert "keyword arguments" not in refused.value.fields["problem"]


# --- the metric ------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["auc", "gauc", "logloss"])
def test_ranking_model_with_a_metric_of_another_task_is_refused(workdir: Path, metric: str) -> None:
    draft = write_draft(workdir / "draft", task="ranking")
    change_output(draft, metric=metric)
    with raises_code(
        BundleRefused, "fields_unusable", problems=TextMatching(rf"needs metric .*ndcg@k.*{metric}")
    ):
        pack(draft)
    assert store().keys("bundles") == ()


def test_stored_bundle_with_a_metric_of_another_task_is_shown_but_refused_for_orders(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = write_draft(workdir / "draft", task="ranking")
    change_output(draft, metric="auc")
    pack_without_checks(draft, monkeypatch)
    assert show("clicks").signature.single_output.metric == "auc"
    bundle_ref = find_bundle("clicks")
    limit = Limit.parse("bytes vs baseline <= 0.5")
    with raises_code(LimitRefused, "bundle_metric_unusable", name="clicks", version="1") as caught:
        require_measurable(bundle_ref, (limit,))
    reason = HasReason("metric_of_other_task", metric="auc")
    assert caught.value.fields["problem"] == reason
    with raises_code(BundleRefused, "metric_unfit", problem=reason):
        examine("clicks")


@pytest.mark.parametrize("task", ["ctr", "ranking", "retrieval"])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("rows", [1, 63, 64, 5000])
def test_limit_is_accepted_if_and_only_if_its_metric_is_measured(
    task: str, grouped: bool, rows: int
) -> None:
    if task != "ctr" and not grouped:
        return  # such a signature is refused
    output = {
        "ctr": Output(name="y", kind="ctr", form="logit", label="y", metric="auc"),
        "ranking": Output(name="y", kind="ranking", form="score", label="y", metric="ndcg@10"),
        "retrieval": Output(name="y", kind="retrieval", form="score", metric="recall@20"),
    }[task]
    bundle_ref = BundleRef(
        artifact=Artifact(uri=f"artifacts/{'0' * 64}", sha256="0" * 64, bytes=1),  # is not read
        name="n",
        version="1",
        outputs=(output,),
        rows={"test": rows},
        longest={},  # list lengths of inputs, which limits do not depend on
        architecture="",  # the digest of the model's class, which is not read
        grouped=grouped,
    )
    for name, metric in default_metrics().items():
        limit = Limit(metric=name, at_least=0)
        is_measured = (
            can_be_measured(metric, task, grouped=True)
            and (grouped or not metric.needs_group)
            and (metric.batch or 0) <= rows  # a metric of latency has a batch size
        )
        if is_measured:
            require_measurable(bundle_ref, (limit,))
        else:
            code = "limit_not_measured" if grouped else "limit_not_measured_without_groups"
            with raises_code(LimitRefused, code, limit=str(limit), rows=rows):
                require_measurable(bundle_ref, (limit,))


# --- labels and scores -----------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "validation"])
@pytest.mark.parametrize("value", [0, 1])
def test_split_whose_labels_are_all_equal_is_refused(workdir: Path, split: str, value: int) -> None:
    draft = write_draft(workdir / "draft")
    replace_labels(draft, split, [value] * len(labels_of(draft, split)))
    with raises_code(
        DataRefused, "not_measurable", problems=HasReason("labels_equal", split=split, label=value)
    ):
        pack(draft)
    assert store().keys("") == ()  # nothing is stored


def test_split_whose_groups_each_have_equal_labels_is_refused(workdir: Path) -> None:
    draft = write_draft(workdir / "draft", task="ranking")
    queries = pq.read_table(draft / "test.parquet")["query"].to_pylist()
    replace_labels(draft, "test", [query % 2 for query in queries])  # a query is a group
    with raises_code(
        DataRefused,
        "not_measurable",
        problems=HasReason("group_labels_equal", split="test", metrics=("ndcg@10",)),
    ):
        pack(draft)


def test_probability_declared_as_logit_is_refused_with_the_fitting_form(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = write_changed_draft(workdir, monkeypatch, score="torch.sigmoid(score)")
    with raises_code(
        DataRefused,
        "not_measurable",
        problems=HasReason("output_misdeclared", fitting="probability"),
    ):
        pack(draft)
    change_output(draft, form="probability")
    assert pack(draft).warnings == ()


def test_logit_declared_as_probability_is_refused(workdir: Path) -> None:
    draft = write_draft(workdir / "draft")
    change_output(draft, form="probability")
    # Logits are outside of [0, 1].
    with raises_code(DataRefused, "not_measurable", problems=HasReason("probability_outside")):
        pack(draft)


def test_model_worse_than_the_base_rate_is_packed_with_warnings(
    workdir: Path,
) -> None:
    draft = write_draft(workdir / "draft")
    weights = load_file(draft / "model.safetensors")
    for name in ("out.weight", "out.bias"):
        weights[name] = -weights[name]
    save_file(weights, draft / "model.safetensors")
    packed = pack(draft)
    assert codes_of(packed.warnings) == ["worse_than_base_rate", "worse_than_chance"]
    assert examine("clicks").warnings == packed.warnings
    document = json.loads(packed.model_dump_json())
    assert document["warnings"] == [str(warning) for warning in packed.warnings]


def test_validation_warns_about_a_stored_bundle_with_a_wrong_output_form(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    draft = write_changed_draft(workdir, monkeypatch, score="torch.sigmoid(score)")
    pack_without_checks(draft, monkeypatch)
    packed = find_bundle("clicks").artifact
    from infra.data.checks import Rules

    artifact = validate.fn(bundle=packed, rules=Rules())
    folder = local(artifact)
    stored = Validation.model_validate_json((folder / "validation.json").read_text())
    assert stored.success
    (warning,) = stored.warnings
    assert "Set output to 'probability'" in warning
    assert "Set output to 'probability'" in html.unescape((folder / "validation.html").read_text())
    assert warning in caplog.text


def test_validation_refuses_a_stored_bundle_that_cannot_be_measured(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = write_draft(workdir / "draft")
    change_output(draft, form="probability")
    pack_without_checks(draft, monkeypatch)
    from infra.data.checks import Rules

    with raises_code(DataRefused, "not_measurable", problems=HasReason("probability_outside")):
        validate.fn(bundle=find_bundle("clicks").artifact, rules=Rules())


def test_validation_without_warnings_of_an_earlier_version_is_read() -> None:
    text = '{"success": true, "evaluated": 1, "intended": 1, "findings": [], "seconds": 0.1}'
    assert Validation.model_validate_json(text).warnings == ()


def test_manifest_without_notes_of_an_earlier_version_is_read(workdir: Path) -> None:
    packed = pack(write_draft(workdir / "draft"))
    raw = (local(packed.artifact) / MANIFEST).read_bytes()
    assert b"notes" not in raw
    assert parse_manifest(raw, workdir).notes == ()
    assert bundle_format.Manifest.model_fields["notes"].default == ()

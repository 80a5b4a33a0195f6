"""Migration of ``model.json`` from schema version 1, and the locations in its errors.

A draft is the folder of a bundle before it is packed.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from drafts import write_draft
from error_codes import raises_code
from signatures import as_version_1

from infra.bundle.bundle_folder import read_draft
from infra.bundle.schema_versions import KNOWN_VERSIONS, SCHEMA_VERSION, migrate
from infra.errors import BundleRefused

VERSION_1: dict[str, Any] = {
    "schema_version": 1,
    "name": "shop",
    "signature": {
        "task": "ctr",
        "inputs": [{"kind": "id", "name": "user", "table": "user"}],
        "output": "logit",
        "label": "click",
        "group": "user",
        "time": None,
        "metric": "auc",
    },
    "notes": ["unchanged"],
}
VERSION_2: dict[str, Any] = {
    "schema_version": 2,
    "name": "shop",
    "signature": {
        "inputs": [{"kind": "id", "name": "user", "table": "user"}],
        "outputs": [
            {"name": "score", "kind": "ctr", "form": "logit", "label": "click", "metric": "auc"}
        ],
        "group": "user",
        "time": None,
    },
    "notes": ["unchanged"],
}


def edit_draft(draft: Path, change: Any, *, version: int = 1) -> Path:
    """Convert the ``model.json`` of a draft to a schema version and change it; return the draft."""
    path = draft / "model.json"
    document = json.loads(path.read_text())
    document = as_version_1(document) if version == 1 else document
    change(document)
    path.write_text(json.dumps(document))
    return draft


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return write_draft(tmp_path / "draft", rows={"train": 20, "test": 20})


# --- the migration ---------------------------------------------------------------------------


def test_migration_moves_the_four_fields_of_version_1_into_one_output() -> None:
    before = copy.deepcopy(VERSION_1)
    assert migrate(VERSION_1) == VERSION_2
    assert before == VERSION_1  # the argument is not modified


def test_migration_does_not_change_a_document_of_the_current_version() -> None:
    assert max(KNOWN_VERSIONS) == SCHEMA_VERSION
    assert migrate(VERSION_2) == VERSION_2


def test_migration_adds_no_field_that_version_1_does_not_have() -> None:
    signature = {"task": "retrieval", "output": "score", "metric": "recall@20", "item": "item"}
    migrated = migrate({"schema_version": 1, "signature": signature})
    assert migrated["signature"] == {
        "item": "item",
        "outputs": [
            {"name": "score", "kind": "retrieval", "form": "score", "metric": "recall@20"},
        ],
    }


@pytest.mark.parametrize("document", [{}, {"signature": 1}, {"signature": [{"task": "ctr"}]}])
def test_migration_without_a_signature_changes_only_the_version(
    document: dict[str, Any],
) -> None:
    assert migrate({"schema_version": 1, **document}) == {"schema_version": 2, **document}


# --- drafts ----------------------------------------------------------------------------------


def test_draft_of_schema_version_1_is_read_like_the_same_draft_of_version_2(draft: Path) -> None:
    edit_draft(draft, lambda document: None, version=2)
    current = read_draft(draft)
    migrated = read_draft(edit_draft(draft, lambda document: None))
    # Outputs of version 1 have no name, so the migration calls the only output "score".
    (output,) = current.signature.outputs
    renamed = current.signature.model_copy(
        update={"outputs": (output.model_copy(update={"name": "score"}),)}
    )
    assert migrated == current.model_copy(update={"signature": renamed})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("metric"), "signature.metric is missing; add it."),
        (lambda s: s.pop("task"), "signature.task is missing; add it."),
        (lambda s: s.update(output="loggit"), "signature.output: Input should be 'logit'"),
        (lambda s: s.update(label=7), "signature.label: Input should be a valid string; found 7."),
        (lambda s: s.update(output="score"), "signature: task 'ctr' needs output logit"),
        (lambda s: s.update(labels="x"), "signature.labels is not a field of this format"),
    ],
)
def test_refusal_of_a_wrong_field_contains_its_location_in_version_1(
    draft: Path, change: Any, sentence: str
) -> None:
    edit_draft(draft, lambda document: change(document["signature"]))
    with raises_code(BundleRefused, "fields_unusable") as refused:
        read_draft(draft)
    (problem,) = refused.value.fields["problems"]
    assert problem.startswith(sentence)


def test_field_of_version_2_in_version_1_is_refused(draft: Path) -> None:
    edit_draft(draft, lambda document: document["signature"].update(outputs=[]))
    with raises_code(
        BundleRefused, "schema_version_too_old", field="signature.outputs", got="1", known=2
    ):
        read_draft(draft)


def test_field_of_version_1_in_version_2_is_refused(draft: Path) -> None:
    edit_draft(draft, lambda document: document["signature"].update(task="ctr"), version=2)
    with raises_code(BundleRefused, "fields_unusable") as refused:
        read_draft(draft)
    (problem,) = refused.value.fields["problems"]
    assert problem.startswith("signature.task is not a field of this format")

"""An order for a model with sequences of dynamic length, and data that packing refuses.

The inputs of ``SequenceNet`` (``tests/sequence_draft.py``) are two sequences of 1 to 12 ids,
``history`` and ``categories``, and the id of an item.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from error_codes import raises_code
from orders import run_without_prefect
from sequence_draft import CONFIG, NETWORK_MODULE, write_sequence_draft

from compressors.contracts import Limit
from flows.order import Order
from infra.errors import DataRefused
from tasks.bundles.packing import pack
from tasks.report.target_facts import targets_section


@pytest.fixture
def draft(work_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A draft (the folder of a bundle before it is packed) with padding on the left."""
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", NETWORK_MODULE)
    return write_sequence_draft(work_folder / "draft", "left")


def test_model_with_sequences_is_compressed_and_accepted(draft: Path) -> None:
    pack(draft)
    limits = (Limit.parse("auc vs baseline >= -0.01"), Limit.parse("bytes vs baseline <= 0.6"))
    report = run_without_prefect(Order(model="sequences", preset="fast", limits=limits))
    finished = report.finished.report
    assert finished.outcome == "accepted", finished.targets[0].verdict.reason
    (graph,) = finished.targets[0].lowering.graphs
    by_name = {item.name: (item.shape, item.shortest) for item in graph.inputs}
    longest = CONFIG["longest"]
    assert by_name == {
        "history": ((longest,), 1),
        "history_mask": ((longest,), 1),
        "history_positions": ((longest,), 1),
        "categories": ((longest,), 1),
        "category_count": ((), None),
        "item": ((), None),
    }
    (target,) = targets_section(finished).built
    assert "history int64 [rows, 1 to 12]" in dict(target.facts)["Inputs"].text


@pytest.mark.parametrize(
    ("column", "change", "expected"),
    [
        ("categories", [1, 2, 3], "has another length than that of column 'history'"),
        ("history", [], "has another length"),
    ],
)
def test_lists_of_unequal_length_are_refused(
    draft: Path, column: str, change: list[int], expected: str
) -> None:
    table = pq.read_table(draft / "test.parquet")
    lists = table[column].to_pylist()
    # A row whose list has neither 0 nor 3 ids, which are the lengths of the values of ``change``.
    row = next(index for index, ids in enumerate(lists) if len(ids) not in (0, 3))
    lists[row] = change
    index = table.column_names.index(column)
    changed = table.set_column(index, column, pa.array(lists, pa.list_(pa.int64())))
    pq.write_table(changed, draft / "test.parquet")
    with raises_code(DataRefused, "schema_unfit") as caught:
        pack(draft)
    (problem,) = caught.value.fields["problems"]
    assert expected in problem
    assert f"row(s) {row}." in problem


def test_list_shorter_than_min_length_is_refused(draft: Path) -> None:
    document = json.loads((draft / "model.json").read_text())
    for item in document["signature"]["inputs"][:2]:  # the two sequences
        item["min_length"] = 2
    (draft / "model.json").write_text(json.dumps(document))
    with raises_code(DataRefused, "split_unusable", split="train") as caught:
        pack(draft)
    expected = "a list has 1 ids, input 'history' needs at least 2"
    assert expected in caught.value.fields["problem"]

"""An order for a retrieval model whose items are identified by a key that no tower reads.

``write_retrieval_draft`` writes a draft: the folder that becomes a bundle when it is packed.
"""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from orders import run_without_prefect
from retrieval_draft import INTERACTIONS_PER_USER, SIGNATURE, planted_recall, write_retrieval_draft

from compressors.contracts import Limit
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.order import Order
from tasks.bundles.packing import pack

KEY_OF_FIRST_ITEM = 1_000_000  # keys are not rows of a table


@pytest.mark.slow
def test_items_identified_by_a_key_have_the_recall_of_the_network(work_folder: Path) -> None:
    draft = write_retrieval_draft(work_folder / "draft")
    recall = planted_recall(draft)
    inputs = [*SIGNATURE["inputs"], {"kind": "key", "name": "sku"}]
    document = json.loads((draft / "model.json").read_text())
    document["signature"] |= {"inputs": inputs, "item": "sku"}
    (draft / "model.json").write_text(json.dumps(document))
    for split in (*INTERACTIONS_PER_USER, "items"):
        table = pq.read_table(draft / f"{split}.parquet")
        keys = pc.add(table["item"], pa.scalar(KEY_OF_FIRST_ITEM))
        if split != "items":  # interactions have the key only; the catalogue has the tower's inputs
            table = table.drop_columns(["item"])
        pq.write_table(table.append_column("sku", keys), draft / f"{split}.parquet")
    pack(draft)
    order = Order(
        model="finder",
        preset="custom",
        steps=(RowwiseInt8(),),
        limits=(Limit.parse("recall@20 vs baseline >= -0.05"),),
    )
    report = run_without_prefect(order).finished.report
    assert report.outcome == "accepted", report.targets[0].verdict.reason
    assert report.measurement is not None
    measured = report.measurement.baseline.of("recall@20", "absolute")
    assert measured is not None
    assert measured.point == pytest.approx(recall, abs=1e-6)
    query_graph, item_graph = report.targets[0].lowering.graphs
    names = [item.name for graph in (query_graph, item_graph) for item in graph.inputs]
    assert "sku" not in names

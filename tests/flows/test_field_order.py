"""An order for a model with a float matrix, a bounded integer and fields of a joined table.

In a joined table, the rows of several id columns (fields) follow each other. A bounded integer has
a smallest and a largest value; here it is the position. The inputs of the model, ``FieldsNet``
(``tests/field_network.py``), are two ids per row, a matrix of 7 columns (a brand, 4 tags and 2
numbers), and a position. It has four tables and two dense layers. A draft is the folder that
becomes a bundle when it is packed.
"""

from pathlib import Path

import pytest
from field_draft import NETWORK_MODULE, write_field_draft
from orders import BOTH_TARGETS, run_without_prefect

from compressors.contracts import Limit
from flows.order import Order
from tasks.bundles.packing import pack


def test_model_with_matrix_integers_and_fields_is_compressed_and_accepted(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECPRESS_ALLOWED_MODULES", NETWORK_MODULE)
    pack(write_field_draft(work_folder / "draft"))
    limits = (Limit.parse("auc vs baseline >= -0.01"), Limit.parse("bytes vs baseline <= 0.5"))
    order = Order(model="fields", preset="fast", limits=limits, targets=BOTH_TARGETS)
    report = run_without_prefect(order).finished.report
    assert [(item.target, item.verdict.outcome) for item in report.targets] == [
        ("onnxruntime", "accepted"),
        ("tensorrt-rtx", "built-unmeasured"),
    ], report.targets[0].verdict.reason
    (graph,) = report.targets[0].lowering.graphs
    assert [(item.name, item.dtype, item.shape) for item in graph.inputs] == [
        ("ids", "int64", (2,)),
        ("matrix", "float32", (7,)),
        ("position", "int64", ()),
    ]
    assert graph.audit is not None
    # All four tables stay int8, and both layers are computed with int8 weights.
    assert (graph.audit.packed_tables, graph.audit.int8_products) == (4, 2)

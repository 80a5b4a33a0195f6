"""One file and one registration add a table format that every phase of an order can use.

The format and its method are in ``added_table_format.py``; the order is in ``added_order.py``.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from added_order import AddedOrder
from added_table_format import Signs, registered_table_format

from compressors.core.modules.formats import PackedTable
from compressors.core.registries import register
from flows.order import Order
from tasks.bundles.table_files import table_steps


@pytest.fixture
def signs() -> Iterator[None]:
    with registered_table_format():
        yield


@pytest.mark.xdist_group("added")
def test_registered_table_format_is_stored_lowered_and_measured(added_order: AddedOrder) -> None:
    plan = added_order.compressed.plan
    assert plan is not None
    line = plan.of("item")
    assert line is not None
    assert line.format == "signs"
    table = added_order.compressed.module.get_submodule("item")
    assert isinstance(table, PackedTable)
    assert line.bytes_after == table.rows * (table.dim + 4)  # int8 signs and a float32 scale
    assert set(np.unique(table.get_buffer("signs"))) == {-1, 1}
    (graph,) = added_order.report.targets[0].lowering.graphs
    # The largest difference between the scores of graph and module: signs times scales are exact in
    # float32, so only the sums of the dense layers are rounded differently.
    assert graph.rows_parity.largest < 1e-6


def test_registered_table_format_is_listed_for_table_files_and_orders(signs: None) -> None:
    assert table_steps()["signs"] is Signs
    assert "Signs" in Order.model_json_schema()["$defs"]


def test_registering_a_method_twice_raises_value_error(signs: None) -> None:
    with pytest.raises(ValueError, match="signs"):
        register(Signs)

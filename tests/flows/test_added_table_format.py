"""A table format is added by one file and one registration, and goes through a whole order."""

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
def test_a_registered_table_format_is_stored_lowered_and_measured(added_order: AddedOrder) -> None:
    plan = added_order.compressed.plan
    assert plan is not None
    line = plan.of("item")
    assert line is not None
    assert line.format == "signs"
    table = added_order.compressed.module.get_submodule("item")
    assert isinstance(table, PackedTable)
    assert line.bytes_after == table.rows * (table.dim + 4)
    assert set(np.unique(table.get_buffer("signs"))) == {-1, 1}
    (graph,) = added_order.report.targets[0].lowering.graphs
    assert graph.rows_parity.largest < 1e-6  # signs and lengths are multiplied exactly


def test_a_registered_table_format_is_offered_for_table_files(signs: None) -> None:
    assert table_steps()["signs"] is Signs
    assert "Signs" in Order.model_json_schema()["$defs"]


def test_a_method_is_registered_once(signs: None) -> None:
    with pytest.raises(ValueError, match="signs"):
        register(Signs)

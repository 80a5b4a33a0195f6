"""One order of a kind of task, a metric and a table format that are registered for it alone."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from added_metric import registered_metric
from added_table_format import Signs, registered_table_format
from added_task_kind import LOSSES, registered_task_kind, write_upvotes
from orders import carry_out, surroundings

from compressors.contracts import Limit
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.distill.fine_tune import FineTune
from compressors.distill.training.settings import Training
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from flows.order import Order
from tasks.bundles.loading import load_bundle
from tasks.bundles.packing import pack
from tasks.orchestration.documents import Report

LIMITS = (
    "brier vs baseline <= 0.05",
    "brier vs baseline <= -0.15",  # a gain that no compression reaches
    "auc vs baseline >= -0.05",
)


@dataclass(frozen=True)
class AddedOrder:
    """The report of the order, its compressed model, and what was seen while it ran.

    ``losses`` are the values of the task kind's loss, ``packing_warnings`` those of ``pack``.
    """

    report: Report
    compressed: Model
    losses: tuple[float, ...]
    packing_warnings: tuple[Reason, ...]


def carry_out_added(home: Path) -> AddedOrder:
    """Carry out the order in a new home."""
    with (
        pytest.MonkeyPatch.context() as patch,
        registered_task_kind(),
        registered_metric(),
        registered_table_format(),
    ):
        surroundings(patch, home / "recpress")
        packed = pack(write_upvotes(home / "draft"))
        LOSSES.clear()
        order = Order(
            model="posts",
            preset="custom",
            steps=(
                Signs(tables=("item",)),
                RowwiseInt8(tables=("user", "tags")),
                FineTune(training=Training(epochs=1, learning_rate=1e-4)),
            ),
            limits=tuple(map(Limit.parse, LIMITS)),
        )
        report = carry_out(order).finished.report
        compressed = load_bundle(report.compressed).model
        return AddedOrder(report, compressed, tuple(LOSSES), packed.warnings)

"""Run one order with a task kind, a metric and a table format that only tests define."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from added_metric import registered_metric
from added_table_format import Signs, registered_table_format
from added_task_kind import LOSSES, registered_task_kind, write_upvotes
from orders import run_without_prefect, use_home

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
    "brier vs baseline <= -0.15",  # an improvement that compression cannot reach
    "auc vs baseline >= -0.05",
)


@dataclass(frozen=True)
class AddedOrder:
    """The result of the order of this module.

    Attributes:
        report: the report of the order.
        compressed: the model after all steps of the order.
        losses: the training losses that the added task kind computed.
        packing_warnings: the warnings of ``pack`` for the model.
    """

    report: Report
    compressed: Model
    losses: tuple[float, ...]
    packing_warnings: tuple[Reason, ...]


def run_added_order(folder: Path) -> AddedOrder:
    """Pack a draft, and run the order in a new home (the folder with store and registry).

    A draft is the folder that a user writes and ``pack`` stores as a bundle.

    Args:
        folder: the parent of the home and of the draft.
    """
    with (
        pytest.MonkeyPatch.context() as patch,
        registered_task_kind(),
        registered_metric(),
        registered_table_format(),
    ):
        use_home(patch, folder / "recpress")
        packed = pack(write_upvotes(folder / "draft"))
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
        report = run_without_prefect(order).finished.report
        compressed = load_bundle(report.compressed).model
        return AddedOrder(report, compressed, tuple(LOSSES), packed.warnings)

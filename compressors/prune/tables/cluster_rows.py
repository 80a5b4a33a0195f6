"""Cluster the rarely looked-up rows of embedding tables, so that they share a few rows.

The most looked-up rows are not changed. The others are clustered by weighted k-means, and each is
replaced by the mean of its cluster. If ``hot`` is 0, all rows are clustered.

Source: clustered embeddings of rare ids, such as CCE (https://arxiv.org/abs/2210.05974), which
clusters during training. Differs: rows are clustered once after training, weighted by their lookup
counts.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from compressors.contracts import Bench, Part
from compressors.contracts.reasons import Reason
from compressors.core.model import Model
from compressors.core.modules.composed import Design
from compressors.core.steps.composition_steps import (
    UNSEEN,
    ComposingStep,
    Designs,
    FittedParts,
    choose_composed,
    recompose,
    share_or_number,
)
from compressors.core.steps.decisions import AppliedStep, StepPlan
from compressors.core.steps.unit_settings import MinRows
from compressors.prune.tables.kept_rows import lookup_share, select_highest
from compressors.prune.tables.row_map import COMPOSITION, byte_planes
from compressors.quantize.calibration.lookup_counts import lookup_counts
from compressors.quantize.kernels.lloyd import kmeans, nearest_entries

SAMPLE = 65_536
"""Largest number of rows to fit clusters to: the most looked-up ones of the clustered rows."""


def cluster_rare_rows(
    table: Tensor, counts: Tensor, hot: int, clusters: int
) -> tuple[Tensor, Tensor]:
    """Cluster all rows except the most looked-up ones.

    Args:
        table: float, ``(rows, dim)``.
        counts: lookups of each row, ``(rows,)``.
        hot: number of most looked-up rows that are not clustered.
        clusters: number of clusters of the other rows, at most the number of these rows.

    Returns:
        ``index`` int64 ``(rows,)``, the number of each row in ``unique``, and ``unique`` float32
        ``(hot + clusters, dim)``: first the hot rows in their order, then the cluster means.
    """
    is_hot = select_highest(counts, hot)
    cold = table[~is_hot].float()
    weight = counts[~is_hot] + UNSEEN  # so that rows without lookups have some weight
    sample = select_highest(weight, min(len(cold), SAMPLE))
    centers = kmeans(cold[sample], clusters, weight[sample]).codebook
    index = torch.empty(len(table), dtype=torch.int64)
    index[is_hot] = torch.arange(hot)
    index[~is_hot] = hot + nearest_entries(cold, centers)
    return index, torch.cat([table[is_hot].float(), centers])


class ClusterRows(ComposingStep):
    """Cluster the rarely looked-up rows of embedding tables, so that they share a few rows.

    The result is a composition, a table built from smaller ones (``row_map.py``): the table
    ``unique`` of hot rows and cluster means, and a map from each id to the index of its row in
    ``unique``, stored as the tensor ``planes``. The composition's setting ``places`` is the number
    of rows of ``unique``.
    """

    kind: Literal["cluster_rows"] = "cluster_rows"
    tables: tuple[str, ...] = Field(
        ("*",), description="Tables to cluster: module names, with * for any characters."
    )
    min_rows: MinRows = 1
    hot: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Share of a table's rows, those with the most lookups, that are not clustered.",
    )
    clusters: float = Field(
        0.1,
        gt=0,
        description="Number of clusters of the other rows. Below 1: as a share of these rows. From "
        "1 on: a number.",
    )

    @property
    def needs(self) -> tuple[Part, ...]:
        """Training rows, to count how often each row is looked up."""
        return ("train",)

    def plan(self, model: Model, bench: Bench) -> StepPlan[Designs]:
        """Select the tables to cluster; give a reason for each other table."""
        return choose_composed(model, self.tables, self.min_rows, self.kind, self.design)

    def apply(self, model: Model, bench: Bench, plan: StepPlan[Designs]) -> AppliedStep:
        """Replace every selected table by its hot rows, its clusters and a map.

        Raises:
            RowsMissing: there are no training rows.
        """
        designs = plan.payload
        counts = lookup_counts(model, bench, designs)

        def fit(name: str, table: Tensor, design: Design) -> FittedParts:
            hot, clusters = self._choose_sizes(len(table))
            index, unique = cluster_rare_rows(table, counts[name], hot, clusters)
            clustered_share = lookup_share(counts[name], ~select_highest(counts[name], hot))
            stored = {"planes": byte_planes(index, len(unique))}
            reason = Reason("shared_lookups", share=clustered_share)
            return FittedParts(stored, parts={"unique": unique}, reasons=(reason,))

        return recompose(model, designs, fit)

    def design(self, rows: int, dim: int) -> Design:
        """Design the composition of a table of ``rows x dim``."""
        hot, clusters = self._choose_sizes(rows)
        reason = Reason("clustered_rows", hot=hot, rows=rows, clusters=clusters)
        return Design(COMPOSITION, {"places": hot + clusters}, reason)

    def _choose_sizes(self, rows: int) -> tuple[int, int]:
        """Return the number of hot rows and the number of clusters."""
        hot = min(rows - 1, round(self.hot * rows))
        return hot, share_or_number(self.clusters, rows - hot)

"""Draw items of the catalogue as negatives of a retrieval batch, in addition to its own items.

The items of a batch are those with which users interact, so frequent items are frequent negatives,
and most items of a large catalogue are never negatives. If items are drawn uniformly, every item
of the catalogue can be a negative.

Source: Yang et al. 2020, https://doi.org/10.1145/3366424.3386195 (mixed negative sampling).
Differs: each drawn item occurs once in a batch, and losses correct for the probability that an item
is in a batch (``compressors/task_kinds/sampled_softmax.py``).
"""

import numpy as np
import torch
from torch import Tensor

from compressors.contracts import ITEMS, Signature, Split
from compressors.core.batches import JoinedRows, Rows, SampledItems
from compressors.errors.steps import RowsMissing


class ItemSampler:
    """Draws items uniformly from a catalogue, without repetition within a batch.

    Args:
        catalogue: the split ``items``, prepared as tensors.
        signature: signature of a model with two towers.
        rows: the training rows; the frequency of an item in them is its probability in a batch.
        count: number of items of each draw; all items if the catalogue has fewer.
    """

    def __init__(self, catalogue: Split, signature: Signature, rows: Rows, count: int) -> None:
        self._items = Rows(catalogue, signature.of_split(ITEMS))
        self._ids = self._items.column(str(signature.item))
        self._log_share = log_shares(self._ids, rows.column(str(signature.item)))
        self._count = min(count, len(self._items))
        self.seed(0)

    def seed(self, *seeds: int) -> None:
        """Start a sequence of draws that depends only on these integers."""
        self._random = np.random.default_rng(seeds)

    def draw(self) -> SampledItems:
        """Draw the items of one batch."""
        total = len(self._items)
        drawn = self._random.choice(total, self._count, replace=False, shuffle=False)
        indices = torch.from_numpy(np.sort(drawn))  # sorted, because rows are read from a file
        return SampledItems(
            inputs=self._items.take(indices).inputs,
            item=self._ids[indices],
            item_log_share=self._log_share[indices],
            drawn_share=self._count / total,
        )


def build_sampler(
    catalogue: Split | None, signature: Signature, rows: Rows | JoinedRows, negatives: int
) -> ItemSampler | None:
    """Return the sampler of the negatives of each batch; None if ``negatives`` is 0.

    Raises:
        RowsMissing: there is no catalogue, or the rows contain rows without labels
            (``JoinedRows``), which have no items.
    """
    if not negatives:
        return None
    if catalogue is None or not isinstance(rows, Rows):
        raise RowsMissing("catalogue_missing", negatives=negatives)
    return ItemSampler(catalogue, signature, rows, negatives)


def log_shares(ids: Tensor, item_of_row: Tensor) -> Tensor:
    """Return the logarithm of the share of rows that have each item, float32 ``(items,)``.

    Args:
        ids: the id of each item, int ``(items,)``.
        item_of_row: the id of the item of each row, int ``(rows,)``.

    Returns:
        -inf for an item without a row.
    """
    known, counts = torch.unique(item_of_row, return_counts=True)
    place = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
    count = torch.where(known[place] == ids, counts[place], 0)
    shares: Tensor = count / len(item_of_row)
    return shares.log()

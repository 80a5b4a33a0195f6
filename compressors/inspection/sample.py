"""Sampled columns of a model's data, and tensors made of them.

The data are rows of a training set, such as a parquet file. ``recpress new`` derives the model's
inputs from them, for the signature of a new bundle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

ColumnKind = Literal["integer", "float", "integer_list", "float_list"]


@dataclass(frozen=True)
class SampleColumn:
    """One column of the sampled rows.

    Attributes:
        name: name of the column.
        kind: type of its values.
        values: the values of the sampled rows: int64 or float32 ``(rows,)``, or for a column of
            lists, one such array per row.
        shortest: length of the shortest list in all rows, also those not sampled; 0 without lists.
        longest: length of the longest list in all rows; 0 without lists.
        low: smallest integer in all rows; 0 for floats.
        high: largest integer in all rows; 0 for floats.
    """

    name: str
    kind: ColumnKind
    values: Any
    shortest: int = 0
    longest: int = 0
    low: int = 0
    high: int = 0

    @property
    def is_list(self) -> bool:
        """Whether the column has a list per row."""
        return self.kind.endswith("_list")

    @property
    def is_integer(self) -> bool:
        """Whether the values are integers."""
        return self.kind.startswith("integer")


Sample = Mapping[str, SampleColumn]
"""The sampled columns by name."""

Padding = Literal["left", "right"]


def stack_columns(columns: Sequence[SampleColumn], dtype: torch.dtype) -> Tensor:
    """Stack columns of numbers into one tensor of this dtype.

    The shape is ``(rows, columns)``; for a single column and an integer dtype it is ``(rows,)``, as
    for an id in a signature.
    """
    stacked = torch.stack([torch.from_numpy(column.values) for column in columns], dim=1).to(dtype)
    return stacked[:, 0] if len(columns) == 1 and not dtype.is_floating_point else stacked

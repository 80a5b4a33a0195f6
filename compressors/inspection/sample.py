"""Sampled columns of a user's data, and the tensors they fill."""

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
        values: the values of each row: int64 or float32 ``(rows,)``, or one such array per row.
        shortest: length of the shortest list in all data; 0 without lists.
        longest: length of the longest list in all data; 0 without lists.
        low: smallest integer in all data; 0 for floats.
        high: largest integer in all data; 0 for floats.
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


def scalar_tensor(columns: Sequence[SampleColumn], dtype: torch.dtype) -> Tensor:
    """Return columns of numbers as one tensor.

    Integers of one column have the shape ``(rows,)``, as ids have in a signature; all others
    ``(rows, columns)``.
    """
    stacked = torch.stack([torch.from_numpy(column.values) for column in columns], dim=1).to(dtype)
    return stacked[:, 0] if len(columns) == 1 and not dtype.is_floating_point else stacked

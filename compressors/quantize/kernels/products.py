"""Multiply vectors by all rows of a stored table, and convert only a block of rows at once."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK_VALUES = 2**19
"""Largest number of weights that are converted to float32 at once: 2 MB."""


def row_ranges(rows: int, dim: int) -> Iterator[tuple[int, int]]:
    """Yield ``begin`` and ``end`` of the blocks of rows of a table ``(rows, dim)``."""
    step = max(BLOCK_VALUES // max(dim, 1), 1)
    yield from ((begin, min(begin + step, rows)) for begin in range(0, rows, step))


def multiply_by_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply float32 ``(*, dim)`` by the transpose of ``weight`` ``(rows, dim)``, of any dtype.

    Returns float32 ``(*, rows)``.
    """
    ranges = row_ranges(*weight.shape)
    return torch.cat([F.linear(x, weight[b:e].float()) for b, e in ranges], dim=-1)


def compute_grad_x_by_blocks(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of ``x`` in ``multiply_by_blocks``: float32 ``(*, dim)``.

    ``grad`` is the gradient of the product, ``(*, rows)``.
    """
    total = grad.new_zeros((*grad.shape[:-1], weight.shape[1]))
    for begin, end in row_ranges(*weight.shape):
        total += torch.matmul(grad[..., begin:end], weight[begin:end].float())
    return total

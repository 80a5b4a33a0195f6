"""Codes narrower than a byte, packed so that a graph unpacks them with a few element-wise ops.

Two codes of 4 bits lie in a byte *planar*: the low nibbles of a row are the first half of its
codes, the high nibbles the second, so that unpacking is a mask, a shift and one concatenation
(``benchmarks/int4_lookup.py`` says what that is worth). Codes of 2 bits are packed the same way
twice: the low halves of the nibbles are the first half of the codes. TensorRT reads nibbles itself,
so there only the second step is left.
"""

import torch
from torch import Tensor

WIDTHS = (2, 4, 8)
"""Bits that a code may take as stored."""


def width_of(levels: int) -> int:
    """Bits of a stored code that tells ``levels`` apart, at most 256."""
    return next(width for width in WIDTHS if levels <= 1 << width)


def row_bytes(count: int, width: int) -> int:
    """Bytes of a row of ``count`` codes of ``width`` bits, padding included."""
    return -(-count * width // 8)


def pack(codes: Tensor, width: int) -> Tensor:
    """Codes uint8 ``(rows, count)``, each below ``2 ** width``, as ``(rows, row_bytes)``."""
    halvings = {8: 0, 4: 1, 2: 2}[width]
    padding = row_bytes(codes.shape[1], width) * (8 // width) - codes.shape[1]
    packed = torch.nn.functional.pad(codes, (0, padding))
    for bits in (2, 4)[2 - halvings :]:
        half = packed.shape[1] // 2
        packed = packed[:, :half] | (packed[:, half:] << bits)
    return packed.contiguous()


def unpack(packed: Tensor, count: int, width: int) -> Tensor:
    """Packed bytes uint8 ``(*, row_bytes)`` as codes uint8 ``(*, count)``."""
    codes = packed
    if width <= 4:
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    if width == 2:
        codes = torch.cat([codes & 3, codes >> 2], dim=-1)
    return codes[..., :count]

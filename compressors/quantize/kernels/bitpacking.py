"""Pack codes of 4 or 2 bits into bytes in *planar* layout.

The codes of a row are split into *planes*: 8 / ``bits`` parts of equally many consecutive codes.
Byte ``j`` contains code ``j`` of every plane, the first plane in the lowest bits. Unpacking is then
a few element-wise ops and one concatenation. For batches, ONNX Runtime runs these several times
faster than its 4-bit lookup, GatherBlockQuantized; for single rows both take about the same time
(``benchmarks/int4_lookup.py``). For TensorRT, codes are repacked when the graph is written.
"""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 ``(rows, dim)``, into uint8 ``(rows, ceil(dim * bits / 8))``.

    Codes are below ``2 ** bits``. Positions after ``dim`` are padded with ``2 ** (bits - 1)``.
    """
    planes = 8 // bits
    width = -(-codes.shape[1] // planes)
    padded = torch.full((codes.shape[0], planes * width), 2 ** (bits - 1), dtype=torch.uint8)
    padded[:, : codes.shape[1]] = codes
    packed = padded[:, :width].clone()
    for plane in range(1, planes):
        packed |= padded[:, plane * width : (plane + 1) * width] << (bits * plane)
    return packed


def unpack(packed: Tensor, dim: int, bits: int) -> Tensor:
    """Unpack bytes ``(*, ceil(dim * bits / 8))`` to codes, uint8 ``(*, dim)``."""
    planes = [(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.cat(planes, dim=-1)[..., :dim]

"""Convert 8-bit float weights from a bundle's type (bytes) to a graph's type (float8)."""

import numpy as np
import onnx_ir as ir


def float8_codes(name: str, values: np.ndarray) -> ir.TensorProtocol | None:
    """Convert one stored tensor of an 8-bit float layer to float8 e4m3.

    Args:
        name: the tensor's name in the layer's format.
        values: uint8 bit patterns if ``name`` is ``codes``.

    Returns:
        A tensor of the same shape; None for all tensors except ``codes``.
    """
    return ir.Tensor(values.view(ir.DataType.FLOAT8E4M3FN.numpy())) if name == "codes" else None

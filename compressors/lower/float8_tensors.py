"""8-bit floats: stored as bytes in a bundle, and as floats in a graph."""

import numpy as np
import onnx_ir as ir


def float8_codes(name: str, values: np.ndarray) -> ir.TensorProtocol | None:
    """Convert the codes of a layer of 8-bit floats; None for its other tensors."""
    return ir.Tensor(values.view(ir.DataType.FLOAT8E4M3FN.numpy())) if name == "codes" else None

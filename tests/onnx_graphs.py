"""Build small ONNX models, convert them to PyTorch, and compare the outputs with ONNX Runtime."""

import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compressors.onnx_network.conversion import convert_model
from compressors.onnx_network.network import OnnxNetwork
from infra.onnxruntime.sessions import Session

Array = NDArray[Any]
ROWS = "rows"
OPSET = 18


def build_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Array],
    outputs: Sequence[str] = ("y",),
    weights: Mapping[str, Array] | None = None,
    opset: int = OPSET,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Build an ONNX model.

    Args:
        nodes: the nodes of the graph.
        inputs: for each input, an array with its dtype and shape; the first dimension is dynamic.
        outputs: names of the outputs.
        weights: the initializers.
        opset: the opset of the standard operators.
        domains: further domains of operators.
    """
    graph_inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), [ROWS, *array.shape[1:]]
        )
        for name, array in inputs.items()
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        graph_inputs,
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    model = helper.make_model(
        graph,
        opset_imports=[
            helper.make_opsetid("", opset),
            *(helper.make_opsetid(domain, 1) for domain in domains),
        ],
        ir_version=10,
    )
    return infer_types(model)


def infer_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a model with inferred types.

    Outputs whose type cannot be inferred become floats.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    for output in inferred.graph.output:
        if not output.type.tensor_type.elem_type:
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    return inferred


def build_network(model: onnx.ModelProto) -> OnnxNetwork:
    """Convert an ONNX model to a PyTorch network."""
    return convert_model(ir.from_proto(model)).build_network()


def network_outputs(network: OnnxNetwork, inputs: Mapping[str, Array]) -> list[Array]:
    """Return the outputs of a converted network for input arrays."""
    with torch.no_grad():
        returned = network({name: torch.from_numpy(array) for name, array in inputs.items()})
    tensors = returned.values() if isinstance(returned, dict) else [returned]
    return [tensor.numpy() for tensor in tensors]


def runtime_outputs(
    model: onnx.ModelProto, inputs: Mapping[str, Array], folder: Path
) -> list[Array]:
    """Return the outputs of ONNX Runtime for input arrays."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    return Session(path, threads=1).outputs(list(inputs.values()))


def require_same_outputs(
    model: onnx.ModelProto, inputs: Mapping[str, Array], folder: Path, tolerance: float = 2e-6
) -> None:
    """Raise unless the converted network has the outputs of ONNX Runtime.

    Both compute in float32, and sums of a few values in different orders differ in the last bits.
    """
    expected = runtime_outputs(model, inputs, folder)
    for output, array in zip(network_outputs(build_network(model), inputs), expected, strict=True):
        assert output.shape == array.shape
        assert output.dtype.kind == array.dtype.kind
        np.testing.assert_allclose(
            output.astype(np.float64), array.astype(np.float64), rtol=tolerance, atol=tolerance
        )


def export(
    network: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    *,
    dynamo: bool,
    by_name: bool = True,
) -> None:
    """Export a PyTorch network to ONNX with a dynamic number of rows.

    Args:
        network: the network.
        inputs: example inputs.
        outputs: names of the outputs.
        path: the file to write.
        dynamo: True to export with ``torch.export``, False with TorchScript.
        by_name: whether ``forward`` has a parameter per input; False for ``*tensors``.
    """
    names = list(inputs)
    rows = torch.export.Dim("rows", min=1, max=4096)
    shapes: Any = {name: {0: rows} for name in names} if by_name else (({0: rows},) * len(names),)
    uses_keywords = dynamo and by_name  # TorchScript does not support keyword arguments
    options: dict[str, Any] = (
        {"dynamic_shapes": shapes, "external_data": False}
        if dynamo
        else {"dynamic_axes": {name: {0: ROWS} for name in names}, "opset_version": 17}
    )
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # torch deprecates the TorchScript exporter
        torch.onnx.export(
            network,
            () if uses_keywords else tuple(inputs.values()),
            path,
            kwargs=dict(inputs) if uses_keywords else None,
            dynamo=dynamo,
            verbose=False,
            input_names=names,
            output_names=list(outputs),
            **options,
        )

"""Small ONNX graphs for tests, and their outputs in a network and in ONNX Runtime."""

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

from compressors.onnx_network.conversion import build, convert
from compressors.onnx_network.network import OnnxNetwork
from infra.onnxruntime.sessions import Session

Array = NDArray[Any]
ROWS = "rows"
OPSET = 18


def build_graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Array],
    outputs: Sequence[str] = ("y",),
    weights: Mapping[str, Array] | None = None,
    opset: int = OPSET,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Return a model whose inputs have the dtypes and shapes of arrays, and any number of rows."""
    declared = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), [ROWS, *array.shape[1:]]
        )
        for name, array in inputs.items()
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        declared,
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
    """Return a model whose outputs have types, which ONNX derives from the nodes."""
    inferred = onnx.shape_inference.infer_shapes(model)
    for output in inferred.graph.output:
        if not output.type.tensor_type.elem_type:
            output.type.tensor_type.elem_type = TensorProto.FLOAT
    return inferred


def build_network(model: onnx.ModelProto) -> OnnxNetwork:
    """Return the network that is read from a model."""
    return build(convert(ir.from_proto(model)))


def network_outputs(network: OnnxNetwork, inputs: Mapping[str, Array]) -> list[Array]:
    """Return what a network returns for arrays."""
    with torch.no_grad():
        returned = network({name: torch.from_numpy(array) for name, array in inputs.items()})
    tensors = returned.values() if isinstance(returned, dict) else [returned]
    return [tensor.numpy() for tensor in tensors]


def runtime_outputs(
    model: onnx.ModelProto, inputs: Mapping[str, Array], folder: Path
) -> list[Array]:
    """Return what ONNX Runtime returns for arrays."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    return Session(path, threads=1).outputs(list(inputs.values()))


def require_equal(
    model: onnx.ModelProto, inputs: Mapping[str, Array], folder: Path, tolerance: float = 2e-6
) -> None:
    """Raise unless the network that is read from a model returns what ONNX Runtime returns.

    Both compute in float32, where a sum of a few values in another order differs in the last bits.
    """
    expected = runtime_outputs(model, inputs, folder)
    for got, array in zip(network_outputs(build_network(model), inputs), expected, strict=True):
        assert got.shape == array.shape
        assert got.dtype.kind == array.dtype.kind
        np.testing.assert_allclose(
            got.astype(np.float64), array.astype(np.float64), rtol=tolerance, atol=tolerance
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
    """Export a network of torch with any number of rows, by either exporter of torch.

    Args:
        network: a network.
        inputs: example inputs.
        outputs: names of the outputs.
        path: the file to write.
        dynamo: whether by ``torch.export``, and otherwise by TorchScript.
        by_name: whether the network receives its inputs by name, and otherwise as ``*tensors``.
    """
    names = list(inputs)
    rows = torch.export.Dim("rows", min=1, max=4096)
    shapes: Any = {name: {0: rows} for name in names} if by_name else (({0: rows},) * len(names),)
    passes_names = dynamo and by_name  # TorchScript knows no keywords
    form: dict[str, Any] = (
        {"dynamic_shapes": shapes, "external_data": False}
        if dynamo
        else {"dynamic_axes": {name: {0: ROWS} for name in names}, "opset_version": 17}
    )
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter of TorchScript is deprecated
        torch.onnx.export(
            network,
            () if passes_names else tuple(inputs.values()),
            path,
            kwargs=dict(inputs) if passes_names else None,
            dynamo=dynamo,
            verbose=False,
            input_names=names,
            output_names=list(outputs),
            **form,
        )

"""Read a trained network from an ONNX file and compare its outputs with ONNX Runtime's."""

from pathlib import Path

import numpy as np
from torch import Tensor

from compressors.contracts import ONNX_NETWORK, Architecture
from compressors.errors.onnx_graphs import OnnxRefused
from compressors.inspection.lookups import tensors_in
from compressors.onnx_network.conversion import convert_model
from compressors.onnx_network.network import OnnxNetwork
from infra.bundle.onnx_file import read_onnx
from infra.errors import BuildRefused, ScoringFailed
from infra.onnxruntime.sessions import Session

TOLERANCE = 1e-4
"""Largest accepted difference from an output of ONNX Runtime, relative to 1 + its largest absolute
value. Both compute in float32 and sum in different orders, which changes outputs of a deep network
by about 1e-6; a wrongly converted node changes them by more than 1e-3."""


def load_onnx(path: Path) -> tuple[OnnxNetwork, Architecture]:
    """Read a trained network from an ONNX file.

    Returns:
        The network in evaluation mode, and its class and arguments.

    Raises:
        DraftRefused: the file cannot be read or refers to files outside of its folder.
        OnnxRefused: the graph is not supported.
    """
    converted = convert_model(read_onnx(path))
    return converted.build_network(), Architecture(path=ONNX_NETWORK, config=converted.config)


def require_onnx_scores(
    path: Path,
    network: OnnxNetwork,
    inputs: dict[str, Tensor],
    returned: object,
) -> None:
    """Raise if the outputs of a network differ from the outputs of ONNX Runtime.

    Args:
        path: the ONNX file.
        network: the network that was read from it.
        inputs: input tensors of the network by name.
        returned: what the network returned for these inputs.

    Raises:
        OnnxRefused: ONNX Runtime cannot compute the outputs, or an output differs.
    """
    tensors = network.graph_inputs(inputs)
    arrays = [tensors[item.name].numpy() for item in network.inputs]
    try:
        expected = Session(path, threads=1).outputs(arrays)
    except (BuildRefused, ScoringFailed) as fault:
        raise OnnxRefused("scores_missing", problem=str(fault)) from fault
    outputs = tensors_in(returned)
    for name, tensor, array in zip(network.outputs, outputs, expected, strict=True):
        output, limit = tensor.double().numpy(), TOLERANCE * (1 + np.abs(array).max(initial=0))
        has_shape = output.shape == array.shape
        difference = np.abs(output - array).max(initial=0) if has_shape else np.inf
        if not difference <= limit:  # also raises for NaN
            raise OnnxRefused("scores_differ", output=name, got=difference, expected=limit)

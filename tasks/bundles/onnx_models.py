"""Read a trained network from an ONNX file, and compare it with ONNX Runtime."""

from pathlib import Path

import numpy as np
from torch import Tensor

from compressors.contracts import ONNX_NETWORK, Architecture
from compressors.errors.onnx_graphs import OnnxRefused
from compressors.inspection.lookups import tensors_in
from compressors.onnx_network.conversion import build, convert
from compressors.onnx_network.network import OnnxNetwork
from infra.bundle.onnx_file import read_onnx
from infra.errors import BuildRefused, ScoringFailed
from infra.onnxruntime.sessions import Session

TOLERANCE = 1e-4
"""Largest difference of an output from ONNX Runtime's, relative to 1 + the largest value. Both
compute in float32 and add in different orders, which changes a value of a deep network by about
1e-6; a node with another meaning changes it by more than 1e-3."""


def load_onnx(path: Path) -> tuple[OnnxNetwork, Architecture]:
    """Read a trained network from an ONNX file.

    Returns:
        The network in evaluation mode, and its class and arguments.

    Raises:
        DraftRefused: the file is unusable or unsafe.
        OnnxRefused: its graph cannot become a network.
    """
    converted = convert(read_onnx(path))
    return build(converted), Architecture(path=ONNX_NETWORK, config=converted.config)


def require_onnx_scores(
    path: Path,
    network: OnnxNetwork,
    inputs: dict[str, Tensor],
    returned: object,
) -> None:
    """Raise if ONNX Runtime computes other outputs from the file than the network returned.

    Args:
        path: the ONNX file.
        network: the network that was read from it.
        inputs: input tensors of the network by name.
        returned: what the network returned for them.

    Raises:
        OnnxRefused: ONNX Runtime fails, or an output differs.
    """
    tensors = network.graph_inputs(inputs)
    arrays = [tensors[item.name].numpy() for item in network.inputs]
    try:
        expected = Session(path, threads=1).outputs(arrays)
    except (BuildRefused, ScoringFailed) as fault:
        raise OnnxRefused("scores_missing", problem=str(fault)) from fault
    outputs = tensors_in(returned)
    for name, output, array in zip(network.outputs, outputs, expected, strict=True):
        got, limit = output.double().numpy(), TOLERANCE * (1 + np.abs(array).max(initial=0))
        difference = np.abs(got - array).max(initial=0) if got.shape == array.shape else np.inf
        if not difference <= limit:
            raise OnnxRefused("scores_differ", output=name, got=difference, expected=limit)

"""Networks that torch exports to ONNX have the same scores and units when they are read."""

from pathlib import Path

import onnx
import pytest
import torch
from models import ATTENTION, BUFFERED, COMPACT, MULTI_TASK, NORMED, TIED, Reference
from onnx_graphs import build_network, export

from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import network_scores
from compressors.core.units import Unit

TOLERANCE = 1e-6  # of float32 sums in another order; scores are below 10
# TorchScript takes 0.1 s and torch.export 2 s.
CASES = [
    *((reference, False) for reference in (COMPACT, BUFFERED, ATTENTION, NORMED)),
    (COMPACT, True),
    *(
        pytest.param(reference, True, marks=pytest.mark.nightly)
        for reference in (TIED, BUFFERED, ATTENTION, NORMED, MULTI_TASK)
    ),
]


def name_of(value: object) -> str:
    if isinstance(value, Reference):
        return value.network.__name__
    return "torch_export" if value else "torchscript"


@pytest.mark.parametrize(("reference", "dynamo"), CASES, ids=name_of)
def test_exported_network_has_the_same_scores_and_units(
    tmp_path: Path, reference: Reference, dynamo: bool
) -> None:
    module, signature = reference.model().module, reference.signature
    inputs = generate_inputs(signature, reference.rows_of_tables(), rows=6)
    outputs = [output.name for output in signature.outputs]
    export(module, inputs, outputs, tmp_path / "model.onnx", dynamo=dynamo)
    network = build_network(onnx.load(tmp_path / "model.onnx"))
    called = signature.model_copy(update={"call": "mapping"})
    other = generate_inputs(signature, reference.rows_of_tables(), rows=9, seed=1)
    with torch.no_grad():
        expected = network_scores(module, other, signature)
        torch.testing.assert_close(
            network_scores(network, other, called), expected, rtol=TOLERANCE, atol=TOLERANCE
        )
    described = {(unit.name, unit.role, unit.rows) for unit in Unit.of(module)}
    described.discard(("position", "table", 3))  # read at constant rows: a parameter
    if reference is NORMED:  # the norm is folded into the layer, which TorchScript names after it
        described = {("norm" if n == "hidden" and not dynamo else n, *u) for n, *u in described}
    assert {(unit.name, unit.role, unit.rows) for unit in Unit.of(network)} == described

"""Networks that torch exports to ONNX have the same scores and units after conversion."""

from pathlib import Path

import onnx
import pytest
import torch
from models import ATTENTION, BUFFERED, COMPACT, MULTI_TASK, NORMED, TIED, Reference
from onnx_graphs import build_network, export

from compressors.core.random_inputs import generate_inputs
from compressors.core.scores import network_scores
from compressors.core.units import Unit

TOLERANCE = 1e-6  # float32 sums in different orders; scores are below 10
# An export takes 0.1 s with TorchScript and 2 s with torch.export.
CASES = [
    *((reference, False) for reference in (COMPACT, BUFFERED, ATTENTION, NORMED)),
    (COMPACT, True),
    *(
        pytest.param(reference, True, marks=pytest.mark.nightly)
        for reference in (TIED, BUFFERED, ATTENTION, NORMED, MULTI_TASK)
    ),
]


def case_id(value: object) -> str:
    if isinstance(value, Reference):
        return value.network.__name__
    return "torch_export" if value else "torchscript"


@pytest.mark.parametrize(("reference", "dynamo"), CASES, ids=case_id)
def test_converted_export_has_the_scores_and_units_of_the_network(
    tmp_path: Path, reference: Reference, dynamo: bool
) -> None:
    module, signature = reference.model().module, reference.signature
    inputs = generate_inputs(signature, reference.rows_of_tables(), rows=6)
    outputs = [output.name for output in signature.outputs]
    export(module, inputs, outputs, tmp_path / "model.onnx", dynamo=dynamo)
    network = build_network(onnx.load(tmp_path / "model.onnx"))
    mapping_signature = signature.model_copy(update={"call": "mapping"})
    other = generate_inputs(signature, reference.rows_of_tables(), rows=9, seed=1)
    with torch.no_grad():
        expected = network_scores(module, other, signature)
        torch.testing.assert_close(
            network_scores(network, other, mapping_signature),
            expected,
            rtol=TOLERANCE,
            atol=TOLERANCE,
        )
    expected_units = {unit.name: (unit.role, unit.rows) for unit in Unit.of(module)}
    if reference is TIED:
        del expected_units["similar"]  # shares the weight of "item", which a graph stores once
    if reference is BUFFERED:
        del expected_units["position"]  # a parameter, because its row ids are constant
    if reference is NORMED and not dynamo:  # the norm, folded into the layer, gives it its name
        expected_units["norm"] = expected_units.pop("hidden")
    units = {unit.name: (unit.role, unit.rows) for unit in Unit.of(network)}
    if dynamo:  # torch.export renames weights that it transposes, and keeps one name of a tied one
        assert sorted(units.values()) == sorted(expected_units.values())
    else:
        assert units == expected_units

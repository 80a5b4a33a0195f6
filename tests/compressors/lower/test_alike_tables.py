"""Two small tables with equal codes share an initializer of the graph but stay two tables."""

import numpy as np
import pytest
import torch
from models import Graph, Reference, only_served_graph, signature_of
from torch import Tensor, nn

from compressors.contracts import IdInput
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8


class EqualTables(nn.Module):
    """Two tables of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Embedding(60, 4), nn.Embedding(60, 4)
        self.out = nn.Linear(8, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        x = torch.cat([self.first(first), self.second(second)], dim=1)
        score: Tensor = self.out(x)
        return score


REFERENCE = Reference(
    EqualTables,
    # With different policies for ids out of range; otherwise, both lookups would be merged.
    signature_of(
        IdInput(name="first", table="first"),
        IdInput(name="second", table="second", out_of_range="clamp"),
        form="logit",
    ),
)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_tables_with_equal_codes_share_one_initializer_and_stay_two_tables(target, tmp_path):
    model = REFERENCE.model()
    model.module.second.weight = nn.Parameter(model.module.first.weight.detach().clone())
    packed = run(RowwiseInt8(), model, REFERENCE.bench(tmp_path / "data"), tmp_path / "out")
    path = tmp_path / "model.onnx"
    lowered = lower(packed.module, only_served_graph(REFERENCE.signature), target, path)
    first, second = lowered.tables
    assert first.names == second.names  # of the initializers with codes and scales
    graph = Graph(packed, lowered, REFERENCE.signature, path)
    inputs = graph.rows(50)
    # In the graph for TensorRT rows are rounded to float16, an error of 2^-11 of each weight.
    np.testing.assert_allclose(graph.run_in_onnx(inputs), graph.run_in_torch(inputs), atol=1e-3)

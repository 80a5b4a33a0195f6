"""Convolutions of kernel size 1 are compressed, stored and lowered as dense layers."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Graph, Reference, only_served_graph, signature_of
from torch import Tensor, nn

from compressors.contracts import IdInput
from compressors.core.modules.pointwise import PointwiseConv, replace_pointwise_convs
from compressors.core.skipping import run_or_skip
from compressors.core.state.module_state import load, save
from compressors.core.steps.step import Method
from compressors.core.units import Unit
from compressors.factorize.low_rank_dense import LowRankDense
from compressors.lower.export import lower
from compressors.lower.targets.registry import lowering_target
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8

FIELDS, DIM, MAPS = 3, 8, 10
"""Numbers of ids per row, of columns of the table, and of feature maps of each convolution."""


class InteractionNet(nn.Module):
    """A small xDeepFM: its interaction network (CIN) has two convolutions of kernel size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.fields = nn.Embedding(30, DIM)
        self.convs = nn.ModuleList(
            [nn.Conv1d(FIELDS * FIELDS, MAPS, 1), nn.Conv1d(MAPS * FIELDS, MAPS, 1, bias=False)]
        )
        self.penalized = [conv.weight for conv in self.convs]  # as libraries keep them for a loss
        self.out = nn.Linear(2 * MAPS, 1)

    def forward(self, fields: Tensor) -> Tensor:
        first = self.fields(fields)  # (rows, fields, dim)
        hidden, sums = first, []
        for conv in self.convs:
            products = torch.einsum("bhd,bmd->bhmd", hidden, first)
            hidden = torch.relu(conv(products.flatten(1, 2)))
            sums.append(hidden.sum(dim=2))
        logits: Tensor = self.out(torch.cat(sums, dim=1)).squeeze(1)
        return logits


REFERENCE = Reference(
    InteractionNet,
    signature_of(
        IdInput(name="fields", table="fields", columns=("a", "b", "c"), shape=(FIELDS,)),
        form="logit",
    ),
)
LAYERS = ("convs.0.linear", "convs.1.linear")


@given(
    channels=st.integers(1, 5),
    outputs=st.integers(1, 5),
    length=st.integers(0, 4),
    rows=st.integers(0, 3),
    bias=st.booleans(),
    padding=st.sampled_from((0, "valid", "same")),
)
def test_the_replacement_computes_the_convolution(channels, outputs, length, rows, bias, padding):
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv1d(channels, outputs, 1, bias=bias, padding=padding))
    x = torch.randn(rows, channels, length, generator=generator)
    expected = model(x) if x.numel() else torch.empty(rows, outputs, length)
    conv = model[0]
    replace_pointwise_convs(model)
    assert isinstance(model[0], PointwiseConv)
    assert torch.equal(model[0].weight, conv.weight)
    # Sums of at most five products in another order.
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


class DoublingConv(nn.Conv1d):
    """Has a custom forward method."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name
        return 2 * super().forward(input)


def _hooked() -> nn.Conv1d:
    conv = nn.Conv1d(4, 4, 1)
    conv.register_forward_hook(lambda module, inputs, output: output + 1)
    return conv


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 4, 3),
        nn.Conv1d(4, 4, 1, stride=2),
        nn.Conv1d(4, 4, 1, padding=1),
        nn.Conv1d(4, 4, 1, groups=2),
        DoublingConv(4, 4, 1),
        _hooked(),
    ],
    ids=["kernel 3", "stride", "padding", "groups", "subclass", "hook"],
)
def test_other_convolutions_are_not_replaced(conv: nn.Conv1d) -> None:
    assert replace_pointwise_convs(nn.Sequential(conv))[0] is conv


def test_convolutions_with_one_weight_are_not_replaced() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1))
    model[1].weight = model[0].weight
    assert not any(isinstance(part, PointwiseConv) for part in replace_pointwise_convs(model))


def test_a_stored_convolution_is_loaded_as_a_dense_layer(tmp_path: Path) -> None:
    plain, network = InteractionNet().eval(), REFERENCE.model().network
    save(plain, tmp_path)
    loaded = load(InteractionNet, network, tmp_path)
    assert {unit.name for unit in Unit.of(loaded)} == {"fields", *LAYERS, "out"}
    ids = torch.arange(12).reshape(4, FIELDS)
    # Sums of 30 products in another order.
    torch.testing.assert_close(loaded(ids), plain(ids), rtol=1e-5, atol=1e-5)


RECIPES: dict[str, tuple[Method, ...]] = {
    "fast": (RowwiseInt8(), StaticInt8()),
    "float16": (Float16(),),
    "low rank": (LowRankDense(rank=0.25), Float16()),
}


@pytest.mark.parametrize(
    ("recipe", "target"),
    [
        pytest.param(
            recipe,
            target,
            marks=() if (recipe == "fast") or target == "onnxruntime" else pytest.mark.nightly,
        )
        for recipe in RECIPES
        for target in ("onnxruntime", "tensorrt-rtx")
    ],
)
def test_dense_steps_and_targets_support_convolutions(
    recipe: str, target: str, tmp_path: Path
) -> None:
    # ``run_or_skip`` checks that the stored model gives the scores of the one in memory.
    model, bench = REFERENCE.model(), REFERENCE.bench(tmp_path / "data")
    for number, step in enumerate(RECIPES[recipe]):
        model = run_or_skip(step, model, bench, tmp_path / str(number))
    assert model.plan is not None
    expected_format = {"fast": "static_int8", "float16": "float16", "low rank": "factored"}[recipe]
    for name in LAYERS:
        line = model.plan.of(name)
        assert line is not None
        assert line.format == expected_format
    path = Path(tempfile.mkdtemp(dir=tmp_path)) / "model.onnx"
    lowered = lower(model.module, only_served_graph(REFERENCE.signature), target, path)
    graph = Graph(model, lowered, REFERENCE.signature, path, target)
    inputs = graph.rows(64)
    expected = graph.run_in_torch(inputs)
    difference = (graph.run_in_onnx(inputs) - expected) / expected.std()
    tolerance = lowering_target(target).tolerance(model.plan)
    # Only the largest difference is checked, not the root mean square. The graph for TensorRT
    # rounds table rows to float16. With so few weights, this moves an int8 input of many rows to
    # the next of its 255 levels.
    assert abs(difference).max() <= tolerance.largest

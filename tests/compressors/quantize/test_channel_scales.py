"""``static_int8`` with one input scale for each input channel.

A channel is an element of a layer's input vector. ``mixed_ranges.py`` has a network whose first
layer reads channels of two ranges.
"""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mixed_ranges import model_and_bench
from models import only_served_graph
from torch import Tensor, nn

from compressors.contracts import TargetName
from compressors.core.batches import batches
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.modules.formats import PackedLinear
from compressors.core.runner import run
from compressors.core.units import Unit
from compressors.lower.audit import INT8_MATMULS
from compressors.lower.export import lower
from compressors.quantize.dense.calibrated import channel_factors
from compressors.quantize.dense.static_int8 import StaticInt8, packed_int8
from infra.onnxruntime.sessions import Session, optimized_graph

BY_CHANNEL = StaticInt8(input_scales="channel")


@given(
    ranges=st.lists(st.floats(2.0**-10, 2.0**10, width=32), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_layer_with_channel_scales_equals_integer_arithmetic(ranges, seed):
    generator = torch.Generator().manual_seed(seed)
    range_end = torch.tensor(ranges)
    linear = nn.Linear(len(ranges), 5)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator))
        linear.bias.copy_(torch.randn(5, generator=generator))
    layer = packed_int8(linear, range_end)
    # Up to 1.5 times the range, so that some inputs are clipped.
    x = (3 * torch.rand(20, len(ranges), generator=generator) - 1.5) * range_end
    scale = range_end.numpy() / np.float32(127)
    assert np.array_equal(layer.input_scale.numpy(), scale)
    codes_of_inputs = np.clip(np.rint(x.numpy() / scale), -128, 127).astype(np.int64)
    weight_scale = layer.weight_scale.numpy()
    total = codes_of_inputs @ layer.codes.numpy().T.astype(np.int64)
    total = total + np.rint(layer.bias.numpy() / weight_scale).astype(np.int64)
    # The layer rounds to float32 once.
    np.testing.assert_allclose(layer(x).numpy(), total * weight_scale.astype(float), rtol=1e-6)


@torch.no_grad()
def output_error(source: Model, result: Model, x: Tensor) -> float:
    """Root mean square of the change of the first layer's output, divided by that of the output."""
    exact, rounded = source.module.first(x), result.module.first(x)
    return float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def test_channel_scales_round_small_inputs_as_precisely_as_large_ones(tmp_path):
    source, bench = model_and_bench(tmp_path, largest=1000.0)
    x = torch.cat([source.module.user.weight, torch.rand(500, 3) * 1000], dim=1).detach()
    results = {
        scales: run(StaticInt8(input_scales=scales), source, bench, tmp_path / scales)
        for scales in ("layer", "channel")
    }
    errors = {scales: output_error(source, result, x) for scales, result in results.items()}
    # The embeddings are so much smaller than the features that a common scale rounds them to zero.
    assert errors["layer"] > 0.3
    # 255 levels give an error of 1 % for normally distributed inputs; the weights add as much.
    assert errors["channel"] < 0.02
    assert results["layer"].plan.of("first").warnings
    assert results["channel"].plan.of("first").warnings == ()


def test_layers_that_read_the_same_vector_share_their_factors(tmp_path):
    """The inputs of a channel are divided by its factor, then one range is calibrated for all."""
    source, bench = model_and_bench(tmp_path, largest=12.0)

    class Second(nn.Module):
        """The network with a second layer over the same vector."""

        def __init__(self) -> None:
            super().__init__()
            self.inside = source.module
            self.second = nn.Linear(source.module.first.in_features, 3)
            nn.init.uniform_(self.second.weight)

        def forward(self, user: Tensor, counts: Tensor) -> Tensor:
            x = torch.cat([self.inside.user(user), counts], dim=1)
            score: Tensor = self.inside(user, counts) + self.second(x).sum(dim=1)
            return score

    network = Second().eval()
    units = [unit for unit in Unit.of(network) if unit.role == "dense"]  # the dense layers
    factors = channel_factors(network, units, bench, rows=512, batch=100)
    assert torch.equal(factors["second"], factors["inside.first"])
    assert not torch.equal(factors["second"], torch.ones(19))
    assert factors["inside.out"].shape == (32,)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_graph_with_channel_scales_has_int8_products_and_the_scores_of_torch(tmp_path, target):
    source, bench = model_and_bench(tmp_path, largest=1000.0)
    result = run(BY_CHANNEL, source, bench, tmp_path / "out")
    path = tmp_path / "graph.onnx"
    name: TargetName = target
    lower(result.module, only_served_graph(bench.signature), name, path)
    (batch,) = batches(bench.calibration, bench.signature, 500, 500)
    inputs = {key: value.numpy() for key, value in batch.inputs.items()}
    with torch.no_grad():
        expected = torch.sigmoid(result.module(**batch.inputs)).numpy()
    # Both compute the same integers; the sigmoid and the last float sums may round differently.
    np.testing.assert_allclose(Session(path, threads=1).scores(inputs), expected, atol=1e-6)
    written = onnx.load(path).graph
    weights = {item.name: item for item in written.initializer}
    assert sum(item.dims == [32, 19] for item in weights.values()) == 1
    if target == "onnxruntime":
        operators = [node.op_type for node in optimized_graph(path).node]
        assert sum(operator in INT8_MATMULS for operator in operators) == 2
        assert operators.count("Div") == 2  # of the inputs of each layer


def test_dry_run_predicts_the_stored_tensors_of_channel_scales(tmp_path):
    source, bench = model_and_bench(tmp_path, largest=12.0)
    predicted = dry_run(BY_CHANNEL, source, bench)
    result = run(BY_CHANNEL, source, bench, tmp_path / "out")
    assert predicted.plan.bytes_after == result.plan.bytes_after
    for name in ("first", "out"):
        expected, layer = (model.module.get_submodule(name) for model in (predicted, result))
        assert isinstance(layer, PackedLinear)
        assert layer.record() == expected.record()  # format and settings, as a bundle stores them
        assert {key: tensor.shape for key, tensor in layer.named_buffers()} == {
            key: tensor.shape for key, tensor in expected.named_buffers()
        }

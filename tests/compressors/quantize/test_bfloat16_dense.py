"""bfloat16 layers: rounding, skipped layers, and the graphs of each target.

The networks are in ``tests/models.py``; ``Compact`` has five dense layers.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from error_codes import TextMatching, raises_code
from hypothesis import given
from models import RANKER, build_recipe, lower_reference, plan_and_apply
from onnx import TensorProto
from random_tables import tables
from reason_codes import require_reason
from torch.nn import functional as F

from compressors.contracts import Bench
from compressors.contracts.targets.builder import BuildRequest, Profile
from compressors.core.runner import run
from compressors.errors.compression import ParityLost
from compressors.lower.comparison.parity import check_parity
from compressors.lower.passes.bfloat16_matmuls import has_bfloat16_matmuls, write_checkable
from compressors.quantize.dense.bfloat16_dense import BFloat16Dense
from infra.errors import BuildRefused
from infra.onnxruntime.sessions import Session
from infra.tensorrt.engines import build_engine, find_installed_version

OP = torch.ops.recpress.bfloat16_linear
RTX = "tensorrt-rtx"


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (0, 6)])
def test_op_computes_a_linear_layer_in_float32(shape):
    x, weight, bias = torch.randn(shape), torch.randn(4, 6).bfloat16(), torch.randn(4).bfloat16()
    y = OP(x, weight, bias)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x, weight.float(), bias.float()))


def test_op_passes_opcheck_and_its_gradients_equal_plain_torch():
    leaves = (torch.randn(2, 3, 6), torch.randn(4, 6).bfloat16(), torch.randn(4).bfloat16())
    torch.library.opcheck(OP.default, tuple(leaf.clone().requires_grad_() for leaf in leaves))
    output_gradient = torch.randn(2, 3, 4)
    with_op, with_torch = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    (OP(*with_op) * output_gradient).sum().backward()
    (
        F.linear(with_torch[0], with_torch[1].float(), with_torch[2].float()) * output_gradient
    ).sum().backward()
    for result, expected in zip(with_op, with_torch, strict=True):
        # gradients of bfloat16 leaves are rounded to 8 bits
        torch.testing.assert_close(result.grad, expected.grad, rtol=1e-2, atol=1e-2)
        assert result.grad.any()


@given(table=tables(max_abs=3e38))  # the largest bfloat16 is 3.39e38
def test_rounding_error_is_at_most_half_the_last_of_eight_bits(table):
    model = RANKER.model().private()  # a copy of the module tree, which the test may change
    layer = torch.nn.Linear(table.shape[1], table.shape[0])
    layer.weight = torch.nn.Parameter(table)
    model.module.hidden = layer
    step = BFloat16Dense(layers=("hidden",))
    applied = plan_and_apply(step, model, Bench(signature=RANKER.signature))
    result = applied.model.module.hidden.weight.float()
    # Half of the last of 8 significant bits. Subnormal numbers are evenly spaced by 2^-133.
    assert torch.all((result - table).abs() <= table.abs() * 2.0**-8 + 2.0**-134)


def test_a_layer_that_rounds_to_infinity_is_skipped_with_a_reason():
    model = RANKER.model().private()
    with torch.no_grad():
        model.module.hidden.bias[0] = -3.4e38
    result = plan_and_apply(BFloat16Dense(), model, Bench(signature=RANKER.signature))
    assert result.outcomes.keys() == {"hidden"}  # the decisions that ``apply`` returned
    largest = float(torch.tensor(3.4e38))
    require_reason(
        result.outcomes["hidden"].reasons,
        "beyond_largest",
        largest=largest,
        limit=torch.finfo(torch.bfloat16).max,
    )
    assert isinstance(result.model.module.hidden, torch.nn.Linear)
    assert not isinstance(result.model.module.cross, torch.nn.Linear)


def test_every_dense_layer_is_stored_in_two_bytes_per_number(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    result = run(BFloat16Dense(), RANKER.model(), bench, tmp_path / "out")
    lines = [line for line in result.plan.lines if line.role == "dense"]
    assert {line.format for line in lines} == {"bfloat16"}
    assert has_bfloat16_matmuls(result.plan)
    assert not has_bfloat16_matmuls(RANKER.model().plan)
    for line in lines:  # a layer without bias gets a bias of zeros
        layer = RANKER.model().module.get_submodule(line.module)
        assert line.bytes_after == 2 * (layer.weight.numel() + layer.out_features)


# --- graphs ----------------------------------------------------------------------------------


def cast_type(cast: onnx.NodeProto) -> int:
    """The output type of a Cast node."""
    (result,) = (item.i for item in cast.attribute if item.name == "to")
    return result


def test_tensorrt_graph_has_bfloat16_gemms_between_two_casts():
    onnx_graph = onnx.load(
        lower_reference("Compact", build_recipe("bfloat16_dense"), RTX).path
    ).graph
    types = {item.name: item.data_type for item in onnx_graph.initializer}
    producer = {output: node for node in onnx_graph.node for output in node.output}
    gemms = [node for node in onnx_graph.node if node.op_type == "Gemm"]
    assert len(gemms) == 5  # all dense layers of the network
    for gemm in gemms:
        assert {types[name] for name in gemm.input[1:]} == {TensorProto.BFLOAT16}
        before = producer[gemm.input[0]]
        assert (before.op_type, cast_type(before)) == ("Cast", TensorProto.BFLOAT16)
        (after,) = (n for n in onnx_graph.node if gemm.output[0] in n.input)
        assert (after.op_type, cast_type(after)) == ("Cast", TensorProto.FLOAT)


def test_onnxruntime_graph_stores_bfloat16_weights_and_no_float32_copy():
    onnx_graph = onnx.load(
        lower_reference("Compact", build_recipe("bfloat16_dense"), "onnxruntime").path
    ).graph
    bfloat16_weights = [
        item for item in onnx_graph.initializer if item.data_type == TensorProto.BFLOAT16
    ]
    assert len([item for item in bfloat16_weights if len(item.dims) == 2]) == 5
    float32_weights = [
        i for i in onnx_graph.initializer if i.data_type == TensorProto.FLOAT and len(i.dims) == 2
    ]
    assert not {tuple(i.dims) for i in float32_weights} & {
        tuple(item.dims) for item in bfloat16_weights
    }


def test_onnxruntime_cannot_run_the_bfloat16_graph_of_tensorrt(tmp_path):
    """ONNX Runtime has no bfloat16 Gemm on CPU, so its graph multiplies in float32."""
    with raises_code(
        BuildRefused,
        "onnxruntime_graph_refused",
        problem=TextMatching("Could not find an implementation for Gemm"),
    ):
        Session(lower_reference("Compact", build_recipe("bfloat16_dense"), RTX).path, threads=1)


def test_checkable_graph_computes_the_rounded_product_of_rounded_operands(tmp_path):
    """``write_checkable`` rewrites a TensorRT graph so that ONNX Runtime can compute its scores."""
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.standard_normal((3, 8)).astype(np.float32)).bfloat16()
    bias = torch.from_numpy(rng.standard_normal(3).astype(np.float32)).bfloat16()
    initializers = [
        onnx.helper.make_tensor(name, TensorProto.BFLOAT16, list(t.shape), t.float().flatten())
        for name, t in (("w", weight), ("b", bias))
    ]
    identity = onnx.numpy_helper.from_array(np.eye(8, dtype=np.float32), "eye")
    nodes = [
        onnx.helper.make_node("Gemm", ["x", "eye"], ["same"]),
        onnx.helper.make_node("Cast", ["same"], ["short"], to=TensorProto.BFLOAT16),
        onnx.helper.make_node("Gemm", ["short", "w", "b"], ["product"], transB=1),
        onnx.helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])
        for name, width in (("x", 8), ("y", 3))
    ]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [*initializers, identity])
    opset = [onnx.helper.make_opsetid("", 21)]
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "g.onnx"
    )
    write_checkable(tmp_path / "g.onnx", tmp_path / "c.onnx")
    x = rng.standard_normal((50, 8)).astype(np.float32)
    result = Session(tmp_path / "c.onnx", threads=1).scores({"x": x})
    product = F.linear(torch.from_numpy(x).bfloat16().float(), weight.float(), bias.float())
    # Sums in another order may round to the neighbouring bfloat16 number.
    np.testing.assert_allclose(result, product.bfloat16().float().numpy(), rtol=2.0**-7)
    assert np.array_equal(result, torch.from_numpy(result).bfloat16().float().numpy())
    assert not np.array_equal(result, product.numpy())


@pytest.mark.parametrize("reference", ["Compact", "Attention", "Normed"])
def test_parity_accepts_bfloat16_rounding_and_rejects_changes_of_three_percent_of_the_spread(
    reference, tmp_path
):
    kinds = build_recipe("bfloat16_dense") if reference == "Compact" else ("bfloat16_dense",)
    lowered = lower_reference(reference, kinds, RTX)
    inputs = lowered.rows(1500)
    expected, plan = lowered.run_in_torch(inputs), lowered.model.plan
    check_parity(expected, lowered.run_in_onnx(inputs), plan, RTX)
    spread = expected.std()  # standard deviation of the scores over the rows
    wrong_scores = expected + np.float32(0.03) * spread
    with pytest.raises(ParityLost):
        check_parity(expected, wrong_scores.astype(np.float32), plan, RTX)
    with pytest.raises(ParityLost):  # ONNX Runtime computes in float32 without rounding to bfloat16
        check_parity(expected, expected + np.float32(0.005) * spread, plan, "onnxruntime")


@pytest.mark.slow
@pytest.mark.skipif(
    find_installed_version(RTX) is None,
    reason="TensorRT-RTX is not installed; pip install 'recpress[tensorrt-rtx]'",
)
def test_tensorrt_engine_stores_the_layers_in_bfloat16(tmp_path: Path):
    lowered = lower_reference("Attention", ("bfloat16_dense",), RTX)
    packed = sum(line.bytes_after for line in lowered.model.plan.lines)
    shapes = {"user": (), "history": (6,)}
    request = BuildRequest(
        target=RTX,
        onnx=str(lowered.path),
        # Smallest, optimal and largest shape of each input.
        profiles=tuple(
            Profile(input=name, low=(1, *shape), best=(16, *shape), high=(64, *shape))
            for name, shape in shapes.items()
        ),
        tables=(),
        packed_bytes=packed,
        seconds=300,
    )
    audit = build_engine(request, tmp_path / "engine").audit
    layers = [line for line in lowered.model.plan.lines if line.role == "dense"]
    # Biases, 34 of the 306 bytes, may have another type: 64 bytes less are allowed.
    assert audit.constant_bytes["bf16"] >= sum(line.bytes_after for line in layers) - 64

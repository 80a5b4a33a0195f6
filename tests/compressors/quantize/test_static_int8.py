"""Static int8: the op equals an integer Gemm, and its gradients pass through the rounding.

``EXACT_INPUTS`` is the number of products of int8 numbers whose sum is exact in float32. ``capped``
is a dense layer of ``RANKER`` (``tests/models.py``).
"""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER, only_served_graph
from torch import Tensor

from compressors.contracts import DenseInput, Output, Signature
from compressors.core.batches import batches
from compressors.core.runner import run
from compressors.lower.export import lower
from compressors.quantize.dense import static_int8
from compressors.quantize.dense.int8_codes import encode, quantize
from compressors.quantize.dense.static_int8 import (
    EXACT_INPUTS,
    StaticInt8,
    packed_int8,
    static_int8_linear,
)
from infra.onnxruntime.sessions import Session

OP = torch.ops.recpress.static_int8_linear


def layer(
    inputs: int, outputs: int, seed: int = 0, input_scale: float = 0.02
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, weight scales, input scale and bias of one layer."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator)
    scale = torch.tensor(input_scale)
    codes, weight_scale = encode(weight, bias, scale)
    return codes, weight_scale, scale, bias


def integer_gemm(
    x: Tensor, codes: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor
) -> np.ndarray:
    """An int8 Gemm with an int32 bias, computed in int64 and scaled in float64."""
    ratio = x.numpy() / input_scale.numpy()  # float32, as QuantizeLinear divides
    codes_of_inputs = np.clip(np.rint(ratio), -128, 127).astype(np.int64)
    product_scale = weight_scale.numpy() * input_scale.numpy()
    bias_codes = np.rint(bias.numpy() / product_scale).astype(np.int64)
    total = codes_of_inputs @ codes.numpy().astype(np.int64).T + bias_codes
    return total.astype(np.float64) * product_scale.astype(np.float64)


@pytest.mark.parametrize("inputs", [1, 7, EXACT_INPUTS, EXACT_INPUTS + 1, 5000])
@pytest.mark.parametrize("has_largest_products", [False, True])
def test_op_equals_exact_integer_arithmetic(inputs, has_largest_products):
    codes, weight_scale, input_scale, bias = layer(inputs, 9)
    generator = torch.Generator().manual_seed(2)
    x = 2 * torch.randn(33, inputs, generator=generator)
    if has_largest_products:  # the largest possible products, all of one sign
        codes, x = torch.full_like(codes, -127), torch.full_like(x, -1e6)
    result = OP(x, codes, weight_scale, input_scale, bias)
    expected = integer_gemm(x, codes, weight_scale, input_scale, bias)
    # Adding the bias, scaling, and rounding to float32 each have a relative error of 2^-24. An
    # inexact sum of products would differ by at least one.
    tolerance = 3 * 2.0**-24 * (np.abs(expected) + bias.abs().numpy())
    assert np.all(np.abs(result.numpy() - expected) <= tolerance)


@pytest.mark.parametrize("shape", [(33,), (3, 11), (0,), ()])
@pytest.mark.parametrize("inputs", [7, EXACT_INPUTS + 1])
def test_an_op_that_converts_weights_in_parts_equals_one_product_bit_for_bit(
    inputs, shape, monkeypatch
):
    codes, weight_scale, input_scale, bias = layer(inputs, 9)
    x = torch.randn(*shape, inputs, generator=torch.Generator().manual_seed(2))
    at_once = OP(x, codes, weight_scale, input_scale, bias)
    # One row and output per part, several, and a shorter last part.
    for numbers_at_once in (1, 5 * inputs, 2 * 9):
        monkeypatch.setattr(static_int8, "CONVERTED_AT_ONCE", numbers_at_once)
        in_parts = OP(x, codes, weight_scale, input_scale, bias)
        assert torch.equal(in_parts, at_once)
        assert in_parts.shape == (*shape, 9)
        assert in_parts.dtype == torch.float32


def test_a_sum_of_more_inputs_than_float32_adds_exactly_is_exact():
    inputs = 4 * EXACT_INPUTS
    codes = torch.full((1, inputs), 127, dtype=torch.int8)
    codes[0, -1] = 1
    x = torch.full((1, inputs), 127.0)
    x[0, -1] = 2.0
    expected = 127 * 127 * (inputs - 1) + 2
    # float32 has only multiples of 4 near this sum, in any order of adding; the sum is not one.
    assert expected % 4 == 1
    # The bias is the nearest such number with the other sign, so the result is small and exact.
    bias = -torch.tensor([float(expected)])
    result = OP(x, codes, torch.ones(1), torch.tensor(1.0), bias)
    assert result.item() == expected + int(bias.item())


@given(
    weight=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    ),
    bias=st.floats(-1000, 1000, width=32),
    input_scale=st.floats(2.0**-20, 100, width=32),
)
def test_round_trip_error_is_at_most_half_the_channels_scale(weight, bias, input_scale):
    dense_weight = torch.from_numpy(weight)
    bias_of_outputs = torch.full((len(dense_weight),), bias)
    codes, scale = encode(dense_weight, bias_of_outputs, torch.tensor(input_scale))
    assert torch.all(scale > 0)
    error = (codes.float() * scale[:, None] - dense_weight).abs()
    # Quotient, rounding and product each have a relative error of 2^-24.
    slack = 4 * 2.0**-24 * dense_weight.abs().amax(dim=1, keepdim=True)
    assert torch.all(error <= scale[:, None] / 2 + slack)
    # The bias is an int32 that must leave range for the sum of products.
    assert torch.all((bias_of_outputs / (scale * input_scale)).abs() <= 2**23 * (1 + 1e-6))


def test_each_channel_has_a_separate_scale_and_zeros_remain_zeros():
    weight = torch.tensor([[1.0, -2.0], [0.001, 0.002], [0.0, 0.0]])
    codes, scale = encode(weight, None, torch.tensor(0.1))
    # The codes of two neighbouring weights of equal sign add up to 127; with different signs, each
    # has up to 127.
    torch.testing.assert_close(scale, torch.tensor([2 / 127, 0.003 / 127, 1.0]))
    assert codes.tolist() == [[64, -127], [42, 85], [0, 0]]


@given(
    weight=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 7)),
        elements=st.floats(-100, 100, width=32, allow_subnormal=False),
    ),
    weight_scale=st.none() | st.floats(2.0**-10, 2, width=32),
)
def test_the_sum_of_two_neighbouring_products_fits_in_16_bits(weight, weight_scale):
    dense_weight = torch.from_numpy(weight)
    scale = None if weight_scale is None else torch.full((len(dense_weight),), weight_scale)
    codes, _ = encode(dense_weight, None, torch.tensor(0.1), scale)
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, codes.shape[1] % 2))
    pairs = padded.unflatten(1, (-1, 2))  # (out, pairs, 2)
    for x in ((255, 255), (255, 0), (0, 255)):  # a sum is largest where each input is 0 or 255
        sums = (pairs * torch.tensor(x)).sum(dim=2)
        assert torch.all((sums >= -(2**15)) & (sums < 2**15))


@pytest.mark.parametrize("inputs", [7, 64, 257, 1664])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_onnxruntime_multiplies_the_largest_inputs_and_weights_exactly(inputs, rows, tmp_path):
    """Without VNNI, the CPU adds two products in 16 bits; weight scales must prevent clipping."""
    layer = torch.nn.Linear(inputs, 16)
    torch.nn.init.uniform_(layer.weight, 0.99, 1.0)
    signature = Signature(
        inputs=(DenseInput(name="x", shape=(inputs,)),),
        outputs=(
            Output(name="label", kind="ranking", form="score", label="label", metric="ndcg@10"),
        ),
        group="g",
    )
    network = torch.nn.Sequential(packed_int8(layer, torch.tensor(1.0)), torch.nn.Linear(16, 1))
    torch.nn.init.ones_(network[1].weight)
    network = WithInputX(network).eval()
    lower(network, only_served_graph(signature), "onnxruntime", tmp_path / "model.onnx")
    x = torch.ones(rows, inputs)
    with torch.no_grad():
        expected = network(x).numpy()
    result = Session(tmp_path / "model.onnx", threads=1).scores({"x": x.numpy()})
    np.testing.assert_allclose(result, expected, rtol=1e-6)  # float32 sums of 16 numbers


class WithInputX(torch.nn.Module):
    """A network whose input is named ``x``."""

    def __init__(self, inside: torch.nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.inside(x).squeeze(1)
        return score


@given(
    x=arrays.arrays(np.float32, 8, elements=st.floats(-1e6, 1e6, width=32)),
    scale=st.floats(2.0**-10, 10, width=32),
)
def test_inputs_are_rounded_half_to_even_and_clipped_to_int8(x, scale):
    result = quantize(torch.from_numpy(x), torch.tensor(scale)).numpy()
    expected = np.clip(np.rint(x / np.float32(scale)), -128, 127)
    assert np.array_equal(result, expected)


@pytest.mark.parametrize("shape", [(5,), (0,), (2, 3), (2, 0, 4)])
def test_op_keeps_the_leading_dimensions(shape):
    stored = layer(6, 4)
    x = torch.randn(*shape, 6)
    y = OP(x, *stored)
    assert y.shape == (*shape, 4)
    assert y.dtype == torch.float32
    flat = OP(x.reshape(-1, 6), *stored)
    assert torch.equal(y.reshape(-1, 4), flat)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_op_passes_opcheck(shape):
    codes, weight_scale, input_scale, bias = layer(6, 4)
    parts = (torch.randn(shape), codes, weight_scale, input_scale, bias)
    args = tuple(part.requires_grad_() if part.is_floating_point() else part for part in parts)
    torch.library.opcheck(OP.default, args)


def straight_through(
    x: Tensor, codes: Tensor, weight_scale: Tensor, input_scale: Tensor, bias: Tensor
) -> Tensor:
    """The same function in plain torch, with every rounding passed straight through."""
    ratio = (x / input_scale).clamp(-128, 127)
    codes_of_inputs = ratio + (ratio.round() - ratio).detach()
    weight = codes.to(x.dtype) * weight_scale[:, None]
    return codes_of_inputs * input_scale @ weight.T + bias


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_gradients_equal_the_straight_through_estimate(shape):
    codes, weight_scale, input_scale, bias = layer(6, 4)
    generator = torch.Generator().manual_seed(3)
    x = 1.5 * torch.randn(shape, generator=generator)
    x.view(-1)[:2] = torch.tensor([40.0, -40.0])  # clipped: 0.02 * 127 is 2.54
    output_gradient = torch.randn(*shape[:-1], 4, generator=generator)

    def gradients(function):
        leaves = [t.clone().requires_grad_() for t in (x, weight_scale, input_scale, bias)]
        (function(leaves[0], codes, *leaves[1:]) * output_gradient).sum().backward()
        return [leaf.grad for leaf in leaves]

    with_op, with_torch = gradients(static_int8_linear), gradients(straight_through)
    for result, expected in zip(with_op, with_torch, strict=True):
        # float32 sums in another order
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        assert result.abs().sum() > 0
    assert with_op[0].view(-1)[:2].tolist() == [0, 0]
    assert with_op[0][x.abs() < 2.5].abs().min() > 0


def test_the_gradient_of_weight_scales_equals_the_finite_difference():
    # The output is linear in the weight scales if the bias, which is rounded, is zero.
    codes, weight_scale, input_scale, _ = layer(6, 4)
    zero, x = torch.zeros(4), torch.randn(5, 6, generator=torch.Generator().manual_seed(4))
    leaf = weight_scale.clone().requires_grad_()
    OP(x, codes, leaf, input_scale, zero).sum().backward()
    for channel in range(4):
        changed_scale = weight_scale.clone()
        changed_scale[channel] *= 1.5
        difference = OP(x, codes, changed_scale, input_scale, zero) - OP(
            x, codes, weight_scale, input_scale, zero
        )
        slope = difference.sum() / (0.5 * weight_scale[channel])
        torch.testing.assert_close(leaf.grad[channel], slope, rtol=1e-3, atol=1e-3)


def test_input_scale_is_the_largest_calibration_input_over_127(tmp_path):
    source, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    inputs: list[Tensor] = []
    source.module.capped.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches(bench.calibration, RANKER.signature, size=10, limit=50):
            source.module(**batch.inputs)
    largest = torch.cat(inputs).abs().max()
    source.module.capped._forward_pre_hooks.clear()
    result = run(StaticInt8(rows=50, batch=7), source, bench, tmp_path / "out")
    # The step has another batch size, so float32 sums have another order.
    torch.testing.assert_close(result.module.capped.input_scale, largest / 127, rtol=1e-6, atol=0)
    assert not source.module.capped._forward_pre_hooks

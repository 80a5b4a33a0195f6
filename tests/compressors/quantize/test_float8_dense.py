"""Dense layers in 8-bit floats: rounding, scales, the op and its gradients.

``capped`` is a dense layer of ``RANKER`` (``tests/models.py``).
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compressors.contracts import Bench, DenseInput
from compressors.core.batches import batches
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.quantize.dense.float8_dense import LARGEST, Float8Dense, encode, round_to_float8
from compressors.quantize.tables.float8_e4m3 import convert_from_float8

OP = torch.ops.recpress.float8_linear
# All E4M3 numbers, from the bits of the format, without the two codes of NaN. The largest is 448.
NUMBERS = convert_from_float8(
    torch.tensor([code for code in range(256) if code & 127 != 127]).byte()
).numpy()


def layer(inputs: int, outputs: int, *, by_channel: bool = True) -> tuple[Tensor, ...]:
    """Codes, weight scales, input scale (0.01) and bias of a random layer."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    bias = torch.randn(outputs, generator=generator)
    codes, scale = encode(weight, by_channel=by_channel)
    return codes, scale, torch.tensor(0.01), bias


@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=50))
def test_inputs_are_rounded_to_the_nearest_e4m3_number(values):
    x = torch.tensor(values)
    result = round_to_float8(x).numpy()
    distances = np.abs(NUMBERS[None] - x.clamp(-448, 448).numpy()[:, None])
    np.testing.assert_array_equal(
        np.abs(result - x.clamp(-448, 448).numpy()), distances.min(axis=1)
    )


@pytest.mark.parametrize("by_channel", [True, False])
def test_scale_maps_the_largest_weight_to_448(by_channel):
    weight = torch.randn(6, 40) * torch.logspace(-3, 3, 6)[:, None]
    codes, scale = encode(weight, by_channel=by_channel)
    assert scale.shape == ((6,) if by_channel else ())
    largest_values = convert_from_float8(codes).abs().amax(dim=1)
    assert largest_values.max() == LARGEST
    assert bool((largest_values == LARGEST).all()) == by_channel
    rounding_error = (convert_from_float8(codes) * scale.reshape(-1, 1) - weight).abs()
    if by_channel:
        # Half of the last of 4 bits; below 2^-6 times the scale, half of 2^-9 times the scale.
        allowed = torch.maximum(weight.abs() * 2.0**-4, scale[:, None] * 2.0**-10)
        assert (rounding_error <= allowed * (1 + 1e-6)).all()


def test_channels_of_zeros_or_denormals_have_a_positive_scale_and_finite_weights():
    weight = torch.zeros(3, 8)
    weight[1] = 1e-45  # a denormal number: its scale would be zero
    codes, scale = encode(weight, by_channel=True)
    assert (scale > 0).all()
    assert torch.isfinite(convert_from_float8(codes) * scale[:, None]).all()


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("shape", [(5, 40), (2, 3, 40)])
def test_op_multiplies_rounded_inputs_by_stored_weights(shape, by_channel):
    codes, scale, input_scale, bias = layer(40, 6, by_channel=by_channel)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    x.view(-1)[0] = 100.0  # above 448 * 0.01: clipped, as QuantizeLinear does
    rounded = round_to_float8((x / input_scale).clamp(-448, 448)).double() * 0.01
    weight = convert_from_float8(codes).double() * scale.double().reshape(-1, 1)
    result = OP(x, codes, scale, input_scale, bias)
    torch.testing.assert_close(result.double(), rounded @ weight.T + bias, rtol=1e-5, atol=1e-5)
    without_bias = OP(x, codes, scale, input_scale, None)
    torch.testing.assert_close(without_bias, result - bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_channel", [True, False])
def test_gradients_equal_the_straight_through_estimate(by_channel):
    codes, scale, input_scale, bias = layer(40, 6, by_channel=by_channel)
    generator = torch.Generator().manual_seed(3)
    x, output_gradient = (
        torch.randn(2, 3, 40, generator=generator),
        torch.randn(2, 3, 6, generator=generator),
    )
    x.view(-1)[:2] = torch.tensor([100.0, -100.0])  # clipped: 0.01 * 448 is 4.48

    def with_torch(x: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor) -> Tensor:
        ratio = (x / input_scale).clamp(-448, 448)
        rounded = ratio + (round_to_float8(ratio) - ratio).detach()
        return rounded * input_scale @ (convert_from_float8(codes) * scale.reshape(-1, 1)).T + bias

    def with_op(x: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor) -> Tensor:
        return OP(x, codes, scale, input_scale, bias)

    def gradients(function) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, scale, input_scale, bias)]
        (function(*leaves) * output_gradient).sum().backward()
        return [leaf.grad for leaf in leaves]

    result = gradients(with_op)
    for gradient, expected in zip(result, gradients(with_torch), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
        assert gradient.abs().sum() > 0
    assert result[0].view(-1)[:2].tolist() == [0, 0]


def test_op_passes_opcheck():
    codes, scale, input_scale, bias = layer(24, 5)
    x = torch.randn(3, 24, requires_grad=True)
    for leaf in (scale, bias):
        leaf.requires_grad_()
    torch.library.opcheck(OP.default, (x, codes, scale, input_scale, bias))


def test_input_scale_is_the_largest_calibration_input_over_448(tmp_path):
    source, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    inputs: list[Tensor] = []
    hook = source.module.capped.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches(bench.calibration, RANKER.signature, size=10, limit=50):
            source.module(**batch.inputs)
    hook.remove()
    result = run(Float8Dense(rows=50, batch=7), source, bench, tmp_path / "out")
    largest = torch.cat(inputs).abs().max()
    # The step has another batch size, so float32 sums have another order.
    torch.testing.assert_close(result.module.capped.input_scale, largest / 448, rtol=1e-6, atol=0)
    assert not source.module.capped._forward_pre_hooks


def test_a_layer_with_zero_inputs_or_a_bench_without_rows_raises_an_error(tmp_path):
    source = RANKER.model()
    nn.init.zeros_(source.module.hidden.weight)  # the layer ``capped`` reads its output
    nn.init.zeros_(source.module.hidden.bias)
    step = Float8Dense(layers=("capped",))
    with raises_code(StepRefused, "layer_inputs_zero", layer="capped"):
        run(step, source, RANKER.bench(tmp_path / "data"), tmp_path / "out")
    with raises_code(NothingToCompress, "rows_missing", missing=("calibration",)):
        run(Float8Dense(), source, Bench(signature=RANKER.signature), tmp_path / "out")


def test_a_layer_with_infinite_inputs_is_refused(tmp_path):
    source, bench = RANKER.model(), RANKER.bench(tmp_path / "data")
    file = Path(bench.calibration.path) / "data.safetensors"
    tensors = load_file(file)
    (name,) = [item.name for item in RANKER.signature.inputs if isinstance(item, DenseInput)]
    tensors[name][0] = torch.finfo(torch.float32).max  # a sum of several of these is infinite
    save_file(tensors, file)
    with raises_code(StepRefused, "layer_inputs_not_finite"):
        run(Float8Dense(), source, bench, tmp_path / "out")

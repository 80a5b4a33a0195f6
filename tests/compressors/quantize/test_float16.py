"""Float16 tables and layers: rounding, overflow, lookups and gradients.

``RANKER`` (``tests/models.py``) has the tables ``item`` and ``user``, among others, and the dense
layers ``hidden``, ``capped`` and ``cross``. The largest float16 number is 65,504.
"""

from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER, Reference
from reason_codes import codes_of, require_reason
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Bench, DenseInput, Output, Signature, Split
from compressors.core.runner import run
from compressors.quantize.dense.float16 import (
    Float16,
    compute_largest_sum,
    find_overflow,
    to_float16,
)

OPS = torch.ops.recpress


@given(st.floats(-65504, 65504, width=32))
def test_rounding_error_is_at_most_half_a_float16_step(value):
    weight = torch.tensor([value])
    error = (to_float16(weight).float() - weight).abs().item()
    assert error <= max(abs(value) * 2.0**-11, 2.0**-25)


@pytest.mark.parametrize("value", [65520.0, -7e4, 1e30])
def test_weight_beyond_the_float16_range_is_reported(value):
    weight = torch.tensor([[0.0, value]])
    largest = float(weight.abs().max())  # the value as float32
    require_reason([find_overflow(weight, None)], "beyond_largest", largest=largest, limit=65504.0)
    assert find_overflow(torch.ones(1, 2), weight) == find_overflow(weight)
    assert find_overflow(torch.tensor([65519.0, -65519.0])) is None  # rounds to 65,504


@given(
    x=arrays.arrays(np.float32, (3, 5), elements=st.floats(-10, 10, width=32)),
    weight=arrays.arrays(np.float32, (2, 5), elements=st.floats(-10, 10, width=32)),
    bias=arrays.arrays(np.float32, 2, elements=st.floats(-10, 10, width=32)),
    seed=st.integers(0, 100),
)
def test_largest_sum_bounds_partial_sums_in_any_order(x, weight, bias, seed):
    terms = np.concatenate([x[:, None] * weight, np.broadcast_to(bias, (3, 2))[..., None]], axis=2)
    result = compute_largest_sum(*map(torch.from_numpy, (x, weight, bias)))
    shuffled = np.random.default_rng(seed).permuted(terms.astype(np.float64), axis=2)
    tolerance = 1e-5 * np.abs(terms).sum(axis=2).max()
    assert np.abs(shuffled.cumsum(axis=2)).max() <= result + tolerance
    # The bound is reached if all terms of one sign are added first.
    ordered = np.sort(terms.astype(np.float64), axis=2)
    highest = max(np.abs(o.cumsum(axis=2)).max() for o in (ordered, ordered[..., ::-1]))
    assert abs(highest - result) <= tolerance


WIDTH, ROWS = 4, 50


class LargeInputsNet(nn.Module):
    """Two layers that overflow in float16 for large inputs.

    ``raised`` receives the input itself. ``sums`` receives a tenth of it, and its terms cancel, so
    that only its partial sums are large.
    """

    def __init__(self) -> None:
        super().__init__()
        self.raised = nn.Linear(WIDTH, WIDTH)
        self.sums = nn.Linear(WIDTH, 2)
        self.out = nn.Linear(WIDTH, 1)
        nn.init.constant_(self.raised.weight, 1e-3)
        nn.init.zeros_(self.sums.bias)
        with torch.no_grad():
            self.sums.weight.copy_(torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 2))

    def forward(self, x: Tensor) -> Tensor:
        raised = self.raised(x)
        repeated = (x[:, :1] / 10).expand(-1, WIDTH)
        score: Tensor = self.out(raised.tanh()) + self.sums(repeated).sum(dim=1, keepdim=True)
        return score


SIGNATURE = Signature(
    inputs=(DenseInput(name="x", shape=(WIDTH,)),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
LARGE_INPUTS = Reference(LargeInputsNet, SIGNATURE)


def bench_with_largest_input(folder: Path, size: float) -> Bench:
    """A bench whose largest absolute input is ``size``, in the last calibration row."""
    x = torch.ones(ROWS, WIDTH)
    x[-1] = -size
    folder.mkdir(parents=True)
    save_file({"x": x, "@label": torch.zeros(ROWS)}, folder / "data.safetensors")
    split = Split(path=str(folder), sha256="0" * 64, rows=ROWS)
    return Bench(signature=SIGNATURE, calibration=split)


@pytest.mark.parametrize(
    ("size", "headroom", "kept_layers"),
    [
        # A layer is kept if an input or a sum, times the headroom, is above 65,504.
        (30_000, 2.0, set()),
        (33_000, 2.0, {"raised"}),
        (33_000, 1.0, set()),
        (66_000, 1.0, {"raised"}),
        # ``sums`` adds a tenth of the input twice with each sign, so partial sums reach a fifth.
        (170_000, 2.0, {"raised", "sums"}),
        (170_000, 1.0, {"raised"}),
    ],
)
def test_layers_that_may_overflow_stay_float32_with_a_reason(size, headroom, kept_layers, tmp_path):
    source = LARGE_INPUTS.model()
    bench = bench_with_largest_input(tmp_path / "data", size)
    result = run(Float16(headroom=headroom, batch=8), source, bench, tmp_path / "out")
    lines = {line.module: line for line in result.plan.lines if line.role == "dense"}
    assert {name for name, line in lines.items() if line.format == "float32"} == kept_layers
    for name in kept_layers:
        assert codes_of(lines[name].reasons) == ["kept_format", "near_largest"]
        require_reason(lines[name].reasons, "near_largest", headroom=headroom, format="float16")
        assert lines[name].bytes_after == lines[name].bytes_before
    if "raised" in kept_layers:
        require_reason(lines["raised"].reasons, "near_largest", what="an input", size=float(size))
    if "sums" in kept_layers:
        # A fifth of 170,000, computed in float32.
        sums = pytest.approx(34_000, rel=1e-5)
        require_reason(lines["sums"].reasons, "near_largest", what="a sum", size=sums)
    x = torch.full((2, WIDTH), float(size))
    with torch.no_grad():  # layers in float16 do not overflow
        for name in lines.keys() - kept_layers:
            layer = result.module.get_submodule(name)
            layer_input = x if name == "raised" else x / 10 if name == "sums" else x.tanh()
            assert torch.isfinite(F.linear(layer_input.half(), layer.weight, layer.bias)).all()


def test_units_with_weights_beyond_float16_stay_float32_without_calibration_rows(tmp_path):
    source = RANKER.model()
    with torch.no_grad():
        source.module.item.weight[7, 2] = -7e4
        source.module.hidden.weight[0, 0] = 1e5
        source.module.capped.bias[0] = 2e5
    result = run(Float16(), source, Bench(signature=RANKER.signature), tmp_path / "out")
    for name, weight in (("item", 70000), ("hidden", 100000), ("capped", 200000)):
        line = result.plan.of(name)
        assert line.format == "float32"
        assert codes_of(line.reasons) == ["kept_format", "beyond_largest"]
        require_reason(line.reasons, "beyond_largest", largest=float(weight), limit=65504.0)
    assert result.plan.of("cross").format == result.plan.of("user").format == "float16"
    assert codes_of(result.plan.of("cross").reasons) == ["selected", "sums_not_checked"]
    assert codes_of(result.plan.of("user").reasons) == ["selected"]
    assert torch.equal(result.module.item.weight, source.module.item.weight)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_lookup_gives_the_stored_rows_in_float32(shape, dtype):
    weight = torch.randn(5, 3).half()
    ids = torch.randint(5, shape, dtype=dtype)
    rows = OPS.float16_table(weight, ids)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, weight.float()[ids.long()])


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (0, 6)])
def test_op_computes_a_linear_layer_in_float32(shape):
    x, weight, bias = torch.randn(shape), torch.randn(4, 6).half(), torch.randn(4).half()
    y = OPS.float16_linear(x, weight, bias)
    assert y.dtype == torch.float32
    assert torch.equal(y, F.linear(x, weight.float(), bias.float()))


def test_ops_pass_opcheck():
    weight, ids = torch.randn(5, 3).half().requires_grad_(), torch.tensor([[0, 4, 4]])
    torch.library.opcheck(OPS.float16_table.default, (weight, ids))
    x = torch.randn(2, 3, 6, requires_grad=True)
    layer = (torch.randn(4, 6).half().requires_grad_(), torch.randn(4).half().requires_grad_())
    torch.library.opcheck(OPS.float16_linear.default, (x, *layer))


# Gradients of float16 leaves are float16: one part in 2^11, on sums of a few numbers near 1.
HALF = {"rtol": 2e-3, "atol": 2e-3}


def test_table_gradient_equals_plain_torch():
    weight, ids = torch.randn(5, 3).half(), torch.tensor([[0, 4, 4], [1, 0, 0]])
    output_gradient = torch.randn(2, 3, 3)
    with_op, with_torch = (weight.clone().requires_grad_() for _ in range(2))
    (OPS.float16_table(with_op, ids) * output_gradient).sum().backward()
    (with_torch.float()[ids] * output_gradient).sum().backward()
    torch.testing.assert_close(with_op.grad, with_torch.grad, **HALF)
    assert not with_op.grad[[2, 3]].any()
    assert with_op.grad[4].any()


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6)])
def test_layer_gradients_equal_plain_torch(shape):
    leaves = (torch.randn(shape), torch.randn(4, 6).half(), torch.randn(4).half())
    output_gradient = torch.randn(*shape[:-1], 4)
    with_op, with_torch = ([t.clone().requires_grad_() for t in leaves] for _ in range(2))
    (OPS.float16_linear(*with_op) * output_gradient).sum().backward()
    (
        F.linear(with_torch[0], with_torch[1].float(), with_torch[2].float()) * output_gradient
    ).sum().backward()
    for result, expected in zip(with_op, with_torch, strict=True):
        torch.testing.assert_close(result.grad, expected.grad, **HALF)
        assert result.grad.any()

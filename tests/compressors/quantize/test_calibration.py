"""Calibration: histograms, the range of each calibrator, and the step that uses them.

``LEVELS`` is the largest int8 code, 127. In the step ``StaticInt8``, ``share`` is the share of
inputs inside the range of ``percentile``. Layers whose relative output error is above
``most_error`` stay float32. Its calibrator ``entropy`` is the function ``least_divergence``, and
``mse`` is ``least_squares``.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER, Reference
from reason_codes import codes_of, require_reason
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import Bench, DenseInput, Output, Signature, Split
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.errors.steps import StepRefused
from compressors.quantize.calibration import calibrators
from compressors.quantize.calibration.calibrators import BINS, LEVELS, Histogram
from compressors.quantize.dense.int8_codes import clipped_scale, encode, quantize
from compressors.quantize.dense.static_int8 import StaticInt8

# --- the histogram ---------------------------------------------------------------------------


def histogram_of(*parts: Tensor) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


values = arrays.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.one_of(st.floats(-(2.0**100), 2.0**100, width=32), st.floats(-1, 1, width=32)),
)


@given(x=values, cut=st.integers(0, 60))
def test_histogram_does_not_depend_on_how_rows_are_split_into_batches(x, cut):
    at_once, in_batches = (
        histogram_of(torch.from_numpy(x)),
        histogram_of(*map(torch.from_numpy, (x[:cut], x[cut:]))),
    )
    assert torch.equal(at_once.counts, in_batches.counts)
    assert (at_once.zeros, at_once.width) == (in_batches.zeros, in_batches.width)
    assert torch.equal(at_once.largest, in_batches.largest)


@given(x=values)
def test_histogram_counts_every_value_in_its_bin(x):
    histogram, magnitude = histogram_of(torch.from_numpy(x)), np.abs(x.astype(np.float64))
    assert histogram.zeros == int((magnitude == 0).sum())
    bin_index = np.floor(magnitude[magnitude > 0] / histogram.width).astype(np.int64)
    assert np.array_equal(histogram.counts.numpy(), np.bincount(bin_index, minlength=BINS))
    assert float(histogram.largest) == magnitude.max()
    # The values reach at least half of the bins, except if all are very small.
    assert magnitude.max() < 2.0**-100 or BINS // 2 < histogram.count_used_bins() <= BINS


def test_histogram_accepts_empty_tensors_and_reports_a_nonfinite_largest_value():
    histogram = histogram_of(torch.empty(0, 3), torch.tensor([1.0, -3.0]))
    assert int(histogram.counts.sum()) == 2
    assert not torch.isfinite(histogram_of(torch.tensor([1.0, torch.nan])).largest)
    assert not torch.isfinite(histogram_of(torch.tensor([1.0, -torch.inf])).largest)


# --- the range of each calibrator ------------------------------------------------------------


@given(x=values, share=st.sampled_from([0.6, 0.9, 0.999, 1.0]))
def test_percentile_is_the_smallest_bin_edge_with_its_share_of_values_inside(x, share):
    histogram, magnitude = histogram_of(torch.from_numpy(x)), np.abs(x.astype(np.float64))
    end = calibrators.percentile(histogram, share)
    assert (magnitude <= end).mean() >= share or magnitude.max() == 0
    share_below_previous_edge = (magnitude < end - histogram.width).mean()
    assert share_below_previous_edge < share or end <= histogram.width
    assert end <= magnitude.max() or magnitude.max() == 0
    if share == 1:
        assert end == magnitude.max()


def rounding_error(x: Tensor, end: float) -> float:
    """Squared error of int8 inputs whose range ends at ``end``."""
    scale = torch.tensor(end / LEVELS)
    return float((quantize(x, scale) * scale - x).double().square().sum())


SHAPES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": lambda g: torch.randn(20_000, generator=g),
    "relu": lambda g: torch.randn(20_000, generator=g).relu(),
    "laplace": lambda g: torch.empty(20_000).exponential_(generator=g) * 3,
    "cubed": lambda g: torch.randn(20_000, generator=g) ** 3,
    "one outlier": lambda g: torch.cat([torch.randn(200_000, generator=g), torch.tensor([25.0])]),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_least_squares_range_has_at_most_2_percent_more_error_than_the_best(shape, seed):
    x = shape(torch.Generator().manual_seed(seed))
    histogram = histogram_of(x)
    end = calibrators.least_squares(histogram)
    largest = float(histogram.largest)
    best = min(rounding_error(x, share * largest) for share in np.linspace(0.05, 1, 96))
    # The calibrator estimates errors, assuming that inputs are uniform between two levels.
    assert rounding_error(x, end) <= 1.02 * best


def naive_divergence(counts: np.ndarray, end: int) -> float:
    """The divergence of a range, from bin counts without zeros: Migacz, see ``calibrators.py``."""
    p = counts[:end].astype(np.float64)
    p[-1] += counts[end:].sum()
    groups: dict[int, list[int]] = {}
    for bin_ in range(end):
        groups.setdefault(bin_ * 128 // end, []).append(bin_)  # 128 levels
    q = np.zeros(end)
    for group in groups.values():
        filled = [bin_ for bin_ in group if counts[bin_]]
        for bin_ in filled:
            q[bin_] = sum(counts[b] for b in group) / len(filled)
    p, q = p / p.sum(), q / q.sum()
    if any(p_ > 0 and q_ == 0 for p_, q_ in zip(p, q, strict=True)):
        return np.inf
    return sum(p_ * np.log(p_ / q_) for p_, q_ in zip(p, q, strict=True) if p_ > 0)


@given(
    seed=st.integers(0, 2**31),
    power=st.sampled_from([0.5, 1.0, 3.0]),
    zeros=st.integers(0, 5000),
)
def test_entropy_range_has_the_least_divergence_of_a_naive_reference(seed, power, zeros):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3000, generator=generator).abs() ** power
    histogram = histogram_of(torch.cat([x, torch.zeros(zeros)]))
    counts, used = histogram.counts.numpy(), histogram.count_used_bins()
    ends = [*range(128, used, calibrators.BIN_STRIDE), used]
    tried_ends = ends[:: max(1, len(ends) // 12)]  # about 12, as the reference is slow
    end = calibrators.least_divergence(histogram)
    # The range ends at the largest value, which may be on the lower edge of the last bin.
    bin_index = used if end == float(histogram.largest) else math.ceil(end / histogram.width)
    smallest = naive_divergence(counts, bin_index)
    assert bin_index in ends
    for other in tried_ends:
        assert smallest <= naive_divergence(counts, other) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("rule", ["percentile", "least_divergence", "least_squares"])
@pytest.mark.parametrize("value", [1e-44, 2.0**-101, 1.0, 4.0, 3e38])
def test_inputs_of_one_absolute_value_are_inside_the_range(rule, value):
    ends = {
        "percentile": lambda histogram: calibrators.percentile(histogram, 0.999),
        "least_divergence": calibrators.least_divergence,
        "least_squares": calibrators.least_squares,
    }
    x = torch.tensor([value, -value, value])
    # Least squares assumes uniform values within a bin, so it may clip by up to one bin.
    tolerance = value / BINS * 2 if rule == "least_squares" else 0
    assert float(x[0]) - tolerance <= ends[rule](histogram_of(x)) <= float(x[0])


# --- weights ---------------------------------------------------------------------------------


def test_clipped_scale_never_has_a_larger_error_than_no_clipping():
    weight = torch.randn(20, 4000, generator=torch.Generator().manual_seed(0))
    weight[3, 7] = 30.0  # one outlier among 4000 weights, so clipping lowers the error
    input_scale = torch.tensor(1.0)

    def weight_error(requested_scale: Tensor | None) -> Tensor:
        codes, scale = encode(weight, None, input_scale, requested_scale)  # None: no bias
        return (codes.float() * scale[:, None] - weight).square().sum(dim=1)

    with_clipping, without_clipping = weight_error(clipped_scale(weight)), weight_error(None)
    assert torch.all(with_clipping <= without_clipping * (1 + 1e-5))
    assert with_clipping[3] < 0.99 * without_clipping[3]


# --- the step --------------------------------------------------------------------------------

WIDTH, ROWS = 64, 4096


class Small(nn.Module):
    """Two layers over a dense vector."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.first = nn.Linear(width, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        score: Tensor = self.out(torch.relu(self.first(x)))
        return score


SIGNATURE = Signature(
    inputs=(DenseInput(name="x", shape=(WIDTH,)),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)
SMALL = Reference(Small, SIGNATURE)


def calibration_bench(folder: Path, x: Tensor) -> Bench:
    """A bench with these rows, ``(rows, WIDTH)``, to calibrate on."""
    folder.mkdir(parents=True)
    save_file({"x": x, "@label": torch.zeros(len(x))}, folder / "data.safetensors")
    split = Split(path=str(folder), sha256="0" * 64, rows=len(x))
    return Bench(signature=SIGNATURE, calibration=split)


def rows_with_outlier() -> Tensor:
    """Normal rows with one outlier of 40 among 262,144 numbers."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    x[17, 3] = 40.0
    return x


def output_loss(source: Model, result: Model, x: Tensor, layer: str = "first") -> float:
    """Mean squared error of a layer's output."""
    with torch.no_grad():
        before, after = (model.module.get_submodule(layer)(x) for model in (source, result))
    return float((after - before).double().square().mean())


@pytest.fixture(scope="module")
def by_calibrator(tmp_path_factory):
    """The source, the calibration rows, and the result of static_int8 for every calibrator."""
    folder, x, source = tmp_path_factory.mktemp("calibrators"), rows_with_outlier(), SMALL.model()
    bench = calibration_bench(folder / "data", x)
    results = {
        calibrator: run(
            StaticInt8(calibrator=calibrator, most_error=1.0), source, bench, folder / calibrator
        )
        for calibrator in ("min_max", "percentile", "entropy", "mse", "best")
    }
    return source, x, results


@pytest.mark.parametrize("calibrator", ["percentile", "entropy", "mse"])
def test_with_an_outlier_other_calibrators_have_less_error_than_min_max(by_calibrator, calibrator):
    source, x, results = by_calibrator
    assert output_loss(source, results[calibrator], x) < 0.7 * output_loss(
        source, results["min_max"], x
    )
    end = float(results[calibrator].module.first.input_scale) * LEVELS
    assert 2.5 < end < 20  # far below the outlier of 40, and above nearly all other inputs
    reasons = results[calibrator].plan.of("first").reasons
    assert codes_of(reasons) == ["selected", "calibrated_range", "output_error"]
    require_reason(reasons, "calibrated_range", calibrator=calibrator)


def test_best_selects_the_calibrator_with_the_least_error_for_each_layer(by_calibrator):
    source, x, results = by_calibrator
    others = [calibrator for calibrator in results if calibrator != "best"]
    hidden = torch.relu(source.module.first(x)).detach()
    chosen = []
    for layer, layer_input in (("first", x), ("out", hidden)):
        errors = {
            calibrator: output_loss(source, results[calibrator], layer_input, layer)
            for calibrator in others
        }
        smallest = min(errors, key=errors.__getitem__)
        assert output_loss(source, results["best"], layer_input, layer) == errors[smallest]
        reasons = results["best"].plan.of(layer).reasons
        chosen_range = [r.fields["calibrator"] for r in reasons if r.code == "calibrated_range"]
        assert chosen_range == ([] if smallest == "min_max" else [smallest])
        chosen.append(smallest)
    assert chosen[0] != "min_max"


def test_reported_error_is_the_relative_output_error_on_the_calibration_rows(by_calibrator):
    source, x, results = by_calibrator
    with torch.no_grad():
        mean_square = float(source.module.first(x).double().square().mean())
    relative_error = (output_loss(source, results["mse"], x) / mean_square) ** 0.5
    # The step adds the same squares in batches.
    expected = pytest.approx(relative_error, rel=1e-4)
    require_reason(results["mse"].plan.of("first").reasons, "output_error", share=expected)


def test_layers_above_most_error_stay_float32_and_the_plan_gives_their_error(tmp_path):
    source, x = SMALL.model(), rows_with_outlier()
    bench = calibration_bench(tmp_path / "data", x)
    # ``first`` reads the outlier and ``out`` does not, so only the error of ``first`` is above 4 %.
    result = run(StaticInt8(most_error=0.04), source, bench, tmp_path / "out")
    kept_line, quantized_line = result.plan.of("first"), result.plan.of("out")
    assert kept_line.format == "float32"
    assert kept_line.steps == ()
    assert kept_line.bytes_after == kept_line.bytes_before
    assert codes_of(kept_line.reasons) == ["kept_format", "output_error", "above_most_error"]
    assert require_reason(kept_line.reasons, "output_error").fields["share"] > 0.04
    require_reason(kept_line.reasons, "above_most_error", step="static_int8", most_error=0.04)
    assert torch.equal(result.module.first.weight, source.module.first.weight)
    assert quantized_line.format == "static_int8"
    assert codes_of(quantized_line.reasons) == ["selected", "output_error"]
    unquantized = run(StaticInt8(most_error=1e-9), source, bench, tmp_path / "none")
    assert not unquantized.network.modules
    assert torch.equal(unquantized.module(x), source.module(x))


def test_default_scale_covers_every_input_and_the_plan_reports_no_error(tmp_path):
    source, x = SMALL.model(), rows_with_outlier()
    result = run(StaticInt8(), source, calibration_bench(tmp_path / "data", x), tmp_path / "out")
    assert torch.equal(result.module.first.input_scale, x.abs().max() / LEVELS)
    codes, scale = encode(
        source.module.first.weight.detach(), source.module.first.bias.detach(), x.abs().max() / 127
    )
    assert torch.equal(result.module.first.codes, codes)
    assert torch.equal(result.module.first.weight_scale, scale)
    assert codes_of(result.plan.of("first").reasons) == ["selected"]


def test_percentile_leaves_its_share_of_the_inputs_unclipped(tmp_path):
    x, ends = rows_with_outlier(), []
    bench = calibration_bench(tmp_path / "data", x)
    for share in (0.9, 0.99, 0.9999):
        step = StaticInt8(calibrator="percentile", share=share)
        result = run(step, SMALL.model(), bench, tmp_path / str(share))
        ends.append(float(result.module.first.input_scale) * LEVELS)
        inside = float((x.abs() <= ends[-1]).float().mean())
        assert share <= inside <= share + 5e-3  # the values of one bin more
    assert all(low < high for low, high in itertools.pairwise(ends))


def test_weights_mse_lowers_the_weight_error_and_keeps_the_input_scale(tmp_path):
    source = SMALL.model()
    with torch.no_grad():
        source.module.first.weight[0, :] = 0.5  # 63.5 times the scale without clipping
        source.module.first.weight[0, 0] = 1.0
    x = rows_with_outlier()
    bench = calibration_bench(tmp_path / "data", x)
    without_clipping, clipped = (
        run(StaticInt8(weights=calibrator), source, bench, tmp_path / calibrator)
        for calibrator in ("min_max", "mse")
    )
    assert torch.all(
        clipped.module.first.weight_scale <= without_clipping.module.first.weight_scale * 1.001
    )
    assert torch.equal(clipped.module.first.input_scale, without_clipping.module.first.input_scale)

    def error(result: Model) -> float:
        layer = result.module.first
        decoded = layer.codes.float() * layer.weight_scale[:, None]
        return float((decoded - source.module.first.weight.detach()).square().sum())

    assert error(clipped) < error(without_clipping)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_nonfinite_inputs_raise_an_error_that_names_the_layer(value, tmp_path):
    x = rows_with_outlier()
    x[5, 5] = value
    bench = calibration_bench(tmp_path / "data", x)
    with raises_code(StepRefused, "layer_inputs_not_finite", layer="first"):
        run(StaticInt8(), SMALL.model(), bench, tmp_path / "out")


def test_calibration_leaves_no_hook_on_the_source_network(tmp_path):
    source = RANKER.model()
    bench = RANKER.bench(tmp_path / "data")
    run(StaticInt8(calibrator="best", rows=50, batch=7), source, bench, tmp_path / "out")
    assert not any(part._forward_pre_hooks for part in source.module.modules())

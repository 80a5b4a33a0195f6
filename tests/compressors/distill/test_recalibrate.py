"""``recalibrate``: maps from scores to calibrated probabilities that keep the order of rows.

The methods ``temperature`` and ``platt`` map a logit with a factor (slope), and ``platt`` also with
an offset; both numbers are the tensor ``recalibration.line``. The method ``isotonic`` interpolates
between knots: rows in order of their logit form at most ``knots`` groups, and each group is a knot,
with the mean logit of its rows and the logit of the share of clicks. ``OUTPUT`` is the name of the
map's line in the plan.

The networks are those of ``models.py``. The output of ``RANKER`` and ``COMPACT`` is a logit, that
of ``NORMED`` a probability, and that of ``ATTENTION`` a score for rankings.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import (
    ATTENTION,
    COMPACT,
    NORMED,
    RANKER,
    SHORT_TRAINING,
    Reference,
    only_served_graph,
    write_split,
)
from reason_codes import require_reason
from safetensors.torch import load_file, save_file

from compressors.contracts import Bench
from compressors.core.batches import batches
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.modules.output_calibration import find_recalibration
from compressors.core.plan_lines import OUTPUT
from compressors.core.runner import run
from compressors.distill.fine_tune import FineTune
from compressors.distill.recalibrate import (
    METHODS,
    Recalibrate,
    cross_validated_loss,
    fit_line,
    fit_map,
    fit_pieces,
)
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.lower.export import lower
from compressors.metrics import point_estimates
from compressors.quantize.dense.static_int8 import StaticInt8
from infra.onnxruntime.sessions import Session

ROWS = 4000


def random_labels(
    slope: float, offset: float, rows: int = ROWS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Random logits, and labels of probability sigmoid(slope * logit + offset)."""
    rng = np.random.default_rng(seed)
    logit = rng.normal(size=rows) * 2
    probability = 1 / (1 + np.exp(-(slope * logit + offset)))
    return logit, (rng.random(rows) < probability).astype(np.float64)


def bench_with_drawn_labels(reference: Reference, folder, slope: float, offset: float) -> Bench:
    """A bench with random validation labels of probability sigmoid(slope * logit + offset)."""
    bench = reference.bench(folder)
    split = write_split(
        reference.signature, reference.rows_of_tables(), folder / "many", seed=3, rows=ROWS
    )
    (batch,) = batches(split, reference.signature, ROWS)
    with torch.no_grad():
        scores = reference.model().module(**batch.inputs).reshape(-1).double()
    logit = (
        torch.logit(scores) if reference.signature.single_output.form == "probability" else scores
    )
    probability = torch.sigmoid(slope * logit + offset)
    uniform = torch.rand(
        len(probability), generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    path = folder / "many" / "data.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    save_file({**tensors, "@label": (uniform < probability).float()}, path)
    return bench.model_copy(update={"validation": split})


@given(st.floats(0.3, 3), st.floats(-2, 2), st.integers(0, 5))
def test_fit_line_finds_the_slope_and_offset_of_random_labels(slope, offset, seed):
    logit, label = random_labels(slope, offset, rows=20_000, seed=seed)
    fitted = fit_line(logit, label, offset=True)
    # About four standard errors, which for 20,000 rows are 3 % of the slope and 0.03 of the offset.
    assert fitted[0] == pytest.approx(slope, rel=0.15)
    assert fitted[1] == pytest.approx(offset, abs=0.15)


@given(st.floats(0.3, 3), st.floats(-1, 1), st.sampled_from(METHODS), st.integers(2, 40))
def test_every_output_map_is_strictly_increasing(slope, offset, method, knots):
    logit, label = random_labels(slope, offset, rows=500)
    output_map = fit_map(method, "logit", logit, label, knots)
    grid = torch.linspace(-20, 20, 2001)
    assert bool((output_map(grid).diff() > 0).all())


def test_isotonic_value_of_equal_scores_is_the_mean_of_their_labels():
    rng = np.random.default_rng(0)
    logit = np.concatenate([np.full(3_000, -1.0), rng.normal(0.5, 1, 3_000)])
    probabilities_of_other_scores = np.where(logit[3_000:] < -1, 0.02, 0.4)
    probabilities = np.concatenate([np.linspace(0.02, 0.22, 3_000), probabilities_of_other_scores])
    label = (rng.random(6_000) < probabilities).astype(np.float64)
    knot_positions, knot_values = fit_pieces(logit, label, knots=32)
    probability = label[:3_000].mean()  # all rows of this score
    mapped = 1 / (1 + np.exp(-np.interp(-1.0, knot_positions, knot_values)))
    # The group of this score also contains the few rows between it and the next group.
    assert mapped == pytest.approx(probability, abs=0.01)


def test_isotonic_map_beyond_its_outer_knots_has_slope_at_most_one():
    rng, logit = np.random.default_rng(0), np.linspace(-0.5, 0.5, 20_000)
    label = (rng.random(logit.size) < 1 / (1 + np.exp(-6 * logit))).astype(np.float64)
    output_map = fit_map("isotonic", "logit", logit, label, knots=8)
    inner = output_map(torch.tensor([-0.4, -0.2, 0.2, 0.4]))
    # The true slope is 6 everywhere; a group of 2,500 rows has a standard error of 0.05 in logits.
    assert bool((inner.diff() > 3 * torch.tensor([0.2, 0.4, 0.2])).all())
    mapped_logits = output_map(torch.tensor([-100.0, -90.0, 90.0, 100.0]))
    assert float(mapped_logits[1] - mapped_logits[0]) <= 10 * (1 + 1e-5)
    assert float(mapped_logits[3] - mapped_logits[2]) <= 10 * (1 + 1e-5)


def test_cross_validated_loss_of_a_method_that_cannot_be_fitted_is_infinite():
    logit, label = random_labels(slope=1, offset=-1.5)
    logit = logit + 5  # so the best factor without an offset is negative
    with raises_code(StepRefused, "slope_not_positive_without_offset"):
        fit_map("temperature", "logit", logit, label, knots=8)
    assert cross_validated_loss("temperature", logit, label, knots=8) == np.inf
    assert cross_validated_loss("platt", logit, label, knots=8) < 0.6


def test_fit_line_of_separable_labels_has_a_finite_slope():
    logit = np.linspace(-3, 3, 400)
    slope, _ = fit_line(logit, (logit > 0).astype(np.float64), offset=True)
    # Smoothed labels are 1/202 and 201/202. A line through only the two rows next to the threshold,
    # at logits of -0.0075 and 0.0075, would have a slope of 700.
    assert 1 < slope < 100


def test_mapped_probabilities_close_to_zero_keep_their_order():
    output_map = fit_map("platt", "probability", *random_labels(slope=0.5, offset=0.1), knots=8)
    mapped = output_map(torch.logspace(-30, -1, 200))
    assert bool((mapped.diff() > 0).all())


def test_fit_line_minimizes_the_log_loss():
    logit, label = random_labels(slope=0.6, offset=0.4)
    slope, offset = fit_line(logit, label, offset=True)

    def log_loss(a: float, b: float) -> float:
        return float((np.logaddexp(0, a * logit + b) - label * (a * logit + b)).mean())

    # ``fit_line`` smooths the labels, as if there were one more row with and one without a click.
    clicks = label.sum()
    label = np.where(label > 0.5, (clicks + 1) / (clicks + 2), 1 / (len(label) - clicks + 2))
    smallest_loss = log_loss(slope, offset)
    for change in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert log_loss(slope + change[0], offset + change[1]) > smallest_loss
    factor, offset_without = fit_line(logit, label, offset=False)
    assert offset_without == 0
    assert log_loss(factor, 0) < min(log_loss(factor + 0.01, 0), log_loss(factor - 0.01, 0))


def test_isotonic_map_has_a_smaller_loss_than_a_line_for_curved_logits():
    logit, _ = random_labels(slope=1, offset=0, rows=20_000)
    curved = np.where(logit < 0, 0.3 * logit, 3 * logit)
    label = (np.random.default_rng(1).random(len(logit)) < 1 / (1 + np.exp(-curved))).astype(float)
    assert (
        cross_validated_loss("isotonic", logit, label, knots=32)
        < cross_validated_loss("platt", logit, label, knots=32) - 1e-3
    )
    knot_positions, knot_values = fit_pieces(logit, label, knots=32)
    inner = (knot_positions > -2) & (knot_positions < 1)
    expected_values = np.where(knot_positions < 0, 0.3 * knot_positions, 3 * knot_positions)
    # four standard deviations of a group of 625 rows
    assert np.abs(knot_values - expected_values)[inner].max() < 0.5


@pytest.mark.parametrize("reference", [RANKER, NORMED], ids=["logit", "probability"])
@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic", "best"])
def test_recalibrate_lowers_the_log_loss_and_keeps_the_auc(reference, method, tmp_path):
    bench = bench_with_drawn_labels(reference, tmp_path / "data", slope=2.5, offset=-1.0)
    source = reference.model()
    result = run(Recalibrate(method=method), source, bench, tmp_path / "out")
    (batch,) = batches(bench.validation, reference.signature, ROWS)
    with torch.no_grad():
        before, after = (m.module(**batch.inputs).reshape(-1) for m in (source, result))
    label = batch.label.numpy()
    assert point_estimates.auc(label, after.numpy()) == pytest.approx(
        point_estimates.auc(label, before.numpy()),
        abs=1e-4,  # rounding to float32 may make scores equal
    )
    probability = [
        (x if reference.signature.single_output.form == "probability" else torch.sigmoid(x)).numpy()
        for x in (before, after)
    ]
    assert (
        point_estimates.logloss(label, probability[1])
        < point_estimates.logloss(label, probability[0]) - 0.01
    )
    line = result.plan.of(OUTPUT)
    assert line.steps == ("recalibrate",)
    mapped_to = require_reason(line.reasons, "output_mapped", method=line.format)
    assert mapped_to.fields["after"] < mapped_to.fields["before"]
    assert line.format in METHODS
    assert line.bytes_after == sum(
        t.nbytes for n, t in result.module.state_dict().items() if n.startswith("recalibration.")
    )


def test_rows_without_a_label_do_not_change_the_map(tmp_path):
    """Every third row has no label, or is removed; both must give the same map."""
    bench = bench_with_drawn_labels(COMPACT, tmp_path, slope=0.5, offset=0.3)
    maps = []
    for name in ("without labels", "without rows"):
        folder = tmp_path / name
        folder.mkdir()
        path = Path(bench.validation.path) / "data.safetensors"
        tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
        if name == "without labels":
            tensors["@label"][::3] = torch.nan
        else:
            keep = torch.ones(ROWS, dtype=torch.bool)
            keep[::3] = False
            tensors = {key: tensor[keep].contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / "data.safetensors")
        split = bench.validation.model_copy(
            update={"path": str(folder), "rows": len(tensors["@label"])}
        )
        other = bench.model_copy(update={"validation": split})
        result = run(Recalibrate(method="platt"), COMPACT.model(), other, tmp_path / f"{name}-out")
        maps.append(find_recalibration(result.module).line)
    torch.testing.assert_close(*maps)


def test_the_graph_contains_the_output_map(tmp_path):
    bench = bench_with_drawn_labels(COMPACT, tmp_path / "data", slope=2.5, offset=-1.0)
    for method in ("platt", "isotonic"):
        result = run(Recalibrate(method=method), COMPACT.model(), bench, tmp_path / method)
        path = tmp_path / f"{method}.onnx"
        lowered = lower(result.module, only_served_graph(COMPACT.signature), "onnxruntime", path)
        (batch,) = batches(bench.validation, COMPACT.signature, ROWS)
        arrays = {k: v.numpy() for k, v in batch.inputs.items()}
        scores = Session(path, threads=1).scores(arrays)
        with torch.no_grad():
            expected = torch.sigmoid(result.module(**batch.inputs).reshape(-1)).numpy()
        np.testing.assert_allclose(scores, expected, atol=1e-5)  # float32 in another order
        assert lowered.wrapper.model.recalibration.method == method


def test_later_steps_keep_the_output_map(tmp_path):
    bench = bench_with_drawn_labels(NORMED, tmp_path / "data", slope=2.5, offset=-1.0)
    first = run(Recalibrate(), NORMED.model(), bench, tmp_path / "a")
    quantized = run(StaticInt8(), first, bench, tmp_path / "b")
    assert quantized.plan.of(OUTPUT) == first.plan.of(OUTPUT)
    assert torch.equal(quantized.module.recalibration.line, first.module.recalibration.line)
    tuned = run(FineTune(training=SHORT_TRAINING), first, bench, tmp_path / "c")
    assert torch.equal(tuned.module.recalibration.line, first.module.recalibration.line)
    with raises_code(StepRefused, "recalibrated_already"):
        run(Recalibrate(), first, bench, tmp_path / "d")


def test_method_best_of_calibrated_scores_selects_no_map_or_a_line(tmp_path):
    bench = bench_with_drawn_labels(NORMED, tmp_path / "data", slope=1.0, offset=0.0)
    result = run(Recalibrate(method="best"), NORMED.model(), bench, tmp_path / "out")
    line = result.plan.of(OUTPUT)
    assert line.format in {"as trained", "temperature", "platt"}
    if line.format == "as trained":
        require_reason(line.reasons, "no_better_map", step="recalibrate")
        assert not result.network.modules


def test_a_negative_slope_raises_step_refused(tmp_path):
    bench = bench_with_drawn_labels(NORMED, tmp_path / "data", slope=-1.0, offset=0.0)
    with raises_code(StepRefused, "slope_not_positive"):
        run(Recalibrate(), NORMED.model(), bench, tmp_path / "out")


def test_recalibrate_without_probabilities_raises_nothing_to_compress(tmp_path):
    with raises_code(NothingToCompress, "probability_missing"):
        run(Recalibrate(), ATTENTION.model(), ATTENTION.bench(tmp_path / "d"), tmp_path / "out")


def test_the_dry_run_of_recalibrate_has_the_bytes_of_its_result(tmp_path):
    bench = bench_with_drawn_labels(RANKER, tmp_path / "data", slope=2.5, offset=-1.0)
    for method in ("platt", "isotonic"):
        step = Recalibrate(method=method, knots=16)
        result = run(step, RANKER.model(), bench, tmp_path / method)
        predicted: Model = dry_run(step, RANKER.model(), bench)
        assert predicted.plan.of(OUTPUT).bytes_after == result.plan.of(OUTPUT).bytes_after

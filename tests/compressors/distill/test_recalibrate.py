"""Probabilities that mean what they say, and rows that stay in their order."""

import numpy as np
import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import ATTENTION, COMPACT, NORMED, QUICKLY, RANKER, Reference, prepared, whole
from reason_codes import with_code
from safetensors.torch import load_file, save_file

from compressors.contracts import Bench
from compressors.core.batches import batches
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
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


def drawn(
    slope: float, offset: float, rows: int = ROWS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a network that should be ``slope * logit + offset``, and labels."""
    random = np.random.default_rng(seed)
    logit = random.normal(size=rows) * 2
    share = 1 / (1 + np.exp(-(slope * logit + offset)))
    return logit, (random.random(rows) < share).astype(np.float64)


def planted(reference: Reference, folder, slope: float, offset: float) -> Bench:
    """A bench whose validation labels are drawn from the network's own logits, made steeper."""
    bench = reference.bench(folder)
    split = prepared(reference.signature, reference.rows_of_tables(), folder / "many", 3, rows=ROWS)
    (held,) = batches(split, reference.signature, ROWS)
    with torch.no_grad():
        answer = reference.model().module(**held.inputs).reshape(-1).double()
    logit = (
        torch.logit(answer) if reference.signature.single_output.form == "probability" else answer
    )
    share = torch.sigmoid(slope * logit + offset)
    drawn = torch.rand(len(share), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = folder / "many" / "data.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    save_file({**tensors, "@label": (drawn < share).float()}, path)
    return bench.model_copy(update={"validation": split})


@given(st.floats(0.3, 3), st.floats(-2, 2), st.integers(0, 5))
def test_platt_finds_the_slope_and_offset_that_labels_were_drawn_from(slope, offset, seed):
    logit, label = drawn(slope, offset, rows=20_000, seed=seed)
    found = fit_line(logit, label, offset=True)
    # The standard error from 20,000 rows is about 3 % of a slope and 0.03 of an offset; about four
    # times that.
    assert found[0] == pytest.approx(slope, rel=0.15)
    assert found[1] == pytest.approx(offset, abs=0.15)


@given(st.floats(0.3, 3), st.floats(-1, 1), st.sampled_from(METHODS), st.integers(2, 40))
def test_every_map_keeps_the_order_of_rows(slope, offset, method, knots):
    logit, label = drawn(slope, offset, rows=500)
    made = fit_map(method, "logit", logit, label, knots)
    grid = torch.linspace(-20, 20, 2001)
    assert bool((made(grid).diff() > 0).all())


def test_rows_with_equal_scores_are_averaged_in_any_order():
    random = np.random.default_rng(0)
    logit = np.concatenate([np.full(3_000, -1.0), random.normal(0.5, 1, 3_000)])
    others = np.where(logit[3_000:] < -1, 0.02, 0.4)
    chance = np.concatenate([np.linspace(0.02, 0.22, 3_000), others])
    label = (random.random(6_000) < chance).astype(np.float64)
    at, wanted = fit_pieces(logit, label, 32)
    share = label[:3_000].mean()  # rows of that score, the early and the late ones
    found = 1 / (1 + np.exp(-np.interp(-1.0, at, wanted)))
    # The mean's part also holds the few other rows up to the next edge.
    assert found == pytest.approx(share, abs=0.01)


def test_beyond_the_outer_means_a_map_is_no_steeper_than_the_logit():
    random, logit = np.random.default_rng(0), np.linspace(-0.5, 0.5, 20_000)
    label = (random.random(logit.size) < 1 / (1 + np.exp(-6 * logit))).astype(np.float64)
    made = fit_map("isotonic", "logit", logit, label, 8)
    inner = made(torch.tensor([-0.4, -0.2, 0.2, 0.4]))
    # The labels have slope 6 in every piece: 2,500 rows a mean, whose logits are good to 0.05.
    assert bool((inner.diff() > 3 * torch.tensor([0.2, 0.4, 0.2])).all())
    found = made(torch.tensor([-100.0, -90.0, 90.0, 100.0]))
    assert float(found[1] - found[0]) <= 10 * (1 + 1e-5)
    assert float(found[3] - found[2]) <= 10 * (1 + 1e-5)


def test_a_method_that_fits_nothing_is_not_the_best():
    logit, label = drawn(1, -1.5)
    logit = logit + 5  # without an offset the best factor would turn the order round
    with raises_code(StepRefused, "slope_not_positive_without_offset"):
        fit_map("temperature", "logit", logit, label, 8)
    assert cross_validated_loss("temperature", logit, label, 8) == np.inf
    assert cross_validated_loss("platt", logit, label, 8) < 0.6


def test_rows_separable_by_a_threshold_get_a_finite_slope():
    logit = np.linspace(-3, 3, 400)
    slope, _ = fit_line(logit, (logit > 0).astype(np.float64), offset=True)
    # At 0.0075, the nearest row, both sides may be 1/202: a slope of 700 if that alone counted.
    assert 1 < slope < 100


def test_probabilities_next_to_zero_keep_their_order():
    made = fit_map("platt", "probability", *drawn(0.5, 0.1), 8)
    found = made(torch.logspace(-30, -1, 200))
    assert bool((found.diff() > 0).all())


def test_no_other_line_has_a_smaller_log_loss():
    logit, label = drawn(0.6, 0.4)
    slope, offset = fit_line(logit, label, offset=True)

    def cost(a: float, b: float) -> float:
        return float((np.logaddexp(0, a * logit + b) - label * (a * logit + b)).mean())

    clicks = label.sum()
    label = np.where(label > 0.5, (clicks + 1) / (clicks + 2), 1 / (len(label) - clicks + 2))
    least = cost(slope, offset)
    for moved in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert cost(slope + moved[0], offset + moved[1]) > least
    factor, none = fit_line(logit, label, offset=False)
    assert none == 0
    assert cost(factor, 0) < min(cost(factor + 0.01, 0), cost(factor - 0.01, 0))


def test_isotonic_pieces_follow_a_bend_that_no_line_follows():
    logit, _ = drawn(1, 0, rows=20_000)
    bent = np.where(logit < 0, 0.3 * logit, 3 * logit)
    label = (np.random.default_rng(1).random(len(logit)) < 1 / (1 + np.exp(-bent))).astype(float)
    assert (
        cross_validated_loss("isotonic", logit, label, 32)
        < cross_validated_loss("platt", logit, label, 32) - 1e-3
    )
    at, wanted = fit_pieces(logit, label, 32)
    inner = (at > -2) & (at < 1)
    wished = np.where(at < 0, 0.3 * at, 3 * at)
    assert np.abs(wanted - wished)[inner].max() < 0.5  # 625 rows a piece: four deviations


@pytest.mark.parametrize("reference", [RANKER, NORMED], ids=["logit", "probability"])
@pytest.mark.parametrize("method", ["temperature", "platt", "isotonic", "best"])
def test_log_loss_falls_and_the_order_stays(reference, method, tmp_path):
    bench = planted(reference, tmp_path / "data", 2.5, -1.0)
    source = reference.model()
    result = run(Recalibrate(method=method), source, bench, tmp_path / "out")
    (held,) = batches(bench.validation, reference.signature, ROWS)
    with torch.no_grad():
        before, after = (m.module(**held.inputs).reshape(-1) for m in (source, result))
    label = held.label.numpy()
    assert point_estimates.auc(label, after.numpy()) == pytest.approx(
        point_estimates.auc(label, before.numpy()),
        abs=1e-4,  # float32 may tie what was not
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
    mapped_to = with_code(line.reasons, "output_mapped", method=line.format)
    assert mapped_to.fields["after"] < mapped_to.fields["before"]
    assert line.format in METHODS
    assert line.bytes_after == sum(
        t.nbytes for n, t in result.module.state_dict().items() if n.startswith("recalibration.")
    )


def test_a_map_is_part_of_the_graph(tmp_path):
    bench = planted(COMPACT, tmp_path / "data", 2.5, -1.0)
    for method in ("platt", "isotonic"):
        result = run(Recalibrate(method=method), COMPACT.model(), bench, tmp_path / method)
        path = tmp_path / f"{method}.onnx"
        lowered = lower(result.module, whole(COMPACT.signature), "onnxruntime", path)
        (held,) = batches(bench.validation, COMPACT.signature, ROWS)
        plain = {k: v.numpy() for k, v in held.inputs.items()}
        found = Session(path, threads=1).scores(plain)
        with torch.no_grad():
            expected = torch.sigmoid(result.module(**held.inputs).reshape(-1)).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 in another order
        assert lowered.served.model.recalibration.method == method


def test_what_follows_keeps_the_map(tmp_path):
    bench = planted(NORMED, tmp_path / "data", 2.5, -1.0)
    first = run(Recalibrate(), NORMED.model(), bench, tmp_path / "a")
    then = run(StaticInt8(), first, bench, tmp_path / "b")
    assert then.plan.of(OUTPUT) == first.plan.of(OUTPUT)
    assert torch.equal(then.module.recalibration.line, first.module.recalibration.line)
    tuned = run(FineTune(training=QUICKLY), first, bench, tmp_path / "c")
    assert torch.equal(tuned.module.recalibration.line, first.module.recalibration.line)
    with raises_code(StepRefused, "recalibrated_already"):
        run(Recalibrate(), first, bench, tmp_path / "d")


def test_the_best_map_may_be_none(tmp_path):
    bench = planted(NORMED, tmp_path / "data", 1.0, 0.0)
    result = run(Recalibrate(method="best"), NORMED.model(), bench, tmp_path / "out")
    line = result.plan.of(OUTPUT)
    assert line.format in {"as trained", "temperature", "platt"}
    if line.format == "as trained":
        with_code(line.reasons, "no_better_map", step="recalibrate")
        assert not result.network.modules


def test_a_model_that_orders_the_wrong_way_round_is_refused(tmp_path):
    bench = planted(NORMED, tmp_path / "data", -1.0, 0.0)
    with raises_code(StepRefused, "slope_not_positive"):
        run(Recalibrate(), NORMED.model(), bench, tmp_path / "out")


def test_scores_without_probabilities_are_refused(tmp_path):
    with raises_code(NothingToCompress, "probability_missing"):
        run(Recalibrate(), ATTENTION.model(), ATTENTION.bench(tmp_path / "d"), tmp_path / "out")


def test_the_outline_knows_the_bytes(tmp_path):
    bench = planted(RANKER, tmp_path / "data", 2.5, -1.0)
    for method in ("platt", "isotonic"):
        step = Recalibrate(method=method, knots=16)
        result = run(step, RANKER.model(), bench, tmp_path / method)
        foreseen: Model = dry_run(step, RANKER.model(), bench)
        assert foreseen.plan.of(OUTPUT).bytes_after == result.plan.of(OUTPUT).bytes_after

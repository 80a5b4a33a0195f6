"""``dimensions``: dropped dimensions of a table are replaced by their mean.

The importance of a dimension decides whether it is dropped. ``variance`` weights all rows equally,
``lookups`` by their lookups. ``gradient`` estimates with ``taylor`` how much the loss changes if a
dimension is replaced by its mean.

``selection`` is the matrix of zeros and ones that puts the kept columns in their places; a table
stores it as ``projection``. The result is a composed table: a narrower table, the projection and
the mean row. A ``Bench`` is the data that a step may use; without splits, a step has no rows.
"""

import pytest
import torch
from error_codes import raises_code
from hypothesis import given
from hypothesis import strategies as st
from models import RANKER
from reason_codes import require_reason
from signatures import replace_output
from torch.nn import functional as F

from compressors.contracts import Bench
from compressors.core.batches import batches
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.prune.tables.dimensions import (
    Dimensions,
    mean_row,
    remove_dimensions,
    taylor,
    variance,
)
from compressors.quantize.calibration.lookup_counts import lookup_counts


def draw_normal(seed: int, rows: int, dim: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 30),
    kept=st.sets(st.integers(0, 6), min_size=1),
)
def test_kept_dimensions_are_exact_and_dropped_dimensions_are_their_mean(seed, rows, kept):
    table, weight = (
        draw_normal(seed, rows, 7),
        draw_normal(seed + 1, rows, 1).abs().squeeze(1) + 0.01,
    )
    kept_columns = torch.tensor(sorted(kept))
    mean = mean_row(table, weight)
    narrow, selection, removed_mean = remove_dimensions(table, kept_columns, mean)
    decoded = narrow @ selection + removed_mean
    expected = mean.float().expand(rows, -1).clone()
    expected[:, kept_columns] = table[:, kept_columns]
    assert torch.equal(decoded, expected)  # products with zeros and ones round nothing


@given(seed=st.integers(0, 10**6), rows=st.integers(2, 30), kept=st.integers(1, 6))
def test_variance_importance_is_the_error_of_dropping_a_dimension(seed, rows, kept):
    table, weight = (
        draw_normal(seed, rows, 7),
        draw_normal(seed + 1, rows, 1).abs().squeeze(1) + 0.01,
    )
    importance = variance(table, weight)
    kept_columns = importance.argsort(descending=True)[:kept].sort().values
    mean = mean_row(table, weight)
    narrow, selection, removed_mean = remove_dimensions(table, kept_columns, mean)
    error_of_rows = (narrow @ selection + removed_mean - table).double()
    error = float((weight * error_of_rows.square().sum(dim=1)).sum() / weight.sum())
    # The rows are float32, and up to thirty numbers of size one are averaged.
    assert error == pytest.approx(
        float(importance.sort().values[: 7 - kept].sum()), rel=1e-4, abs=1e-6
    )


def test_lookups_importance_weights_rows_by_lookups(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    counts = lookup_counts(source, bench, ["item"])["item"]
    with torch.no_grad():
        weight = source.module.item.weight
        # Dimension 2 is not zero in rows with lookups, dimension 5 in the others, which are more.
        # So dimension 5 has the larger variance only if lookups are not the weights.
        weight.zero_()
        weight[counts > 0, 2] = draw_normal(0, int((counts > 0).sum()), 1).squeeze(1)
        weight[counts == 0, 5] = 0.9 * draw_normal(1, int((counts == 0).sum()), 1).squeeze(1)
    assert bool((counts > 0).any())
    for importance, expected_column in (("variance", 5), ("lookups", 2)):
        step = Dimensions(tables=("item",), keep=1, importance=importance)
        table = run(step, source, bench, tmp_path / importance).module.item
        assert table.projection.argmax() == expected_column


def test_gradient_importance_is_the_squared_derivative_of_the_loss_towards_the_mean(tmp_path):
    """The derivative is estimated by moving a dimension towards its mean in small steps."""
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    table = source.module.user.weight
    mean = mean_row(table.detach(), torch.ones(len(table), dtype=torch.float64))
    (importance,) = taylor(source.module, bench, {"user": mean}, 10_000).values()
    (batch,) = batches(bench.train, bench.signature, 1024)
    module = source.module.double()  # float32 has too few digits for differences of losses
    table = module.user.weight
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in batch.inputs.items()}

    def loss() -> float:
        with torch.no_grad():
            score = module(**inputs).reshape(-1)
            return float(F.binary_cross_entropy_with_logits(score, batch.label.double()))

    for dimension in range(6):
        original = table.detach().clone()
        losses = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                table[:, dimension] += step * (mean[dimension].float() - original[:, dimension])
            losses.append(loss())
            with torch.no_grad():
                table.copy_(original)
        derivative = (losses[0] - losses[1]) / 2e-4
        # ``taylor`` computes gradients in float32.
        assert importance[dimension] == pytest.approx(derivative**2, rel=1e-3, abs=1e-12)
    assert float(importance.max()) > 1e-7


def test_gradient_importance_drops_a_dimension_that_does_not_affect_the_loss(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    with torch.no_grad():  # zero all weights that read dimension 0 of ``user``
        source.module.cross.weight[:, 0] = 0
        source.module.cross.weight[0, :] = 0
        source.module.cross.bias[0] = 0
        source.module.hidden.weight[:, 0] = 0
        source.module.out.weight[:, 0] = 0
        source.module.user.weight[:, 0] *= 100
    keeps_dimension_0 = {}
    for importance in ("variance", "gradient"):
        step = Dimensions(tables=("user",), keep=5, importance=importance)
        table = run(step, source, bench, tmp_path / importance).module.user
        keeps_dimension_0[importance] = bool(table.projection[:, 0].any())
    assert keeps_dimension_0 == {"variance": True, "gradient": False}


def test_the_plan_line_has_the_low_rank_format_and_the_dimensions_step(tmp_path):
    result = run(Dimensions(), RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    line = result.plan.of("user")
    assert (line.format, line.steps) == ("low_rank", ("dimensions",))
    require_reason(line.reasons, "composed", step="dimensions")
    require_reason(line.reasons, "kept_dimensions", kept=3, dim=6, importance="variance")
    assert line.bytes_after == 4 * (
        3 * 6 + 6
    )  # float32: projection and mean row; the narrow table has its own line


def test_dimensions_skips_a_table_that_would_grow(tmp_path):
    result = run(Dimensions(keep=5), RANKER.model(), Bench(signature=RANKER.signature), tmp_path)
    # Before: 9 rows of 6 numbers. After: 9 rows of 5, a projection of 5 x 6, and the mean row.
    require_reason(result.plan.of("city").reasons, "not_smaller_composed", before=216, after=324)


@pytest.mark.parametrize("importance", ["lookups", "gradient"])
def test_data_driven_importance_requires_training_rows(importance, tmp_path):
    step = Dimensions(importance=importance)
    with raises_code(NothingToCompress, "rows_missing", missing=("train",)):
        run(step, RANKER.model(), Bench(signature=RANKER.signature), tmp_path)


def test_gradient_importance_without_gradients_raises_step_refused(tmp_path):
    bench, source = RANKER.bench(tmp_path / "data"), RANKER.model()
    with torch.no_grad():
        source.module.out.weight.zero_()
    with raises_code(StepRefused, "dimension_gradients_zero"):
        run(Dimensions(importance="gradient"), source, bench, tmp_path / "out")


def test_gradient_importance_for_retrieval_raises_loss_missing(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    signature = replace_output(bench.signature, kind="retrieval")
    retrieval_bench = bench.model_copy(update={"signature": signature})
    with raises_code(NothingToCompress, "loss_missing"):
        run(Dimensions(importance="gradient"), RANKER.model(), retrieval_bench, tmp_path / "out")

"""``drop_tables``: tables that do not improve the metric are replaced by their mean row.

``most_loss`` is the largest allowed decrease of the metric for all dropped tables together. The
networks ``RANKER`` and ``COMPACT`` are in ``tests/models.py``; rows of their tables except ``item``
have 6 float32 values.
"""

import pytest
import torch
from error_codes import raises_code
from models import COMPACT, RANKER, Reference, write_split
from reason_codes import require_reason

from compressors.contracts import Bench
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import run
from compressors.errors.compression import NothingToCompress
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import input_names, served_graphs
from compressors.metrics.validation_score import quality
from compressors.prune.tables.drop_tables import DropTables, permutation_loss
from compressors.quantize.calibration.lookup_counts import lookup_counts
from infra.onnxruntime.sessions import Session


def bench_with_predicted_labels(tmp_path, reference: Reference = RANKER) -> Bench:
    """Return a bench whose labels follow the network's predictions, so that tables matter."""
    module, signature = reference.model().module, reference.signature

    def predict(inputs):
        with torch.no_grad():
            return module(**inputs).reshape(-1)

    splits = {
        name: write_split(signature, reference.rows_of_tables(), tmp_path / name, seed, predict)
        for seed, name in enumerate(("train", "validation"))
    }
    return Bench(signature=signature, **splits)


def ranker_with_constant_table(name: str):
    """Return the ranker with a table of equal rows, so that no prediction depends on its ids."""
    source = RANKER.model()
    with torch.no_grad():
        source.module.get_submodule(name).weight.copy_(torch.ones(6).mul(0.25))
    return source


def test_a_table_of_equal_rows_is_dropped_without_loss(tmp_path):
    source, bench = ranker_with_constant_table("user"), bench_with_predicted_labels(tmp_path)
    before = quality(source.module, bench.signature, bench.validation)
    result = run(DropTables(tables=("user",)), source, bench, tmp_path / "out")
    line = result.plan.of("user")
    assert (line.format, line.bytes_after) == ("constant", 6 * 4)
    require_reason(line.reasons, "table_dropped", metric="auc", change=0.0)
    assert quality(result.module, bench.signature, bench.validation) == before


def test_tables_that_improve_the_metric_are_kept_and_the_plan_has_their_change(tmp_path):
    source, bench = RANKER.model(), bench_with_predicted_labels(tmp_path)
    before = quality(source.module, bench.signature, bench.validation)
    result = run(DropTables(), source, bench, tmp_path / "out")
    kept_lines = [line for line in result.plan.lines if line.role == "table" and not line.steps]
    assert "item" in {line.module for line in kept_lines}
    for line in kept_lines:
        assert line.format == "float32"
        assert require_reason(line.reasons, "table_kept", metric="auc").fields["change"] < 0
    assert quality(result.module, bench.signature, bench.validation) >= before


def test_the_total_loss_is_at_most_most_loss(tmp_path):
    source, bench = RANKER.model(), bench_with_predicted_labels(tmp_path)
    before = quality(source.module, bench.signature, bench.validation)
    dropped = []
    for most_loss in (0.0, 0.02, 0.2):
        result = run(DropTables(most_loss=most_loss), source, bench, tmp_path / str(most_loss))
        loss = before - quality(result.module, bench.signature, bench.validation)
        assert loss <= most_loss
        dropped.append(sum(line.format == "constant" for line in result.plan.lines))
    assert dropped == sorted(dropped)
    assert dropped[-1] > dropped[0]


def test_dropped_table_returns_its_mean_row_weighted_by_lookup_counts(tmp_path):
    source, bench = ranker_with_constant_table("city"), bench_with_predicted_labels(tmp_path)
    with torch.no_grad():  # rows that differ, so that the mean depends on the lookup counts
        source.module.city.weight.add_(0.1 * torch.arange(9).unsqueeze(1))
    result = run(DropTables(tables=("city",), most_loss=1), source, bench, tmp_path / "out")
    # The weight of a row is its lookup count plus 0.5, so that rows without lookups count too.
    counts = lookup_counts(source, bench, ["city"])["city"] + 0.5
    weight = source.module.city.weight.detach().double()
    expected = (counts / counts.sum()).unsqueeze(1).mul(weight).sum(dim=0).float()
    with torch.no_grad():
        rows = result.module.city(torch.tensor([[0, 8]]))
    torch.testing.assert_close(rows, expected.expand(1, 2, 6))


def test_permutation_loss_is_zero_for_a_table_of_equal_rows(tmp_path):
    source, bench = ranker_with_constant_table("user"), bench_with_predicted_labels(tmp_path)
    before = quality(source.module, bench.signature, bench.validation)
    # The decrease of the metric if the table's outputs are permuted between rows of the data.
    assert permutation_loss(source, bench, "user", before, repeats=2) == 0
    assert permutation_loss(source, bench, "item", before, repeats=2) > 0


@pytest.mark.parametrize(
    ("reference", "tables", "target"),
    [
        # ``city`` has single ids and ``genres`` of RANKER bags; TensorRT-RTX has the bag in the
        # nightly tier only. ``genres`` of COMPACT has two ids per row.
        (RANKER, ("city", "genres"), "onnxruntime"),
        pytest.param(RANKER, ("city", "genres"), "tensorrt-rtx", marks=pytest.mark.nightly),
        (COMPACT, ("genres",), "tensorrt-rtx"),
    ],
    ids=["Ranker-onnxruntime", "Ranker-tensorrt-rtx", "Compact-tensorrt-rtx"],
)
def test_the_graph_of_a_model_with_dropped_tables_has_its_scores(
    reference, tables, target, tmp_path
):
    source, bench = reference.model(), bench_with_predicted_labels(tmp_path, reference)
    signature, rows_of_tables = reference.signature, reference.rows_of_tables()
    step = DropTables(tables=tables, most_loss=1)  # any decrease of the AUC is allowed
    result = run(step, source, bench, tmp_path / "out")
    (graph,) = served_graphs(signature)
    lowered = lower(result.module, graph, target, tmp_path / "model.onnx")
    assert {table.module for table in lowered.tables} == set(rows_of_tables) - set(tables)
    inputs = generate_inputs(signature, rows_of_tables, 50)
    with torch.no_grad():
        expected = lowered.wrapper(*(inputs[name] for name in input_names(signature)))
    scores = Session(tmp_path / "model.onnx", threads=1).scores(
        {k: v.numpy() for k, v in inputs.items()}
    )
    # The graph adds float32 numbers in another order.
    torch.testing.assert_close(torch.from_numpy(scores), expected, rtol=1e-5, atol=1e-6)


def test_drop_tables_without_rows_raises_nothing_to_compress(tmp_path):
    with raises_code(NothingToCompress, "rows_missing", missing=("train", "validation")):
        run(DropTables(), RANKER.model(), Bench(signature=RANKER.signature), tmp_path / "out")

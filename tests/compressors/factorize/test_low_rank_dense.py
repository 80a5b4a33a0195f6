"""``low_rank_dense``: a layer becomes two, ``reduce`` and ``expand``, also for later steps.

The energy of a direction of the outputs is the sum of squares of the outputs in it. The setting
``most_error`` is the largest share of the outputs' energy that the factors may lose. By default,
the rank is a quarter of the smaller side of a layer.

The networks are those of ``models.py``. ``RANKER`` has the layers ``hidden`` (40 inputs, 16
outputs), ``capped`` and ``plain`` (16 and 16; ``plain`` has no bias), among others, and ``out`` (56
inputs, one output). ``COMPACT`` also has five dense layers, ``NORMED`` two, ``TIED`` only ``out``.
``CHAIN`` of ``chained_networks.py`` begins with the layers ``a`` and ``b``.
"""

from pathlib import Path

import hypothesis.strategies as st
import models
import numpy as np
import pytest
import torch
from chained_networks import CHAIN
from error_codes import HasReason, raises_code
from hypothesis import given
from model_scores import scores_of, stored_bytes
from models import (
    COMPACT,
    NORMED,
    RANKER,
    TIED,
    Graph,
    Reference,
    only_served_graph,
    plan_and_apply,
)
from narrow_networks import SIGNATURE, ResidualConcatNet
from reason_codes import codes_of, require_reason
from torch import Tensor, nn

from compressors.contracts import Bench, ModuleRecord, TargetName
from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.modules.factored import FactoredLinear
from compressors.core.runner import run
from compressors.core.state.module_state import build_module, load, map_tensors
from compressors.core.units import Unit
from compressors.distill.fine_tune import FineTune
from compressors.errors.compression import ModelRefused, NothingToCompress
from compressors.errors.steps import RowsMissing, StepRefused
from compressors.factorize.low_rank_dense import (
    LowRankDense,
    factorize,
    principal_outputs,
    rank_within,
)
from compressors.lower.audit import audit
from compressors.lower.comparison.parity import check_parity
from compressors.lower.export import lower
from compressors.prune.dense.channels import Channels
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.rewrite.equalize import Equalize
from compressors.rewrite.fold import Fold
from infra.onnxruntime.sessions import optimized_graph


def draw_normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def output_error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    return float((x @ (weight - other).T).square().sum())


def low_rank_product(weight: Tensor, moment: Tensor, rank: int) -> Tensor:
    """The product of the two factors, a matrix of the shape of ``weight``.

    ``moment`` is the second moment of the inputs, ``x.T @ x``.
    """
    _, directions = principal_outputs(weight, moment)
    reduce, expand = factorize(weight, directions, rank)
    return expand.double() @ reduce.double()


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31), st.data())
def test_factors_have_the_smallest_output_error_of_all_matrices_of_their_rank(
    inputs, outputs, seed, data
):
    weight = draw_normal(outputs, inputs, seed=seed)
    x = draw_normal(30, inputs, seed=seed + 1) @ draw_normal(inputs, inputs, seed=seed + 2)
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    energy, directions = principal_outputs(weight, x.T @ x)
    error = output_error(weight, low_rank_product(weight, x.T @ x, rank), x)
    total_energy = float(energy.sum())
    # The factors are float32.
    assert error == pytest.approx(float(energy[rank:].sum()), abs=1e-10 * total_energy)
    # By Eckart and Young, this is the best approximation of the outputs with that rank.
    left, values, right = torch.linalg.svd(x @ weight.T, full_matrices=False)
    best_outputs = (left[:, :rank] * values[:rank]) @ right[:rank]
    smallest_error = float((x @ weight.T - best_outputs).square().sum())
    assert error <= smallest_error + 1e-10 * total_energy
    torch.testing.assert_close(directions.T @ directions, torch.eye(outputs).double())


def test_factors_equal_the_factors_after_whitening_with_the_cholesky_factor():
    weight, x = (
        draw_normal(6, 9, seed=1),
        draw_normal(200, 9, seed=2) @ draw_normal(9, 9, seed=3),
    )
    root = torch.linalg.cholesky(x.T @ x)
    left, values, right = torch.linalg.svd(weight @ root, full_matrices=False)
    whitened = (left[:, :3] * values[:3]) @ right[:3] @ torch.linalg.inv(root)
    torch.testing.assert_close(low_rank_product(weight, x.T @ x, 3), whitened, rtol=1e-5, atol=1e-5)


def test_factors_without_data_equal_the_truncated_singular_value_decomposition():
    weight = draw_normal(6, 9, seed=1)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    expected = (left[:, :3] * values[:3]) @ right[:3]
    result = low_rank_product(weight, torch.eye(9).double(), 3)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@given(st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=8), st.floats(0.001, 0.999))
def test_rank_within_is_the_smallest_rank_within_the_error(values, most_error):
    energy = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = rank_within(energy, most_error)
    total = float(energy.sum())
    assert 1 <= rank <= len(values)
    assert float(energy[rank:].sum()) <= (most_error + 1e-9) * total
    if rank > 1:
        assert float(energy[rank - 1 :].sum()) > (most_error - 1e-9) * total


# --- the step --------------------------------------------------------------------------------


class LowRankInputsNet(nn.Module):
    """The inputs of ``wide`` have a large mean and nearly rank 3; the table adds a small part."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.spread = nn.Linear(3, 24)
        self.wide = nn.Linear(24, 24)
        self.out = nn.Linear(24, 1)
        nn.init.constant_(self.spread.bias, 5.0)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = self.spread(price[:, :3]) + self.user(user).sum(dim=1, keepdim=True) * 1e-4
        score: Tensor = self.out(torch.tanh(self.wide(x)))
        return score


LOW_RANK_INPUTS = Reference(LowRankInputsNet, SIGNATURE)


def factorize_reference(
    reference: Reference, folder: Path, **settings: float | bool | tuple[str, ...]
) -> tuple[Model, Model]:
    """Run ``LowRankDense`` with these settings on a reference; return source and result."""
    source = reference.model()
    bench = reference.bench(folder / "data")
    return source, run(LowRankDense(**settings), source, bench, folder / "out")


def relative_change_of_scores(first: Model, second: Model, reference: Reference) -> float:
    """Root mean squared difference of scores, as a share of the spread of the first model's."""
    before = scores_of(first.private(), reference)  # a copy in evaluation mode
    return float((scores_of(second, reference) - before).square().mean().sqrt() / before.std())


def test_weighted_factors_of_the_rank_of_the_inputs_hardly_change_scores(tmp_path):
    """The inputs of the layer have nearly rank 3, but its weights have rank 24."""
    source, result = factorize_reference(LOW_RANK_INPUTS, tmp_path / "a", layers=("wide",), rank=3)
    _, without_data = factorize_reference(
        LOW_RANK_INPUTS, tmp_path / "b", layers=("wide",), rank=3, weighted=False
    )
    # The remaining error is the part from the table, which is about 1e-4 of the inputs.
    assert relative_change_of_scores(source, result, LOW_RANK_INPUTS) < 0.01
    assert relative_change_of_scores(source, without_data, LOW_RANK_INPUTS) > 0.5


def test_most_error_finds_a_rank_for_each_layer(tmp_path):
    _, result = factorize_reference(
        LOW_RANK_INPUTS, tmp_path, layers=("wide", "spread"), most_error=0.01
    )
    assert result.module.wide.rank <= 3
    line = result.plan.of("wide")
    assert codes_of(line.reasons) == ["rank_searched", "rank_loss"]
    # The largest rank that saves weights of a 24x24 layer is 11: 11 * (24 + 24) < 24 * 24.
    require_reason(line.reasons, "rank_searched", most_error=0.01, rank=11)
    assert result.plan.of("spread").format == "float32" or result.module.spread.rank <= 2


def test_a_layer_whose_rank_saves_no_bytes_is_kept_with_a_reason(tmp_path):
    bench = RANKER.bench(tmp_path / "data")
    step = LowRankDense(layers=("hidden", "plain"), most_error=1e-6)
    plan = run(step, RANKER.model(), bench, tmp_path / "out").plan
    assert plan.of("plain").format == "float32"
    require_reason(plan.of("plain").reasons, "found_rank_not_smaller")
    predicted = dry_run(step, RANKER.model(), Bench(signature=RANKER.signature)).plan
    # The parts of a factored layer have at most the bytes of the layer before the step.
    for line in plan.lines:
        if predicted.of(line.module) is None:
            continue
        bytes_of_parts = sum(x.bytes_after for x in plan.lines if x.module.startswith(line.module))
        largest_bytes = sum(
            x.bytes_before for x in predicted.lines if x.module.startswith(line.module)
        )
        assert bytes_of_parts <= largest_bytes


def test_plan_lines_of_both_parts_have_the_stored_bytes(tmp_path):
    source, result = factorize_reference(RANKER, tmp_path)
    plan, stored = result.plan, map_tensors(tmp_path / "out")
    assert sum(line.bytes_after for line in plan.lines) == stored_bytes(stored)
    hidden = plan.of("hidden")
    assert (hidden.format, hidden.bytes_after, hidden.steps) == (
        "factored",
        0,
        ("low_rank_dense",),
    )
    assert codes_of(hidden.reasons) == ["factorized", "rank_loss"]
    require_reason(hidden.reasons, "factorized", inputs=40, rank=4, outputs=16)
    require_reason(hidden.reasons, "rank_loss", rank=4)
    # float32 weights of rank 4, and the bias in ``expand``
    assert plan.of("hidden.reduce").bytes_after == 4 * 40 * 4
    assert plan.of("hidden.expand").bytes_after == 4 * (4 * 16 + 16)
    for name in ("reduce", "expand"):
        line = plan.of(f"hidden.{name}")
        assert line.bytes_before == 0
        require_reason(line.reasons, "part_of", unit="hidden")
    # 56 weights from 56 inputs to one output; factors of rank 1 have 56 + 1 numbers.
    require_reason(plan.of("out").reasons, "rank_not_smaller", rank=1, before=56, after=57)
    assert result.network.modules["plain"].settings == {
        "in_features": 16,
        "out_features": 16,
        "rank": 4,
        "bias": False,
    }
    assert result.module.plain.expand.bias is None
    assert source.module.hidden.weight.shape == (16, 40)


def test_a_network_of_small_layers_raises_nothing_to_compress(tmp_path):
    with raises_code(NothingToCompress, "units_missing") as caught:
        factorize_reference(TIED, tmp_path)
    assert caught.value.fields["reasons"]["out"] == (
        Reason("rank_not_smaller", rank=1, before=24, after=25),
    )


def test_later_steps_run_on_the_parts(tmp_path):
    model, bench = NORMED.model(), NORMED.bench(tmp_path / "data")
    steps = (
        Fold(),
        LowRankDense(rank=2),
        FineTune(training=models.SHORT_TRAINING),
        StaticInt8(layers=("hidden",)),
    )
    for number, step in enumerate(steps):
        predicted = dry_run(step, model, bench).plan
        before = model
        model = run(step, model, bench, tmp_path / str(number))
        assert sum(line.bytes_after for line in predicted.lines) == sum(
            line.bytes_after for line in model.plan.lines
        )
        if isinstance(step, FineTune):
            for name in ("reduce", "expand"):
                part = f"hidden.{name}.weight"
                old, new = (m.module.get_parameter(part) for m in (before, model))
                assert not torch.equal(old, new)
    for name in ("hidden.reduce", "hidden.expand"):
        assert model.plan.of(name).steps == ("fine_tune", "static_int8")
        assert model.network.modules[name].format == "static_int8"
    assert model.network.modules["hidden"].format == "factored"
    loaded = load(model.architecture, model.network, tmp_path / "3")
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.module.state_dict()))


def test_equalize_scales_between_parts_of_factored_layers(tmp_path):
    _, factored = factorize_reference(CHAIN, tmp_path, layers=("a", "b"))
    result = run(Equalize(), factored, CHAIN.bench(tmp_path / "data"), tmp_path / "equal")
    # ``producer`` is the layer that outputs the scaled channels.
    require_reason(result.plan.of("b.reduce").reasons[:1], "inputs_scaled", producer="a.expand")
    # float32 sums in another order
    assert relative_change_of_scores(factored, result, CHAIN) < 1e-4


def test_channels_skips_a_factored_layer_with_a_reason(tmp_path):
    _, result = factorize_reference(RANKER, tmp_path, layers=("capped",))
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(Channels(), result, RANKER.bench(tmp_path / "data"), tmp_path / "again")
    reasons = caught.value.fields["reasons"]["hidden"]
    assert reasons == HasReason("prune_before_factorizing", module="capped")


def test_pruning_another_width_keeps_factored_layers(tmp_path):
    """The input and output channels of the factored layer are not the pruned ones.

    The layer ``again`` follows the layer ``left`` in a branch of its width. The branch is
    concatenated with the output of the layer ``right``, which is pruned.
    """
    reference = Reference(ResidualConcatNet, SIGNATURE, {"left": 16, "right": 24, "deep": 32})
    bench = reference.bench(tmp_path / "data")
    factored = run(LowRankDense(layers=("again",)), reference.model(), bench, tmp_path / "0")
    result = run(Channels(layers=("right",)), factored, bench, tmp_path / "1")
    assert isinstance(result.module.again, FactoredLinear)
    assert result.module.right.out_features < 24
    with torch.no_grad():
        assert torch.equal(result.module.again.reduce.weight, factored.module.again.reduce.weight)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_the_graph_of_factored_layers_has_the_scores_of_its_module(target: TargetName, tmp_path):
    bench = COMPACT.bench(tmp_path / "data")
    model = run(LowRankDense(), COMPACT.model(), bench, tmp_path / "0")
    model = run(StaticInt8(), model, bench, tmp_path / "1")
    path = tmp_path / "model.onnx"
    lowered = lower(model.module, only_served_graph(COMPACT.signature), target, path)
    graph = Graph(model, lowered, COMPACT.signature, path)
    inputs = graph.rows(1500)
    check_parity(graph.run_in_torch(inputs), graph.run_in_onnx(inputs), model.plan, target)
    if target == "onnxruntime":
        # The audit checks that the optimized graph keeps the formats of the plan.
        report = audit(optimized_graph(path), model.plan, lowered.tables)
        # Four factored layers have two products each; ``out`` is not factored and has one.
        assert report.int8_products == 9
        assert np.isfinite(graph.run_in_onnx(inputs)).all()


def test_unweighted_factors_need_no_rows_and_weighted_factors_raise_without_rows(tmp_path):
    bench = Bench(signature=RANKER.signature)
    result = run(LowRankDense(weighted=False), RANKER.model(), bench, tmp_path / "out")
    assert isinstance(result.module.hidden, FactoredLinear)
    with raises_code(NothingToCompress, "rows_missing", missing=("calibration",)):
        run(LowRankDense(), RANKER.model(), bench, tmp_path / "again")
    with raises_code(RowsMissing, "weighted_needs_rows"):
        plan_and_apply(LowRankDense(), RANKER.model(), bench)


def test_a_layer_that_is_never_called_raises_step_refused(tmp_path):
    source = LOW_RANK_INPUTS.model()
    source.module.spare = nn.Linear(20, 20)
    with raises_code(StepRefused, "layer_not_called", layer="spare"):
        plan_and_apply(LowRankDense(), source, LOW_RANK_INPUTS.bench(tmp_path / "data"))


def test_incomplete_records_and_wrong_shapes_of_factored_layers_raise_errors():
    record = ModuleRecord(
        kind="linear", format="factored", settings={"in_features": 4, "out_features": 4}
    )
    with raises_code(ModelRefused, "record_incomplete", name="hidden") as caught:
        build_module("hidden", record)
    assert "bias" in caught.value.fields["problem"]
    stored = {"reduce.weight": torch.zeros(2, 4), "expand.weight": torch.zeros(2, 4)}
    with pytest.raises(ValueError, match=r"expand.weight of \(4, 2\) was given \(2, 4\)"):
        FactoredLinear(4, 4, 2, bias=False, stored=stored)
    empty = FactoredLinear(4, 4, 2, bias=True)
    assert all(weight.is_meta for weight in empty.parameters())
    assert [unit.part_of for unit in Unit.of(nn.Sequential(empty))] == [None, "0", "0"]

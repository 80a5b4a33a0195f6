"""``fold``: folded norms, removed dead channels, and reported columns with only zero weights.

The networks are in ``tests/chained_networks.py`` (``NORM_FIRST``, ``BLOCK``), ``tests/models.py``
(``NORMED``, ``COMPACT``) and ``examples/dcnv2.py``. A batch norm is folded into the dense layer
directly before or after it, and the factors and offsets of a layer norm into all its consumers.

A channel is dead if its output is constant or multiplied by zero weights only. The plan line
``(other)`` is for tensors that belong to no table or dense layer. In the fields of reasons,
``producer`` outputs channels, and ``consumer`` reads them.
"""

import copy
from pathlib import Path

import hypothesis.strategies as st
import models
import onnx
import pytest
import torch
from chained_networks import BLOCK, NORM_FIRST, NormFirst
from error_codes import HasReason, raises_code
from hypothesis import given
from model_scores import float32_rounding, scores_of
from models import COMPACT, NORMED, Reference, only_served_graph
from narrow_networks import SIGNATURE
from reason_codes import codes_of, require_reason
from torch import Tensor, nn
from torch.nn import functional as F

from compressors.contracts import Bench, DenseInput, IdInput, Output, Signature
from compressors.contracts.reasons import Reason
from compressors.core.dry_run import dry_run
from compressors.core.model import Model
from compressors.core.modules.formats import FoldedNorm
from compressors.core.runner import run
from compressors.distill.fine_tune import FineTune
from compressors.errors.compression import NothingToCompress
from compressors.errors.steps import StepRefused
from compressors.lower.export import lower
from compressors.prune.dense.channels import Channels
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.rewrite.fold import Fold, batch_norm_factors, scale_inputs, scale_outputs
from compressors.rewrite.unread_features import unread_features
from examples.dcnv2 import DCNv2
from infra.onnxruntime.sessions import optimized_graph

FIELDS = [{"name": "user", "rows": 30}, {"name": "item", "rows": 50}]
DCN = Reference(
    DCNv2,
    Signature(
        inputs=(
            IdInput(name="user", table="tables.user"),
            IdInput(name="item", table="tables.item"),
            DenseInput(name="dense", shape=(3,)),
        ),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    ),
    {"fields": FIELDS, "dense": 3, "dim": 8, "hidden": [32, 16], "batch_norm": True},
)


def fold_reference(
    reference: Reference, folder: Path, source: Model | None = None
) -> tuple[Model, Model]:
    """Return the source, by default the reference's model, and the result of ``Fold`` on it."""
    source = source or reference.model()
    return source, run(Fold(), source, reference.bench(folder / "data"), folder / "out")


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_scaled_outputs_and_inputs_equal_a_factor_and_an_offset_after_and_before_the_layer(
    inputs, outputs, has_bias, seed
):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, weight = numbers(5, inputs), numbers(outputs, inputs)
    bias = numbers(outputs) if has_bias else None
    scale, shift = numbers(outputs), numbers(outputs)
    after = F.linear(x, *scale_outputs(weight, bias, scale, shift))
    torch.testing.assert_close(after, F.linear(x, weight, bias) * scale + shift)
    scale, shift = numbers(inputs), numbers(inputs)
    before = F.linear(x, *scale_inputs(weight, bias, scale, shift))
    torch.testing.assert_close(before, F.linear(x * scale + shift, weight, bias))


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_factors_compute_the_norm_in_evaluation_mode(affine):
    norm = nn.BatchNorm1d(5, eps=1e-3, affine=affine).double().eval()
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.2, 2.0)
    scale, shift = batch_norm_factors(norm)
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(x * scale + shift, norm(x))


@pytest.mark.parametrize(
    ("reference", "folded_norms"),
    [
        (NORMED, ["norm"]),
        (DCN, ["perceptron.1", "perceptron.5"]),
        (NORM_FIRST, ["first", "second"]),  # a sum also adds the input of ``third``
        (BLOCK, []),  # layer norms remain
    ],
    ids=["normed", "dcnv2", "norm-first", "block"],
)
def test_fold_removes_norms_and_keeps_scores(reference, folded_norms, tmp_path):
    source, result = fold_reference(reference, tmp_path)
    # ``private`` returns a copy in evaluation mode.
    before, after = scores_of(source.private(), reference), scores_of(result, reference)
    assert (after - before).abs().max() <= float32_rounding(before)
    norms = [n for n, part in result.module.named_modules() if isinstance(part, FoldedNorm)]
    assert norms == folded_norms
    other = result.plan.of("(other)")
    assert (other.bytes_after < other.bytes_before) == bool(folded_norms)
    for name in folded_norms:
        assert name in require_reason(other.reasons, "folded_norms").fields["norms"]


def test_the_affine_part_of_a_layer_norm_is_folded_into_all_its_consumers(tmp_path):
    _, result = fold_reference(BLOCK, tmp_path)
    for norm in (result.module.first, result.module.second):
        assert bool((norm.weight == 1).all())
        assert not bool(norm.bias.any())
    assert bool((result.module.last.weight == 1).all())
    for name in ("query", "key", "value"):
        assert result.plan.of(name).reasons == (Reason("norm_folded", step="fold", norm="first"),)
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(Fold(), result, BLOCK.bench(tmp_path / "data"), tmp_path / "again")
    assert caught.value.fields["reasons"]["query"] == (Reason("norm_already_folded", norm="first"),)


def test_a_norm_with_an_offset_before_a_layer_without_bias_is_kept(tmp_path):
    reference = Reference(NormFirst, SIGNATURE, {"bias": False})
    source, result = fold_reference(reference, tmp_path)
    assert isinstance(result.module.first, FoldedNorm)
    assert isinstance(result.module.second, nn.BatchNorm1d)
    kept_norm = require_reason(result.plan.of("plain").reasons, "norm_kept", norm="second")
    assert kept_norm.fields["why"] == Reason("no_bias_for_offset", layer="deep")
    assert torch.equal(source.module.deep.weight, result.module.deep.weight)


def test_a_norm_without_an_offset_is_folded_into_a_layer_without_bias(tmp_path):
    reference = Reference(NormFirst, SIGNATURE, {"bias": False})
    source = reference.model()
    nn.init.zeros_(source.module.second.running_mean)
    source, result = fold_reference(reference, tmp_path, source)
    assert isinstance(result.module.second, FoldedNorm)
    assert result.plan.of("plain").reasons == (Reason("norm_folded", step="fold", norm="second"),)
    before = scores_of(source.private(), reference)
    assert (scores_of(result, reference) - before).abs().max() <= float32_rounding(before)


def test_norms_of_layers_that_do_not_match_the_pattern_are_kept(tmp_path):
    bench = DCN.bench(tmp_path / "data")
    result = run(Fold(layers=("perceptron.4",)), DCN.model(), bench, tmp_path / "out")
    assert isinstance(result.module.perceptron[1], nn.BatchNorm1d)
    assert isinstance(result.module.perceptron[5], FoldedNorm)


# --- dead channels ---------------------------------------------------------------------------


def with_dead_channels(reference: Reference = NORMED) -> Model:
    """Return a model in which three channels of ``hidden`` are dead.

    Channel 3 has zero weights, channel 7 a zero factor in the norm, and ``out`` has zero weights
    for channel 5.
    """
    source = reference.model()
    # A generator with a fixed seed, because for some constants the scores hardly change.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        source.module.hidden.weight[3] = 0
        source.module.norm.weight[7] = 0
        source.module.norm.bias.uniform_(0.1, 0.5, generator=generator)  # constants other than zero
        source.module.out.weight[:, 5] = 0
    return source


def test_dead_channels_are_removed_and_their_constant_output_is_kept(tmp_path):
    source, result = fold_reference(NORMED, tmp_path, with_dead_channels())
    assert result.network.architecture.config == {"width": 9}
    assert result.module.hidden.weight.shape == (9, 8)
    hidden = result.plan.of("hidden").reasons
    require_reason(hidden, "dead_channels", count=3, channels=12, width="width")
    assert result.plan.of("out").reasons == (
        Reason("dead_inputs", step="fold", producers=("hidden",)),
    )
    before = scores_of(source.private(), NORMED)
    assert (scores_of(result, NORMED) - before).abs().max() <= float32_rounding(before)
    # Without the constants, scores change.
    without_constants = copy.deepcopy(result)
    without_constants.module.out.bias = source.module.out.bias
    assert (scores_of(without_constants, NORMED) - before).abs().max() > 1e-3


def test_the_dry_run_of_fold_has_the_plan_of_its_result(tmp_path):
    source = with_dead_channels()
    result = run(Fold(), source, NORMED.bench(tmp_path / "data"), tmp_path / "out")
    assert dry_run(Fold(), source, Bench(signature=NORMED.signature)).plan == result.plan


def test_zeros_of_placeholders_are_not_dead_channels(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    step = models.default_step(models.Fold)
    predicted = dry_run(Channels(keep=0.7), NORMED.model(), bench)
    for part in predicted.module.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(torch.zeros(()).expand(part.weight.shape))
    folded = dry_run(step, predicted, bench)
    assert folded.network.architecture.config == {"width": 8}
    assert folded.plan.of("hidden").reasons[-1] == Reason("norm_folded", step="fold", norm="norm")


def test_a_channel_whose_relu_is_always_zero_is_removed_only_if_rows_are_evaluated(tmp_path):
    source = NORMED.model()
    with torch.no_grad():
        source.module.norm.bias[2] = -60.0  # zero on all rows, which the weights do not prove
    bench = NORMED.bench(tmp_path / "data")
    assert run(Fold(), source, bench, tmp_path / "a").network.architecture.config == {}
    result = run(Fold(rows=96), source, bench, tmp_path / "b")
    assert result.network.architecture.config == {"width": 11}
    before = scores_of(source.private(), NORMED)
    assert (scores_of(result, NORMED) - before).abs().max() <= float32_rounding(before)


def test_a_dead_channel_before_a_layer_without_bias_is_kept(tmp_path):
    """``plain`` has no bias to which the constant of a dead channel of ``capped`` can be added."""
    source = COMPACT.model()
    with torch.no_grad():
        source.module.capped.weight[4] = 0
        source.module.capped.bias[4] = 0.5
        source.module.hidden.weight[0] = 0  # all layers of this width lose equally many
        source.module.plain.weight[2] = 0
    bench = COMPACT.bench(tmp_path / "data")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(Fold(), source, bench, tmp_path / "out")
    assert caught.value.fields["reasons"]["cross"] == (Reason("nothing_to_fold"),)


def test_layers_with_a_common_width_lose_the_smallest_count_of_dead_channels(tmp_path):
    source = COMPACT.model()  # hidden, capped and plain are all ``width`` wide
    with torch.no_grad():
        for layer, count in ((source.module.hidden, 3), (source.module.capped, 2)):
            layer.weight[:count] = 0
            layer.bias[:count] = 0.0
        source.module.plain.weight[:4] = 0
    bench = COMPACT.bench(tmp_path / "data")
    result = run(Fold(), source, bench, tmp_path / "out")
    assert result.network.architecture.config == {"width": 14}
    before = scores_of(source.private(), COMPACT)
    assert (scores_of(result, COMPACT) - before).abs().max() <= float32_rounding(before)


class NormStatisticReadingNet(nn.Module):
    """Adds the running variances of its norm to the score."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.hidden, self.norm = nn.Linear(9, width), nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = self.norm(self.hidden(torch.cat([self.user(user), price], dim=1)))
        score: Tensor = self.out(F.relu(x)) + self.norm.running_var.sum()
        return score


def test_a_norm_whose_statistics_other_code_reads_is_kept(tmp_path):
    reference = Reference(NormStatisticReadingNet, SIGNATURE)
    with raises_code(NothingToCompress, "units_missing") as caught:
        fold_reference(reference, tmp_path)
    reason = Reason("weight_read_elsewhere")
    assert caught.value.fields["reasons"]["hidden"] == HasReason(
        "consumer_fixed", consumer="norm", why=reason
    )


def test_a_fold_that_changes_scores_raises_step_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("compressors.rewrite.fold.scale_outputs", lambda w, b, *_: (w, b))
    with raises_code(StepRefused, "folded_scores_differ"):
        fold_reference(NORMED, tmp_path)


# --- columns with only zero weights ----------------------------------------------------------


def test_input_columns_that_no_weight_reads_are_reported(tmp_path):
    source = NORMED.model()
    with torch.no_grad():
        source.module.hidden.weight[:, [1, 4, 7]] = 0  # two of the table's six, the second price
    plan = run(Fold(), source, NORMED.bench(tmp_path / "data"), tmp_path / "out").plan
    assert codes_of(plan.of("user").reasons) == ["wrong_role", "columns_unread"]
    require_reason(plan.of("user").reasons, "columns_unread", columns=(1, 4))
    assert plan.of("hidden").reasons[-1] == Reason(
        "input_columns_unread", columns=(1,), input="price"
    )


def test_columns_that_a_cross_product_reads_are_not_reported_as_unread():
    crossed = DCN.model()
    with torch.no_grad():
        for layer in (crossed.module.cross[0], crossed.module.perceptron[0]):
            layer.weight[:, 2] = 0
    assert not unread_features(crossed.module, DCN.signature)  # the cross product reads them
    with torch.no_grad():
        for layer in crossed.module.cross:
            layer.weight[:, 2] = 0
        crossed.module.head.weight[:, 2] = 0
    assert unread_features(crossed.module, DCN.signature) == {"tables.user": (2,)}


class ComparisonNet(nn.Module):
    """Compares the price with 0.

    The comparison turns a NaN into False, so only finite values show that the score depends on it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.hidden, self.out = nn.Linear(9, 8), nn.Linear(9, 1)
        with torch.no_grad():
            self.hidden.weight[:, 4:] = 0

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = torch.cat([self.user(user), price], dim=1)
        cheap = (price[:, :1] < 0).float()
        score: Tensor = self.out(torch.cat([F.relu(self.hidden(x)), cheap], dim=1))
        return score


def test_columns_that_only_a_comparison_reads_are_not_reported_as_unread():
    model = Reference(ComparisonNet, SIGNATURE).model()
    assert unread_features(model.module, SIGNATURE) == {"price": (1, 2, 3, 4)}


# --- later steps -----------------------------------------------------------------------------


def test_later_steps_run_on_a_folded_network(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    model = run(Fold(), NORMED.model(), bench, tmp_path / "0")
    steps = (Channels(keep=0.7), FineTune(training=models.SHORT_TRAINING), StaticInt8())
    for number, step in enumerate(steps, 1):
        model = run(step, model, bench, tmp_path / str(number))
    assert model.plan.of("hidden").steps == ("fold", "channels", "fine_tune", "static_int8")
    assert isinstance(model.module.norm, FoldedNorm)


def optimized_graph_of(model: Model, reference: Reference, folder: Path) -> onnx.GraphProto:
    """Lower a model and return the graph that ONNX Runtime executes."""
    path = folder / "model.onnx"
    lower(model.module, only_served_graph(reference.signature), "onnxruntime", path)
    return optimized_graph(path)


def test_int8_layers_are_adjacent_in_the_graph_after_their_norm_is_folded(tmp_path):
    bench = DCN.bench(tmp_path / "data")
    quantized = run(StaticInt8(), DCN.model(), bench, tmp_path / "plain")
    unfolded_graph = optimized_graph_of(quantized, DCN, tmp_path)
    assert sum(node.op_type == "BatchNormalization" for node in unfolded_graph.node) == 2
    model = run(
        StaticInt8(), run(Fold(), DCN.model(), bench, tmp_path / "0"), bench, tmp_path / "1"
    )
    graph = optimized_graph_of(model, DCN, tmp_path)
    kinds = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("QGemm") == 6  # all dense layers
    producer = {output: node for node in graph.node for output in node.output}
    (second,) = (
        node
        for node in graph.node
        if node.op_type == "QGemm" and "perceptron.4.codes" in "".join(node.input)
    )
    operators_between, node = [], producer[second.input[0]]
    while node.op_type != "QGemm":
        operators_between.append(node.op_type)
        node = producer[node.input[0]]
    # The Clip is the Relu, computed on the integers that the previous product outputs.
    assert operators_between == ["Clip"]


class ConstantSoftmaxNet(nn.Module):
    """Multiplies its features by a softmax of parameters, which depends on no input."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.first, self.second = nn.Parameter(torch.randn(9)), nn.Parameter(torch.randn(9))
        self.out = nn.Linear(9, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        share = torch.softmax(self.first * 2 + self.second.exp(), dim=0)
        score: Tensor = self.out(torch.cat([self.user(user), price], dim=1) * share)
        return score


def test_values_that_depend_on_no_input_are_one_initializer_of_the_graph(tmp_path):
    """The export folds constants, so a runtime does not have to."""
    path = tmp_path / "model.onnx"
    module = Reference(ConstantSoftmaxNet, SIGNATURE).model().module
    lower(module, only_served_graph(SIGNATURE), "onnxruntime", path)
    graph = onnx.load(path).graph
    assert not {"Softmax", "Exp"} & {node.op_type for node in graph.node}
    (product,) = (node for node in graph.node if node.op_type == "Mul")
    initializers = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    (share,) = (initializers[name] for name in product.input if name in initializers)
    expected = torch.softmax(module.first * 2 + module.second.exp(), dim=0)
    torch.testing.assert_close(torch.from_numpy(share.copy()), expected.detach())
    # Two arrays of 9 numbers: the softmax, and the weight of ``out``.
    assert sum(array.size == 9 for array in initializers.values()) == 2

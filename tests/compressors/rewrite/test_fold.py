"""Norms become part of layers and dead channels go: the same scores from fewer operators."""

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
from models import COMPACT, NORMED, Reference, whole
from narrow_networks import SCHEMA
from reason_codes import codes_of, with_code
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
from compressors.rewrite.fold import Fold, batch_norm_factors, scaled_inputs, scaled_outputs
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


def folded(reference: Reference, folder: Path, source: Model | None = None) -> tuple[Model, Model]:
    source = source or reference.model()
    return source, run(Fold(), source, reference.bench(folder / "data"), folder / "out")


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_factor_and_an_offset_become_part_of_the_layer(inputs, outputs, biased, seed):
    drawn = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float64)

    x, weight = numbers(5, inputs), numbers(outputs, inputs)
    bias = numbers(outputs) if biased else None
    scale, shift = numbers(outputs), numbers(outputs)
    after = F.linear(x, *scaled_outputs(weight, bias, scale, shift))
    torch.testing.assert_close(after, F.linear(x, weight, bias) * scale + shift)
    scale, shift = numbers(inputs), numbers(inputs)
    before = F.linear(x, *scaled_inputs(weight, bias, scale, shift))
    torch.testing.assert_close(before, F.linear(x * scale + shift, weight, bias))


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_is_a_factor_and_an_offset(affine):
    norm = nn.BatchNorm1d(5, eps=1e-3, affine=affine).double().eval()
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.2, 2.0)
    scale, shift = batch_norm_factors(norm)
    x = torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(x * scale + shift, norm(x))


@pytest.mark.parametrize(
    ("reference", "gone"),
    [
        (NORMED, ["norm"]),
        (DCN, ["perceptron.1", "perceptron.5"]),
        (NORM_FIRST, ["first", "second"]),
        (BLOCK, []),
    ],
    ids=["normed", "dcnv2", "norm-first", "block"],
)
def test_scores_stay_the_same_and_the_norms_are_gone(reference, gone, tmp_path):
    source, result = folded(reference, tmp_path)
    before, after = scores_of(source.private(), reference), scores_of(result, reference)
    assert (after - before).abs().max() <= float32_rounding(before)
    norms = [n for n, part in result.module.named_modules() if isinstance(part, FoldedNorm)]
    assert norms == gone
    other = result.plan.of("(other)")
    assert (other.bytes_after < other.bytes_before) == bool(gone)
    for name in gone:
        assert name in with_code(other.reasons, "folded_norms").fields["norms"]


def test_the_affine_part_of_a_norm_goes_into_all_that_reads_it(tmp_path):
    _, result = folded(BLOCK, tmp_path)
    for norm in (result.module.first, result.module.second):
        assert bool((norm.weight == 1).all())
        assert not bool(norm.bias.any())
    assert bool((result.module.last.weight == 1).all())
    for name in ("query", "key", "value"):
        assert result.plan.of(name).reasons == (Reason("norm_folded", step="fold", norm="first"),)
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(Fold(), result, BLOCK.bench(tmp_path / "data"), tmp_path / "again")
    assert caught.value.fields["reasons"]["query"] == (Reason("norm_already_folded", norm="first"),)


def test_a_layer_without_bias_cannot_take_an_offset(tmp_path):
    reference = Reference(NormFirst, SCHEMA, {"bias": False})
    source, result = folded(reference, tmp_path)
    assert isinstance(result.module.first, FoldedNorm)
    assert isinstance(result.module.second, nn.BatchNorm1d)
    stays = with_code(result.plan.of("plain").reasons, "norm_kept", norm="second")
    assert stays.fields["why"] == Reason("no_bias_for_offset", layer="deep")
    assert torch.equal(source.module.deep.weight, result.module.deep.weight)


def test_a_norm_without_an_offset_goes_into_a_layer_without_bias(tmp_path):
    reference = Reference(NormFirst, SCHEMA, {"bias": False})
    source = reference.model()
    nn.init.zeros_(source.module.second.running_mean)
    source, result = folded(reference, tmp_path, source)
    assert isinstance(result.module.second, FoldedNorm)
    assert result.plan.of("plain").reasons == (Reason("norm_folded", step="fold", norm="second"),)
    before = scores_of(source.private(), reference)
    assert (scores_of(result, reference) - before).abs().max() <= float32_rounding(before)


def test_layers_that_are_not_named_keep_their_norms(tmp_path):
    bench = DCN.bench(tmp_path / "data")
    result = run(Fold(layers=("perceptron.4",)), DCN.model(), bench, tmp_path / "out")
    assert isinstance(result.module.perceptron[1], nn.BatchNorm1d)
    assert isinstance(result.module.perceptron[5], FoldedNorm)


# --- dead channels ---------------------------------------------------------------------------


def with_dead_channels(reference: Reference = NORMED) -> Model:
    """One row of zeros, one factor of zero in the norm, one channel that nothing reads."""
    source = reference.model()
    # Of its own: with some constants from the global generator the scores hardly depend on them.
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad():
        source.module.hidden.weight[3] = 0
        source.module.norm.weight[7] = 0
        source.module.norm.bias.uniform_(0.1, 0.5, generator=drawn)  # dead channels output numbers
        source.module.out.weight[:, 5] = 0
    return source


def test_dead_channels_go_and_their_constant_stays(tmp_path):
    source, result = folded(NORMED, tmp_path, with_dead_channels())
    assert result.network.architecture.config == {"width": 9}
    assert result.module.hidden.weight.shape == (9, 8)
    hidden = result.plan.of("hidden").reasons
    with_code(hidden, "dead_channels", count=3, channels=12, width="width")
    assert result.plan.of("out").reasons == (
        Reason("dead_inputs", step="fold", makers=("hidden",)),
    )
    before = scores_of(source.private(), NORMED)
    assert (scores_of(result, NORMED) - before).abs().max() <= float32_rounding(before)
    # Without the constants it would be another network.
    silent = copy.deepcopy(result)
    silent.module.out.bias = source.module.out.bias
    assert (scores_of(silent, NORMED) - before).abs().max() > 1e-3


def test_what_is_dead_is_predicted(tmp_path):
    source = with_dead_channels()
    result = run(Fold(), source, NORMED.bench(tmp_path / "data"), tmp_path / "out")
    assert dry_run(Fold(), source, Bench(signature=NORMED.signature)).plan == result.plan


def test_stand_ins_are_not_taken_for_dead_channels(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    student = models.default(models.Fold)
    predicted = dry_run(Channels(keep=0.7), NORMED.model(), bench)
    for part in predicted.module.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(torch.zeros(()).expand(part.weight.shape))
    again = dry_run(student, predicted, bench)
    assert again.network.architecture.config == {"width": 8}
    assert again.plan.of("hidden").reasons[-1] == Reason("norm_folded", step="fold", norm="norm")


def test_a_relu_that_never_opens_goes_only_if_rows_may_say_so(tmp_path):
    source = NORMED.model()
    with torch.no_grad():
        source.module.norm.bias[2] = -60.0  # never opens, but no weight proves it
    bench = NORMED.bench(tmp_path / "data")
    assert run(Fold(), source, bench, tmp_path / "a").network.architecture.config == {}
    result = run(Fold(rows=96), source, bench, tmp_path / "b")
    assert result.network.architecture.config == {"width": 11}
    before = scores_of(source.private(), NORMED)
    assert (scores_of(result, NORMED) - before).abs().max() <= float32_rounding(before)


def test_a_constant_needs_a_bias_to_live_on_in(tmp_path):
    """``plain`` has no bias: what a dead channel says cannot be moved, unless it is nothing."""
    source = COMPACT.model()
    with torch.no_grad():
        source.module.capped.weight[4] = 0
        source.module.capped.bias[4] = 0.5
        source.module.hidden.weight[0] = 0  # the others of that width could lose one
        source.module.plain.weight[2] = 0
    bench = COMPACT.bench(tmp_path / "data")
    with raises_code(NothingToCompress, "units_missing") as caught:
        run(Fold(), source, bench, tmp_path / "out")
    assert caught.value.fields["reasons"]["cross"] == (Reason("nothing_to_fold"),)


def test_layers_of_one_number_lose_as_many_as_the_poorest_has(tmp_path):
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


class Peeking(nn.Module):
    """Reads the numbers of its norm past the norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.hidden, self.norm = nn.Linear(9, width), nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        x = self.norm(self.hidden(torch.cat([self.user(user), price], dim=1)))
        score: Tensor = self.out(F.relu(x)) + self.norm.running_var.sum()
        return score


def test_a_norm_that_other_code_reads_stays(tmp_path):
    reference = Reference(Peeking, SCHEMA)
    with raises_code(NothingToCompress, "units_missing") as caught:
        folded(reference, tmp_path)
    why = Reason("weight_read_elsewhere")
    assert caught.value.fields["reasons"]["hidden"] == HasReason(
        "reader_closed", reader="norm", why=why
    )


def test_a_network_that_would_change_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("compressors.rewrite.fold.scaled_outputs", lambda w, b, *_: (w, b))
    with raises_code(StepRefused, "folded_scores_differ"):
        folded(NORMED, tmp_path)


# --- features that nothing reads -------------------------------------------------------------


def test_input_columns_that_no_weight_reads_are_reported(tmp_path):
    source = NORMED.model()
    with torch.no_grad():
        source.module.hidden.weight[:, [1, 4, 7]] = 0  # two of the table's six, the second price
    plan = run(Fold(), source, NORMED.bench(tmp_path / "data"), tmp_path / "out").plan
    assert codes_of(plan.of("user").reasons) == ["wrong_role", "columns_unread"]
    with_code(plan.of("user").reasons, "columns_unread", columns=(1, 4))
    assert plan.of("hidden").reasons[-1] == Reason(
        "input_columns_unread", columns=(1,), input="price"
    )


def test_numbers_that_are_read_in_another_way_are_not():
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


class Comparing(nn.Module):
    """Loses a NaN on the way: only other numbers show that the price counts."""

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


def test_a_comparison_reads_too():
    model = Reference(Comparing, SCHEMA).model()
    assert unread_features(model.module, SCHEMA) == {"price": (1, 2, 3, 4)}


# --- later steps -----------------------------------------------------------------------------


def test_later_steps_take_a_folded_network(tmp_path):
    bench = NORMED.bench(tmp_path / "data")
    model = run(Fold(), NORMED.model(), bench, tmp_path / "0")
    steps = (Channels(keep=0.7), FineTune(training=models.QUICKLY), StaticInt8())
    for number, step in enumerate(steps, 1):
        model = run(step, model, bench, tmp_path / str(number))
    assert model.plan.of("hidden").steps == ("fold", "channels", "fine_tune", "static_int8")
    assert isinstance(model.module.norm, FoldedNorm)


def operators(model: Model, reference: Reference, folder: Path) -> onnx.GraphProto:
    path = folder / "model.onnx"
    lower(model.module, whole(reference.signature), "onnxruntime", path)
    return optimized_graph(path)


def test_int8_products_follow_each_other_where_a_norm_stood(tmp_path):
    bench = DCN.bench(tmp_path / "data")
    plain = run(StaticInt8(), DCN.model(), bench, tmp_path / "plain")
    apart = operators(plain, DCN, tmp_path)
    assert sum(node.op_type == "BatchNormalization" for node in apart.node) == 2
    model = run(
        StaticInt8(), run(Fold(), DCN.model(), bench, tmp_path / "0"), bench, tmp_path / "1"
    )
    graph = operators(model, DCN, tmp_path)
    kinds = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in kinds
    assert kinds.count("QGemm") == 6
    maker = {output: node for node in graph.node for output in node.output}
    (second,) = (
        node
        for node in graph.node
        if node.op_type == "QGemm" and "perceptron.4.codes" in "".join(node.input)
    )
    way, node = [], maker[second.input[0]]
    while node.op_type != "QGemm":
        way.append(node.op_type)
        node = maker[node.input[0]]
    assert way == ["Clip"]  # the Relu, on whole numbers that the product before gives out


class Fixed(nn.Module):
    """A mix of fields that no input decides: a softmax of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(30, 4)
        self.rank, self.tilt = nn.Parameter(torch.randn(9)), nn.Parameter(torch.randn(9))
        self.out = nn.Linear(9, 1)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        share = torch.softmax(self.rank * 2 + self.tilt.exp(), dim=0)
        score: Tensor = self.out(torch.cat([self.user(user), price], dim=1) * share)
        return score


def test_what_depends_on_no_input_is_one_initializer(tmp_path):
    """Constants are folded when a graph is written, before any runtime loads it."""
    path = tmp_path / "model.onnx"
    module = Reference(Fixed, SCHEMA).model().module
    lower(module, whole(SCHEMA), "onnxruntime", path)
    graph = onnx.load(path).graph
    assert not {"Softmax", "Exp"} & {node.op_type for node in graph.node}
    (product,) = (node for node in graph.node if node.op_type == "Mul")
    held = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    (share,) = (held[name] for name in product.input if name in held)
    expected = torch.softmax(module.rank * 2 + module.tilt.exp(), dim=0)
    torch.testing.assert_close(torch.from_numpy(share.copy()), expected.detach())
    assert sum(array.size == 9 for array in held.values()) == 2  # that, and the weight of ``out``

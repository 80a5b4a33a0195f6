"""What a lowered graph looks like, which tables it holds, and which networks have none."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from error_codes import raises_code
from models import NORMED, RANKER, UNDIVIDED, Ranker, compressed, graph, recipe_with, whole
from narrow_networks import Branching
from onnx import TensorProto
from torch import Tensor, nn

from compressors.contracts import Output, PaddedBag, Signature, TargetName
from compressors.core.modules.formats import PackedTable
from compressors.core.registries import TABLE_FORMATS
from compressors.errors.compression import NothingToCompress, NotLowerable
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import SCORE, input_names, wrap_for_serving
from compressors.lower.targets.tensorrt.types import codes_tensor, retyped
from compressors.quantize.kernels import bitpacking
from infra.onnxruntime.sessions import Session, optimized_graph

ORT: TargetName = "onnxruntime"
RTX: TargetName = "tensorrt-rtx"
KINDS = [method.model_fields["kind"].default for method in UNDIVIDED]
EVERYTHING = ("rowwise_int8", "static_int8")

each_target = pytest.mark.parametrize("target", [ORT, RTX])


@each_target
def test_inputs_and_output_are_the_schemas(target):
    written = onnx.load(graph("Ranker", EVERYTHING, target).path).graph
    assert [item.name for item in written.input] == list(input_names(RANKER.signature))
    types = {item.name: item.type.tensor_type.elem_type for item in written.input}
    assert types["user"] == TensorProto.INT64
    assert types["city"] == types["tags"] == TensorProto.INT32
    assert types["price"] == TensorProto.FLOAT
    (score,) = written.output
    assert score.name == SCORE
    assert score.type.tensor_type.elem_type == TensorProto.FLOAT
    assert len(score.type.tensor_type.shape.dim) == 1


def test_a_ranking_score_is_given_as_it_is():
    lowered = graph("Attention", (), ORT)
    inputs = lowered.rows(50)
    found = lowered.in_onnx(inputs)
    with torch.no_grad():
        # float32 sums in another order
        np.testing.assert_allclose(found, lowered.model.module(**inputs).numpy(), atol=1e-6)
    assert found.min() < 0


def test_a_probability_is_not_squashed_twice():
    lowered = graph("Normed", (), ORT)
    inputs = lowered.rows(50)
    with torch.no_grad():
        expected = lowered.model.module(**inputs).squeeze(1).numpy()
    np.testing.assert_allclose(lowered.in_onnx(inputs), expected, atol=1e-6)


def walk(found: onnx.GraphProto, start: str) -> Iterator[onnx.NodeProto]:
    """The nodes that read a tensor."""
    return (node for node in found.node if start in node.input)


def on_networks(kinds: list[str]) -> list[object]:
    """Every kind of step in the recipe of the default tier in which it stands.

    The default tier has these recipes on the compact network, and int8 tables on the ranker too.
    """
    return [
        pytest.param(name, kind, recipe_with(kind), id=f"{name}-{kind}", marks=marks)
        for name, marks in (("Compact", ()), ("Ranker", pytest.mark.nightly))
        for kind in kinds
    ] + [pytest.param("Ranker", "rowwise_int8", EVERYTHING, id=f"Ranker-{'+'.join(EVERYTHING)}")]


def each_network_with(kinds: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("network", "kind", "recipe"), on_networks(kinds))


TABLES_OF = {"Ranker": 6, "Compact": 2}


@each_network_with([kind for kind in KINDS if kind != "static_int8"])
def test_onnxruntime_gathers_a_table_before_anything_else_touches_it(network, kind, recipe):
    lowered = graph(network, recipe, ORT)
    found = optimized_graph(lowered.path)
    held = {item.name for item in found.initializer}
    assert len(lowered.lowered.tables) == TABLES_OF[network]
    for table in lowered.lowered.tables:
        for name in table.names:
            assert name in held
            assert [node.op_type for node in walk(found, name)] == ["Gather"], name


TYPES = {
    "rowwise_int8": TensorProto.INT8,
    "rowwise_int4": TensorProto.INT4,
    "rowwise_int2": TensorProto.INT4,  # two codes in one
    "float8_e4m3": TensorProto.FLOAT8E4M3FN,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
}
PLAIN = {"float16", "bfloat16"}


@each_network_with(sorted(TYPES))
def test_tensorrt_gets_packed_tables_that_feed_nothing_but_a_dequantize(network, kind, recipe):
    lowered = graph(network, recipe, RTX)
    written = onnx.load(lowered.path).graph
    held = {item.name: item for item in written.initializer}
    reads = {"Gather"} if kind in PLAIN else {"DequantizeLinear"}
    for table in lowered.lowered.tables:
        codes = held[table.names[0]]
        assert codes.data_type == TYPES[kind]
        assert codes.dims[0] == table.rows
        assert {node.op_type for node in walk(written, codes.name)} == reads
        for node in walk(written, codes.name):
            if kind not in PLAIN:
                after = [reader.op_type for reader in walk(written, node.output[0])]
                assert after == ["Gather"]


def test_tensorrt_gets_symmetric_int8_layers_with_a_float_bias():
    written = onnx.load(graph("Ranker", EVERYTHING, RTX).path).graph
    held = {item.name: item for item in written.initializer}
    for item in held.values():
        if item.data_type == TensorProto.INT8:
            readers = {node.op_type for node in walk(written, item.name)}
            assert readers in ({"DequantizeLinear"}, {"QuantizeLinear"}), item.name
    maker = {output: node for node in written.node for output in node.output}
    gemms = [node for node in written.node if node.op_type == "Gemm"]
    assert len(gemms) == 5
    for gemm in gemms:
        assert [maker[name].op_type for name in gemm.input[:2]] == ["DequantizeLinear"] * 2
        assert all(held[name].data_type == TensorProto.FLOAT for name in gemm.input[2:])
    for node in written.node:  # the builder refuses unsigned and int32 codes
        if node.op_type in {"DequantizeLinear", "QuantizeLinear"}:
            given = [held[name].data_type for name in node.input if name in held]
            assert set(given) <= {TensorProto.INT8, TensorProto.FLOAT, TensorProto.FLOAT16}


@each_target
@pytest.mark.parametrize(
    ("network", "kinds"),
    [("Ranker", ()), ("Ranker", EVERYTHING), ("Compact", recipe_with("rowwise_int4"))],
)
def test_the_exporters_notes_are_stripped(network, kinds, target):
    model = onnx.load(graph(network, kinds, target).path)
    assert not model.metadata_props
    everything = (*model.graph.node, *model.graph.input, *model.graph.initializer)
    assert not any(item.metadata_props for item in (*everything, *model.graph.value_info))
    assert not any(item.doc_string for item in everything)
    assert b"models.py" not in model.SerializeToString()


@each_target
@each_network_with(sorted(TYPES))
def test_packed_bytes_are_what_the_file_holds(network, kind, recipe, target):
    lowered = graph(network, recipe, target)
    written = onnx.load(lowered.path).graph
    held = {item.name: item for item in written.initializer}
    for table in lowered.lowered.tables:
        line = lowered.model.plan.of(table.module)
        assert line.format == table.format == kind
        stored = sum(len(held[name].raw_data) for name in table.names)
        assert stored == line.bytes_after


def as_int4(tensor: ir.TensorProtocol) -> np.ndarray:
    """What ONNX itself reads from a packed tensor."""
    written = onnx.TensorProto(
        data_type=TensorProto.INT4, dims=tuple(tensor.shape), raw_data=tensor.tobytes()
    )
    return onnx.numpy_helper.to_array(written).astype(np.int8)


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_int4_is_repacked_without_a_code_changing(dim):
    codes = torch.randint(1, 16, (6, dim), dtype=torch.uint8)
    found = as_int4(codes_tensor(bitpacking.pack(codes, 4).numpy(), 4))
    assert np.array_equal(found[:, :dim], codes.numpy().astype(np.int8) - 8)
    assert not found[:, dim:].any()  # the padding of an odd width decodes to zero


@pytest.mark.parametrize("dim", [1, 3, 5, 8])
def test_int2_is_repacked_two_codes_to_an_int4(dim):
    codes = torch.randint(0, 4, (6, dim), dtype=torch.uint8)
    pairs = as_int4(codes_tensor(bitpacking.pack(codes, 2).numpy(), 2)) + 8
    assert pairs.shape == (6, 2 * -(-dim // 4))
    found = np.concatenate([pairs % 4, pairs // 4], axis=1)
    assert np.array_equal(found[:, :dim], codes.numpy())


def test_codes_with_an_offset_are_128_lower():
    settings = {"scale": "float16", "symmetric": False}
    table = PackedTable(TABLE_FORMATS["rowwise_int8"], 1, 4, settings)
    found = retyped(table, "codes", np.array([[0, 127, 128, 255]], np.uint8))
    assert found.numpy().tolist() == [[-128, -1, 0, 127]]
    half = np.ones((1, 1), np.float16)
    for name in ("scale", "offset"):  # gathered as they are stored
        assert retyped(table, name, half) is None


# --- shared, unread and constant tables ------------------------------------------------------


@each_target
def test_tied_and_shared_tables_lie_in_the_graph_once(target):
    lowered = graph("Tied", EVERYTHING, target)
    by_module = {table.module: table.names for table in lowered.lowered.tables}
    assert by_module["item"] == by_module["similar"]
    written = onnx.load(lowered.path).graph
    held = [item.name for item in written.initializer]
    assert all(held.count(name) == 1 for names in by_module.values() for name in names)
    wide = [item for item in written.initializer if list(item.dims) == [30, 6]]
    assert len(wide) == 1


@pytest.mark.parametrize(
    ("kinds", "target"),
    [
        # In the default tier each has one target, in turn.
        pytest.param(
            kinds,
            target,
            id=f"{'+'.join(kinds) or '-'}-{target}",
            marks=() if (place + turn) % 2 else pytest.mark.nightly,
        )
        for place, kinds in enumerate([(), EVERYTHING, ("rowwise_int4", "float16")])
        for turn, target in enumerate((ORT, RTX))
    ],
)
def test_a_table_read_at_the_same_rows_in_every_call_is_no_lookup(kinds, target):
    # A runtime computes such a read once and drops the table.
    assert [t.module for t in graph("Buffered", kinds, target).lowered.tables] == ["fields"]


@each_target
def test_a_table_that_nothing_reads_does_not_stop_lowering(target, tmp_path):
    model = NORMED.model().module
    model.spare = nn.Embedding(3, 4)
    tables = lower(model, whole(NORMED.signature), target, tmp_path / "model.onnx").tables
    assert [table.module for table in tables] == ["user"]


def test_a_table_called_table_keeps_its_name(tmp_path):
    model = NORMED.model().module
    model.user = nn.Sequential()
    model.user.add_module("table", nn.Embedding(15, 6))
    signature = Signature.model_validate_json(
        NORMED.signature.model_dump_json().replace('"table":"user"', '"table":"user.table"')
    )
    tables = lower(model, whole(signature), ORT, tmp_path / "model.onnx").tables
    assert [table.module for table in tables] == ["user.table"]


# --- refusals, and what stays as it was ------------------------------------------------------


@each_target
def test_a_network_that_branches_on_values_is_refused_in_a_sentence(target, tmp_path):
    path = tmp_path / "model.onnx"
    with raises_code(NotLowerable, "export_failed", target=target) as refusal:
        lower(Branching(), whole(NORMED.signature), target, path)
    assert "data-dependent" in refusal.value.fields["problem"]
    assert refusal.value.__cause__ is not None
    assert not path.exists()


class OutsideOnnx(nn.Module):
    """Computes what ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        rows = self.user(user)
        return torch.linalg.eigvals(rows.T @ rows).real.sum() + price.sum(dim=1)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    with raises_code(NotLowerable, "export_failed") as caught:
        lower(OutsideOnnx(), whole(NORMED.signature), ORT, tmp_path / "model.onnx")
    assert "No ONNX function found for " in caught.value.fields["problem"]
    assert "linalg_eig" in caught.value.fields["problem"]


class Undeclared(nn.Module):
    """Reads a second jagged bag's table through an input that names another one."""

    def __init__(self) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(50, 4, mode="sum")
        self.again = nn.EmbeddingBag(50, 4, mode="sum")

    def forward(self, history: Tensor, history_offsets: Tensor) -> Tensor:
        bags = self.history(history, history_offsets) + self.again(history, history_offsets)
        return bags.sum(dim=1)


def test_a_jagged_bag_without_a_declared_longest_list_is_refused(tmp_path):
    (item,) = (item for item in RANKER.signature.inputs if item.name == "history")
    signature = RANKER.signature.model_copy(update={"inputs": (item,)})
    with raises_code(NotLowerable, "longest_list_unknown"):
        lower(Undeclared(), whole(signature), ORT, tmp_path / "model.onnx")


def test_a_schema_that_names_a_missing_table_is_refused(tmp_path):
    text = NORMED.signature.model_dump_json().replace('"table":"user"', '"table":"usre"')
    signature = Signature.model_validate_json(text)
    with raises_code(
        NothingToCompress, "input_table_missing", input="user", table="usre", tables=("user",)
    ):
        lower(NORMED.model().module, whole(signature), ORT, tmp_path / "model.onnx")


def test_serving_leaves_the_given_module_as_it_is():
    model = RANKER.model().module.train()
    wrapper = wrap_for_serving(model, whole(RANKER.signature), RANKER.rows_of_tables())
    assert isinstance(model, Ranker)
    assert isinstance(model.history, nn.EmbeddingBag)
    assert model.training
    assert model.history.training
    assert wrapper.model.history.table.weight is model.history.weight


@each_target
def test_lowering_leaves_the_given_module_as_it_is(target, tmp_path):
    model = compressed("Normed", EVERYTHING).module
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lower(model, whole(NORMED.signature), target, tmp_path / "model.onnx")
    after = {name: (id(module), module.training) for name, module in model.named_modules()}
    assert after == before
    torch.testing.assert_close(dict(model.state_dict()), tensors, rtol=0, atol=0)


class Heads(nn.Module):
    """Heads that are split along their width and stand below one another as rows, as in SASRec."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(20, 8)
        self.out = nn.Linear(4, 1)

    def forward(self, items: Tensor) -> Tensor:
        rows = self.item(items)  # (rows, length, 8)
        apart = torch.cat(torch.split(rows, 4, dim=2), dim=0)  # (2 * rows, length, 4)
        heads = apart.reshape(2, -1, 3, 4)
        score: Tensor = self.out((heads[0] * heads[1]).mean(dim=1)).squeeze(1)
        return score


def test_rows_that_are_joined_along_another_axis_than_they_were_split_stay_so(tmp_path):
    signature = Signature(
        inputs=(PaddedBag(name="items", table="item", shape=(3,)),),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    )
    torch.manual_seed(0)
    model = Heads().eval()
    made = lower(model, whole(signature), ORT, tmp_path / "model.onnx")
    items = torch.randint(20, (9, 3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = made.served(items).numpy()
    found = Session(tmp_path / "model.onnx", threads=1).scores({"items": items.numpy()})
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 sums in another order

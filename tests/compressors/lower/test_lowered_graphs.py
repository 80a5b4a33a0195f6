"""Lowered graphs: inputs, operators, stored tables, and networks that cannot be lowered.

Packed tables are stored as codes or short floats, which a graph decodes to float32.

The networks are those of ``models.py``. ``Ranker`` has inputs of ids, bags and numbers, and five
dense layers; ``Compact`` has the same layers and two tables. ``NORMED`` has the table ``user`` (15
rows of 6 numbers) and the inputs ``user`` and ``price``; most networks of this file have the same
inputs and use its signature.
"""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from error_codes import raises_code
from models import (
    NORMED,
    RANKER,
    UNDIVIDED,
    Ranker,
    build_recipe,
    compress_reference,
    lower_reference,
    only_served_graph,
)
from narrow_networks import DataDependentBranchNet
from onnx import TensorProto
from torch import Tensor, nn

from compressors.contracts import Output, PaddedBag, Signature, TargetName
from compressors.core.modules.formats import PackedTable
from compressors.core.random_inputs import generate_inputs
from compressors.core.registries import TABLE_FORMATS
from compressors.errors.compression import NothingToCompress, NotLowerable
from compressors.lower.export import lower
from compressors.lower.program import TRACE_ROWS
from compressors.lower.serving_wrapper import SCORE, input_names, wrap_for_serving
from compressors.lower.targets.tensorrt.types import codes_tensor, convert_type
from compressors.quantize.kernels import bitpacking
from infra.onnxruntime.sessions import Session, optimized_graph

ORT: TargetName = "onnxruntime"
RTX: TargetName = "tensorrt-rtx"
# ``UNDIVIDED`` are the methods that change graphs and keep each table as one table.
KINDS = [method.model_fields["kind"].default for method in UNDIVIDED]
INT8_RECIPE = ("rowwise_int8", "static_int8")

each_target = pytest.mark.parametrize("target", [ORT, RTX])


@each_target
def test_graph_has_inputs_and_output_of_the_signature(target):
    written = onnx.load(lower_reference("Ranker", INT8_RECIPE, target).path).graph
    assert [item.name for item in written.input] == list(input_names(RANKER.signature))
    types = {item.name: item.type.tensor_type.elem_type for item in written.input}
    assert types["user"] == TensorProto.INT64
    assert types["city"] == types["tags"] == TensorProto.INT32
    assert types["price"] == TensorProto.FLOAT
    (score,) = written.output
    assert score.name == SCORE
    assert score.type.tensor_type.elem_type == TensorProto.FLOAT
    assert len(score.type.tensor_type.shape.dim) == 1


def test_graph_returns_ranking_scores_unchanged():
    lowered = lower_reference("Attention", (), ORT)
    inputs = lowered.rows(50)
    scores = lowered.run_in_onnx(inputs)
    with torch.no_grad():
        # The float32 sums have another order.
        np.testing.assert_allclose(scores, lowered.model.module(**inputs).numpy(), atol=1e-6)
    assert scores.min() < 0


def test_graph_applies_no_sigmoid_to_a_probability():
    lowered = lower_reference("Normed", (), ORT)
    inputs = lowered.rows(50)
    with torch.no_grad():
        expected = lowered.model.module(**inputs).squeeze(1).numpy()
    np.testing.assert_allclose(lowered.run_in_onnx(inputs), expected, atol=1e-6)


def find_consumers(graph: onnx.GraphProto, name: str) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that read a tensor."""
    return (node for node in graph.node if name in node.input)


def on_networks(kinds: list[str]) -> list[object]:
    """Return each kind of step with its recipe, on two networks.

    Cases on the ranker are marked ``nightly``, except int8 tables with ``INT8_RECIPE``.
    """
    return [
        pytest.param(name, kind, build_recipe(kind), id=f"{name}-{kind}", marks=marks)
        for name, marks in (("Compact", ()), ("Ranker", pytest.mark.nightly))
        for kind in kinds
    ] + [pytest.param("Ranker", "rowwise_int8", INT8_RECIPE, id=f"Ranker-{'+'.join(INT8_RECIPE)}")]


def each_network_with(kinds: list[str]) -> pytest.MarkDecorator:
    """Parametrize a test with the recipes of ``on_networks``."""
    return pytest.mark.parametrize(("network", "kind", "recipe"), on_networks(kinds))


TABLE_COUNTS = {"Ranker": 6, "Compact": 2}
"""Number of tables of each network."""


@each_network_with([kind for kind in KINDS if kind != "static_int8"])
def test_tables_in_onnxruntime_are_read_by_gather_only(network, kind, recipe):
    lowered = lower_reference(network, recipe, ORT)
    graph = optimized_graph(lowered.path)
    initializers = {item.name for item in graph.initializer}
    assert len(lowered.lowered.tables) == TABLE_COUNTS[network]
    for table in lowered.lowered.tables:
        for name in table.names:
            assert name in initializers
            assert [node.op_type for node in find_consumers(graph, name)] == ["Gather"], name


STORED_TYPES = {
    "rowwise_int8": TensorProto.INT8,
    "rowwise_int4": TensorProto.INT4,
    "rowwise_int2": TensorProto.INT4,  # two codes in one
    "float8_e4m3": TensorProto.FLOAT8E4M3FN,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
}
SHORT_FLOATS = {"float16", "bfloat16"}
"""Formats whose rows are gathered without a DequantizeLinear."""


@each_network_with(sorted(STORED_TYPES))
def test_tables_for_tensorrt_are_dequantized_before_the_gather_except_short_floats(
    network, kind, recipe
):
    lowered = lower_reference(network, recipe, RTX)
    written = onnx.load(lowered.path).graph
    initializers = {item.name: item for item in written.initializer}
    expected_operators = {"Gather"} if kind in SHORT_FLOATS else {"DequantizeLinear"}
    for table in lowered.lowered.tables:
        codes = initializers[table.names[0]]
        assert codes.data_type == STORED_TYPES[kind]
        assert codes.dims[0] == table.rows
        assert {node.op_type for node in find_consumers(written, codes.name)} == expected_operators
        for node in find_consumers(written, codes.name):
            if kind not in SHORT_FLOATS:
                next_operators = [
                    reader.op_type for reader in find_consumers(written, node.output[0])
                ]
                assert next_operators == ["Gather"]


def test_int8_layers_for_tensorrt_are_symmetric_with_a_float_bias():
    written = onnx.load(lower_reference("Ranker", INT8_RECIPE, RTX).path).graph
    initializers = {item.name: item for item in written.initializer}
    for item in initializers.values():
        if item.data_type == TensorProto.INT8:
            readers = {node.op_type for node in find_consumers(written, item.name)}
            assert readers in ({"DequantizeLinear"}, {"QuantizeLinear"}), item.name
    producers = {output: node for node in written.node for output in node.output}
    gemms = [node for node in written.node if node.op_type == "Gemm"]
    assert len(gemms) == 5  # the dense layers of the ranker
    for gemm in gemms:
        assert [producers[name].op_type for name in gemm.input[:2]] == ["DequantizeLinear"] * 2
        assert all(initializers[name].data_type == TensorProto.FLOAT for name in gemm.input[2:])
    for node in written.node:  # TensorRT refuses unsigned and int32 codes
        if node.op_type in {"DequantizeLinear", "QuantizeLinear"}:
            stored_types = [
                initializers[name].data_type for name in node.input if name in initializers
            ]
            assert set(stored_types) <= {TensorProto.INT8, TensorProto.FLOAT, TensorProto.FLOAT16}


@each_target
@pytest.mark.parametrize(
    ("network", "kinds"),
    [("Ranker", ()), ("Ranker", INT8_RECIPE), ("Compact", build_recipe("rowwise_int4"))],
)
def test_graph_contains_no_metadata_of_the_exporter(network, kinds, target):
    model = onnx.load(lower_reference(network, kinds, target).path)
    assert not model.metadata_props
    parts = (*model.graph.node, *model.graph.input, *model.graph.initializer)
    assert not any(item.metadata_props for item in (*parts, *model.graph.value_info))
    assert not any(item.doc_string for item in parts)
    assert b"models.py" not in model.SerializeToString()


@each_target
@each_network_with(sorted(STORED_TYPES))
def test_tables_in_the_file_take_the_bytes_of_the_plan(network, kind, recipe, target):
    lowered = lower_reference(network, recipe, target)
    written = onnx.load(lowered.path).graph
    initializers = {item.name: item for item in written.initializer}
    for table in lowered.lowered.tables:
        line = lowered.model.plan.of(table.module)
        assert line.format == table.format == kind
        stored_bytes = sum(len(initializers[name].raw_data) for name in table.names)
        assert stored_bytes == line.bytes_after


def as_int4(tensor: ir.TensorProtocol) -> np.ndarray:
    """Decode a packed int4 tensor with ONNX."""
    written = onnx.TensorProto(
        data_type=TensorProto.INT4, dims=tuple(tensor.shape), raw_data=tensor.tobytes()
    )
    return onnx.numpy_helper.to_array(written).astype(np.int8)


@pytest.mark.parametrize("dim", [1, 2, 5, 8])
def test_int4_tensor_for_tensorrt_has_the_stored_codes_minus_8(dim):
    codes = torch.randint(1, 16, (6, dim), dtype=torch.uint8)
    decoded = as_int4(codes_tensor(bitpacking.pack(codes, 4).numpy(), 4))
    assert np.array_equal(decoded[:, :dim], codes.numpy().astype(np.int8) - 8)
    assert not decoded[:, dim:].any()  # the padding of an odd width decodes to zero


@pytest.mark.parametrize("dim", [1, 3, 5, 8])
def test_int4_tensor_for_tensorrt_has_two_2_bit_codes_per_number(dim):
    codes = torch.randint(0, 4, (6, dim), dtype=torch.uint8)
    pairs = as_int4(codes_tensor(bitpacking.pack(codes, 2).numpy(), 2)) + 8
    assert pairs.shape == (6, 2 * -(-dim // 4))
    decoded = np.concatenate([pairs % 4, pairs // 4], axis=1)
    assert np.array_equal(decoded[:, :dim], codes.numpy())


def test_unsigned_int8_codes_for_tensorrt_are_128_lower():
    settings = {"scale": "float16", "symmetric": False}
    table = PackedTable(TABLE_FORMATS["rowwise_int8"], 1, 4, settings)
    converted = convert_type(table, "codes", np.array([[0, 127, 128, 255]], np.uint8))
    assert converted.numpy().tolist() == [[-128, -1, 0, 127]]
    ones = np.ones((1, 1), np.float16)
    for name in ("scale", "offset"):  # they are gathered without conversion
        assert convert_type(table, name, ones) is None


# --- shared, unused and constant tables ------------------------------------------------------


@each_target
def test_graph_stores_tied_and_shared_tables_once(target):
    lowered = lower_reference("Tied", INT8_RECIPE, target)
    by_module = {table.module: table.names for table in lowered.lowered.tables}
    assert by_module["item"] == by_module["similar"]
    written = onnx.load(lowered.path).graph
    initializers = [item.name for item in written.initializer]
    assert all(initializers.count(name) == 1 for names in by_module.values() for name in names)
    # ``item`` and ``similar`` share one table of 30 rows.
    tables_of_this_shape = [item for item in written.initializer if list(item.dims) == [30, 6]]
    assert len(tables_of_this_shape) == 1


@pytest.mark.parametrize(
    ("kinds", "target"),
    [
        # One target for each recipe, in turn, is not marked ``nightly``.
        pytest.param(
            kinds,
            target,
            id=f"{'+'.join(kinds) or '-'}-{target}",
            marks=() if (index + target_index) % 2 else pytest.mark.nightly,
        )
        for index, kinds in enumerate([(), INT8_RECIPE, ("rowwise_int4", "float16")])
        for target_index, target in enumerate((ORT, RTX))
    ],
)
def test_table_read_at_constant_rows_is_not_reported(kinds, target):
    # A runtime computes such a lookup once and drops the table.
    assert [t.module for t in lower_reference("Buffered", kinds, target).lowered.tables] == [
        "fields"
    ]


@each_target
def test_unused_table_is_not_reported_and_does_not_stop_lowering(target, tmp_path):
    model = NORMED.model().module
    model.spare = nn.Embedding(3, 4)
    tables = lower(
        model, only_served_graph(NORMED.signature), target, tmp_path / "model.onnx"
    ).tables
    assert [table.module for table in tables] == ["user"]


def test_table_whose_attribute_is_named_table_keeps_its_name(tmp_path):
    model = NORMED.model().module
    model.user = nn.Sequential()
    model.user.add_module("table", nn.Embedding(15, 6))
    signature = Signature.model_validate_json(
        NORMED.signature.model_dump_json().replace('"table":"user"', '"table":"user.table"')
    )
    tables = lower(model, only_served_graph(signature), ORT, tmp_path / "model.onnx").tables
    assert [table.module for table in tables] == ["user.table"]


# --- errors, and modules that must not change ------------------------------------------------


@each_target
def test_network_that_branches_on_tensor_values_is_not_lowerable(target, tmp_path):
    path = tmp_path / "model.onnx"
    with raises_code(NotLowerable, "export_failed", target=target) as caught:
        lower(DataDependentBranchNet(), only_served_graph(NORMED.signature), target, path)
    assert "data-dependent" in caught.value.fields["problem"]
    assert caught.value.__cause__ is not None
    assert not path.exists()


class EigenvalueNet(nn.Module):
    """A network with an operator that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        rows = self.user(user)
        return torch.linalg.eigvals(rows.T @ rows).real.sum() + price.sum(dim=1)


def test_error_names_the_operator_that_onnx_lacks(tmp_path):
    with raises_code(NotLowerable, "export_failed") as caught:
        lower(
            EigenvalueNet(),
            only_served_graph(NORMED.signature),
            ORT,
            tmp_path / "model.onnx",
        )
    assert "No ONNX function found for " in caught.value.fields["problem"]
    assert "linalg_eig" in caught.value.fields["problem"]


class SqueezeNet(nn.Module):
    """A network that squeezes dimensions of other sizes than 1, which torch leaves as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        rows = self.user(user).squeeze(1).squeeze((0, 1))
        return (rows.sum(dim=1) + price.sum(dim=1)).squeeze(-1)


def test_squeeze_of_dimensions_of_other_sizes_leaves_them(tmp_path):
    torch.manual_seed(0)
    model, graph = SqueezeNet().eval(), only_served_graph(NORMED.signature)
    lower(model, graph, ORT, tmp_path / "model.onnx")
    session = Session(tmp_path / "model.onnx", threads=1)
    for rows in (2, 7):
        inputs = generate_inputs(NORMED.signature, {"user": 15}, rows)
        scores = session.scores({name: tensor.numpy() for name, tensor in inputs.items()})
        with torch.no_grad():
            np.testing.assert_allclose(scores, model(**inputs).numpy(), atol=1e-6)


class LengthNet(nn.Module):
    """A network that converts the number of rows to a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(15, 6)

    def forward(self, user: Tensor, price: Tensor) -> Tensor:
        return self.user(user).reshape(len(user), 6).sum(dim=1) + price.sum(dim=1)


def test_network_that_fixes_the_number_of_rows_is_not_lowerable(tmp_path):
    # ``lower`` exports a network with TRACE_ROWS rows; this graph would accept only as many.
    with raises_code(NotLowerable, "size_fixed", target=ORT, name="user", axis=0, size=TRACE_ROWS):
        lower(LengthNet(), only_served_graph(NORMED.signature), ORT, tmp_path / "model.onnx")


class UndeclaredBagNet(nn.Module):
    """A jagged input is read by two bags; the signature names the table of only one."""

    def __init__(self) -> None:
        super().__init__()
        self.history = nn.EmbeddingBag(50, 4, mode="sum")
        self.undeclared = nn.EmbeddingBag(50, 4, mode="sum")

    def forward(self, history: Tensor, history_offsets: Tensor) -> Tensor:
        bags = self.history(history, history_offsets)
        bags = bags + self.undeclared(history, history_offsets)
        return bags.sum(dim=1)


def test_jagged_bag_without_a_declared_longest_list_is_not_lowerable(tmp_path):
    (item,) = (item for item in RANKER.signature.inputs if item.name == "history")
    signature = RANKER.signature.model_copy(update={"inputs": (item,)})
    with raises_code(NotLowerable, "longest_list_unknown"):
        lower(UndeclaredBagNet(), only_served_graph(signature), ORT, tmp_path / "model.onnx")


def test_signature_that_names_a_missing_table_is_refused(tmp_path):
    text = NORMED.signature.model_dump_json().replace('"table":"user"', '"table":"usre"')
    signature = Signature.model_validate_json(text)
    with raises_code(
        NothingToCompress, "input_table_missing", input="user", table="usre", tables=("user",)
    ):
        lower(
            NORMED.model().module,
            only_served_graph(signature),
            ORT,
            tmp_path / "model.onnx",
        )


def test_wrap_for_serving_does_not_modify_the_module():
    model = RANKER.model().module.train()
    wrapper = wrap_for_serving(model, only_served_graph(RANKER.signature), RANKER.rows_of_tables())
    assert isinstance(model, Ranker)
    assert isinstance(model.history, nn.EmbeddingBag)
    assert model.training
    assert model.history.training
    assert wrapper.model.history.table.weight is model.history.weight


@each_target
def test_lower_does_not_modify_the_module(target, tmp_path):
    model = compress_reference("Normed", INT8_RECIPE).module
    before = {name: (id(module), module.training) for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lower(model, only_served_graph(NORMED.signature), target, tmp_path / "model.onnx")
    after = {name: (id(module), module.training) for name, module in model.named_modules()}
    assert after == before
    torch.testing.assert_close(dict(model.state_dict()), tensors, rtol=0, atol=0)


class SplitHeadsNet(nn.Module):
    """Attention heads that are split along the width and concatenated along the rows (SASRec)."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(20, 8)
        self.out = nn.Linear(4, 1)

    def forward(self, items: Tensor) -> Tensor:
        rows = self.item(items)  # (rows, length, 8)
        stacked = torch.cat(torch.split(rows, 4, dim=2), dim=0)  # (2 * rows, length, 4)
        heads = stacked.reshape(2, -1, 3, 4)
        score: Tensor = self.out((heads[0] * heads[1]).mean(dim=1)).squeeze(1)
        return score


def test_split_and_concat_along_different_axes_are_not_removed(tmp_path):
    signature = Signature(
        inputs=(PaddedBag(name="items", table="item", shape=(3,)),),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    )
    torch.manual_seed(0)
    model = SplitHeadsNet().eval()
    lowered = lower(model, only_served_graph(signature), ORT, tmp_path / "model.onnx")
    items = torch.randint(20, (9, 3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = lowered.wrapper(items).numpy()
    actual = Session(tmp_path / "model.onnx", threads=1).scores({"items": items.numpy()})
    np.testing.assert_allclose(actual, expected, atol=1e-6)  # sums have another order

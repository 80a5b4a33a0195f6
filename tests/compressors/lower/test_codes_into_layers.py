"""ONNX Runtime's graph passes codes of int8 tables to int8 layers, however a network is written.

The networks look up ids of one matrix, and combine the rows in the styles of public libraries.
Every table has one scale for all rows. A layer that reads codes has one scale per input channel.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from models import Reference
from onnx import numpy_helper
from torch import Tensor, nn

from compressors.contracts import DenseInput, IdInput, MatrixInput, Output, PaddedBag, Signature
from compressors.core.model import Model
from compressors.core.random_inputs import generate_edge_inputs, generate_inputs
from compressors.core.runner import run
from compressors.lower.audit import audit
from compressors.lower.export import Lowered, lower
from compressors.lower.serving_wrapper import input_names, served_graphs
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.dense.table_inputs import find_table_scales
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import Session, optimized_graph

ROWS, DIM = (40, 300, 9), 8
OUTPUT = Output(name="label", kind="ctr", form="logit", label="label", metric="auc")
STEPS = (RowwiseInt8(rows_per_scale=0), StaticInt8(input_scales="tables"))


def cat(rows: list[Tensor]) -> Tensor:
    """Concatenate rows ``(rows, dim)``."""
    return torch.cat(rows, dim=1)


def stack(rows: list[Tensor]) -> Tensor:
    """Stack rows to ``(rows, tables, dim)``, then flatten."""
    return torch.stack(rows, dim=1).flatten(1)


def cat_of_three_dimensions(rows: list[Tensor]) -> Tensor:
    """Concatenate ``(rows, 1, dim)`` along the last dimension, as DeepCTR does."""
    return torch.cat([row.unsqueeze(1) for row in rows], dim=-1).flatten(start_dim=1)


def view(rows: list[Tensor]) -> Tensor:
    """Concatenate ``(rows, 1, dim)`` along the second dimension, then call ``view``."""
    joined = torch.cat([row.unsqueeze(1) for row in rows], dim=1)
    return joined.view(joined.shape[0], -1)


def in_another_order(rows: list[Tensor]) -> Tensor:
    """Concatenate rows in another order than that of the lookups."""
    return torch.cat(rows[::-1], dim=1)


STYLES = (cat, stack, cat_of_three_dimensions, view, in_another_order)


class Net(nn.Module):
    """A perceptron over the rows of three tables, and numbers.

    Attributes:
        join: concatenates the rows of the tables.
        has_products: whether a product and a sum of rows are added to the output, as in a
            factorization machine.
    """

    def __init__(self, style: str = "cat", *, has_products: bool = False, numbers: int = 0) -> None:
        super().__init__()
        self.join: Callable[[list[Tensor]], Tensor] = {f.__name__: f for f in STYLES}[style]
        self.has_products = has_products
        self.tables = nn.ModuleList(nn.Embedding(rows, DIM) for rows in ROWS)
        # Tables of very different range: each needs a scale of its own.
        for table, size in zip(self.tables, (1.0, 0.01, 20.0), strict=True):
            nn.init.normal_(table.weight, std=size)
        self.first = nn.Linear(len(ROWS) * DIM + numbers, 16)
        self.out = nn.Linear(16, 1)

    def forward(self, ids: Tensor, numbers: Tensor | None = None) -> Tensor:
        rows = [table(ids[:, index]) for index, table in enumerate(self.tables)]
        joined = self.join(rows)
        if numbers is not None:
            joined = torch.cat([joined, numbers], dim=1)
        logit: Tensor = self.out(torch.relu(self.first(joined))).squeeze(1)
        if self.has_products:
            logit = logit + (rows[0] * rows[1]).sum(dim=1) + rows[2].sum(dim=1)
        return logit


class SeparateInputs(Net):
    """``Net`` with one input for each table."""

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.stack([a, b, c], dim=1))


MATRIX = MatrixInput(
    name="ids",
    dtype="int64",
    fields=tuple(
        IdInput(name=name, table=f"tables.{index}", out_of_range="clamp")
        for index, name in enumerate("abc")
    ),
)


def reference(numbers: int = 0, **config: object) -> Reference:
    """Return ``Net`` with these arguments, and numbers of ranges 1 to 1,000 as second input."""
    inputs: tuple[object, ...] = (MATRIX,)
    if numbers:
        inputs = (*inputs, DenseInput(name="numbers", shape=(numbers,)))
    signature = Signature(inputs=inputs, outputs=(OUTPUT,))
    return Reference(Net, signature, {**config, "numbers": numbers})


def compress(of: Reference, folder: Path) -> Model:
    model = of.model()
    for index, step in enumerate(STEPS):
        model = run(step, model, of.bench(folder / "data"), folder / str(index))
    return model


def lower_for_onnxruntime(of: Reference, model: Model, folder: Path) -> tuple[Lowered, Path]:
    path = folder / "model.onnx"
    return lower(model.module, served_graphs(of.signature)[0], "onnxruntime", path), path


def count_operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in optimized_graph(path).node)


def check_scores(of: Reference, lowered: Lowered, path: Path) -> None:
    """Compare the probabilities of graph and module.

    Both add the same integers, so only the last float32 operators are rounded differently: by at
    most a few units in the last place.
    """
    session = Session(path, threads=1)
    tables = of.rows_of_tables()
    for inputs in (
        generate_inputs(of.signature, tables, 200),
        generate_edge_inputs(of.signature, tables, 50),
    ):
        expected = lowered.wrapper(*(inputs[name] for name in input_names(of.signature)))
        result = session.scores({name: tensor.numpy() for name, tensor in inputs.items()})
        np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("style", [style.__name__ for style in STYLES])
def test_first_layer_reads_codes_and_rounds_nothing(style, tmp_path):
    of = reference(style=style)
    model = compress(of, tmp_path)
    lowered, path = lower_for_onnxruntime(of, model, tmp_path)
    operators = count_operators(path)
    # The second layer's inputs are rounded by the first, so no operator rounds.
    assert operators["QGemm"] == 2
    assert operators["QuantizeLinear"] == operators["DequantizeLinear"] == operators["Cast"] == 0
    assert operators["Gather"] == 1
    check_scores(of, lowered, path)
    assert audit(optimized_graph(path), model.plan, lowered.tables).packed_tables == 1


def test_tables_of_separate_inputs_share_one_lookup(tmp_path):
    inputs = [
        IdInput(name=name, table=f"tables.{index}", out_of_range="error")
        for index, name in enumerate("abc")
    ]
    of = Reference(SeparateInputs, Signature(inputs=tuple(inputs), outputs=(OUTPUT,)))
    model = compress(of, tmp_path)
    _, path = lower_for_onnxruntime(of, model, tmp_path)
    assert count_operators(path)["Gather"] == 1
    # An id out of range refuses the row.
    ids = {name: np.array([0, rows, -1]) for name, rows in zip("abc", ROWS, strict=True)}
    scores = Session(path, threads=1).scores(ids)
    assert np.isnan(scores).tolist() == [False, True, True]


def test_other_inputs_of_the_layer_are_rounded_with_a_scale_of_their_own(tmp_path):
    of = reference(numbers=3)
    model = compress(of, tmp_path)
    scales = model.module.first.get_buffer("input_scale")
    tables = [model.module.tables[index].get_buffer("scale").float() for index in range(3)]
    expected = torch.cat([scale.reshape(1).expand(DIM) for scale in tables])
    assert torch.equal(scales[: 3 * DIM], expected)
    lowered, path = lower_for_onnxruntime(of, model, tmp_path)
    assert count_operators(path)["QuantizeLinear"] == 1  # of the numbers
    check_scores(of, lowered, path)


def test_operators_other_than_layers_read_rows_of_the_same_lookup(tmp_path):
    of = reference(has_products=True)
    model = compress(of, tmp_path)
    lowered, path = lower_for_onnxruntime(of, model, tmp_path)
    operators = count_operators(path)
    assert operators["QuantizeLinear"] == 0
    lookups = [node for node in onnx.load(path).graph.node if "together" in "".join(node.input)]
    assert sum(node.op_type == "Gather" for node in lookups) == 1
    check_scores(of, lowered, path)


class History(nn.Module):
    """Looks up one item, and a list of items in the same table, whose rows are added."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.user = nn.Embedding(50, DIM), nn.Embedding(20, DIM)
        self.first, self.out = nn.Linear(3 * DIM, 16), nn.Linear(16, 1)

    def forward(self, user: Tensor, item: Tensor, history: Tensor) -> Tensor:
        seen = (self.item(history) * (history > 0).unsqueeze(2)).sum(dim=1)
        joined = torch.cat([self.user(user), self.item(item), seen], dim=1)
        logit: Tensor = self.out(torch.relu(self.first(joined))).squeeze(1)
        return logit


def test_table_of_an_id_and_of_a_list_is_stored_once(tmp_path):
    inputs = (
        IdInput(name="user", table="user", out_of_range="clamp"),
        IdInput(name="item", table="item", out_of_range="clamp"),
        PaddedBag(name="history", table="item", shape=(4,), out_of_range="clamp"),
    )
    of = Reference(History, Signature(inputs=inputs, outputs=(OUTPUT,)))
    model = compress(of, tmp_path)
    lowered, path = lower_for_onnxruntime(of, model, tmp_path)
    stored = [tuple(item.dims) for item in onnx.load(path).graph.initializer]
    assert [dims for dims in stored if len(dims) == 2 and dims[1] == DIM] == [(70, DIM)]
    check_scores(of, lowered, path)
    # The sum of the list's rows is no row of the table: the layer rounds it.
    scales = find_table_scales(
        run(STEPS[0], of.model(), of.bench(tmp_path / "data"), tmp_path / "again").module,
        of.signature,
    )
    assert scales["first"].isnan().tolist() == [False] * (2 * DIM) + [True] * DIM


def test_layer_with_other_scales_than_its_tables_rounds_their_rows(tmp_path):
    of = reference()
    model = compress(of, tmp_path)
    scale = model.module.first.get_buffer("input_scale")
    scale[0] *= 1.5
    lowered, path = lower_for_onnxruntime(of, model, tmp_path)
    assert count_operators(path)["QuantizeLinear"] >= 1
    check_scores(of, lowered, path)


def test_sums_of_two_products_fit_in_16_bits(tmp_path):
    """Processors without VNNI add two products in 16 bits and clip the sum (``static_int8.py``)."""
    of = reference(numbers=3)
    _, path = lower_for_onnxruntime(of, compress(of, tmp_path), tmp_path)
    graph = optimized_graph(path)
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    products = [node for node in graph.node if node.op_type == "QGemm"]
    assert len(products) == 2
    for node in products:
        is_transposed = any(item.name == "transB" and item.i for item in node.attribute)
        weight = stored[node.input[3]].astype(np.int32)
        by_input = weight.T if is_transposed else weight  # (in, out)
        padded = np.pad(by_input, ((0, len(by_input) % 2), (0, 0)))
        # The largest sum of two products has the input 255 for each weight of one sign, else 0.
        largest = 255 * (padded[0::2].clip(min=0) + padded[1::2].clip(min=0))
        smallest = 255 * (padded[0::2].clip(max=0) + padded[1::2].clip(max=0))
        assert largest.max() < 2**15
        assert smallest.min() >= -(2**15)
        assert largest.max() > 2**14  # the codes use their range


def joins_in_place(net: Net, rows: list[Tensor]) -> Tensor:
    """Change the concatenation in place, then use the rows again."""
    joined = torch.cat(rows, dim=1)
    torch.relu_(joined)
    return net.score(joined) + (rows[0] * rows[1]).sum(dim=1)


def scales_a_view(net: Net, rows: list[Tensor]) -> Tensor:
    """Multiply a view of the concatenation in place."""
    joined = torch.cat(rows, dim=1)
    joined.view(-1, len(ROWS), DIM).mul_(50)
    return net.score(joined)


def converts_to_floats(net: Net, rows: list[Tensor]) -> Tensor:
    """Convert rows that are float32 already."""
    return net.score(torch.cat([row.float() for row in rows], dim=1).float())


def joins_batches(net: Net, rows: list[Tensor]) -> Tensor:
    """Concatenate rows of the three tables as one longer batch."""
    parts = torch.cat([rows[0], rows[1], 2 * rows[2]], dim=0).reshape(len(ROWS), -1, DIM)
    return net.score(parts.transpose(0, 1).flatten(1))


def divides_by_a_buffer(net: Net, rows: list[Tensor]) -> Tensor:
    """Divide by a stored vector, which is not the layer's scale."""
    return net.score(torch.cat(rows, dim=1) / net.width)


def splits(net: Net, rows: list[Tensor]) -> Tensor:
    """Split the concatenation, and join it in another order."""
    parts = torch.cat(rows, dim=1).split(DIM, dim=1)
    return net.score(torch.cat([parts[2], parts[0], parts[1]], dim=1))


def has_an_empty_part(net: Net, rows: list[Tensor]) -> Tensor:
    """Concatenate a part without columns."""
    return net.score(torch.cat([*rows, rows[0][:, DIM:]], dim=1))


def reads_flags(net: Net, rows: list[Tensor]) -> Tensor:
    """Concatenate rows and flags: the last table's columns are replaced by booleans."""
    return net.score(torch.cat([rows[0], rows[1], rows[2] > 0], dim=1))


def multiplies_rows(net: Net, rows: list[Tensor]) -> Tensor:
    """Add the dot products of all pairs of rows, as DLRM does."""
    stacked = torch.stack(rows, dim=1)
    products = torch.bmm(stacked, stacked.transpose(1, 2))
    return net.score(torch.cat(rows, dim=1)) + products.sum(dim=(1, 2)) / 100


ODD = (
    multiplies_rows,
    joins_in_place,
    scales_a_view,
    converts_to_floats,
    joins_batches,
    divides_by_a_buffer,
    splits,
    has_an_empty_part,
    reads_flags,
)


class OddNet(Net):
    """``Net`` whose rows a function of ``ODD`` combines."""

    width: Tensor

    def __init__(self, combine: str) -> None:
        super().__init__()
        self.combine = {function.__name__: function for function in ODD}[combine]
        self.register_buffer("width", torch.ones(len(ROWS) * DIM))

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        rows = [table(ids[:, index]) for index, table in enumerate(self.tables)]
        return self.combine(self, rows)

    def score(self, joined: Tensor) -> Tensor:
        """Return the output of the perceptron, ``(rows,)``."""
        logit: Tensor = self.out(torch.relu(self.first(joined))).squeeze(1)
        return logit


@pytest.mark.parametrize("combine", [function.__name__ for function in ODD])
@pytest.mark.parametrize("steps", [STEPS, (RowwiseInt8(),)], ids=["codes", "rows"])
def test_network_that_combines_rows_in_an_odd_way_keeps_its_scores(combine, steps, tmp_path):
    of = Reference(OddNet, Signature(inputs=(MATRIX,), outputs=(OUTPUT,)), {"combine": combine})
    original = model = of.model()
    for index, step in enumerate(steps):
        model = run(step, model, of.bench(tmp_path / "data"), tmp_path / str(index))
    lowered, path = lower_for_onnxruntime(of, model, tmp_path)
    check_scores(of, lowered, path)
    # Int8 changes a logit by a few percent of its size; a scale of the wrong table by far more.
    inputs = generate_inputs(of.signature, of.rows_of_tables(), 200)
    with torch.no_grad():
        exact, compressed = original.module(**inputs), model.module(**inputs)
    assert float((compressed - exact).std() / exact.std()) < 0.1


class SequenceFirst(nn.Module):
    """Calls a layer with rows of one table, and with larger rows of another, positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.item, self.tag = nn.Embedding(50, DIM), nn.Embedding(30, DIM)
        nn.init.normal_(self.tag.weight, std=1000)
        self.first = nn.Linear(DIM, 1)

    def forward(self, item: Tensor, tags: Tensor) -> Tensor:
        by_position = self.first(self.tag(tags).transpose(0, 1)).mean(dim=0)
        logit: Tensor = (self.first(self.item(item)) + by_position).squeeze(1)
        return logit


def test_layer_that_also_reads_rows_in_another_layout_has_no_scale_of_a_table(tmp_path):
    inputs = (
        IdInput(name="item", table="item", out_of_range="clamp"),
        PaddedBag(name="tags", table="tag", shape=(4,), out_of_range="clamp"),
    )
    of = Reference(SequenceFirst, Signature(inputs=inputs, outputs=(OUTPUT,)))
    model = run(STEPS[0], of.model(), of.bench(tmp_path / "data"), tmp_path / "out")
    assert find_table_scales(model.module, of.signature) == {}

"""TensorRT-RTX engines of tables in every quantized format: the table stays packed.

A builder may widen a table: convert its packed numbers to a wider type, in the engine's weights or
in scratch memory, the temporary memory of a call. To detect a copy in scratch memory, a second
engine is built, the *twin*: the same graph with half the rows in large tables. The audit calls
scratch memory "flat" if both engines need equally much, and less than a widened copy of the table.
See ``infra/tensorrt/audit.py``.

A ``Profile`` has the smallest (``low``), optimal (``best``) and largest (``high``) shape of an
input. ``rows_per_entry`` of a table has, by name of an initializer, the number of rows that share
one of its entries, such as a scale.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from error_codes import raises_code
from models import Reference, only_served_graph
from torch import Tensor, nn

from compressors.contracts import Bench, IdInput, Output, Signature
from compressors.contracts.targets.builder import BuildRequest, Profile, TableWeights
from compressors.core.runner import run
from compressors.core.steps.step import TableStep
from compressors.core.units import stored_bytes
from compressors.lower.export import lower
from compressors.quantize.tables.bfloat16 import BFloat16
from compressors.quantize.tables.float8_e4m3 import Float8E4M3
from compressors.quantize.tables.rowwise_int2 import RowwiseInt2
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.errors import BuildRefused
from infra.tensorrt.engines import build_engine, find_installed_version

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_installed_version("tensorrt-rtx") is None,
        reason="TensorRT-RTX is not installed; pip install 'recpress[tensorrt-rtx]'",
    ),
]
# Enough rows for a twin, and for an fp16 copy of the smallest packed codes (two int2 values in one
# int4) to be larger than the 9.9 MB of scratch memory that these engines take.
ROWS, DIM, FIELDS = 330_000, 32, 2


class Fields(nn.Module):
    """One large table, looked up for two fields, and one dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.item = nn.Embedding(ROWS, DIM)
        self.out = nn.Linear(FIELDS * DIM, 1)

    def forward(self, item: Tensor) -> Tensor:
        score: Tensor = self.out(self.item(item).flatten(1))
        return score


SIGNATURE = Signature(
    inputs=(IdInput(name="item", table="item", columns=("a", "b"), shape=(FIELDS,)),),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


class Case(NamedTuple):
    """A step, the bytes that its format stores per row, and TensorRT's type of the codes.

    A row of most formats has a float16 scale (2 bytes); an asymmetric one also a float16 offset (2
    more bytes). With ``rows_per_scale``, this many rows share them; 0 stands for all rows.
    """

    step: TableStep
    row_bytes: float
    constant_type: str


ASYMMETRIC = {"symmetric": False, "clipping": "min_max"}
CASES = {
    "int8": Case(RowwiseInt8(), DIM + 2, "int8"),
    "int8, asymmetric": Case(RowwiseInt8(**ASYMMETRIC), DIM + 4, "int8"),
    "int8, shared scales": Case(RowwiseInt8(rows_per_scale=16), DIM + 2 / 16, "int8"),
    "int8, one scale": Case(RowwiseInt8(rows_per_scale=0), DIM, "int8"),
    "int4": Case(RowwiseInt4(), DIM / 2 + 2, "int4"),
    "int4, asymmetric": Case(RowwiseInt4(**ASYMMETRIC), DIM / 2 + 4, "int4"),
    "int4, shared scales": Case(RowwiseInt4(rows_per_scale=16), DIM / 2 + 2 / 16, "int4"),
    "int4, one scale": Case(RowwiseInt4(rows_per_scale=0), DIM / 2, "int4"),
    "int2": Case(RowwiseInt2(symmetric=True, clipping="min_max"), DIM / 4 + 2, "int4"),
    "int2, asymmetric": Case(RowwiseInt2(**ASYMMETRIC), DIM / 4 + 4, "int4"),
    "int2, shared scales": Case(
        RowwiseInt2(**ASYMMETRIC, rows_per_scale=16), DIM / 4 + 4 / 16, "int4"
    ),
    "float8": Case(Float8E4M3(), DIM + 2, "fp8"),
    "float8, shared scales": Case(Float8E4M3(rows_per_scale=16), DIM + 2 / 16, "fp8"),
    "bfloat16": Case(BFloat16(), 2 * DIM, "bf16"),
}


def build_request(case: Case, folder: Path) -> BuildRequest:
    """Quantize the table, lower the model, and return the request to build its engine."""
    model = run(
        case.step, Reference(Fields, SIGNATURE).model(), Bench(signature=SIGNATURE), folder / "s"
    )
    packed = stored_bytes(model.module)
    assert packed == ROWS * case.row_bytes + bytes_outside_rows(model.module)
    lowered = lower(
        model.module,
        only_served_graph(SIGNATURE),
        "tensorrt-rtx",
        folder / "model.onnx",
        most_rows=64,
    )
    (table,) = lowered.tables
    weights = TableWeights(
        module=table.module,
        rows=table.rows,
        initializers=table.names,
        rows_per_entry=table.rows_per_entry,
    )
    return BuildRequest(
        target="tensorrt-rtx",
        onnx=str(folder / "model.onnx"),
        profiles=(Profile(input="item", low=(1, FIELDS), best=(16, FIELDS), high=(64, FIELDS)),),
        tables=(weights,),
        packed_bytes=packed,
        seconds=300,
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_engine_stores_each_table_format_packed(case: Case, tmp_path: Path):
    request = build_request(case, tmp_path)
    audit = build_engine(request, tmp_path / "engine").audit
    assert audit.scratch == "flat"
    assert audit.tables_checked == ("item",)
    assert audit.twin_scratch_bytes == audit.scratch_bytes
    # A lower bound for the codes: the row without the most that a format stores in addition, a
    # float16 scale and a float16 offset.
    assert audit.constant_bytes[case.constant_type] >= ROWS * int(case.row_bytes - 4)
    # 64 KiB are the audit's allowance for padding. One fp32 scale per row instead of an fp16 one
    # would add ten times as much.
    assert request.packed_bytes <= audit.weights_bytes <= request.packed_bytes + 65_536


@pytest.mark.parametrize("name", ["int8", "int8, asymmetric", "int2, shared scales"])
def test_table_multiplied_before_its_gather_is_refused(name: str, tmp_path: Path):
    """The audit detects a widened table, so the test above shows that none is widened.

    The product with an identity matrix has the scores of the original graph. But its operand is the
    whole table in fp16, so TensorRT writes the widened table to scratch memory before the Gather.
    """
    request = build_request(CASES[name], tmp_path)
    model = onnx.load(request.onnx)
    nodes = model.graph.node
    codes = next(n for n in nodes if n.op_type == "DequantizeLinear" and "codes" in n.input[0])
    (table,) = (item for item in model.graph.initializer if item.name == codes.input[0])
    identity = np.eye(table.dims[1], dtype=np.float16)
    model.graph.initializer.append(onnx.numpy_helper.from_array(identity, "identity"))
    for node in nodes:
        if codes.output[0] in node.input:
            node.input[0] = "multiplied"
    product = onnx.helper.make_node("MatMul", [codes.output[0], "identity"], ["multiplied"])
    nodes.insert(list(nodes).index(codes) + 1, product)
    onnx.save(model, request.onnx)
    with raises_code(BuildRefused, "scratch_grows"):
        build_engine(request, tmp_path / "engine")


def bytes_outside_rows(module: nn.Module) -> int:
    """Return the bytes of the dense layer and of scales shared by all rows of the table."""
    shared = [tensor for _, tensor in module.item.named_buffers() if len(tensor) == 1]
    return stored_bytes(module.out) + sum(t.numel() * t.element_size() for t in shared)

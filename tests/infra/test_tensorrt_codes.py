"""TensorRT-RTX engines of tables with codebooks: the codes stay packed.

A builder may widen a table: convert its packed numbers to a wider type, in the engine's weights or
in scratch memory, the temporary memory of a call. The audit of an engine
(``infra/tensorrt/audit.py``) builds a twin: the same graph with half the rows in large tables.
Scratch memory is "flat" if engine and twin need the same amount, and a widened copy is larger.

A ``Profile`` has the smallest (``low``), optimal (``best``) and largest (``high``) shape of an
input. ``rows_per_entry`` of a table has, by name of an initializer, the number of table rows that
share one of its entries, such as a scale. It is 0 for a codebook, which all rows share.
"""

import onnx
import pytest
import torch
from error_codes import raises_code
from table_codes import step_id
from torch import Tensor, nn

from compressors.contracts import IdInput, Output, Signature
from compressors.contracts.targets.builder import BuildRequest, Profile, TableWeights
from compressors.core.modules.formats import PackedTable
from compressors.core.steps.step import TableStep
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import served_graphs
from compressors.quantize.tables.kmeans import KMeans
from compressors.quantize.tables.product_codes import ProductCodes
from compressors.quantize.tables.residual_codes import ResidualCodes
from infra.errors import BuildRefused
from infra.tensorrt.engines import Engine, build_engine, find_installed_version

pytestmark = pytest.mark.skipif(
    find_installed_version("tensorrt-rtx") is None,
    reason="TensorRT-RTX is not installed; pip install 'recpress[tensorrt-rtx]'",
)
FIELDS = 26
# So many rows that a widened copy of 16-byte codes is larger than the 8.2 MB of scratch memory that
# every one of these engines uses.
ROWS, DIM = 600_000, 32
SIGNATURE = Signature(
    inputs=(
        IdInput(
            name="ids", table="items", columns=tuple("abcdefghijklmnopqrstuvwxyz"), shape=(FIELDS,)
        ),
    ),
    outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
)


class Fields(nn.Module):
    """One table that all fields look up, and a dense layer after it."""

    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.items = table
        self.out = nn.Linear(FIELDS * DIM, 1)

    def forward(self, ids: Tensor) -> Tensor:
        score: Tensor = self.out(self.items(ids).flatten(1)).squeeze(1)
        return score


def random_table(step: TableStep) -> PackedTable:
    """Return a table with random content, because the builder depends only on types and shapes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, spec in step.storage.layout(ROWS, DIM, step.settings()).items():
        if spec.dtype == torch.uint8:
            tensors[name] = torch.randint(256, spec.shape, generator=generator, dtype=spec.dtype)
        else:
            tensors[name] = torch.randn(spec.shape, generator=generator).to(spec.dtype)
    return PackedTable(step.storage, ROWS, DIM, step.settings(), tensors)


def build(step: TableStep, tmp_path, modify=None) -> tuple[Engine, int]:
    """Build the engine of a network with a random table; return it and the packed bytes.

    Packed bytes are the bytes of all tensors as the plan stores them. ``modify`` changes the ONNX
    model before the build.
    """
    module = Fields(random_table(step)).eval()
    path = tmp_path / "model.onnx"
    (served_graph,) = served_graphs(SIGNATURE)
    lowered = lower(module, served_graph, "tensorrt-rtx", path)
    if modify is not None:
        graph = onnx.load(path)
        modify(graph)
        onnx.save(graph, path)
    packed = sum(tensor.nbytes for tensor in module.state_dict().values())
    # Small batches, whose activations take little scratch memory.
    ids = Profile(input="ids", low=(1, FIELDS), best=(4, FIELDS), high=(8, FIELDS))
    request = BuildRequest(
        target="tensorrt-rtx",
        onnx=str(path),
        profiles=(ids,),
        tables=tuple(
            TableWeights(
                module=t.module, rows=t.rows, initializers=t.names, rows_per_entry=t.rows_per_entry
            )
            for t in lowered.tables
        ),
        packed_bytes=packed,
        seconds=120,
    )
    return build_engine(request, tmp_path / "out"), packed


@pytest.mark.parametrize(
    "step",
    [
        KMeans(bits=4),
        pytest.param(KMeans(bits=8, scale="none"), marks=pytest.mark.nightly),
        pytest.param(ProductCodes(parts=16), marks=pytest.mark.nightly),
        ProductCodes(parts=16, bits=4, codebook_type="float16"),
        pytest.param(ResidualCodes(codebooks=16), marks=pytest.mark.nightly),
        ResidualCodes(codebooks=16, bits=2),
    ],
    ids=step_id,
)
def test_engine_stores_codes_and_codebooks_packed(step, tmp_path):
    engine, packed = build(step, tmp_path)
    audit = engine.audit
    assert audit.scratch == "flat", audit.scratch_reason
    assert audit.tables_checked == ("items",)
    assert audit.scratch_bytes == audit.twin_scratch_bytes
    # Padding (2.4 KB was measured for other tables) and one float32 copy of float16 codebooks.
    assert packed <= audit.weights_bytes < packed + 32_768


def test_engine_of_uint8_codes_is_refused_as_widened(tmp_path):
    """TensorRT accepts uint8 codes but widens them to int32, so lowering stores them as int8."""

    def modify(model: onnx.ModelProto) -> None:
        graph = model.graph
        (codes,) = (item for item in graph.initializer if item.name.endswith(".codes"))
        (dequantize,) = (node for node in graph.node if codes.name in node.input)
        (gather,) = (node for node in graph.node if dequantize.output[0] in node.input)
        (cast,) = (node for node in graph.node if gather.output[0] in node.input)
        codes.data_type = onnx.TensorProto.UINT8
        gather.input[0] = codes.name
        assert cast.op_type == "Cast"
        graph.node.remove(dequantize)

    with raises_code(BuildRefused, "weights_widened"):
        build(ProductCodes(parts=8), tmp_path, modify)

"""TensorRT-RTX engines that multiply by all rows of a table: the table stays packed.

The network ``MaskedItemHead`` (``tests/weight_readers.py``) has the output head of BERT4Rec, which
multiplies by the table of items.

A builder may widen a table: convert its packed numbers to a wider type. The audit of an engine
(``infra/tensorrt/audit.py``) excludes this if scratch memory, the temporary memory of a call, is
"flat": a copy of the table in float16 does not fit into that of a request of one row.

A ``Profile`` has the smallest (``low``), optimal (``best``) and largest (``high``) shape of an
input.
"""

import pytest
from models import Reference, only_served_graph
from weight_readers import LONGEST, MASKED_ITEM_HEAD, MaskedItemHead

from compressors.contracts import Bench
from compressors.contracts.targets.builder import BuildRequest, Profile, TableWeights
from compressors.core.skipping import run_or_skip
from compressors.core.steps.step import Method
from compressors.core.units import stored_bytes
from compressors.lower.export import lower
from compressors.quantize.dense.float16 import Float16
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.tensorrt.engines import build_engine, find_installed_version

ROWS, DIM, BATCH = 400_000, 32, 64


@pytest.mark.slow
@pytest.mark.skipif(
    find_installed_version("tensorrt-rtx") is None,
    reason="TensorRT-RTX is not installed; pip install 'recpress[tensorrt-rtx]'",
)
@pytest.mark.parametrize("step", [RowwiseInt8(), Float16()], ids=lambda step: step.kind)
def test_engine_of_an_output_head_does_not_widen_its_table(step: Method, tmp_path) -> None:
    reference = Reference(MaskedItemHead, MASKED_ITEM_HEAD.signature, {"items": ROWS, "dim": DIM})
    bench = Bench(signature=reference.signature)
    model = run_or_skip(step, reference.model(), bench, tmp_path / "out")
    graph = tmp_path / "model.onnx"
    lowered = lower(model.module, only_served_graph(reference.signature), "tensorrt-rtx", graph)
    lists = {"low": (1, 1), "best": (BATCH, LONGEST), "high": (BATCH, LONGEST)}
    request = BuildRequest(
        target="tensorrt-rtx",
        onnx=str(graph),
        profiles=(
            Profile(input="history", **lists),
            Profile(input="history_mask", **lists),
            Profile(input="next", low=(1,), best=(BATCH,), high=(BATCH,)),
        ),
        tables=tuple(
            TableWeights(
                module=table.module,
                rows=table.rows,
                initializers=table.names,
                rows_per_entry=table.rows_per_entry,
                multiplied=table.multiplied,
            )
            for table in lowered.tables
        ),
        packed_bytes=stored_bytes(model.module),
        seconds=200,
    )
    engine = build_engine(request, tmp_path)
    assert engine.audit.scratch == "flat"
    assert engine.audit.tables_checked == ("item",)
    # The table is stored once, with its scales in a second copy (2 bytes per row). 64 KiB are for
    # padding.
    assert engine.audit.weights_bytes <= request.packed_bytes + 2 * ROWS + 64 * 1024

"""Which graph of a 4-bit table lookup is fastest in ONNX Runtime?

Four graphs are compared:

- a Gather of float32 rows;
- int8 rows with Gather, Cast and Mul, as recpress exports them;
- 4-bit rows with ONNX Runtime's operator GatherBlockQuantized;
- 4-bit rows in the planar layout of recpress: the low halves of a row's bytes are the codes of the
  first columns, and the high halves those of the last columns. Two bitwise operators and one
  concatenation therefore unpack a row.

Each graph is first checked against the dequantized weights. Then all four are timed in turn in one
process on one thread, so that other load affects all of them. Labels with "ours" are exported by
recpress.

    python benchmarks/int4_lookup.py
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compressors.core.steps.table_encoder import encode_table
from compressors.lower.targets.onnxruntime.operators import translations
from compressors.quantize.kernels import bitpacking
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import OnnxRuntime, Session
from infra.timing import describe_machine, measure_interleaved_ms

FIELDS = 10  # lookups per row of a batch
SMALLEST_BLOCK = 16  # smallest block size that GatherBlockQuantized accepts
OPSET = 21


def export(module: nn.Module, path: Path) -> Path:
    """Export a table for ONNX Runtime, as recpress does: ids ``(batch, fields)`` to table rows."""
    program = torch.onnx.export(
        module.eval(),
        (torch.zeros(3, FIELDS, dtype=torch.int64),),
        dynamo=True,
        custom_translation_table=translations(),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=65_536)},),
        input_names=["ids"],
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None
    program.save(str(path))
    return path


def write_block_quantized(codes: Tensor, scale: Tensor, path: Path) -> Path:
    """Write the lookup of a table with GatherBlockQuantized, one block per row.

    Args:
        codes: int8 ``(rows, dim)``, each from -8 to 7.
        scale: float16 ``(rows, 1)``: the scale of each row.
        path: file of the graph.
    """
    rows, dim = codes.shape
    nibbles = codes.numpy().view(np.uint8) & 15
    packed = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).tobytes()
    initializers = [
        TensorProto(name="codes", data_type=TensorProto.INT4, dims=[rows, dim], raw_data=packed),
        numpy_helper.from_array(scale.numpy(), "scale"),
    ]
    nodes = [
        helper.make_node(
            "GatherBlockQuantized",
            ["codes", "ids", "scale"],
            ["float16_rows"],
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            block_size=dim,
        ),
        helper.make_node("Cast", ["float16_rows"], ["rows"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", FIELDS])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", FIELDS, dim])],
        initializers,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def write_graphs(rows: int, dim: int, folder: Path) -> dict[str, tuple[Path, Tensor]]:
    """Write all graphs; return by name the file and the weights that the lookup must return."""
    weight = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)) * 0.1
    plain = nn.Embedding(rows, dim, _weight=weight)
    int8, int4 = (encode_table(step, weight) for step in (RowwiseInt8(), RowwiseInt4()))
    ids = torch.arange(rows)
    dequantized8, dequantized4 = int8(ids), int4(ids)
    # recpress stores a 4-bit code plus 8, as an unsigned number.
    codes4 = (bitpacking.unpack(int4.codes, dim, 4).to(torch.int8) - 8, int4.scale)
    writers: dict[str, tuple[Callable[[Path], Path], Tensor]] = {
        "fp32 Gather": (lambda path: export(plain, path), weight),
        "int8 Gather-Cast-Mul (ours)": (lambda path: export(int8, path), dequantized8),
        "int4 GatherBlockQuantized": (lambda p: write_block_quantized(*codes4, p), dequantized4),
        "int4 planar (ours)": (lambda path: export(int4, path), dequantized4),
    }
    return {
        name: (write(folder / f"{number}.onnx"), expected)
        for number, (name, (write, expected)) in enumerate(writers.items())
    }


def measure(rows: int, dim: int, batches: list[int], rounds: int) -> None:
    """Print microseconds per call, and the ratio to GatherBlockQuantized, for tables of one width.

    Raises:
        AssertionError: the output of a graph differs from the dequantized weights.
    """
    with tempfile.TemporaryDirectory() as scratch:
        graphs = write_graphs(rows, dim, Path(scratch))
        sessions = {name: Session(path, threads=1) for name, (path, _) in graphs.items()}
    for batch in batches:
        ids = np.random.default_rng(batch).integers(0, rows, (batch, FIELDS))
        for name, (_, expected) in graphs.items():
            result = sessions[name].scores({"ids": ids})
            # GatherBlockQuantized multiplies in float16, the others in float32.
            tolerance = 2e-3 * float(expected.abs().max()) if "Block" in name else 1e-6
            gap = float(np.abs(result - expected[torch.from_numpy(ids)].numpy()).max())
            assert gap <= tolerance, f"{name} differs by {gap}"
        times = measure_interleaved_ms(list(sessions.values()), {"ids": ids}, rounds)
        medians = [1000 * float(np.median(samples)) for samples in times]
        peer = medians[list(sessions).index("int4 GatherBlockQuantized")]
        for name, median in zip(sessions, medians, strict=True):
            print(f"{dim:4d} {batch:6d}  {name:27s} {median:9.1f} us {median / peer:8.2f}")


def main() -> None:
    """Measure all table widths and batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64], help="powers of two >= 16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    for dim in args.dims:
        if dim < SMALLEST_BLOCK or dim & (dim - 1):
            parser.error(f"Expected a dim of 16, 32, 64, ... for GatherBlockQuantized, got {dim}.")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns once per missing operator
    warnings.simplefilter("ignore")
    host = describe_machine("ONNX Runtime", OnnxRuntime().version(), threads=1)
    print(f"{host.processor}, {host.runtime} {host.version}, 1 thread, {args.rows:,} rows,")
    print(f"{FIELDS} ids per row of the batch, median of {args.rounds} interleaved calls;")
    print("ratio to GatherBlockQuantized")
    print(f"{'dim':>4s} {'batch':>6s}  {'graph':27s} {'median':>12s} {'ratio':>8s}")
    for dim in args.dims:
        measure(args.rows, dim, args.batches, args.rounds)


if __name__ == "__main__":
    main()

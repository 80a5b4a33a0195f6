"""Which form of a 4-bit table does ONNX Runtime look up fastest?

Peers: fp32 Gather; int8 rows gathered, cast and multiplied (ours); 4-bit rows through ONNX
Runtime's own operator GatherBlockQuantized; 4-bit rows as two planes, unpacked by two bitwise ops
and one concatenation (ours). All four are measured in turn in one process, on one thread, and
checked against the same decoded weights first.

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

from compressors.core.runner import encode_table
from compressors.lower.targets.onnxruntime.operators import translations
from compressors.quantize.kernels import bitpacking
from compressors.quantize.tables.rowwise_int4 import RowwiseInt4
from compressors.quantize.tables.rowwise_int8 import RowwiseInt8
from infra.onnxruntime.sessions import Session, interleaved_ms, machine

FIELDS = 10  # ids looked up per row of a batch
SMALLEST_BLOCK = 16  # of GatherBlockQuantized
OPSET = 21


def exported(module: nn.Module, path: Path) -> Path:
    """A lookup as we write it down: ids ``(batch, fields)`` in, rows out."""
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


def block_quantized(codes: Tensor, scale: Tensor, path: Path) -> Path:
    """The same codes and scales behind the contrib operator, one block a row."""
    rows, dim = codes.shape
    nibbles = codes.numpy().view(np.uint8) & 15
    packed = (nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)).tobytes()
    held = [
        TensorProto(name="codes", data_type=TensorProto.INT4, dims=[rows, dim], raw_data=packed),
        numpy_helper.from_array(scale.numpy(), "scale"),
    ]
    nodes = [
        helper.make_node(
            "GatherBlockQuantized",
            ["codes", "ids", "scale"],
            ["half"],
            domain="com.microsoft",
            gather_axis=0,
            quantize_axis=1,
            block_size=dim,
        ),
        helper.make_node("Cast", ["half"], ["rows"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", FIELDS])],
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", FIELDS, dim])],
        held,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def forms(rows: int, dim: int, folder: Path) -> dict[str, tuple[Path, Tensor]]:
    """Every form's graph, and the weights it must give back."""
    weight = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)) * 0.1
    plain = nn.Embedding(rows, dim, _weight=weight)
    int8, int4 = (encode_table(step, weight) for step in (RowwiseInt8(), RowwiseInt4()))
    every = torch.arange(rows)
    decoded8, decoded4 = int8(every), int4(every)
    codes4 = (bitpacking.unpack(int4.codes, dim, 4).to(torch.int8) - 8, int4.scale)
    makers: dict[str, tuple[Callable[[Path], Path], Tensor]] = {
        "fp32 Gather": (lambda path: exported(plain, path), weight),
        "int8 Gather-Cast-Mul": (lambda path: exported(int8, path), decoded8),
        "int4 GatherBlockQuantized": (lambda p: block_quantized(*codes4, p), decoded4),
        "int4 planar (ours)": (lambda path: exported(int4, path), decoded4),
    }
    return {
        name: (make(folder / f"{number}.onnx"), expected)
        for number, (name, (make, expected)) in enumerate(makers.items())
    }


def measure(rows: int, dim: int, batches: list[int], rounds: int) -> None:
    """Print one dim's table: microseconds a call, and the ratio to the contrib operator."""
    with tempfile.TemporaryDirectory() as scratch:
        made = forms(rows, dim, Path(scratch))
        sessions = {name: Session(path, threads=1) for name, (path, _) in made.items()}
    for batch in batches:
        ids = np.random.default_rng(batch).integers(0, rows, (batch, FIELDS))
        for name, (_, expected) in made.items():
            found = sessions[name].scores({"ids": ids})
            # GatherBlockQuantized multiplies in float16, the others in float32.
            room = 2e-3 * float(expected.abs().max()) if "Block" in name else 1e-6
            gap = float(np.abs(found - expected[torch.from_numpy(ids)].numpy()).max())
            assert gap <= room, f"{name} is off by {gap}"
        times = interleaved_ms(list(sessions.values()), {"ids": ids}, rounds)
        medians = [1000 * float(np.median(each)) for each in times]
        peer = medians[list(sessions).index("int4 GatherBlockQuantized")]
        for name, median in zip(sessions, medians, strict=True):
            print(f"{dim:4d} {batch:6d}  {name:27s} {median:9.1f} us {median / peer:8.2f}")


def main() -> None:
    """Measure every dim and batch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64], help="powers of two >= 16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 1024])
    parser.add_argument("--rounds", type=int, default=100)
    order = parser.parse_args()
    for dim in order.dims:
        if dim < SMALLEST_BLOCK or dim & (dim - 1):
            parser.error(f"GatherBlockQuantized takes blocks of 16, 32, 64, ...; found dim {dim}")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns once per missing op
    warnings.simplefilter("ignore")
    here = machine(threads=1)
    print(f"{here.processor}, ONNX Runtime {here.onnxruntime}, 1 thread, {order.rows:,} rows,")
    print(f"{FIELDS} ids a row of the batch, median of {order.rounds} interleaved calls")
    print(f"{'dim':>4s} {'batch':>6s}  {'form':27s} {'median':>12s} {'to block':>8s}")
    for dim in order.dims:
        measure(order.rows, dim, order.batches, order.rounds)


if __name__ == "__main__":
    main()

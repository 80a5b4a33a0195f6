"""How fast are dense layers with 8- and 4-bit weights in ONNX Runtime, by operator?

Five kinds of layers are compared:

- the fp32 Gemm;
- ``static_int8``: weights and inputs in int8, with calibrated input ranges (QGemm);
- ``weight_int8`` and ``weight_int4`` with float inputs;
- the same with inputs that are quantized to int8 at run time;
- ONNX Runtime's 8-bit MatMul on float inputs (MatMulNBits), which recpress does not use.

The number in a label such as ``weight_int4/32`` is the block size: the weights that share a scale.

Each layer is first checked against the torch module. Then all are timed in turn in one process on
one thread. The printed time is the 10 % quantile of all calls, because other load only adds time.
Ratios are relative to the fp32 Gemm.

    python benchmarks/weight_only.py
"""

import argparse
import logging
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import Tensor, nn

from compressors.contracts import Architecture, Bench, DenseInput, Network, Output, Signature, Split
from compressors.core.model import Model
from compressors.core.runner import run
from compressors.core.steps.step import Step
from compressors.lower.export import lower
from compressors.lower.serving_wrapper import VECTOR, served_graphs
from compressors.quantize.dense.static_int8 import StaticInt8
from compressors.quantize.dense.weight_int4 import WeightInt4
from compressors.quantize.dense.weight_int8 import WeightInt8
from infra.onnxruntime.sessions import OnnxRuntime, Session
from infra.timing import describe_machine, measure_interleaved_ms

ROWS = 256  # calibration rows
STEPS: dict[str, Step] = {
    "static_int8": StaticInt8(),
    "weight_int8, int8 inputs": WeightInt8(),
    "weight_int8, float inputs": WeightInt8(activations="float32"),
    "weight_int4/32, float inputs": WeightInt4(),
    "weight_int4/32, int8 inputs": WeightInt4(activations="int8"),
    "weight_int4/128, int8 inputs": WeightInt4(block=128, activations="int8"),
}
MATMUL_NBITS = "MatMulNBits, 8 bits, float inputs"


class Layer(nn.Module):
    """One dense layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map vectors ``(rows, inputs)`` to ``(rows, outputs)``."""
        y: Tensor = self.dense(x)
        return y


def build_signature(inputs: int) -> Signature:
    """Return the signature of a network whose only input is one vector."""
    item = DenseInput(name="x", shape=(inputs,))
    return Signature(
        inputs=(item,),
        outputs=(Output(name="label", kind="ctr", form="logit", label="label", metric="auc"),),
    )


def build_sessions(width: int, folder: Path) -> dict[str, Session]:
    """Build sessions of a ``width x width`` layer in all formats; check each against torch."""
    torch.manual_seed(0)
    config = {"inputs": width, "outputs": width}
    network = Network(architecture=Architecture(path="benchmark:Layer", config=config))
    source = Model(Layer(width, width).eval(), Layer, network)
    rows = folder / "rows"
    rows.mkdir()
    save_file(
        {"x": torch.randn(ROWS, width), "@label": torch.zeros(ROWS)}, rows / "data.safetensors"
    )
    split = Split(path=str(rows), sha256="0" * 64, rows=ROWS)  # the hash is not checked here
    bench = Bench(signature=build_signature(width), calibration=split)
    # The layer outputs a vector for each row, like a tower, instead of the signature's one score.
    graph = replace(served_graphs(build_signature(width))[0], outputs=(VECTOR,))
    x = torch.randn(37, width)
    sessions = {}
    for number, (name, step) in enumerate({"fp32 Gemm": None, **STEPS}.items()):
        model = source if step is None else run(step, source, bench, folder / str(number))
        path = folder / f"{number}.onnx"
        lower(model.module, graph, "onnxruntime", path)
        sessions[name] = Session(path, threads=1)
        with torch.no_grad():
            expected = model.module(x).numpy()
        check(name, sessions[name], x.numpy(), expected)
    sessions[MATMUL_NBITS] = build_matmul_nbits(source.module, x, folder)
    return sessions


def build_matmul_nbits(module: nn.Module, x: Tensor, folder: Path) -> Session:
    """Build a session of MatMulNBits with 8 bits, float inputs and blocks of 128, without bias."""
    weight = module.dense.weight.detach().numpy()
    width, block = len(weight), 128
    blocks = weight.reshape(width, -1, block)
    scale = np.abs(blocks).max(axis=2) / 127
    codes = (np.rint(blocks / scale[:, :, None]) + 128).astype(np.uint8)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scale"],
        ["y"],
        domain="com.microsoft",
        K=width,
        N=width,
        bits=8,
        block_size=block,
        accuracy_level=1,  # ONNX Runtime's code for float32 computation
    )
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "layer",
        [info("x", TensorProto.FLOAT, ["rows", width])],
        [info("y", TensorProto.FLOAT, ["rows", width])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scale, "scale")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "matmul_nbits.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    session = Session(path, threads=1)
    dequantized = ((codes.astype(np.float32) - 128) * scale[:, :, None]).reshape(width, width)
    check(MATMUL_NBITS, session, x.numpy(), x.numpy() @ dequantized.T)
    return session


def check(
    name: str, session: Session, x: NDArray[np.float32], expected: NDArray[np.float32]
) -> None:
    """Exit if the session's output differs from ``expected`` by more than the tolerance.

    The tolerance is a share of the standard deviation of the outputs.
    """
    gap = float(np.abs(session.scores({"x": x}) - expected).max())
    tolerance = (5e-2 if name == "static_int8" else 1e-5) * float(expected.std())
    if gap > tolerance:
        raise SystemExit(f"{name} differs by {gap:.2g}, more than {tolerance:.2g}")


def main() -> None:
    """Measure all widths and batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 256])
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns once per missing operator
    warnings.simplefilter("ignore")
    host = describe_machine("ONNX Runtime", OnnxRuntime().version(), threads=1)
    print(f"{host.processor}, {host.runtime} {host.version}, 1 thread, layers of width x width,")
    print(
        f"us per call, the 10 % quantile of {args.rounds} interleaved calls, and the ratio to the"
    )
    print("fp32 Gemm; a column has the width and the batch size B")
    print(
        f"{'layer':34s}" + "".join(f"{w:>8d} B={b:<5d}" for w in args.widths for b in args.batches)
    )
    columns: list[dict[str, str]] = []
    for width in args.widths:
        with tempfile.TemporaryDirectory() as scratch:
            sessions = build_sessions(width, Path(scratch))
        for batch in args.batches:
            x = np.random.default_rng(batch).standard_normal((batch, width)).astype(np.float32)
            times = measure_interleaved_ms(list(sessions.values()), {"x": x}, args.rounds)
            fastest = [1000 * float(np.quantile(samples, 0.1)) for samples in times]
            columns.append(
                {
                    name: f"{time:7.1f} {time / fastest[0]:5.2f}x"
                    for name, time in zip(sessions, fastest, strict=True)
                }
            )
    for name in columns[0]:
        print(f"{name:34s}" + "".join(f" {column[name]:>15s}" for column in columns))


if __name__ == "__main__":
    main()

"""Which Q/DQ form does ONNX Runtime really compute in int8, and how fast?

Two networks: a chain of two layers with a Relu between, and two layers that read the same input.
Each is written in float32 and in several Q/DQ forms that mean the same. The column "int8" counts
the products that the runtime's own optimized graph computes in int8; the audit's opinion stands
beside it. All forms of a network are measured in turn in one process, on one thread.

    python benchmarks/qdq_forms.py
"""

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compressors.contracts import Plan, PlanLine, Reason
from compressors.errors.compression import AuditFailed
from compressors.lower.audit import INT8_PRODUCTS, audit
from infra.onnxruntime.sessions import Session, interleaved_ms, machine, optimized_graph

INPUT_SCALE = np.float32(0.03)
OPSET = 21


@dataclass(frozen=True)
class Form:
    """How the layers of a network are written down."""

    name: str
    zero: np.generic | None = None  # None: float32
    relu: str = "Max"
    whole_bias: bool = True


FP32 = Form("fp32", relu="Relu")
CHAIN = (
    FP32,
    Form("int8 around 0, Relu", np.int8(0), relu="Relu"),
    Form("int8 around 0, Max", np.int8(0)),
    Form("uint8 around 128, Relu", np.uint8(128), relu="Relu"),
    Form("uint8 around 128, Max", np.uint8(128)),
    Form("uint8 around 128, floor of the rounded (ours)", np.uint8(128), relu="Clip"),
    Form("uint8 around 128, Max, float bias", np.uint8(128), whole_bias=False),
)
SHARED = (
    FP32,
    Form("int8 around 0", np.int8(0)),
    Form("uint8 around 128 (ours)", np.uint8(128)),
)


@dataclass
class Drawing:
    """A graph in the making. Every form of a network gets the same weights."""

    form: Form
    width: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    held: list[onnx.TensorProto] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, value: Any) -> str:
        """A tensor that the graph holds."""
        name = f"c{len(self.held)}"
        self.held.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """An operator with one output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def rounded(self, x: str, *, floored: bool = False) -> str:
        """Inputs rounded to int8 and back, once for all layers that read them."""
        if self.form.zero is None:
            return x
        scale, zero = self.constant(INPUT_SCALE), self.constant(self.form.zero)
        steps = self.node("QuantizeLinear", x, scale, zero)
        if floored:
            steps = self.node("Clip", steps, zero)
        return self.node("DequantizeLinear", steps, scale, zero)

    def layer(self, x: str) -> str:
        """A dense layer of ``width`` inputs and outputs."""
        n = self.width
        weight = self.random.standard_normal((n, n)).astype(np.float32) / np.sqrt(n, dtype="f")
        bias = self.random.standard_normal(n).astype(np.float32)
        if self.form.zero is None:
            return self.node("Gemm", x, self.constant(weight), self.constant(bias), transB=1)
        scale = np.abs(weight).max(axis=1) / 127
        codes = self.constant(np.rint(weight / scale[:, None]).astype(np.int8))
        zeros = self.constant(np.zeros(n, np.int8))
        w = self.node("DequantizeLinear", codes, self.constant(scale), zeros, axis=0)
        b = self.constant(bias)
        if self.form.whole_bias:
            step = scale * INPUT_SCALE
            whole = self.constant(np.rint(bias / step).astype(np.int32))
            zeros = self.constant(np.zeros(n, np.int32))
            b = self.node("DequantizeLinear", whole, self.constant(step), zeros, axis=0)
        return self.node("Gemm", x, w, b, transB=1)

    def relu(self, x: str) -> str:
        """The same function under either name."""
        if self.form.relu == "Relu":
            return self.node("Relu", x)
        return self.node("Max", x, self.constant(np.float32(0)))

    def save(self, output: str, path: Path) -> Path:
        """Write the graph."""
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "layers",
            [value("x", TensorProto.FLOAT, ["batch", self.width])],
            [value(output, TensorProto.FLOAT, ["batch", self.width])],
            self.held,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path


def chain(draw: Drawing) -> str:
    """A layer, a Relu, a layer."""
    first = draw.layer(draw.rounded("x"))
    if draw.form.relu == "Clip":
        return draw.layer(draw.rounded(first, floored=True))
    return draw.layer(draw.rounded(draw.relu(first)))


def shared(draw: Drawing) -> str:
    """Two layers over one input, added: a cross layer beside a tower."""
    x = draw.rounded("x")
    return draw.node("Add", draw.layer(x), draw.layer(x))


def opinion(graph: onnx.GraphProto, form: Form) -> tuple[int, str]:
    """How many products run in int8, and what the audit says of it."""
    fused = sum(node.op_type in INT8_PRODUCTS for node in graph.node)
    if form.zero is None:
        return fused, "-"
    line = PlanLine(
        module="layer",
        role="dense",
        format="static_int8",
        bytes_before=0,
        bytes_after=0,
        reasons=(Reason("as_written", text="benchmark"),),
    )
    try:
        audit(graph, Plan(lines=(line, line)), ())
    except AuditFailed:
        return fused, "refused"
    return fused, "passed"


def measure(
    name: str, network: Callable[[Drawing], str], forms: tuple[Form, ...], order: argparse.Namespace
) -> None:
    """Print one network's table: milliseconds a call, and the ratio to fp32."""
    sessions, opinions = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for form in forms:
            draw = Drawing(form, order.width)
            path = draw.save(network(draw), Path(scratch) / "layers.onnx")
            sessions.append(Session(path, threads=1))
            opinions.append(opinion(optimized_graph(path), form))
    for batch in order.batches:
        x = np.random.default_rng(batch).standard_normal((batch, order.width)).astype(np.float32)
        expected = sessions[0].scores({"x": x})
        for form, session in zip(forms, sessions, strict=True):
            gap = np.abs(session.scores({"x": x}) - expected)
            # A level of the inputs, through one or two layers that keep the size of numbers.
            assert gap.mean() < 2 * INPUT_SCALE, f"{form.name} is off by {gap.mean()} on average"
        times = interleaved_ms(sessions, {"x": x}, order.rounds)
        medians = [float(np.median(each)) for each in times]
        for form, median, (fused, said) in zip(forms, medians, opinions, strict=True):
            print(
                f"{name:7s} {batch:6d}  {form.name:34s} {fused:4d}  {said:8s}"
                f"{median:9.4f} ms {median / medians[0]:8.2f}"
            )


def main() -> None:
    """Measure both networks at every batch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=512, help="inputs and outputs of each layer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, default=100)
    order = parser.parse_args()
    here = machine(threads=1)
    dot = "with" if here.int8_dot else "without"
    print(f"{here.processor} ({dot} int8 dot products), ONNX Runtime {here.onnxruntime}, 1 thread,")
    print(f"layers of {order.width} x {order.width}, median of {order.rounds} interleaved calls")
    print(
        f"{'network':7s} {'batch':>6s}  {'form':34s} {'int8':>4s}  {'audit':8s}{'median':>12s} "
        f"{'to fp32':>8s}"
    )
    measure("chain", chain, CHAIN, order)
    measure("shared", shared, SHARED, order)


if __name__ == "__main__":
    main()

"""Which Q/DQ graphs does ONNX Runtime compute in int8, and how fast?

Q/DQ graphs express int8 layers by pairs of QuantizeLinear and DequantizeLinear, which a runtime may
fuse with the matrix product between them. There are two networks: "chain" has two layers with a
Relu between them, "shared" has two layers with the same input. Each is written in float32 and in
several equivalent Q/DQ forms.

The column "int8" is the number of matrix products that ONNX Runtime's optimized graph computes in
int8. The column "audit" is whether ``compressors/lower/audit.py`` accepts that graph. All forms of
a network are timed in turn in one process on one thread. "ours" is the form that recpress exports.

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
from compressors.lower.audit import INT8_MATMULS, audit
from infra.onnxruntime.sessions import OnnxRuntime, Session, optimized_graph
from infra.timing import describe_machine, measure_interleaved_ms

INPUT_SCALE = np.float32(0.03)  # int8 then covers -3.8 to 3.8, nearly all standard normal inputs
OPSET = 21


@dataclass(frozen=True)
class Form:
    """How the layers of a network are written as ONNX operators.

    Attributes:
        name: label of the printed line.
        zero: zero point of the quantized inputs; None writes the layers in float32.
        relu: the operator of a ReLU: ``Relu``; ``Max`` with 0; or ``Clip`` of the quantized codes
            at the zero point.
        int32_bias: whether biases are int32 codes; else they are float32.
    """

    name: str
    zero: np.generic | None = None
    relu: str = "Max"
    int32_bias: bool = True


FP32 = Form("fp32", relu="Relu")
CHAIN_FORMS = (
    FP32,
    Form("int8 around 0, Relu", np.int8(0), relu="Relu"),
    Form("int8 around 0, Max", np.int8(0)),
    Form("uint8 around 128, Relu", np.uint8(128), relu="Relu"),
    Form("uint8 around 128, Max", np.uint8(128)),
    Form("uint8 around 128, Clip of the codes (ours)", np.uint8(128), relu="Clip"),
    Form("uint8 around 128, Max, float bias", np.uint8(128), int32_bias=False),
)
SHARED_FORMS = (
    FP32,
    Form("int8 around 0", np.int8(0)),
    Form("uint8 around 128 (ours)", np.uint8(128)),
)


@dataclass
class GraphBuilder:
    """Builds the graph of one form; every form of a network gets the same random weights."""

    form: Form
    width: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, value: Any) -> str:
        """Add an initializer; return its name."""
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator with one output; return the name of the output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def fake_quantize(self, x: str, *, clip: bool = False) -> str:
        """Add a Q/DQ pair, or nothing to a float32 form; ``clip`` applies a ReLU to the codes."""
        if self.form.zero is None:
            return x
        scale, zero = self.constant(INPUT_SCALE), self.constant(self.form.zero)
        codes = self.node("QuantizeLinear", x, scale, zero)
        if clip:
            codes = self.node("Clip", codes, zero)
        return self.node("DequantizeLinear", codes, scale, zero)

    def layer(self, x: str) -> str:
        """Add a dense layer of ``width`` inputs and outputs."""
        n = self.width
        weight = self.rng.standard_normal((n, n)).astype(np.float32) / np.sqrt(n, dtype="f")
        bias = self.rng.standard_normal(n).astype(np.float32)
        if self.form.zero is None:
            return self.node("Gemm", x, self.constant(weight), self.constant(bias), transB=1)
        scale = np.abs(weight).max(axis=1) / 127
        codes = self.constant(np.rint(weight / scale[:, None]).astype(np.int8))
        zeros = self.constant(np.zeros(n, np.int8))
        w = self.node("DequantizeLinear", codes, self.constant(scale), zeros, axis=0)
        b = self.constant(bias)
        if self.form.int32_bias:
            bias_scale = scale * INPUT_SCALE
            bias_codes = self.constant(np.rint(bias / bias_scale).astype(np.int32))
            zeros = self.constant(np.zeros(n, np.int32))
            b = self.node("DequantizeLinear", bias_codes, self.constant(bias_scale), zeros, axis=0)
        return self.node("Gemm", x, w, b, transB=1)

    def relu(self, x: str) -> str:
        """Add a ReLU before quantization, as Relu or as Max with 0."""
        if self.form.relu == "Relu":
            return self.node("Relu", x)
        return self.node("Max", x, self.constant(np.float32(0)))

    def save(self, output: str, path: Path) -> Path:
        """Write the graph to ``path``."""
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes,
            "layers",
            [value("x", TensorProto.FLOAT, ["batch", self.width])],
            [value(output, TensorProto.FLOAT, ["batch", self.width])],
            self.initializers,
        )
        opsets = [helper.make_opsetid("", OPSET)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
        return path


def add_chain(builder: GraphBuilder) -> str:
    """Add two layers with a ReLU between them; return the name of the output."""
    first = builder.layer(builder.fake_quantize("x"))
    if builder.form.relu == "Clip":
        return builder.layer(builder.fake_quantize(first, clip=True))
    return builder.layer(builder.fake_quantize(builder.relu(first)))


def add_layers_of_one_input(builder: GraphBuilder) -> str:
    """Add two layers with the same input and their sum, like a cross layer parallel to a tower."""
    x = builder.fake_quantize("x")
    return builder.node("Add", builder.layer(x), builder.layer(x))


def audit_graph(graph: onnx.GraphProto, form: Form) -> tuple[int, str]:
    """Return the number of matrix products that run in int8, and the result of the audit.

    The result is "accepted", "refused", or "-" for a graph in float32, which is not audited.
    """
    fused = sum(node.op_type in INT8_MATMULS for node in graph.node)
    if form.zero is None:
        return fused, "-"
    # The audit compares the graph with a plan: here, one line for each of the two int8 layers.
    # Names, bytes and reasons are placeholders.
    line = PlanLine(
        module="layer",
        role="dense",
        format="static_int8",
        bytes_before=0,
        bytes_after=0,
        reasons=(Reason("as_written", text="benchmark"),),
    )
    try:
        audit(graph, Plan(lines=(line, line)), tables=())
    except AuditFailed:
        return fused, "refused"
    return fused, "accepted"


def measure(
    name: str,
    network: Callable[[GraphBuilder], str],
    forms: tuple[Form, ...],
    args: argparse.Namespace,
) -> None:
    """Print for every form of a network milliseconds per call, and the ratio to fp32."""
    sessions, audit_results = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for form in forms:
            builder = GraphBuilder(form, args.width)
            path = builder.save(network(builder), Path(scratch) / "layers.onnx")
            sessions.append(Session(path, threads=1))
            audit_results.append(audit_graph(optimized_graph(path), form))
    for batch in args.batches:
        x = np.random.default_rng(batch).standard_normal((batch, args.width)).astype(np.float32)
        expected = sessions[0].scores({"x": x})
        for form, session in zip(forms, sessions, strict=True):
            gap = np.abs(session.scores({"x": x}) - expected)
            # The error is about one quantization step of the inputs, also after two layers.
            assert gap.mean() < 2 * INPUT_SCALE, f"{form.name} differs by {gap.mean()} on average"
        times = measure_interleaved_ms(sessions, {"x": x}, args.rounds)
        medians = [float(np.median(samples)) for samples in times]
        for form, median, (fused, outcome) in zip(forms, medians, audit_results, strict=True):
            print(
                f"{name:7s} {batch:6d}  {form.name:34s} {fused:4d}  {outcome:8s}"
                f"{median:9.4f} ms {median / medians[0]:8.2f}"
            )


def main() -> None:
    """Measure both networks at all batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=512, help="inputs and outputs of each layer")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    host = describe_machine("ONNX Runtime", OnnxRuntime().version(), threads=1)
    vnni = "with" if host.int8_dot else "without"
    print(f"{host.processor} ({vnni} int8 dot products), {host.runtime} {host.version}, 1 thread,")
    print(f"layers of {args.width} x {args.width}, median of {args.rounds} interleaved calls")
    print(
        f"{'network':7s} {'batch':>6s}  {'form':34s} {'int8':>4s}  {'audit':8s}{'median':>12s} "
        f"{'/ fp32':>8s}"
    )
    measure("chain", add_chain, CHAIN_FORMS, args)
    measure("shared", add_layers_of_one_input, SHARED_FORMS, args)


if __name__ == "__main__":
    main()

"""Rewrite a graph with bfloat16 matmuls so that ONNX Runtime can run it on a CPU.

The parity check runs TensorRT's graph in ONNX Runtime, which has no bfloat16 Gemm on CPUs and
refuses the graph. The rewritten graph rounds the operands to bfloat16, multiplies them in float32
and rounds the result to bfloat16. (ONNX Runtime itself treats a float16 Gemm this way.)
"""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from compressors.contracts import Plan


def has_bfloat16_matmuls(plan: Plan | None) -> bool:
    """Return whether a dense layer of a plan is stored as bfloat16; False without a plan."""
    lines = plan.lines if plan is not None else ()
    return any(line.role == "dense" and line.format == "bfloat16" for line in lines)


def write_checkable(path: Path, out: Path) -> None:
    """Write a copy of a graph that computes each Gemm with bfloat16 weights in float32.

    Args:
        path: the ONNX file to read.
        out: the ONNX file to write: another name in the same folder, because external weight files
            are not moved.
    """
    model = onnx.load(path, load_external_data=False)
    bfloat16_names = {
        item.name for item in model.graph.initializer if item.data_type == TensorProto.BFLOAT16
    }
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Gemm" or node.input[1] not in bfloat16_names:
            nodes.append(node)
            continue
        operands = [f"{node.output[0]}/operand{index}" for index in range(len(node.input))]
        float_output, output = f"{node.output[0]}/float", node.output[0]
        for name, operand in zip(node.input, operands, strict=True):
            nodes.append(helper.make_node("Cast", [name], [operand], to=TensorProto.FLOAT))
        node.input[:] = operands
        node.output[0] = float_output
        nodes += [node, helper.make_node("Cast", [float_output], [output], to=TensorProto.BFLOAT16)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # types are inferred again
    onnx.save(model, out)

"""Rewrite a graph with bfloat16 products so that ONNX Runtime can check it on a CPU.

ONNX Runtime has no bfloat16 Gemm on CPUs and refuses such a graph; a float16 Gemm it silently
computes in float32. The rewritten graph does the same for bfloat16: operands are rounded as
ordered and multiplied in float32, and the product is rounded again.
"""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from compressors.contracts import Plan


def has_bfloat16_products(plan: Plan | None) -> bool:
    """Whether a dense layer of a plan is stored as bfloat16."""
    lines = plan.lines if plan is not None else ()
    return any(line.role == "dense" and line.format == "bfloat16" for line in lines)


def write_checkable(path: Path, out: Path) -> None:
    """Write the graph of ``path`` to ``out``, with every Gemm over bfloat16 weights in float32.

    ``out`` must be another name in the same folder, because external weight files are not moved.
    """
    model = onnx.load(path, load_external_data=False)
    short = {
        item.name for item in model.graph.initializer if item.data_type == TensorProto.BFLOAT16
    }
    nodes = []
    for node in model.graph.node:
        if node.op_type != "Gemm" or node.input[1] not in short:
            nodes.append(node)
            continue
        wide = [f"{node.output[0]}/operand{place}" for place in range(len(node.input))]
        product, end = f"{node.output[0]}/float", node.output[0]
        for name, widened in zip(node.input, wide, strict=True):
            nodes.append(helper.make_node("Cast", [name], [widened], to=TensorProto.FLOAT))
        node.input[:] = wide
        node.output[0] = product
        nodes += [node, helper.make_node("Cast", [product], [end], to=TensorProto.BFLOAT16)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]  # types are inferred again
    onnx.save(model, out)

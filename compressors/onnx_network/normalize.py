"""Bring an ONNX graph to one opset and simplify it."""

import logging

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass
from onnxscript.version_converter import ConvertVersionPass

from compressors.contracts import is_out_of_memory
from compressors.errors.onnx_graphs import OnnxRefused
from compressors.lower.passes.simplify import simplify
from compressors.onnx_network.rules import simplify_lookups

OPSET = 18
"""The first opset in which the axes of all reductions are inputs. No later one, up to 25, changes
an operator of ``operators/``, so graphs of later opsets are not converted."""


def normalize(model: ir.Model) -> None:
    """Convert a graph to opset 18 if it is older, and simplify it, in place.

    Raises:
        OnnxRefused: the graph cannot be converted.
    """
    InlinePass()(model)
    opset = model.opset_imports.get("", 0)
    if opset < OPSET:
        _convert(model, opset)
    _name_results(model.graph)
    simplify(model, _may_fold)
    simplify_lookups(model)
    RemoveUnusedNodesPass()(model)


def _convert(model: ir.Model, opset: int) -> None:
    """Convert a graph to ``OPSET`` with the converters of onnx."""
    log = logging.getLogger("onnxscript.version_converter")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that it uses the converter of onnx
    problem = "an operator has no conversion"
    try:
        ConvertVersionPass(target_version=OPSET, fallback=True)(model)
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        problem = str(fault)
    finally:
        log.setLevel(level)
    if model.opset_imports.get("") != OPSET:
        raise OnnxRefused("opset_unconverted", expected=OPSET, got=opset, problem=problem)


def _name_results(graph: ir.Graph) -> None:
    """Give a weight that is transposed or reshaped the name of the original.

    Constant folding stores it under the name of the operator's result.
    """
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type not in ("Transpose", "Reshape") or source is None:
            continue
        if source.is_initializer() and len(source.uses()) == 1 and not _is_output(node):
            name = source.name
            source.name = f"{name}.original"
            node.outputs[0].name = name


def _is_output(node: ir.Node) -> bool:
    return any(value.is_graph_output() for value in node.outputs)


def _may_fold(node: ir.Node) -> bool | None:
    """Return whether a transposed weight of any size is folded; None for other nodes.

    If other nodes read the weight too, its transpose would be a second copy.
    """
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Transpose" and source is not None and source.is_initializer():
        return len(source.uses()) == 1
    return None

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


def _may_fold(node: ir.Node) -> bool | None:
    """Return True for a transposed weight of any size, so that its layer is recognized."""
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Transpose" and source is not None and source.is_initializer():
        return len(source.uses()) == 1 or None
    return None

"""Bring an ONNX graph to one opset and simplify it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass
from onnxscript.version_converter import ConvertVersionPass

from compressors.contracts import is_out_of_memory
from compressors.errors.onnx_graphs import OnnxRefused
from compressors.lower.passes.simplify import simplify
from compressors.onnx_network.rules import simplify_lookups
from compressors.onnx_network.weights import Weights

OPSET = 18
"""The first opset in which the axes of all reductions are inputs. No later one, up to 25, changes
an operator of ``operators/``, so graphs of later opsets are not converted."""

ONNX_DOMAIN = "ai.onnx"
"""The other name of the domain of ONNX's own operators, whose usual name is empty."""


def normalize(model: ir.Model) -> Weights:
    """Convert a graph to opset 18 if it is older, and simplify it, in place.

    Returns:
        What follows its trained weights.

    Raises:
        OnnxRefused: the graph cannot be converted or simplified.
    """
    for owner in (model, *model.functions.values()):
        if ONNX_DOMAIN in owner.opset_imports:
            owner.opset_imports[""] = owner.opset_imports.pop(ONNX_DOMAIN)
    with _refusing_faults():
        InlinePass()(model)
    opset = model.opset_imports.get("", 0)
    if opset < OPSET:
        _convert(model, opset)
    weights = Weights.of(model.graph)
    with _refusing_faults():
        simplify(model, weights.may_fold, most_merged=1)  # larger equal ones are trained apart
        simplify_lookups(model)
        RemoveUnusedNodesPass()(model)
    weights.restore_names(model.graph)
    return weights


@contextmanager
def _refusing_faults() -> Iterator[None]:
    """Raise ``OnnxRefused`` for any exception of onnx's libraries, except a lack of memory."""
    try:
        yield
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        raise OnnxRefused("simplification_failed", problem=str(fault)) from fault


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

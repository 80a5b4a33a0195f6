"""Convert an ONNX graph to opset 18 or later and simplify it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass
from onnxscript.version_converter import ConvertVersionPass

from compressors.contracts import is_out_of_memory
from compressors.errors.onnx_graphs import OnnxRefused
from compressors.lower.passes.simplify import simplify
from compressors.onnx_network.lookup_rewrites import simplify_lookups
from compressors.onnx_network.trained_weights import TrainedWeights

OPSET = 18
"""The first opset in which the axes of all reductions are inputs. The opsets 19 to 25 do not change
the operators of ``operators/``, so graphs with these opsets are not converted."""

ONNX_DOMAIN = "ai.onnx"
"""The long name of the domain of the standard ONNX operators, which graphs usually leave empty."""


def normalize(model: ir.Model) -> TrainedWeights:
    """Convert a model to opset 18 if its opset is older, and simplify it, in place.

    Returns:
        The initializers that training may change.

    Raises:
        OnnxRefused: the graph cannot be converted or simplified.
    """
    for owner in (model, *model.functions.values()):
        if ONNX_DOMAIN in owner.opset_imports:
            owner.opset_imports[""] = owner.opset_imports.pop(ONNX_DOMAIN)
    with _translate_library_errors():
        InlinePass()(model)
    opset = model.opset_imports.get("", 0)
    if opset < OPSET:
        _convert_opset(model, opset)
    weights = TrainedWeights.of(model.graph)
    with _translate_library_errors():
        # Merge equal initializers only if they have one element: larger ones may be weights, which
        # training changes separately.
        simplify(model, weights.should_fold, most_merged=1)
        simplify_lookups(model)
        RemoveUnusedNodesPass()(model)
    weights.restore_names(model.graph)
    return weights


@contextmanager
def _translate_library_errors() -> Iterator[None]:
    """Raise ``OnnxRefused`` for any exception of onnx and onnxscript, except a lack of memory."""
    try:
        yield
    except Exception as fault:
        if is_out_of_memory(fault):
            raise
        raise OnnxRefused("simplification_failed", problem=str(fault)) from fault


def _convert_opset(model: ir.Model, opset: int) -> None:
    """Convert a model from an older opset to ``OPSET`` with the converters of onnx."""
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

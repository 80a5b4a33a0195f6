"""Trace one graph of a model, merge its lookups, and translate it to ONNX."""

import copy
import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressors.contracts import is_out_of_memory
from compressors.core.modules.formats import PackedLinear, PackedTable
from compressors.core.modules.output_calibration import find_recalibration
from compressors.core.random_inputs import generate_inputs
from compressors.core.runner import rows_of_tables
from compressors.errors.compression import NotLowerable
from compressors.lower import attention, recurrent
from compressors.lower.graph_builders import (
    exact_sigmoid,
    log_sigmoid,
    squeeze_dimension,
    squeeze_dimensions,
    squeeze_fixed,
)
from compressors.lower.lookups.merge_lookups import merge_lookups
from compressors.lower.serving_wrapper import (
    ServedGraph,
    ServingWrapper,
    dynamic_shapes,
    input_names,
    wrap_for_serving,
)
from compressors.lower.targets.registry import lowering_target

OPSET = 21  # the first with blocked DequantizeLinear and int4
TRACE_ROWS = 3  # batch size of the example inputs


def export_program(
    model: nn.Module, served_graph: ServedGraph, target: str, most_rows: int = 65_536
) -> tuple[ServingWrapper, torch.onnx.ONNXProgram]:
    """Export one graph of a model with torch, before it is simplified.

    The parameters are those of ``lower``; equal arguments result in equal programs. Returns the
    PyTorch module that was exported, and the ONNX program.

    Raises:
        NotLowerable: torch.export cannot trace the module, the graph would have a fixed number of
            rows or ids, or an operator has no ONNX form.
    """
    signature = served_graph.signature
    rows = rows_of_tables(model, signature)
    lowering = lowering_target(target)
    # The graph of an uncompressed model is the reference for latency, so it stays as it is.
    merges = lowering.can_merge_lookups and _is_compressed(model)
    wrapper = wrap_for_serving(model, served_graph, rows, joins_ids=merges)
    translations: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.log_sigmoid.default: log_sigmoid,
        torch.ops.aten.squeeze.default: squeeze_fixed,
        torch.ops.aten.squeeze.dim: squeeze_dimension,
        torch.ops.aten.squeeze.dims: squeeze_dimensions,
        **attention.translations(),
        **recurrent.translations(),
        **lowering.translations(),
    }
    has_probabilities = any(output.form == "probability" for output in signature.outputs)
    if has_probabilities and find_recalibration(wrapper.model) is not None:
        # The recalibration computes the logit of the sigmoid's output.
        translations[torch.ops.aten.sigmoid.default] = exact_sigmoid
    inputs = generate_inputs(signature, rows, TRACE_ROWS)
    names = input_names(signature)
    try:
        args = tuple(inputs[name] for name in names)
        shapes = dynamic_shapes(signature, most_rows)
        traced = _trace(wrapper, args, shapes)
        if merges:
            # Without in-place operators: a merged lookup would change with the rows of one table.
            traced = traced.run_decompositions({})
            wrapper.together = nn.ModuleList(merge_lookups(traced, wrapper))
        program = _translate(traced, names, wrapper.served_graph.outputs, translations)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        original = _find_original_error(error)
        if isinstance(original, NotLowerable):
            raise copy.copy(original) from error
        reason = (str(original).strip().splitlines() or [repr(original)])[0].rstrip(".")
        raise NotLowerable("export_failed", target=target, problem=reason) from error
    for name, value, sizes in zip(names, program.model.graph.inputs, shapes, strict=True):
        for axis in sizes:  # torch's exporter falls back to sizes of the traced batch
            size = value.shape[axis] if value.shape is not None else None
            if isinstance(size, int):
                raise NotLowerable("size_fixed", target=target, name=name, axis=axis, size=size)
    return wrapper, program


def _find_original_error(error: BaseException) -> BaseException:
    """Return the first error in a chain of causes; torch's exporter wraps it in other errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_compressed(model: nn.Module) -> bool:
    return any(isinstance(module, PackedTable | PackedLinear) for module in model.modules())


def _trace(
    wrapper: ServingWrapper, args: tuple[Tensor, ...], shapes: tuple[dict[int, Any], ...]
) -> torch.export.ExportedProgram:
    """Trace a module as ``torch.onnx.export`` does, which would not return the traced program.

    If Python code cannot be run with symbols, it is analyzed instead (``strict``). Sizes that the
    module fixes become numbers, as torch suggests; the caller refuses them.
    """
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), oblivious:  # a batch may have one row, and a list no element
        try:
            return _trace_with_fixes(wrapper, args, shapes, strict=False)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            try:
                return _trace_with_fixes(wrapper, args, shapes, strict=True)
            except Exception:
                raise error from None


def _trace_with_fixes(
    wrapper: ServingWrapper,
    args: tuple[Tensor, ...],
    shapes: tuple[dict[int, Any], ...],
    *,
    strict: bool,
) -> torch.export.ExportedProgram:
    export = partial(
        torch.export.export,
        wrapper,
        args,
        strict=strict,
        # Conditions on sizes do not restrict the graph if they hold for all of its sizes.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    try:
        return export(dynamic_shapes=(shapes,))
    except torch._dynamo.exc.UserError as error:
        refine = torch.export.dynamic_shapes.refine_dynamic_shapes_from_suggested_fixes
        try:
            fixed = refine(error.msg, (shapes,))
        except Exception:
            raise error from None
        return export(dynamic_shapes=fixed)


def _translate(
    traced: torch.export.ExportedProgram,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    translations: dict[Any, Callable[..., Any]],
) -> torch.onnx.ONNXProgram:
    """Call ``torch.onnx.export`` without its warnings and log messages."""
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # torch warns once per missing torchvision operator
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced,
                dynamo=True,
                custom_translation_table=translations,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                optimize=False,
                verbose=False,
            )
            assert program is not None  # noqa: S101 - never None with dynamo=True; for mypy
            return program
    finally:
        exporter_log.setLevel(level)

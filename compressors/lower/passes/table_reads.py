"""How an exported graph reads the stored tensors of a table: by lookups, slices or matmuls."""

from collections.abc import Iterator

import onnx_ir as ir

_BEFORE_MATMUL = {"Slice", "DequantizeLinear", "Cast", "Transpose"}
"""Operators between a stored tensor and the matmul that reads it."""


def depends_on_request(value: ir.Value) -> bool:
    """Return whether the graph's inputs select rows of a stored tensor, or are multiplied by it.

    Position embeddings, for example, are read at the same rows in every call. A runtime computes
    such a lookup once and drops the table, which is not an error.
    """
    return any(not _is_constant(other) for _, other in _iterate_reads(value))


def _iterate_reads(value: ir.Value) -> Iterator[tuple[ir.Node, ir.Value | None]]:
    """Yield the operators that read rows of a value or multiply by it, with their other input.

    The other input is the ids of a Gather, the first row of a Slice, or the matrix that a Gemm
    multiplies. A DequantizeLinear may be in between.
    """
    for node in value.consumers():
        if node.op_type in ("Gather", "Slice"):
            yield node, node.inputs[1]
        elif node.op_type == "Gemm" and value is node.inputs[1]:
            yield node, node.inputs[0]
        elif node.op_type == "DequantizeLinear":
            yield from _iterate_reads(node.outputs[0])


def is_used_in_matmul(value: ir.Value) -> bool:
    """Return whether a Gemm or MatMul reads a stored tensor: all of it, or blocks of rows."""
    return any(
        node.op_type in ("Gemm", "MatMul")
        or (node.op_type in _BEFORE_MATMUL and any(map(is_used_in_matmul, node.outputs)))
        for node in value.consumers()
    )


def _is_constant(value: ir.Value | None) -> bool:
    """Return whether a value does not depend on the graph's inputs."""
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(_is_constant(item) for item in node.inputs)

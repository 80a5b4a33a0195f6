"""Rewrite rules that reduce an exported embedding lookup to one Gather.

TensorFlow adds the number of rows to negative indices before a lookup, and tf2onnx exports this
choice between two values as a sum of two products. ONNX's Gather counts negative indices from the
last row itself, so these nodes are redundant. ``negative_ids.py`` detects lookups whose indices may
be negative.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewritePass, pattern


def _sum_of_products(op: Any, condition: Any, x: Any, y: Any) -> Any:
    is_x, is_y = op.Cast(condition), op.Cast(op.Not(condition))
    return op.Add(op.Mul(is_x, x), op.Mul(is_y, y))


def _where(op: Any, condition: Any, x: Any, y: Any, **_: Any) -> Any:
    return op.Where(condition, x, y)


def _lookup_with_wrapped_ids(op: Any, table: Any, ids: Any, zero: Any, rows: Any) -> Any:
    return op.Gather(table, op.Where(op.Less(ids, zero), op.Add(ids, rows), ids))


def _lookup_with_cast_and_wrapped_ids(op: Any, table: Any, ids: Any, zero: Any, rows: Any) -> Any:
    return op.Gather(table, op.Where(op.Less(op.Cast(ids), zero), op.Add(ids, rows), ids))


def _lookup(op: Any, table: Any, ids: Any, **_: Any) -> Any:
    return op.Gather(table, ids, axis=0)


def _wraps_negative_ids(_: Any, table: ir.Value, zero: ir.Value, rows: ir.Value, **__: Any) -> bool:
    """Return whether a lookup adds the number of rows of its table to ids below zero."""
    gather = next(iter(table.consumers()), None)
    return (
        table.shape is not None
        and gather is not None
        and all(node.attributes.get_int("axis", 0) == 0 for node in table.consumers())
        and _scalar(zero) == 0
        and _scalar(rows) == table.shape[0]
    )


def _scalar(value: ir.Value) -> float | None:
    """Return the number in a constant of one element; None for other values."""
    stored = value.const_value
    return float(stored.numpy().reshape(-1)[0]) if stored is not None and stored.size == 1 else None


RULES = pattern.RewriteRuleSet(
    [
        pattern.RewriteRule(_sum_of_products, _where, name="SumOfProductsToWhere"),
        pattern.RewriteRule(
            _lookup_with_wrapped_ids, _lookup, _wraps_negative_ids, name="NegativeIds"
        ),
        pattern.RewriteRule(
            _lookup_with_cast_and_wrapped_ids,
            _lookup,
            _wraps_negative_ids,
            name="NegativeIdsWithCast",
        ),
    ],
    commute=True,
)


def simplify_lookups(model: ir.Model) -> None:
    """Apply the rules to a model, in place; nodes without consumers remain."""
    RewritePass(RULES)(model)

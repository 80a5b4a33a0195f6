"""Rewrite rules for what exporters write around a lookup.

TensorFlow adds the number of rows to negative indices before it looks them up, and tf2onnx writes
its selection as two products. ONNX's Gather counts negative indices from the last row anyway, so
it needs neither; ``ids.py`` finds lookups for which this matters.
"""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewritePass, pattern


def _sum_of_products(op: Any, condition: Any, x: Any, y: Any) -> Any:
    is_x, is_y = op.Cast(condition), op.Cast(op.Not(condition))
    return op.Add(op.Mul(is_x, x), op.Mul(is_y, y))


def _where(op: Any, condition: Any, x: Any, y: Any, **_: Any) -> Any:
    return op.Where(condition, x, y)


def _lookup_from_the_end(op: Any, table: Any, ids: Any, zero: Any, rows: Any) -> Any:
    return op.Gather(table, op.Where(op.Less(ids, zero), op.Add(ids, rows), ids))


def _lookup_from_the_end_with_cast(op: Any, table: Any, ids: Any, zero: Any, rows: Any) -> Any:
    return op.Gather(table, op.Where(op.Less(op.Cast(ids), zero), op.Add(ids, rows), ids))


def _lookup(op: Any, table: Any, ids: Any, **_: Any) -> Any:
    return op.Gather(table, ids, axis=0)


def _adds_rows(_: Any, table: ir.Value, zero: ir.Value, rows: ir.Value, **__: Any) -> bool:
    """Return whether a lookup adds the number of rows of its table to ids below zero."""
    gather = next(iter(table.consumers()), None)
    return (
        table.shape is not None
        and gather is not None
        and all(node.attributes.get_int("axis", 0) == 0 for node in table.consumers())
        and _number(zero) == 0
        and _number(rows) == table.shape[0]
    )


def _number(value: ir.Value) -> float | None:
    """Return the value of a constant number; None for other values."""
    stored = value.const_value
    return float(stored.numpy().reshape(-1)[0]) if stored is not None and stored.size == 1 else None


RULES = pattern.RewriteRuleSet(
    [
        pattern.RewriteRule(_sum_of_products, _where, name="SumOfProductsToWhere"),
        pattern.RewriteRule(_lookup_from_the_end, _lookup, _adds_rows, name="NegativeIds"),
        pattern.RewriteRule(
            _lookup_from_the_end_with_cast, _lookup, _adds_rows, name="NegativeIdsWithCast"
        ),
    ],
    commute=True,
)


def simplify_lookups(model: ir.Model) -> None:
    """Remove what exporters write around lookups, in place; unused nodes remain."""
    RewritePass(RULES)(model)

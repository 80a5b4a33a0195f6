"""Find lookups whose ids may be negative.

``Gather`` of ONNX counts negative ids from the last row, and a table of torch refuses them. The
ids of inputs are not negative, because the signature of a bundle excludes it.
"""

import onnx_ir as ir

NON_NEGATIVE = frozenset({"Abs", "ArgMax", "ArgMin", "Relu", "Shape", "Sigmoid", "Size"})
"""Operators whose results are not negative."""

OF_FIRST = frozenset(
    {
        *("Cast", "CastLike", "Ceil", "Clip", "CumSum", "Expand", "Flatten", "Floor", "Gather"),
        *("GatherElements", "GatherND", "Identity", "ReduceMax", "ReduceMin", "ReduceSum"),
        *("Reshape", "Round", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""Operators whose results are not negative if their first input is not."""

OF_ALL = frozenset({"Add", "Concat", "Div", "Max", "Mean", "Min", "Mul", "Sum"})
"""Operators whose results are not negative if no input is."""


def may_be_negative(ids: ir.Value) -> bool:
    """Return whether a node computes ids that may be negative."""
    visited: set[ir.Value] = set()
    pending = [ids]
    while pending:
        value = pending.pop()
        if value in visited or value.is_graph_input():
            continue
        visited.add(value)
        sources = _sources(value)
        if sources is None:
            return True
        pending += [source for source in sources if source is not None]
    return False


def _sources(value: ir.Value) -> tuple[ir.Value | None, ...] | None:
    """Return the values of which none may be negative for a value not to be; None if it may be."""
    if value.is_initializer():
        return None if _is_negative(value) else ()
    node = value.producer()
    if node is None:
        return None
    first, *others = node.inputs or (None,)
    match node.op_type:
        case op if op in NON_NEGATIVE:
            return ()
        case "TopK" if value is node.outputs[1]:
            return ()
        case "Clip" | "Max" if any(_is_bound(item) for item in others[:1]):
            return ()
        case "Mod" if not node.attributes.get_int("fmod", 0):
            return tuple(others)  # the result has the sign of the divisor
        case op if op in OF_FIRST:
            return (first,)
        case op if op in OF_ALL:
            return tuple(node.inputs)
        case "Where":
            return tuple(others)
    return None


def _is_bound(value: ir.Value | None) -> bool:
    """Return whether a value is a constant that is not negative."""
    return value is not None and value.is_initializer() and not _is_negative(value)


def _is_negative(constant: ir.Value) -> bool:
    """Return whether an initializer has a negative number, or none that can be compared."""
    stored = constant.const_value
    return stored is None or stored.dtype.is_string() or bool((stored.numpy() < 0).any())

"""Detect lookups whose ids may be negative.

ONNX's ``Gather`` counts negative ids from the last row; ``nn.Embedding`` rejects them. Ids that are
inputs of the graph are not negative, because the bundle's signature excludes negative ids.
"""

import onnx_ir as ir

NON_NEGATIVE = frozenset({"Abs", "ArgMax", "ArgMin", "Relu", "Shape", "Sigmoid", "Size"})
"""Operators whose output is never negative."""

NON_NEGATIVE_IF_FIRST_INPUT_IS = frozenset(
    {
        *("Cast", "CastLike", "Ceil", "Clip", "CumSum", "Expand", "Flatten", "Floor", "Gather"),
        *("GatherElements", "GatherND", "Identity", "ReduceMax", "ReduceMin", "ReduceSum"),
        *("Reshape", "Round", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)
"""Operators whose output is not negative if their first input is not negative."""

NON_NEGATIVE_IF_ALL_INPUTS_ARE = frozenset(
    {"Add", "Concat", "Div", "Max", "Mean", "Min", "Mul", "Sum"}
)
"""Operators whose output is not negative if no input is negative."""


def may_be_negative(ids: ir.Value) -> bool:
    """Return whether the graph may compute negative values for these ids."""
    visited: set[ir.Value] = set()
    pending = [ids]
    while pending:
        value = pending.pop()
        if value in visited or value.is_graph_input():
            continue
        visited.add(value)
        inputs = _inputs_to_check(value)
        if inputs is None:
            return True
        pending += [item for item in inputs if item is not None]
    return False


def _inputs_to_check(value: ir.Value) -> tuple[ir.Value | None, ...] | None:
    """Return the inputs of a value's node that decide whether the value may be negative.

    The value is not negative if none of them is. None means that it may be negative anyway.
    """
    if value.is_initializer():
        return None if _has_negative_element(value) else ()
    node = value.producer()
    if node is None:
        return None
    first, *others = node.inputs or (None,)
    match node.op_type:
        case op if op in NON_NEGATIVE:
            return ()
        case "TopK" if value is node.outputs[1]:
            return ()
        case "Clip" | "Max" if any(_is_non_negative_constant(item) for item in others[:1]):
            return ()
        case "Mod" if not node.attributes.get_int("fmod", 0):
            return tuple(others)  # the result has the sign of the divisor
        case op if op in NON_NEGATIVE_IF_FIRST_INPUT_IS:
            return (first,)
        case op if op in NON_NEGATIVE_IF_ALL_INPUTS_ARE:
            return tuple(node.inputs)
        case "Where":
            return tuple(others)
    return None


def _is_non_negative_constant(value: ir.Value | None) -> bool:
    """Return whether a value is an initializer without negative elements."""
    return value is not None and value.is_initializer() and not _has_negative_element(value)


def _has_negative_element(initializer: ir.Value) -> bool:
    """Return whether an initializer has a negative element, or elements that are no numbers."""
    stored = initializer.const_value
    return stored is None or stored.dtype.is_string() or bool((stored.numpy() < 0).any())

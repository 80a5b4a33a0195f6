"""A graph pass that removes a Split whose parts are concatenated again.

The merged lookup of several tables (``lower/merged/merged_tables.py``) ends with a Split, and
networks often concatenate the looked-up rows.
"""

import onnx_ir as ir


class JoinSplitRows(ir.passes.InPlacePass):
    """Replace the parts of a Split by its input in a Concat that has all parts, in their order."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite a model in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Concat" or node.outputs[0].is_graph_output():
                continue
            inputs, joined = list(node.inputs), list[ir.Value | None]()
            while inputs:
                split = inputs[0].producer() if inputs[0] is not None else None
                parts = list(split.outputs) if split is not None else []
                is_complete = (
                    split is not None
                    and split.op_type == "Split"
                    and inputs[: len(parts)] == parts
                    and split.inputs[0] is not None
                    and _get_axis(split, split.inputs[0])
                    == _get_axis(node, split.inputs[0])
                    is not None
                )
                joined.append(split.inputs[0] if split is not None and is_complete else inputs[0])
                inputs = inputs[len(parts) if is_complete else 1 :]
            if len(joined) == len(node.inputs):
                continue
            modified = True
            if len(joined) == 1 and joined[0] is not None:
                ir.convenience.replace_all_uses_with(node.outputs[0], joined[0])
                model.graph.remove(node, safe=True)
                continue
            new = ir.node("Concat", joined, attributes=dict(node.attributes))
            new.outputs[0].dtype, new.outputs[0].shape = (
                node.outputs[0].dtype,
                node.outputs[0].shape,
            )
            new.outputs[0].name = node.outputs[0].name
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [new], node.outputs, new.outputs
            )
        for node in reversed(list(model.graph)):
            if node.op_type == "Split" and not any(out.uses() for out in node.outputs):
                model.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _get_axis(node: ir.Node, value: ir.Value) -> int | None:
    """Return the axis of a Concat or Split, counted from the front; None if the rank is unknown.

    ``value`` is a tensor of the same rank as the node's inputs.
    """
    if value.shape is None:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return axis % len(value.shape)

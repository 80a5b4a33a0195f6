"""A graph pass that removes a Split whose parts a Concat joins again."""

import onnx_ir as ir


class JoinSplitRows(ir.passes.InPlacePass):
    """Let a Concat that joins all parts of a Split in order read the input of the Split."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite a model in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "Concat" or node.outputs[0].is_graph_output():
                continue
            inputs, joined = list(node.inputs), list[ir.Value | None]()
            while inputs:
                source = inputs[0].producer() if inputs[0] is not None else None
                parts = list(source.outputs) if source is not None else []
                whole = (
                    source is not None
                    and source.op_type == "Split"
                    and inputs[: len(parts)] == parts
                    and source.inputs[0] is not None
                    and _axis(source, source.inputs[0]) == _axis(node, source.inputs[0]) is not None
                )
                joined.append(source.inputs[0] if source is not None and whole else inputs[0])
                inputs = inputs[len(parts) if whole else 1 :]
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


def _axis(node: ir.Node, value: ir.Value) -> int | None:
    """The axis of a Concat or Split of tensors like a value, from the front; None if unknown."""
    if value.shape is None:
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    return axis % len(value.shape)

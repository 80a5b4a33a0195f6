"""A graph pass that keeps int8 products in int8 if a Relu or Clip follows them."""

import numpy as np
import onnx_ir as ir


class SpellOutClipping(ir.passes.InPlacePass):
    """Write a Relu or Clip right after an int8 Gemm in a form that leaves the product in int8.

    ONNX Runtime merges Gemm and Relu into a float FusedGemm *before* it looks for int8 products,
    and leaves the whole layer in float32 after a DequantizeLinear: 3.5 times slower than fused
    (``benchmarks/qdq_forms.py``). It has no such rule for Max and Min, which compute the same. If
    only the rounding for the next int8 layer reads a Relu, the Relu becomes a lower bound of the
    rounded numbers: then the product itself outputs them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite a model in place."""
        modified = False
        for node in list(model.graph):
            if node.op_type not in {"Relu", "Clip"} or node.inputs[0] is None:
                continue
            gemm = node.inputs[0].producer()
            if gemm is None or gemm.op_type != "Gemm" or gemm.inputs[0] is None:
                continue
            source = gemm.inputs[0].producer()
            if source is None or source.op_type != "DequantizeLinear":
                continue
            modified = True
            if node.op_type != "Relu" or not _floor_steps(model, node):
                _spell_out(model, node)
        return ir.passes.PassResult(model, modified=modified)


def _floor_steps(model: ir.Model, relu: ir.Node) -> bool:
    """Replace a Relu by a Clip after the QuantizeLinear that reads it, if only one node does."""
    value, floored = relu.inputs[0], relu.outputs[0]
    readers = [use.node for use in floored.uses()]
    if value is None or floored.is_graph_output() or len(value.uses()) != 1 or len(readers) != 1:
        return False
    (rounding,) = readers
    if rounding.op_type != "QuantizeLinear" or (zero := rounding.inputs[2]) is None:
        return False
    if zero.dtype != ir.DataType.UINT8:
        return False
    steps = rounding.outputs[0]
    clip = ir.node("Clip", [steps, zero])
    clip.outputs[0].name = f"{steps.name}_floored"
    clip.outputs[0].dtype, clip.outputs[0].shape = steps.dtype, steps.shape
    ir.convenience.replace_all_uses_with(steps, clip.outputs[0])
    clip.replace_input_with(0, steps)
    model.graph.insert_after(rounding, clip)
    rounding.replace_input_with(0, value)
    model.graph.remove(relu, safe=True)
    return True


def _spell_out(model: ir.Model, node: ir.Node) -> None:
    low, high = (*node.inputs[1:], None, None)[:2]
    if node.op_type == "Relu":
        low = _scalar(model, "relu_floor", 0.0)
    current, new = node.inputs[0], []
    for op_type, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            new.append(ir.node(op_type, [current, bound]))
            current = new[-1].outputs[0]
            current.dtype, current.shape = node.outputs[0].dtype, node.outputs[0].shape
    if current is not None:
        current.name = node.outputs[0].name
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, node.outputs, [current])


def _scalar(model: ir.Model, name: str, value: float) -> ir.Value:
    if name not in model.graph.initializers:
        tensor = ir.Tensor(np.array(value, np.float32), name=name)
        kind = ir.TensorType(ir.DataType.FLOAT)
        model.graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(()), type=kind, const_value=tensor
        )
    return model.graph.initializers[name]

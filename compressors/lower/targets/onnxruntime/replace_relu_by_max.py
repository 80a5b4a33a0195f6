"""A graph pass that keeps int8 layers in int8 if a Relu or Clip follows them."""

import numpy as np
import onnx_ir as ir


class ReplaceReluByMax(ir.passes.InPlacePass):
    """Replace a Relu or Clip after an int8 Gemm by operators that leave the Gemm in int8.

    ONNX Runtime merges Gemm and Relu into a float FusedGemm *before* it looks for int8 Gemms.
    The layer then computes in float32 after a DequantizeLinear, 3.5 times slower than in int8
    (``benchmarks/qdq_forms.py``). It does not merge Gemm with Max or Min, so these replace Relu and
    Clip. If the only consumer of a Relu is the QuantizeLinear of the next int8 layer, a Clip of the
    codes replaces the Relu instead, and the Gemm itself outputs the codes.
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
            if node.op_type != "Relu" or not _clip_codes(model, node):
                _replace_by_max_and_min(model, node)
        return ir.passes.PassResult(model, modified=modified)


def _clip_codes(model: ir.Model, relu: ir.Node) -> bool:
    """Replace a Relu by a Clip of the codes, if a QuantizeLinear is its only consumer.

    Returns whether the graph was changed.
    """
    value, relu_output = relu.inputs[0], relu.outputs[0]
    consumers = [use.node for use in relu_output.uses()]
    if (
        value is None
        or relu_output.is_graph_output()
        or len(value.uses()) != 1
        or len(consumers) != 1
    ):
        return False
    (quantize,) = consumers
    if quantize.op_type != "QuantizeLinear" or (zero_point := quantize.inputs[2]) is None:
        return False
    if zero_point.dtype != ir.DataType.UINT8:
        return False
    codes = quantize.outputs[0]
    # The zero point is the code of 0.0, so it is the smallest code after a Relu.
    clip = ir.node("Clip", [codes, zero_point])
    clip.outputs[0].name = f"{codes.name}_floored"
    clip.outputs[0].dtype, clip.outputs[0].shape = codes.dtype, codes.shape
    ir.convenience.replace_all_uses_with(codes, clip.outputs[0])
    clip.replace_input_with(0, codes)
    model.graph.insert_after(quantize, clip)
    quantize.replace_input_with(0, value)
    model.graph.remove(relu, safe=True)
    return True


def _replace_by_max_and_min(model: ir.Model, node: ir.Node) -> None:
    """Replace a Relu or Clip by Max, Min, or both."""
    low, high = (*node.inputs[1:], None, None)[:2]
    if node.op_type == "Relu":
        low = _get_scalar_initializer(model, "relu_floor", 0.0)
    current, new_nodes = node.inputs[0], []
    for op_type, bound in (("Max", low), ("Min", high)):
        if bound is not None:
            new_nodes.append(ir.node(op_type, [current, bound]))
            current = new_nodes[-1].outputs[0]
            current.dtype, current.shape = node.outputs[0].dtype, node.outputs[0].shape
    if current is not None:
        current.name = node.outputs[0].name
    ir.convenience.replace_nodes_and_values(
        model.graph, node, [node], new_nodes, node.outputs, [current]
    )


def _get_scalar_initializer(model: ir.Model, name: str, value: float) -> ir.Value:
    """Return the float32 initializer of this name; add it if the graph has none."""
    if name not in model.graph.initializers:
        tensor = ir.Tensor(np.array(value, np.float32), name=name)
        kind = ir.TensorType(ir.DataType.FLOAT)
        model.graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(()), type=kind, const_value=tensor
        )
    return model.graph.initializers[name]

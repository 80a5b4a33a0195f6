"""Errors of converting an ONNX graph to a PyTorch network."""

from typing import ClassVar

from compressors.errors.compression import CompressionError


class OnnxRefused(CompressionError):
    """An ONNX graph cannot be converted to a PyTorch network.

    ``op`` is an ONNX operator and ``node`` the name of the node that has it.
    """

    sentences: ClassVar = {
        "operator_unknown": "Expected a supported operator, got {op} in the node {node}. Export "
        "the model without it; docs/onnx-models.md lists the supported operators.",
        "attributes_unknown": "Expected supported attributes of the operator {op}, got "
        "{attributes} in the node {node}. Export the model without them.",
        "form_unknown": "Expected a supported form of the node {node}, got {problem}. Export the "
        "model without it.",
        "shape_from_values": "Expected shapes that depend only on the shapes of inputs, got a "
        "shape that depends on values of inputs in the node {node} ({op}). Export the model "
        "without it.",
        "opset_unconverted": "Expected a graph that can be converted from opset {got} to opset "
        "{expected}, got: {problem}. Export the model with opset {expected} or later.",
        "simplification_failed": "Expected a graph that onnx and onnxscript can simplify, got the "
        "error: {problem}. Check the file with onnx.checker and ONNX Runtime.",
        "weights_dtype": "Expected weights of type float32, got {dtype} as {name}. Export the "
        "trained model in float32, before it is quantized.",
        "batch_fixed": "Expected a dynamic number of rows, got the input {name} with the shape "
        "{shape}. Export the model again with a dynamic first dimension: dynamic_shapes or "
        "dynamic_axes of torch.onnx.export, None in the input signature of tf2onnx.",
        "inputs_missing": "Expected a graph with inputs, got none. Export the model with its "
        "inputs.",
        "input_not_tensor": "Expected numeric tensors as inputs, got the input {name} of the type "
        "{got}. If it has strings, export the part of the model that starts at the ids.",
        "scores_differ": "Expected the same scores from the converted network and ONNX Runtime, "
        "got a difference of {got:g} in the output {output} (limit {expected:g}). Please report "
        "this, with the model if you can.",
        "scores_missing": "Expected outputs of ONNX Runtime for the file, got the error {problem}. "
        "Check the file with onnx.checker.",
    }

"""Errors of reading a trained network from an ONNX graph."""

from typing import ClassVar

from compressors.errors.compression import CompressionError


class OnnxRefused(CompressionError):
    """An ONNX graph cannot become a network of torch.

    ``op`` is an ONNX operator and ``node`` the name of the node that has it.
    """

    sentences: ClassVar = {
        "operator_unknown": "Expected operators of rankers, encoders and sequence models, got the "
        "operator {op} in the node {node}. Export the model without it; docs/onnx-models.md lists "
        "the operators.",
        "attributes_unknown": "Expected a node {node} that recpress can compute, got the operator "
        "{op} with the attributes {attributes}. Export the model without them.",
        "form_unknown": "Expected a node {node} that recpress can compute, got: {problem}. Export "
        "the model without it.",
        "shape_from_values": "Expected shapes that depend only on the shapes of inputs, got the "
        "operator {op} in the node {node} with a shape that is computed from values. Export the "
        "model without it.",
        "opset_unconverted": "Expected a graph that can be converted to opset {expected}, got one "
        "of opset {got} that cannot: {problem}. Export the model with opset {expected} or later.",
        "simplification_failed": "Expected a graph that ONNX's libraries can simplify, got the "
        "error: {problem}. Check the file with onnx.checker and ONNX Runtime.",
        "weights_dtype": "Expected weights of type float32, got {dtype} as {name}. Export the "
        "trained model before it is converted or quantized.",
        "batch_fixed": "Expected a dynamic number of rows, got the input {name} with the shape "
        "{shape}. Export the model again with a dynamic first dimension: dynamic_shapes or "
        "dynamic_axes of torch.onnx.export, None in the input signature of tf2onnx.",
        "inputs_missing": "Expected a graph with inputs, got none. Export the model with its "
        "inputs.",
        "input_not_tensor": "Expected tensors of numbers as inputs, got the input {name} of the "
        "type {got}. Export the model from where texts are ids already.",
        "scores_differ": "Expected the scores of ONNX Runtime from the network that was read from "
        "the file, got a difference of {got:g} in the output {output} (at most {expected:g}). "
        "Please report this, with the model if you can.",
        "scores_missing": "Expected the outputs of ONNX Runtime, got the error {problem}.",
    }

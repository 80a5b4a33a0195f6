"""Translations of storage formats to ONNX operators, one folder per serving target.

onnxruntime/  ONNX Runtime on CPU and edge
tensorrt/     TensorRT and TensorRT-RTX
"""

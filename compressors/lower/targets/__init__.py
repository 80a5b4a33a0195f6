"""Lowering for each serving target: translate storage formats to ONNX operators.

target.py     the protocol of a target: translations, passes, tolerance, audit
onnxruntime/  ONNX Runtime on CPU and edge
tensorrt/     TensorRT and TensorRT-RTX
registry.py   get a target by name
"""

"""Serving targets: translations of storage formats to ONNX operators, one folder for each.

target.py     what a target decides while a model is lowered for it
onnxruntime/  ONNX Runtime on CPU and edge
tensorrt/     TensorRT and TensorRT-RTX
registry.py   the lowering that a target declares
"""

"""One folder for each serving target.

onnxruntime/  ONNX Runtime on CPU and edge
tensorrt/     TensorRT and TensorRT-RTX
"""

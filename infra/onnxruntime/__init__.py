"""ONNX Runtime on CPU.

sessions.py  sessions that score and are timed, the optimized graph, and intermediate values
"""

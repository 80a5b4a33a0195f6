"""ONNX Runtime on CPU.

sessions.py  runs sessions: scores, latency and the optimized graph
"""

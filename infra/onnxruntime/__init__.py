"""ONNX Runtime on CPU.

sessions.py  sessions: scores, latency and the optimized graph
"""

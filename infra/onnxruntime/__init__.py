"""ONNX Runtime on CPU.

sessions.py  runs sessions: scores, bound calls and the optimized graph
"""

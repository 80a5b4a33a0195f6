"""Translations of storage formats for TensorRT and TensorRT-RTX.

types.py      stored tensors in the types that TensorRT accepts
tables.py     tables
operators.py  the translation of every custom op
"""

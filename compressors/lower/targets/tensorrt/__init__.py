"""Translations of storage formats for TensorRT and TensorRT-RTX.

types.py      stored tensors in types that TensorRT takes
tables.py     tables
operators.py  the translation of every custom op
"""

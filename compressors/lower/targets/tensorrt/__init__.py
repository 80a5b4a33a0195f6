"""Translations of storage formats for TensorRT and TensorRT-RTX.

types.py        stored tensors of tables in the types that TensorRT accepts
dense_types.py  stored tensors of dense layers in those types
tables.py       tables
operators.py    the translation of every custom op
target.py       all of it as targets of lowering
"""

"""Translations of storage formats for ONNX Runtime.

tables.py     tables
dense.py      dense layers of few bits
operators.py  the translation of every custom op
"""

"""Translations of storage formats for TensorRT and TensorRT-RTX.

types.py        convert stored tensors of tables to accepted types
dense_types.py  convert stored tensors of dense layers to accepted types
tables.py       translate tables
operators.py    translate dense layers; the list of all translations
target.py       the target's class, which combines the files above
"""

"""Translations of storage formats for ONNX Runtime.

tables.py              translate tables
dense.py               translate weight-only and 8-bit float dense layers
operators.py           translate other dense layers; the list of all translations
replace_relu_by_max.py graph pass: replace Relu and Clip by Max and Min, so that layers stay int8
types.py               convert stored tensors of dense layers to accepted types
target.py              the target's class, which combines the files above
"""

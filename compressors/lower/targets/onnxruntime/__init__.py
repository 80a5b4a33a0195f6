"""Translations of storage formats for ONNX Runtime.

tables.py              tables
dense.py               dense layers with codes of few bits
operators.py           the translation of every custom op
join_split_rows.py     a pass: remove a Split whose parts are joined again
spell_out_clipping.py  a pass: Relu and Clip in forms that keep products in int8
types.py               stored tensors of dense layers in the types that it accepts
target.py              all of it as a target of lowering
"""

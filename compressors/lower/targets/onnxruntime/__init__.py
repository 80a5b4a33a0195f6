"""Translations of storage formats for ONNX Runtime.

tables.py              translate tables
dense.py               translate weight-only and 8-bit float dense layers
operators.py           translate other dense layers; the list of all translations
join_split_rows.py     graph pass: remove a Split whose parts are concatenated again
spell_out_clipping.py  graph pass: rewrite Relu and Clip so that products stay in int8
types.py               convert stored tensors of dense layers to accepted types
target.py              the target's class, which combines the files above
"""

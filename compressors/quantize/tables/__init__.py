"""Storage formats of embedding tables: one format and its step in each file.

Each file has, in this order: plain functions of tensors, the custom op with its gradient, the
format, the settings of the step.

scales.py          scales and offsets that rows share
rowwise.py         what the row-wise integer formats share
rowwise_int8.py    one byte for each weight
rowwise_int4.py    half a byte
rowwise_int2.py    a quarter of a byte
float8_e4m3.py     8-bit floats
bfloat16.py        bfloat16
codebooks.py       sizes and layouts of codebooks
kmeans.py          a codebook of numbers
product_codes.py   one code for each part of the columns
residual_codes.py  codes whose entries are added up
additive_codes.py  such codes, fitted to lookup counts
"""

"""Storage formats of embedding tables: one format and its step in each file.

Each file has, in this order: plain functions of tensors, the custom op with its gradient, the
format, the settings of the step.

scales.py          scales and offsets that rows share
rowwise.py         settings and packed codes of the row-wise integer formats
rowwise_int8.py    one byte for each weight
rowwise_int4.py    half a byte
rowwise_int2.py    a quarter of a byte
float8_e4m3.py     8-bit floats
bfloat16.py        bfloat16
codebooks.py       sizes and layouts of codebooks
kmeans.py          one codebook of numbers per table
product_codes.py   one code for each part of a row's columns
residual_codes.py  several codes per row whose codebook entries are summed
additive_codes.py  the format of residual_codes, fitted to the rows that are looked up
table_qat.py       training with rounded rows, stored in the row-wise formats
"""

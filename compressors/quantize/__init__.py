"""Quantization of embedding tables and dense layers.

kernels/          levels, ranges, k-means and bit packing
calibration/      statistics from data: ranges, moments, lookup counts, loss gradients
tables/           storage formats of embedding tables, and their steps
dense/            storage formats of dense layers, and their steps
better_format.py  a more precise row-wise format at no more bytes
table_stream.py   tables of any size, encoded block by block
"""

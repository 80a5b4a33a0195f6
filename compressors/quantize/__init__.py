"""Quantization of embedding tables and dense layers.

kernels/          levels, ranges, k-means and bit packing
calibration/      statistics from data: ranges, moments, lookup counts, loss gradients
tables/           storage formats of embedding tables, and their steps
dense/            storage formats of dense layers, and their steps
better_format.py  select a more precise row-wise format if it takes no more bytes
table_stream.py   encode tables of any size, block by block
"""

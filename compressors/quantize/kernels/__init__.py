"""Numerical kernels shared by several formats.

levels.py         evenly spaced levels, and how scales and offsets are stored
clipping.py       clipping rules: select the quantization range of a row
least_squares.py  the clipping rule that refits ranges to their codes
lloyd.py          k-means with weights
bitpacking.py     pack codes of 2 and 4 bits into bytes
products.py       products with all rows of a table, by blocks of rows
short_floats.py   ops and formats of float16 and bfloat16
numba_kernels.py  compiled loops over rows
row_encoding.py   encode row blocks with these loops
"""

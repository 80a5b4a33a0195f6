"""Numerical kernels shared by several formats.

levels.py         evenly spaced levels, and how scales and offsets are stored
clipping.py       clipping rules that select the range of a row
least_squares.py  ranges refitted to their codes
lloyd.py          k-means with weights
bitpacking.py     codes of 2 and 4 bits in bytes
short_floats.py   ops and formats of float16 and bfloat16
numba_kernels.py  compiled loops over rows
row_encoding.py   encoding of row blocks by those loops
"""

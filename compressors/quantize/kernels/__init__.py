"""Numerics that several formats share.

levels.py         evenly spaced levels, and how the ends of ranges are stored
clipping.py       rules that choose the range of a row
least_squares.py  ranges fitted to their own codes
lloyd.py          k-means with weights
bitpacking.py     codes of 2 and 4 bits in bytes
short_floats.py   ops and formats of float16 and bfloat16
numba_kernels.py  compiled loops for rows
row_encoding.py   blocks of rows, encoded by those loops
"""

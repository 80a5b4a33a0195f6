"""Tables and layers as products, hashes and neural codes: one step in each file.

low_rank.py            a table as a narrower table and one matrix
low_rank_dense.py      a dense layer as two low-rank layers
quotient_remainder.py  a table as two short ones
multi_hash.py          rows as sums of shared rows, chosen by hashes
neural_codes.py        rows as short codes that a small network decodes
"""

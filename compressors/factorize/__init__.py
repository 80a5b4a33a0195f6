"""Replace tables and layers by products, hashed rows and neural codes: one step in each file.

low_rank.py            store a table as a table of fewer columns and one matrix
low_rank_dense.py      store a dense layer as two smaller layers
quotient_remainder.py  store a table as two short tables
multi_hash.py          store rows as sums of shared rows, selected by hashes
neural_codes.py        store rows as short codes that a small network decodes
"""

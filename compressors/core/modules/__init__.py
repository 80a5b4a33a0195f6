"""Modules of compressed models: replacements of Embedding, EmbeddingBag and Linear, output map.

table_weight.py        the weight of a compressed table, and output heads tied to a table
observed_table.py      a table that reports how forward code reads its weight
formats.py             the protocols of storage formats, and the modules that hold their tensors
composed.py            a table built from smaller tables
factored.py            a dense layer as the product of two smaller ones
pointwise.py           a convolution of kernel size 1 as a dense layer
output_calibration.py  a monotone map of a network's output, for calibration
"""

"""Modules of compressed models: replacements of torch modules, and calibration of the output.

table_weight.py        the weight of a compressed table, and output heads tied to a table
observed_table.py      a table that reports how forward code reads its weight
formats.py             the protocols of storage formats, and the modules that hold their tensors
composed.py            a table built from smaller tables
factored.py            a dense layer as the product of two smaller ones
pointwise.py           a convolution of kernel size 1 as a dense layer
output_calibration.py  a monotone function that calibrates a network's output
"""

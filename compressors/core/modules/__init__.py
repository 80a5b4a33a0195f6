"""Modules of compressed models: replacements of Embedding, EmbeddingBag and Linear, output map.

formats.py             the protocols of storage formats, and the modules that hold their tensors
composed.py            a table built from smaller tables
factored.py            a dense layer as the product of two smaller ones
output_calibration.py  a monotone map of a network's output, for calibration
"""

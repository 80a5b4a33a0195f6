"""Modules that replace an Embedding, EmbeddingBag or Linear.

formats.py             the protocols of storage formats, and the modules that hold their tensors
composed.py            a table made of smaller tables
factored.py            a dense layer made of two smaller ones
output_calibration.py  a monotone map of a network's output
"""

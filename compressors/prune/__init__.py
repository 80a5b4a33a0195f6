"""Pruning: remove rows, dimensions, tables, channels and layers.

tables/     rows, dimensions and whole tables
structure/  which widths and depths of a network can be reduced
dense/      channels, layers and single weights
"""

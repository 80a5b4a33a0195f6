"""The same function with weights that compress better: one step in each file.

dataflow.py         which layers and norms feed which
unread_features.py  inputs whose weights are all zero
dead_channels.py    channels with constant output
fold.py             norms folded into dense layers
scaling.py          factors moved from one layer into the next
equalize.py         equal channel ranges in consecutive layers
smooth_quant.py     outliers moved from inputs into weights
"""

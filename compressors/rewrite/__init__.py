"""Steps that rewrite weights so that they compress better; the model computes the same function.

dataflow.py         which layers and norms read the output of which others
unread_features.py  inputs whose weights are all zero
dead_channels.py    channels with constant output
fold.py             norms folded into dense layers
scaling.py          channel factors moved from one layer into the next
equalize.py         equal channel ranges in consecutive layers
smooth_quant.py     input outliers moved into weights
"""

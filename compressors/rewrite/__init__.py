"""Steps that change weights so that they compress better, without changing the predictions.

dataflow.py         find the layers and norms that consume each output
unread_features.py  find inputs whose weights are all zero
dead_channels.py    find and remove channels with constant output
fold.py             step: fold norms into dense layers, remove dead channels
scaling.py          move channel factors from one layer into the next
equalize.py         step: equalize channel ranges of consecutive layers
smooth_quant.py     step: move outliers from inputs into weights
"""

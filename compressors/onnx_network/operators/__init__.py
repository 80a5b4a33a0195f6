"""The ONNX operators of a network, as functions of tensors.

sizes.py        operators on sizes: integers from which a graph computes shapes
elementwise.py  arithmetic, comparison, logic, activations, casts
layout.py       reshape, slice, gather, concatenate, pad
reductions.py   matrix products, reductions, normalization, softmax, convolution
recurrent.py    GRU and LSTM
registry.py     all operators by their ONNX name
"""

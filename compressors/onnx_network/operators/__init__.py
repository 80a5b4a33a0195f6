"""The ONNX operators of a network, as functions of tensors.

sizes.py        operators on the integers of shapes
elementwise.py  arithmetic, comparison, logic, activations, casts
layout.py       select, join, reorder or repeat elements
reductions.py   products, reductions, norms, softmax, convolutions
recurrent.py    GRU and LSTM
table.py        the list of all operators
"""

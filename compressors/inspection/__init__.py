"""Inspect a trained network with rows of a parquet file or of arrays, to write its signature.

The network is called with a sample of rows, and again with other values in one column; the lookups
and outputs that change are those that read the column.

sample.py            the sampled columns, and the tensors they fill
forward_arguments.py how the network's method receives its inputs, and which columns fill them
observed_call.py     call a network and record its lookups
lookups.py           find the tables in which each column is looked up
list_inputs.py       find how a network treats the padding and the order of lists
first_call.py        find a layout and dtypes with which the network runs
inputs.py            the inputs of the signature
outputs.py           the outputs of the signature
towers.py            the towers of a retrieval model
"""

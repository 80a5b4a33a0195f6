"""Statistics of a network on data, for compression steps.

calibrators.py     select the range of int8 inputs from a histogram
layer_inputs.py    capture the inputs of dense layers while a network runs
input_moments.py   second moments of these inputs
input_ranges.py    warn about layers whose inputs have very different ranges
lookup_counts.py   how often each row of a table is looked up
loss_gradients.py  gradient and curvature of the loss for each weight of a table
"""

"""Statistics from data that compression steps use.

calibrators.py     the range of int8 inputs, from a histogram
layer_inputs.py    the inputs of dense layers while a network runs
input_moments.py   second moments of these inputs
input_ranges.py    warnings for layers whose inputs differ too much in range
lookup_counts.py   how often each row of a table is looked up
loss_gradients.py  gradient and curvature of the loss for each weight of a table
"""

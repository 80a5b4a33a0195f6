"""Fuzz test of compression: random recommender networks, compressed, lowered and compared.

Reading order:

parts.py           parts that work on vectors, and the interface of a part
shape_parts.py     parts that rearrange a vector, or transform its values
field_parts.py     parts that work on stacked fields: interactions
sequence_parts.py  parts that work on sequences: masked pooling and attention
input_parts.py     parts that read inputs: lookups, bags, histories, dense inputs
network.py         builds a network from a list of parts
generator.py       generates a network with its signature and weights from a seed
inputs.py          rows with edge cases; what replaces ids out of range, computed in Python
bench.py           training, validation and calibration rows as prepared data
reference.py       the compressed network with decoded weights, whose scores are expected
float16_range.py   finds values beyond the range of float16
check.py           comparisons, and the definition of a fault
steps.py           steps with random settings
passes.py          sequences of steps and targets for one network
shrink.py          reduces a failing network to a smaller one that still fails
__main__.py        the command line
"""
